"""Several processes on one folder: what each of them sees of the others, and what they do together."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest

WAIT_S = 120
METHODS = [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(params=METHODS)
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """``run(work, *args, n=4)``: what ``work(i, *args)`` returns in each of n processes that run side by side."""
    context = multiprocessing.get_context(request.param)

    def run(work: Callable[..., Any], *args: Any, n: int = 4) -> list[Any]:
        ends = [context.Pipe() for _ in range(n)]
        processes = [context.Process(target=_child, args=(end[1], work, i, *args)) for i, end in enumerate(ends)]
        for process in processes:
            process.start()
        try:
            found = []
            for mine, theirs in ends:
                theirs.close()
                assert mine.poll(WAIT_S), "a process hangs"
                found.append(mine.recv())
            return found
        finally:
            for process, (mine, _) in zip(processes, ends, strict=True):
                process.join(WAIT_S)
                process.kill()
                process.join()
                process.close()
                mine.close()

    return run


def _child(end: Connection, work: Callable[..., Any], *args: Any) -> None:
    end.send(work(*args))
    end.close()


def _other_process(work: Callable[..., None], *args: Any) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, *args))
    process.start()
    theirs.close()
    return process, mine


# --- counting, consuming, filling


def increment(i: int, path: str, n: int) -> None:
    with Chest[Any, Any](path=path, available_memory=[0, "1 GB"][i % 2]) as chest:
        for _ in range(n):
            with chest.transaction():
                chest["n"] += 1
                chest["by", i] = chest.get(("by", i), 0) + 1


def test_increments_of_four_processes_are_all_there(tmp_path: Path, run: Callable[..., list[Any]]) -> None:
    with Chest[Any, Any]({"n": 0}, path=tmp_path / "c") as chest:
        run(increment, chest.path, 500)
        assert chest["n"] == 2000
        assert [chest["by", i] for i in range(4)] == [500] * 4


def consume(i: int, path: str) -> list[Any]:
    found = []
    with Chest[Any, Any](path=path) as chest:
        while True:
            try:
                found.append(chest.popitem()[0])
            except KeyError:
                return found


def test_each_item_is_popped_by_one_of_four_processes(tmp_path: Path, run: Callable[..., list[Any]]) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest.update((i, np.full(10_000, i) if i % 50 == 0 else [i]) for i in range(400))
        found = run(consume, chest.path)
        assert Counter(key for keys in found for key in keys) == Counter(range(400))
        assert all(keys == sorted(keys, reverse=True) for keys in found)  # last in, first out
        assert len(chest) == 0
        assert list(chest) == []


def take_turns(i: int, path: str) -> list[Any]:
    with Chest[Any, Any](path=path) as chest:
        mine = [chest.setdefault(key, (i, key)) for key in range(100)]
        return [*mine, [chest.pop(("one", key), None) for key in range(100)]]


def test_setdefault_and_pop_give_one_process_each_key(tmp_path: Path, run: Callable[..., list[Any]]) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest.update((("one", key), key) for key in range(100))
        found = run(take_turns, chest.path)
        assert all(f[:100] == found[0][:100] for f in found)  # all got the same value, whoever set it
        assert sorted(key for f in found for key in f[100] if key is not None) == list(range(100))
        assert [chest[key] for key in range(100)] == found[0][:100]


def _own(i: int, n: int) -> dict[Any, Any]:
    rng = random.Random(i)
    return {(i, j): np.full(10_000, j) if rng.random() < 0.05 else [i, j, "x" * rng.randrange(500)] for j in range(n)}


def fill(i: int, path: str, n: int) -> None:
    with Chest[Any, Any](path=path, available_memory=[0, 50_000, 500_000, "1 GB"][i % 4]) as chest:
        for key, value in _own(i, n).items():
            chest[key] = value
        chest["common", i % 2] = i


def test_four_processes_that_fill_one_folder_lose_no_key(tmp_path: Path, run: Callable[..., list[Any]]) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        run(fill, chest.path, 500)
        assert len(chest) == 2002 == len(set(chest))
        for i in range(4):
            for key, value in _own(i, 500).items():
                assert repr(chest[key]) == repr(value)
            assert [key for key in chest if key[0] == i] == list(_own(i, 500))  # each in its order


def transfer(i: int, path: str, n: int) -> list[int]:
    rng = random.Random(i)
    sums = []
    with Chest[Any, Any](path=path, available_memory=[0, "1 GB"][i % 2]) as chest:
        for _ in range(n):
            with chest.transaction():
                if i == 0:
                    sums.append(sum(value[0] for key, value in chest.items()))
                else:
                    a, b = rng.sample(range(8), 2)
                    chest[a][0] -= 1
                    chest[b][0] += 1
    return sums


def test_what_is_read_in_a_transaction_belongs_together(tmp_path: Path, run: Callable[..., list[Any]]) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest.update((i, [100] * (20_000 if i == 7 else 1)) for i in range(8))
        assert run(transfer, chest.path, 60)[0] == [800] * 60
        assert sum(value[0] for value in chest.values()) == 800


# --- seeing


def set_and_tell(end: Connection, path: str, n: int) -> None:
    with Chest[Any, Any](path=path, write_through=True) as chest:
        for i in range(1, n + 1):
            chest["n"] = i
            chest["list"].append(i)
            chest["array"] = np.full(10_000, i)
            chest[i] = i
            if i > 5:
                del chest[i - 5]
            chest.sync()
            end.send(i)
            end.recv()


@pytest.mark.parametrize("limit", ["1 GB", 0])
def test_a_reader_that_was_open_all_along_sees_everything(tmp_path: Path, limit: Any) -> None:
    with Chest[Any, Any]({"n": 0, "list": [], "array": 0}, path=tmp_path / "c", available_memory=limit) as chest:
        chest.sync()
        process, end = _other_process(set_and_tell, chest.path, 50)
        for i in range(1, 51):
            assert chest["n"] in (i - 1, i)
            assert end.poll(WAIT_S)
            assert end.recv() == i
            assert chest["n"] == i
            assert chest["list"] == list(range(1, i + 1))
            assert chest["array"][-1] == i
            assert i in chest
            assert i - 5 not in chest
            assert list(chest) == ["n", "list", "array", *range(max(1, i - 4), i + 1)]
            assert len(chest) == 3 + min(i, 5)
            end.send(None)
        process.join(WAIT_S)
        end.close()


def answer(end: Connection, path: str) -> None:
    with Chest[Any, Any](path=path) as chest:
        end.send("ready")
        value = chest.wait("question", timeout=WAIT_S)
        with chest.transaction():
            chest["answer"] = [*value, "answered"]
    end.close()


def test_processes_wait_for_each_others_keys(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", write_through=True) as chest:
        process, end = _other_process(answer, chest.path)
        assert end.poll(WAIT_S)
        assert end.recv() == "ready"
        chest["question"] = ["?"]
        assert chest.wait("answer", timeout=WAIT_S) == ["?", "answered"]
        process.join(WAIT_S)
        end.close()


def test_unwritten_changes_of_ones_own_win_until_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with Chest[Any, Any]({"a": 0}, path=path) as one, Chest[Any, Any](path=path) as two:
        one.sync()
        one["a"], one["mine"] = "one", 1
        two["a"] = "two"
        two.sync()
        assert one["a"] == "one"
        assert two["a"] == "two"
        one.sync()  # the last writer wins
        assert two["a"] == one["a"] == "one"
        assert list(one) == list(two) == ["a", "mine"]
        del two["mine"]
        one["mine"] = 2
        two.sync()
        assert one["mine"] == 2
        one.sync()
        assert list(two) == ["a", "mine"]


class Unstable:
    """Pickled, loaded and pickled again it comes out as other bytes: the name of an attribute is interned, its value not."""

    def __init__(self, number: int, large: bool) -> None:
        self.name = "name"
        self.number = number
        self.array = np.full(20_000 if large else 1, number)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("limit", ["1 GB", 0])
def test_a_value_that_was_only_read_never_hides_or_overwrites_a_newer_one(tmp_path: Path, large: bool, limit: Any) -> None:
    path = tmp_path / "c"
    with Chest[Any, Any]({"x": Unstable(1, large)}, path=path):
        pass
    with Chest[Any, Any](path=path, available_memory=limit) as one, Chest[Any, Any](path=path) as two:
        held = one["x"]
        two["x"] = Unstable(2, large)
        two.sync()
        assert one["x"].number == 2
        held = one["x"]
        two["x"] = Unstable(3, large)
        two.sync()
        one.flush()
        assert one["x"].number == two["x"].number == 3
        held = one["x"]
        held.array[0] = 7
        two["x"] = Unstable(4, large)
        two.sync()
        one.flush()  # a change of one's own is written, and wins
        assert one["x"].array[0] == two["x"].array[0] == 7


@pytest.mark.parametrize("value", ["small", np.zeros(20_000)], ids=["small", "large"])
def test_what_was_overwritten_before_its_commit_was_settled_is_not_believed_to_be_the_newest(
    tmp_path: Path, value: Any
) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as one, Chest[Any, Any](path=tmp_path / "c") as two:
        one["x"] = np.ones(20_000)
        one.sync()
        settle = one._store.settle

        def overtaken() -> int:
            two["x"] = "newer"
            two.sync()
            return settle()

        one._store.settle = overtaken  # type: ignore[method-assign]
        one["x"] = value
        one.sync()
        assert one["x"] == two["x"] == "newer"


def test_the_older_file_that_still_has_the_name_is_not_taken_for_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.ones(20_000)
    with Chest[Any, Any](path=tmp_path / "c") as one, Chest[Any, Any](path=tmp_path / "c") as two:
        one["x"] = array
        one.sync()
        with monkeypatch.context() as patch:
            patch.setattr(one._store, "settle", lambda: 0)  # as if it took long
            one["x"] = 2 * array
            one.sync()
        assert np.load(tmp_path / "c" / "x", allow_pickle=True)[0] == 1
        assert two["x"][0] == 2
        (tmp_path / "c" / "x").write_bytes(b"damaged")
        two.flush()
        assert two["x"][0] == 2


def test_a_readable_copy_that_comes_late_does_not_replace_a_value_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as one, Chest[Any, Any](path=tmp_path / "c", loose=0) as two:
        copy = one._store._write_copies

        def late(*arguments: Any, **more: Any) -> None:
            two["x"] = np.ones(20_000)
            two.sync()
            copy(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(one._store, "_write_copies", late)
            one["x"] = "small"
            one.sync()
        two.flush()
        assert two["x"].sum() == one["x"].sum() == 20_000
        two["x"] = "packed again"
        two.sync()
        with monkeypatch.context() as patch:
            patch.setattr(one._store, "_write_copies", late)
            file = one.key_to_filename("x")
        two.flush()
        assert two["x"].sum() == one["x"].sum() == 20_000
        assert one.key_to_filename("x") == file


# --- dying


def die_inside(end: Connection, path: str, large: bool) -> None:
    chest = Chest[Any, Any](path=path, available_memory=0)
    with chest.transaction():
        chest["a"] = "torn"
        del chest["b"]
        for i in range(20):
            chest["new", i] = np.ones(20_000) if large else [i]
        end.send("inside")
        end.recv()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_process_that_dies_in_a_transaction_has_done_nothing_and_holds_up_nobody(tmp_path: Path, large: bool) -> None:
    with Chest[Any, Any]({"a": 1, "b": 2}, path=tmp_path / "c") as chest:
        chest.sync()
        process, end = _other_process(die_inside, chest.path, large)
        assert end.poll(WAIT_S)
        end.recv()
        assert dict(chest) == {"a": 1, "b": 2}  # reading goes on meanwhile
        end.send("die")
        with chest.transaction():
            assert dict(chest) == {"a": 1, "b": 2}
            chest["a"] = 3
        process.join(WAIT_S)
        end.close()
        assert process.exitcode == -signal.SIGKILL
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert dict(chest) == {"a": 3, "b": 2}
        assert not [f for f in (tmp_path / "c" / ".keys").glob("new/*") if not f.name.startswith("owner-")]


@pytest.mark.parametrize("value", ["immutable", [1]])
def test_a_key_that_somebody_else_has_deleted_comes_last_when_it_is_set_again(tmp_path: Path, value: Any) -> None:
    with Chest[str, Any](path=tmp_path / "c") as one, Chest[str, Any](path=tmp_path / "c") as other:
        one.update(a=value, b=value)
        assert other["a"] == value
        del one["a"]
        one.sync()
        other["a"] = 5
        assert list(other) == ["b", "a"]
        other.sync()
        assert list(one) == list(other) == ["b", "a"]


@pytest.mark.parametrize("value", ["text", ["list"]], ids=["text", "list"])
def test_what_another_chest_writes_while_room_is_made_is_not_missed(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "c"
    with Chest[Any, Any](path=path, available_memory=20_000, loose=0) as chest, Chest[Any, Any](path=path) as other:
        other["k"] = [value, "old" * 1000]
        other.sync()
        for i in range(18):
            chest[i] = "x" * 1000
        make_room, raced = chest._make_room, []

        def make_room_late(size: int) -> None:
            other["k"] = [value, "new"]
            other.sync()
            raced.append(size)
            make_room(size)

        chest._make_room = make_room_late  # type: ignore[method-assign]
        assert chest["k"][0] == value
        assert raced
        assert chest["k"] == [value, "new"]
