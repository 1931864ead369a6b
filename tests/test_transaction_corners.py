"""Transactions where they meet something else: interrupts, other threads, copies, iterators, serializers, odd keys."""

from __future__ import annotations

import copy
import gzip
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest
from chest._sharing import Sharing
from chest.errors import ChestError, CorruptError, LoadError


@pytest.fixture(params=[10**9, 0], ids=["in memory", "all spilled"])
def chest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=request.param) as chest:
        yield chest


@contextmanager
def undone(chest: Chest[Any, Any]) -> Iterator[None]:
    """A transaction that fails at its end."""
    with pytest.raises(InterruptedError), chest.transaction():  # noqa: PT012
        yield
        raise InterruptedError


def committed(chest: Chest[Any, Any]) -> dict[Any, Any]:
    with Chest[Any, Any](path=chest.path) as other:
        return dict(other)


def left_over(chest: Chest[Any, Any]) -> list[str]:
    """Value files that nothing refers to."""
    new = Path(chest.path, ".keys", "new")
    return [file.name for file in new.glob("*") if not file.name.startswith("owner-")]


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def finishes(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in another thread; it must not wait for ever."""
    results: list[Any] = []
    thread = in_thread(lambda: results.append(work()))
    thread.join(timeout=20)
    assert results, "it hangs, or has failed"
    return results[0]


# --- iterating while values are written


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_iterating_never_brings_back_what_has_been_replaced_meanwhile(chest: Chest[Any, Any], inside: bool) -> None:
    chest.update({i: [i] for i in range(10)})
    chest.flush()

    def run() -> list[Any]:
        seen = []
        for key, value in chest.items():
            if key == 0:
                chest[9].append("changed")
                chest[8], chest[7] = ["new"], 70
                del chest[6]
                for i in range(60):
                    chest["much", i] = b"x" * 100_000  # it spills
                if not inside:
                    chest.flush()
            if type(key) is int:
                seen.append((key, list(value) if isinstance(value, list) else value))
        chest[9].append("again")
        return seen

    if inside:
        with chest.transaction():
            seen = run()
    else:
        seen = run()
    expected = {i: [i] for i in range(6)} | {7: 70, 8: ["new"], 9: [9, "changed"]}
    assert seen == list(expected.items())
    chest.sync()
    assert committed(chest)[9] == chest[9] == [9, "changed", "again"]


def test_other_threads_iterating_loses_no_change_in_place(chest: Chest[Any, Any]) -> None:
    chest.update({i: [] for i in range(8)})
    done = threading.Event()

    def iterate() -> None:
        while not done.is_set():
            list(chest.items())

    thread = in_thread(iterate)
    try:
        for n in range(100):
            chest[n % 8].append(n)
            chest["other"] = [n]
    finally:
        done.set()
        thread.join()
    assert [chest[i] for i in range(8)] == [list(range(i, 100, 8)) for i in range(8)]


# --- interrupts


def test_an_interrupt_right_after_it_has_begun_leaves_the_chest_usable(chest: Chest[Any, Any]) -> None:
    """As if it came when the lock is let go of."""
    lock = chest.lock

    class Interrupting:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            chest.lock = lock
            raise KeyboardInterrupt

    chest.lock = Interrupting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt), chest.transaction():
        pass
    chest["a"] = 1
    finishes(chest.sync)
    assert committed(chest) == {"a": 1}


def test_an_interrupt_right_after_the_commit_undoes_nothing_later(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chest.update(a=[0], read=[0])
    chest.sync()
    held, held_read = chest["a"], chest["read"]
    held.append(1)  # nobody has noticed
    held_read.append(1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def change() -> None:
        with chest.transaction():
            chest["a"].append(2)
            chest["read"]
            chest["b"] = 1

    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "_merge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            change()
    chest.sync()
    assert chest["a"] == [0, 1, 2]
    held_read.append(2)
    assert chest["read"] == [0, 1, 2]
    chest.sync()
    assert committed(chest) == {"a": [0, 1, 2], "read": [0, 1, 2], "b": 1}


@pytest.mark.parametrize("end", ["close", "next"])
def test_a_transaction_that_another_thread_ends_is_undone_and_holds_nobody_up(chest: Chest[Any, Any], end: str) -> None:
    chest["a"] = 1

    def generator() -> Iterator[None]:
        with chest.transaction():
            chest["a"] = 2
            yield

    running: Any = generator()
    next(running)

    message = finishes(lambda: _message_of(running.close if end == "close" else lambda: next(running)))
    assert end == "close" or "another thread" in message
    assert "another thread" in finishes(lambda: _message_of(chest.clear))  # only this one can let go of the lock
    chest["b"] = 1
    chest.sync()
    finishes(chest.sync)
    assert committed(chest) == {"a": 1, "b": 1}


def _message_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except ChestError as error:
        return str(error)
    return "no error"


def test_a_transaction_whose_thread_has_died_holds_nobody_up(chest: Chest[Any, Any]) -> None:
    kept: list[Any] = [chest.transaction()]
    in_thread(kept[0].__enter__).join()
    kept.clear()  # collected here
    chest["b"] = 1
    finishes(chest.sync)
    assert committed(chest) == {"b": 1}


# --- what others do at the same time


def test_a_value_that_somebody_replaces_right_after_the_commit_is_not_taken_for_current(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chest["n"] = [0]
    other = Chest[Any, Any](path=chest.path)
    merge = Sharing._merge

    def late(self: Any, *args: Any) -> None:
        if self is chest:
            other["n"] = [99]
            other.sync()
        merge(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sharing, "_merge", late)
        with chest.transaction():
            chest["n"].append(1)
    assert chest["n"] == [99]
    chest["n"].append(2)
    chest.sync()
    assert other["n"] == [99, 2]
    other.close()


@pytest.mark.parametrize(
    "use", [lambda c: c["a"], lambda c: c.copy().close(), lambda c: c.sync(), lambda c: len(list(c.items()))]
)
@pytest.mark.parametrize("when", ["during", "before it is merged"])
def test_another_thread_never_writes_what_a_transaction_began_with_over_what_it_made_of_it(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], Any], when: str
) -> None:
    chest["a"] = [0]
    chest.sync()
    chest["a"].append(1)  # nobody has noticed
    merge = Sharing._merge
    threads: list[threading.Thread] = []

    def late(self: Any, *args: Any) -> None:
        if self is chest and when != "during":
            threads.append(in_thread(lambda: use(chest)))
            threads[0].join(timeout=0.1)
        merge(self, *args)

    monkeypatch.setattr(Sharing, "_merge", late)
    with chest.transaction():
        chest["a"].append(2)
        if when == "during":
            threads.append(in_thread(lambda: use(chest)))
            threads[0].join(timeout=0.1)
    threads[0].join()
    chest.sync()
    assert committed(chest)["a"] == chest["a"] == [0, 1, 2]


# --- copies inside


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": lambda c: c.copy(),
    "deepcopy": copy.deepcopy,
    "or": lambda c: c | {},
    "ror": lambda c: {} | c,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_inside_is_of_what_is_inside_and_independent(chest: Chest[Any, Any], how: str) -> None:
    chest.update(a=[1], gone=2)
    with chest.transaction():
        chest["a"].append(2)
        chest["large"] = np.ones(20_000)
        del chest["gone"]
        twin = COPIES[how](chest)
        chest["a"].append(3)
    assert list(twin) == ["a", "large"]
    assert twin["a"] == [1, 2]
    assert twin["large"].sum() == 20_000
    twin.close()
    assert chest["a"] == [1, 2, 3]


# --- settings and keys


SETTINGS: dict[str, dict[str, Any]] = {
    "files only": {"loose": None},
    "json": {"serializer": "json"},
    "named": {"key_to_filename": str},
    "gzip": {"open": gzip.open},
    "pair": {"dump": json.dump, "load": json.load, "mode": "t"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("limit", [10**9, 0])
def test_transactions_with_every_kind_of_storage(tmp_path: Path, settings: str, limit: int) -> None:
    given = SETTINGS[settings]
    expected: dict[str, Any] = {"a": [1, 5], "c": [7]} | {str(i): [i] * 4 for i in range(10)}
    with Chest[Any, Any](path=tmp_path / "c", available_memory=limit, **given) as chest:
        chest.update(a=[1], b=[2])
        with chest.transaction():
            chest["a"].append(5)
            del chest["b"]
            chest["c"] = [7]
            for i in range(10):
                chest[str(i)] = [i] * 3
            for i in range(10):
                chest[str(i)].append(i)
        with undone(chest):
            chest["a"].append(6)
            chest["b"], chest["c"] = [3], [8] * 300
            del chest["3"]
        assert dict(chest) == expected
        assert left_over(chest) == []
    with Chest[Any, Any](path=tmp_path / "c", **given) as again:
        assert dict(again) == expected


class Own:
    """A key whose equality only its class knows."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own) and self.n == other.n

    def __hash__(self) -> int:
        return hash(self.n)


def test_keys_of_classes_of_their_own_are_one_inside_and_outside(chest: Chest[Any, Any]) -> None:
    chest[Own(1)] = 1
    with chest.transaction():
        chest[Own(1)] += 1
        chest[Own(2)] = 2
        if chest.available_memory:
            in_thread(partial(chest.__setitem__, Own(2), 3)).join()
    with undone(chest):
        chest[Own(3)] = 3
        del chest[Own(1)]
    assert Own(3) not in chest
    expected = {Own(1): 2, Own(2): 3 if chest.available_memory else 2}
    assert dict(chest) == expected
    chest.sync()
    assert committed(chest) == expected
    assert len(chest) == 2


class Moody:
    def __reduce__(self) -> Any:
        return _moody, ()


MOOD = {"bad": False}


def _moody() -> Moody:
    if MOOD["bad"]:
        raise RuntimeError("not today")
    return Moody()


def test_what_cannot_be_loaded_is_not_popped(chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chest.update(large=np.zeros(20_000), moody=Moody())
    chest.flush()
    file = Path(chest.key_to_filename("large"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 255
    file.write_bytes(data)
    monkeypatch.setitem(MOOD, "bad", True)
    for key, error in (("large", CorruptError), ("moody", LoadError)):
        uses: list[Callable[[], Any]] = [
            partial(chest.pop, key),
            partial(chest.pop, key, None),
            partial(chest.setdefault, key, 1),
        ]
        for use in uses:
            with pytest.raises(error):
                use()
    with chest.transaction():
        with pytest.raises(LoadError):
            chest.popitem()
        chest["ok"] = 1  # no block has failed
    assert list(chest) == ["large", "moody", "ok"]


# --- for a long time


def test_hundreds_of_transactions_leave_nothing_behind(tmp_path: Path) -> None:
    random_ = random.Random(5)
    model: dict[Any, Any] = {}
    with Chest[Any, Any](path=tmp_path / "c", available_memory=300_000) as chest:
        for round_ in range(200):
            trial = {key: list(value) for key, value in model.items()}
            try:
                with chest.transaction():
                    for _ in range(random_.randrange(1, 6)):
                        _step(chest, trial, random_, round_)
                    if random_.random() < 0.4:
                        raise InterruptedError
                model = trial
            except InterruptedError:
                pass
            if model and random_.random() < 0.3:
                key = random_.choice(list(model))
                chest[key].append("outside")
                model[key].append("outside")
            chest._tier.check()
        assert list(chest.items()) == list(model.items())
        chest.flush()
        assert (chest.memory_usage, len(chest._lent), len(chest._pinned)) == (0, 0, 0)
        assert left_over(chest) == []
    assert list(committed(chest).items()) == list(model.items())


def _step(chest: Chest[Any, Any], model: dict[Any, Any], random_: random.Random, n: int) -> None:
    key, operation = random_.randrange(30), random_.randrange(5)
    if operation == 0:
        chest[key] = [n] * random_.randrange(1, 20_000)
        model[key] = list(chest[key])
    elif operation == 1 and key in model:
        chest[key].append(n)
        model[key].append(n)
    elif operation == 2:
        assert chest.pop(key, None) == model.pop(key, None)
    elif operation == 3 and model:
        assert chest.popitem() == model.popitem()
    else:
        assert list(chest) == list(model)


def test_a_value_that_is_got_in_a_block_and_changed_after_it_is_kept(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=4_000_000, loose=0) as chest:
        with chest.transaction():
            chest["k"] = [1]
            for i in range(2000):  # with which "k" is written along, when nobody holds it
                chest[i] = "x" * 1000
            assert "k" in chest._here()._entries
            assert "k" not in chest._here()._dirty
            held = chest["k"]
        held.append(2)
        del held
        chest.flush()
        assert chest["k"] == [1, 2]
