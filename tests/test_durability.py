"""When what a chest has committed survives a power cut: ``tests/faults`` cuts the power, here the syncs are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from chest import Chest
from chest.engines._environment import Environment
from chest.errors import FailedError

LIMIT = 1 << 20


class Syncs:
    """Counts those after which nothing that was committed can be undone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        to_disk = Environment.sync_to_disk

        def counted(env: Environment) -> None:
            self.n += 1
            to_disk(env)

        monkeypatch.setattr(Environment, "sync_to_disk", counted)

    def since(self) -> int:
        """How many there were since this was last asked."""
        n, self.n = self.n, 0
        return n


@pytest.fixture(name="syncs")
def _syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


@pytest.fixture(name="chest")
def _chest(tmp_path: Path, syncs: Syncs) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=LIMIT, loose=0) as chest:
        syncs.since()
        yield chest


def spill(chest: Chest[Any, Any]) -> None:
    before = chest.stats().spills
    for i in range(5000):
        chest[i] = "x" * 500
    assert chest.stats().spills > before


def everything_lasts(chest: Chest[Any, Any]) -> bool:
    env: Environment = chest._store.index._env  # type: ignore[attr-defined]
    return env.durable == env.newest


def test_spills_of_small_values_wait_for_the_next_flush(chest: Chest[Any, Any], syncs: Syncs) -> None:
    spill(chest)
    assert syncs.since() == 0
    assert not everything_lasts(chest)
    chest.flush()
    assert syncs.since() == 1
    assert everything_lasts(chest)


def test_a_flush_of_many_commits_syncs_the_index_once(chest: Chest[Any, Any], syncs: Syncs) -> None:
    chest.available_memory = 1 << 30
    for i in range(20_000):
        chest[i] = "x" * 500
    version = chest._store.index.version()
    chest.sync()
    assert chest._store.index.version() > version + 1
    assert syncs.since() == 1


@pytest.mark.parametrize("way", [Chest.sync, Chest.flush, Chest.close, Chest.write_keys], ids=lambda way: way.__name__)
def test_what_was_spilled_lasts_although_nothing_is_unwritten(
    tmp_path: Path, syncs: Syncs, way: Callable[[Chest[Any, Any]], object]
) -> None:
    chest = Chest[Any, Any](path=tmp_path / "d", available_memory=0, loose=0)
    other = Chest[Any, Any](path=tmp_path / "d")  # so that it can be looked at after `close`
    chest[1] = "x"
    assert not chest.inmem
    assert not everything_lasts(other)
    way(chest)
    assert everything_lasts(other)
    syncs.since()
    other.sync()
    assert syncs.since() == 0  # there was nothing left to do
    chest.close()
    other.close()


CHANGES: dict[str, Callable[[Chest[Any, Any]], object]] = {
    "transaction": lambda chest: _in_transaction(chest),
    "setdefault": lambda chest: chest.setdefault("new", 1),
    "pop": lambda chest: chest.pop("known"),
}


def _in_transaction(chest: Chest[Any, Any]) -> None:
    with chest.transaction():
        chest["a"] = chest["b"] = 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_committed_at_once_lasts_at_once(chest: Chest[Any, Any], change: str) -> None:
    other = Chest[Any, Any](path=chest.path)  # in company each of them is a transaction
    chest["known"] = 0
    chest.sync()
    CHANGES[change](chest)
    assert everything_lasts(chest)
    other.close()


def test_a_value_that_has_a_file_lasts_as_soon_as_it_is_spilled(chest: Chest[Any, Any]) -> None:
    chest["large"] = b"x" * (2 * LIMIT)
    assert "large" not in chest.inmem
    record = chest._store.index.get(b"slarge")
    env: Environment = chest._store.index._env  # type: ignore[attr-defined]
    assert record is not None
    assert record.version <= env.durable  # that its file has its name by now may be forgotten, and is found out again


def test_with_write_through_every_set_lasts(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "w", write_through=True) as chest:
        for i in range(3):
            chest[i] = i
            assert everything_lasts(chest)
        del chest[1]
        assert everything_lasts(chest)


def test_scratch_is_never_synced(syncs: Syncs) -> None:
    with Chest[Any, Any](available_memory=LIMIT) as chest:
        spill(chest)
        chest.flush()
        assert syncs.since() == 0


def test_a_disk_that_fails_when_spills_are_to_last_fails_the_chest(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spill(chest)

    class Failing:
        def __init__(self, env: Any) -> None:
            self._env = env

        def sync(self, force: bool) -> None:
            raise lmdb.Error("mdb_env_sync: Input/output error")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._env, name)

    env: Any = chest._store.index._env  # type: ignore[attr-defined]
    whole = env._env
    env._env = Failing(whole)
    with pytest.raises(FailedError):
        chest.flush()
    env._env = whole
    with pytest.raises(FailedError):  # no pretending, although the disk works again
        chest.flush()
    assert chest[4999] == "x" * 500
