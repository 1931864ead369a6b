"""Waiting for a key, and following the changes that others make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chest import Chest
from chest.engines import _log
from chest.errors import ChestError, ClosedError


@pytest.fixture
def chest(tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        yield chest


@pytest.fixture
def other(chest: Chest[Any, Any]) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=chest.path) as other:
        yield other


def test_wait_returns_the_value_as_soon_as_another_thread_has_set_it(chest: Chest[Any, Any]) -> None:
    chest["there"] = 1
    assert chest.wait("there") == 1
    timer = threading.Timer(0.02, lambda: chest.__setitem__("late", [2]))
    timer.start()
    assert chest.wait("late", timeout=30) == [2]
    timer.join()


def test_wait_gives_up_after_its_timeout(chest: Chest[Any, Any]) -> None:
    with pytest.raises(TimeoutError, match="'missing'"):
        chest.wait("missing", timeout=0)
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        chest.wait("missing", timeout=0.01)


def test_wait_in_a_transaction_would_wait_for_ever(chest: Chest[Any, Any]) -> None:
    with chest.transaction():
        chest["a"] = 1
        assert chest.wait("a") == 1
        with pytest.raises(ChestError, match="nobody else can set it"):
            chest.wait("missing", timeout=1)


# --- changes


def test_changes_are_the_keys_that_anybody_commits_from_now_on(chest: Chest[Any, Any], other: Chest[Any, Any]) -> None:
    chest.update(before=0, gone=0)
    changes = chest.changes(timeout=0)
    keys = [1, 2.5, ("a", 1), "text", None, "k" * 600]
    for key in keys:
        other[key] = key
    del other["gone"]
    other["unwritten"] = 1
    assert list(changes) == []
    changes = chest.changes(timeout=0)
    other.sync()
    chest["mine"] = 1
    chest.sync()
    found = list(changes)
    assert sorted(map(repr, found)) == sorted(map(repr, [*keys, "gone", "unwritten", "mine"]))
    assert found[-1] == "mine"  # in the order of the commits
    assert list(chest.changes(timeout=0)) == []


def test_changes_waits_for_the_next_one(chest: Chest[Any, Any], other: Chest[Any, Any]) -> None:
    changes = chest.changes(timeout=30)
    for i in range(3):
        timer = threading.Timer(0.01, lambda i=i: other.update({i: i}))
        timer.start()
        assert next(changes) == i
        timer.join()
    with other.transaction():
        other["a"], other["b"] = 1, 2
    assert [next(changes), next(changes)] == ["a", "b"]


@pytest.mark.parametrize("reason", ["many commits", "many keys", "long keys"])
def test_who_is_far_behind_is_still_told_every_key_that_is_there(
    chest: Chest[Any, Any], other: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(_log, "KEPT", 3)
    monkeypatch.setattr(_log, "MANY", 20)
    chest["untouched"] = 0
    chest.sync()
    changes = chest.changes(timeout=0)
    keys: list[Any] = [i if reason != "long keys" else f"{i}" * 2000 for i in range(30)]
    if reason == "many commits":
        for key in keys:
            other.update({key: 0})
    else:
        other.update(dict.fromkeys(keys))
    assert list(changes) == keys


def test_changes_of_a_closed_chest_end_with_an_error(chest: Chest[Any, Any]) -> None:
    changes = chest.changes()
    chest.close()
    with pytest.raises(ClosedError):
        next(changes)
    with pytest.raises(ClosedError):
        chest.changes()


def test_the_log_of_changes_stays_small(chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "KEPT", 3)
    for i in range(10):
        chest.update({i: i})
    env: Any = chest._store.index._env  # type: ignore[attr-defined]
    assert env.read(lambda txn: txn.stat(env.changed)["entries"]) == 3
