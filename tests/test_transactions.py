"""Transactions: several keys change together or not at all, for the threads and chests of one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest
from chest.errors import ChestError, ClosedError, SerializeError

LIMITS = {"in memory": "1 GB", "mixed": 4000, "all spilled": 0}


@pytest.fixture(params=LIMITS)
def chest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=LIMITS[request.param]) as chest:
        yield chest


@contextmanager
def undone(chest: Chest[Any, Any]) -> Iterator[None]:
    """A transaction that fails at its end."""
    with pytest.raises(InterruptedError), chest.transaction():
        yield
        raise InterruptedError


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in another thread, which must not be kept waiting."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits"
    return found[0]


def content(chest: Chest[Any, Any]) -> list[tuple[Any, str]]:
    return [(key, repr(value)) for key, value in chest.items()]


def committed(path: str) -> list[tuple[Any, str]]:
    with Chest[Any, Any](path=path) as other:
        return content(other)


# --- all


def test_what_is_written_in_a_transaction_is_there_after_it(chest: Chest[Any, Any]) -> None:
    chest.update(number=1, list=[1], gone=0, array=np.zeros(20_000))
    with chest.transaction():
        chest["number"] += 1
        chest["list"].append(2)
        chest["array"][0] = 7
        del chest["gone"]
        chest["new"] = np.ones(20_000)
        assert list(chest) == ["number", "list", "array", "new"]
        assert list(reversed(chest)) == ["new", "array", "list", "number"]
        assert len(chest) == 4
        assert "gone" not in chest
    assert chest["number"] == 2
    assert chest["list"] == [1, 2]
    assert chest["array"][0] == 7
    assert chest["new"].sum() == 20_000
    assert list(chest) == ["number", "list", "array", "new"]
    assert committed(chest.path) == content(chest)


def test_nobody_else_sees_anything_of_it_before_its_end(chest: Chest[Any, Any]) -> None:
    chest.update(a=1, list=[1], gone=0)
    before = content(chest)
    other = Chest[Any, Any](path=chest.path)
    with chest.transaction():
        chest["a"] = 2
        chest["list"].append(2)
        del chest["gone"]
        chest["large"] = np.ones(20_000)
        for see in (lambda: content(chest), lambda: content(other), lambda: committed(chest.path)):
            assert in_a_thread(see) == before
        assert in_a_thread(lambda: (chest["a"], chest.get("large"), len(chest), "gone" in chest)) == (1, None, 3, True)
        assert in_a_thread(lambda: (other["a"], other.get("large"), len(other), "gone" in other)) == (1, None, 3, True)
    assert in_a_thread(lambda: content(chest)) == content(other) == content(chest) != before
    other.close()


def test_another_threads_reads_see_what_it_has_read_before_change_at_once(chest: Chest[Any, Any]) -> None:
    """The way of a hit, which takes no lock, is closed while a transaction is open, and opened again."""
    chest["a"] = 1
    assert chest["a"] == 1
    with chest.transaction():
        assert chest["a"] == 1
        chest["a"] = 2
        assert in_a_thread(lambda: chest["a"]) == 1
        assert chest["a"] == 2
    assert in_a_thread(lambda: chest["a"]) == 2
    assert chest["a"] == 2


def test_many_keys_larger_than_memory_change_in_one_transaction(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", available_memory="2 MB") as chest:
        with chest.transaction():
            for i in range(3_000):
                chest[i] = [i, "x" * 1000]
            for i in range(20):
                chest["array", i] = np.full(50_000, i)  # 400 KB each
            assert committed(chest.path) == []
            for i in range(0, 3_000, 7):
                chest[i].append(i)
            assert chest.memory_usage <= 2_000_000
        assert [len(chest[i]) for i in range(14)] == [3, 2, 2, 2, 2, 2, 2] * 2
        assert all((chest["array", i] == i).all() for i in range(20))
        assert len(chest) == 3_020
        chest["other"] = 1
        with undone(chest):
            for i in range(3_000):
                chest[i] = 0
            for i in range(20):
                chest["array", i][:] = -1
        assert all(chest[i] == ([i, "x" * 1000] + [i] * (i % 7 == 0)) for i in range(3_000))
        assert all((chest["array", i] == i).all() for i in range(20))
        assert not [name for name in os.listdir(os.path.join(chest.path, ".keys", "new")) if not name.startswith("owner")]


def test_keys_keep_their_order_in_and_after_a_transaction(chest: Chest[Any, Any]) -> None:
    model: dict[Any, Any] = dict.fromkeys("abc", 0)
    chest.update(model)
    with chest.transaction():
        for where in (chest, model):
            del where["a"]
            where["d"] = 1
            where["a"] = 2
            where["b"] = 3
            assert where.popitem() == ("a", 2)
            where["e"] = 4
        assert list(chest.items()) == list(model.items())
    assert list(chest.items()) == list(model.items())


# --- or nothing


def test_an_exception_undoes_everything_in_memory_and_on_disk(chest: Chest[Any, Any]) -> None:
    chest.update(number=1, list=[1], gone=0, array=np.zeros(20_000))
    before, files = content(chest), sorted(os.listdir(chest.path))
    with undone(chest):
        chest["number"] = 2
        chest["list"].append(2)
        chest["array"][0] = 7
        del chest["gone"]
        chest["new"] = np.ones(20_000)
        chest["small"] = 5
        chest.clear()
        chest["last"] = np.ones(20_000)
    assert content(chest) == before == committed(chest.path)
    assert sorted(os.listdir(chest.path)) == files
    assert len(chest) == 4


def test_what_was_unwritten_before_survives_an_undone_transaction(chest: Chest[Any, Any]) -> None:
    chest["a"], chest["list"] = 1, [1]
    chest["list"].append(2)
    with undone(chest):
        assert chest["list"] == [1, 2]
        chest["a"] = 2
        chest["list"].append(3)
    assert chest["a"] == 1
    assert chest["list"] == [1, 2]
    chest.flush()
    assert chest["list"] == [1, 2]


def test_a_change_in_place_that_nobody_noticed_yet_is_found_by_the_transaction(chest: Chest[Any, Any]) -> None:
    chest["list"], chest["array"] = [1], np.zeros(20_000)
    chest.flush()
    mine, array = chest["list"], chest["array"]
    mine.append(2)
    array[0] = 1
    with chest.transaction():
        assert chest["list"] == [1, 2]
        assert dict(chest.items())["array"][0] == 1
        chest["list"].append(3)
    assert chest["list"] == [1, 2, 3]
    assert chest["array"][0] == 1
    array[1] = 1  # the transaction only looked at it: it is still the chest's
    chest.flush()
    assert list(chest["array"][:3]) == [1, 1, 0]
    assert chest["list"] == [1, 2, 3]


def test_values_got_or_set_in_a_transaction_are_watched_after_it(chest: Chest[Any, Any]) -> None:
    chest["old"] = [1]
    chest.flush()
    with chest.transaction():
        old = chest["old"]
        new: list[int] = []
        chest["new"] = new
        array = chest["array"] = np.zeros(20_000)
    old.append(2)
    new.append(3)
    array[5] = 5
    chest.flush()
    assert (chest["old"], chest["new"], chest["array"][5]) == ([1, 2], [3], 5)


def test_a_value_that_cannot_be_written_undoes_the_transaction_and_is_named(chest: Chest[Any, Any]) -> None:
    chest["a"] = 1
    with pytest.raises(SerializeError, match="'bad'"), chest.transaction():
        chest["a"] = 2
        chest["bad"] = lambda: None
    assert content(chest) == [("a", "1")]


def test_a_value_that_cannot_be_written_before_is_only_in_the_way_of_those_who_need_it(chest: Chest[Any, Any]) -> None:
    chest["bad"] = bad = lambda: None
    chest["a"] = 1
    with chest.transaction():
        chest["a"] += 1
        assert "bad" in chest
    assert chest["a"] == 2
    assert chest["bad"] is bad
    uses: dict[str, Callable[[], Any]] = {
        "get": lambda: chest["bad"],
        "len": lambda: len(chest),
        "iter": lambda: list(chest),
        "popitem": lambda: chest.popitem(),
    }
    for use in uses.values():
        with pytest.raises(SerializeError, match="'bad'"), chest.transaction():
            use()
    with chest.transaction():
        chest["bad"] = "good"
    assert chest["bad"] == "good"
    assert len(chest) == 2
    chest["bad"] = bad
    assert chest.pop("bad") is bad
    assert list(chest) == ["a"]
    chest["bad"] = bad
    with chest.transaction():
        del chest["bad"]
    assert "bad" not in chest


# --- blocks in blocks, and what cannot be done


def test_a_block_inside_of_a_block_belongs_to_the_outer_one(chest: Chest[Any, Any]) -> None:
    with undone(chest):
        with chest.transaction():
            chest["a"] = 1
        assert committed(chest.path) == []
    assert len(chest) == 0


def test_a_transaction_is_undone_if_a_block_inside_of_it_failed(chest: Chest[Any, Any]) -> None:
    with pytest.raises(ChestError, match=r"undone.*KeyError\('missing'\)"), chest.transaction():
        chest["a"] = 1
        with pytest.raises(KeyError), chest.transaction():
            chest["b"] = 2
            chest["missing"]
    assert len(chest) == 0
    with chest.transaction():
        chest["a"] = 1
        with pytest.raises(KeyError):  # no block, no harm
            chest.pop("missing")
    assert list(chest) == ["a"]


@pytest.mark.parametrize("method", ["flush", "sync", "close", "drop", "write_keys"])
def test_durability_cannot_be_had_in_the_middle_of_a_transaction(chest: Chest[Any, Any], method: str) -> None:
    with pytest.raises(ChestError, match=r"\(\) within a transaction"), chest.transaction():
        chest["a"] = 1
        getattr(chest, method)()
    assert len(chest) == 0


def test_an_iterator_of_a_transaction_ends_with_it(chest: Chest[Any, Any]) -> None:
    chest.update(a=1, b=2)
    with chest.transaction():
        chest["c"] = 3
        keys, values = iter(chest), iter(chest.values())
        assert next(keys) == "a"
    with pytest.raises(ClosedError, match=r"transaction .* is over"):
        list(values)
    with undone(chest):
        view = chest.keys()
        chest["d"] = 4
        assert list(view) == ["a", "b", "c", "d"]
    assert list(view) == ["a", "b", "c"]


def test_another_chest_on_the_folder_is_refused_in_a_transactions_thread(chest: Chest[Any, Any]) -> None:
    with Chest[Any, Any](path=chest.path) as other:
        other["b"] = 1
        with chest.transaction():
            with pytest.raises(ChestError, match="transaction"):
                other.sync()
            with pytest.raises(ChestError, match="transaction"), other.transaction():
                pass
            chest["a"] = 1
        other.sync()
    assert sorted(chest) == ["a", "b"]


def test_other_chests_can_be_opened_used_and_closed_in_a_transaction(chest: Chest[Any, Any]) -> None:
    chest["a"] = [1]
    with chest.transaction():
        with Chest[Any, Any]() as scratch:
            scratch["a"] = np.zeros(20_000)
            with scratch.transaction():
                scratch["b"] = 1
        copy = chest.copy()
        chest["a"].append(2)
    assert copy["a"] == [1] if "a" in copy else True
    copy.close()
    assert chest["a"] == [1, 2]


# --- threads


def test_increments_of_many_threads_are_all_there(chest: Chest[Any, Any]) -> None:
    chest["n"] = 0

    def work() -> None:
        for _ in range(25):
            with chest.transaction():
                chest["n"] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert chest["n"] == 100


def test_other_threads_go_on_writing_and_their_writes_are_kept(chest: Chest[Any, Any]) -> None:
    chest["a"] = 0
    started, stop = threading.Event(), threading.Event()

    def work() -> None:
        i = 0
        while not stop.is_set() or i < 50:
            chest["theirs", i] = [i] * 10
            i += 1
            started.set()
        assert all(chest["theirs", j] == [j] * 10 for j in range(i))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(30)
    for i in range(20):
        with chest.transaction():
            chest["a"] += 1
            chest["mine", i] = [i]
            chest["mine", i].append(i)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert chest["a"] == 20
    assert all(chest["mine", i] == [i, i] for i in range(20))


def test_sync_waits_for_another_threads_transaction(chest: Chest[Any, Any]) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with chest.transaction():
            chest["a"] = 1
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(30)
    waiting = threading.Thread(target=chest.sync)
    waiting.start()
    go_on.set()
    waiting.join(30)
    thread.join(30)
    assert not waiting.is_alive()
    assert chest["a"] == 1


# --- edit, setdefault, pop, update


def test_edit_commits_what_the_value_became_or_nothing(chest: Chest[Any, Any]) -> None:
    chest["a"], chest["array"] = {"list": [1]}, np.zeros(20_000)
    with chest.edit("a") as value, chest.edit("array") as array:
        value["list"].append(2)
        array[0] = 1
    assert dict(committed(chest.path))["a"] == "{'list': [1, 2]}"
    assert chest["array"][0] == 1
    with pytest.raises(InterruptedError), chest.edit("a") as value:
        value["list"].append(3)
        raise InterruptedError
    assert chest["a"] == {"list": [1, 2]}
    with pytest.raises(KeyError), chest.edit("missing"):
        pass


def test_setdefault_pop_and_popitem_are_committed_on_return(chest: Chest[Any, Any]) -> None:
    assert chest.setdefault("a", 1) == 1
    assert chest.setdefault("a", 2) == 1
    assert committed(chest.path) == [("a", "1")]
    value = chest.setdefault("list", [])
    value.append(1)
    assert chest.setdefault("list", []) is value
    chest.flush()
    assert chest.pop("list") == [1]
    assert chest.pop("list", 7) == 7
    assert committed(chest.path) == [("a", "1")]
    assert chest.popitem() == ("a", 1)
    assert committed(chest.path) == []


def test_an_update_that_fails_changes_nothing(chest: Chest[Any, Any]) -> None:
    chest["a"] = 1

    def pairs() -> Iterator[tuple[str, Any]]:
        yield "a", 2
        yield "b", np.zeros(20_000)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        chest.update(pairs())
    assert content(chest) == [("a", "1")]


def test_a_scratch_chest_has_transactions_too() -> None:
    with Chest[Any, Any]() as chest:
        chest["a"] = [1]
        with undone(chest):
            chest["a"].append(2)
        with chest.transaction():
            chest["a"].append(3)
        with chest.edit("a") as value:
            value.append(4)
        assert chest["a"] == [1, 3, 4]


# --- write_through


def test_write_through_commits_every_set_and_delete_before_it_returns(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", write_through=True) as chest:
        other = Chest[Any, Any](path=chest.path)
        for value in (1, [2], np.full(20_000, 3)):
            chest["a"] = value
            assert repr(other["a"]) == repr(value)
            assert chest.memory_usage > 0
        del chest["a"]
        assert "a" not in other
        with pytest.raises(SerializeError, match="'bad'"):
            chest["bad"] = lambda: None
        chest["good"] = 1  # a value that cannot be written is not in the way of others
        assert other["good"] == 1
        del chest["bad"]
        other.close()


def test_write_through_commits_changes_in_place_when_they_are_noticed(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", write_through=True, available_memory=0) as chest:
        chest["a"] = []
        chest["a"].append(1)
        chest["b"] = 1  # whatever is used next looks at values that were let go
        assert dict(committed(chest.path)) == {"a": "[1]", "b": "1"}
        chest["a"].append(2)
        chest.sync()
        assert dict(committed(chest.path))["a"] == "[1, 2]"
