"""A disk that fails or is full during a transaction: it has not happened, memory stays readable, reopening works."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest
from chest.engines._environment import Environment
from chest.errors import DiskFullError, FailedError

BEFORE = {"a": [1], "b": 2}


def change(chest: Chest[Any, Any]) -> None:
    with chest.transaction():
        chest["a"].append(2)
        chest["large"] = np.ones(20_000)
        del chest["b"]


@pytest.fixture
def chest(tmp_path: Path) -> Chest[Any, Any]:
    chest = Chest[Any, Any](BEFORE, path=tmp_path / "c")
    chest.sync()
    return chest


def _fsync_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)


def _commit_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As LMDB's commit does on a disk that is full, or fails."""

    def fail(self: Environment, txn: Any) -> None:
        if code == errno.ENOSPC:
            raise DiskFullError("the disk is full", path=self.folder)
        raise self._fail(OSError(code, os.strerror(code)))  # type: ignore[arg-type]

    monkeypatch.setattr(Environment, "_commit", fail)


@pytest.mark.parametrize("fails", [_fsync_fails, _commit_fails])
def test_a_transaction_that_the_disk_fails_has_not_happened_and_the_chest_says_so_from_then_on(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch, fails: Callable[[pytest.MonkeyPatch, int], None]
) -> None:
    held = chest["a"]
    with monkeypatch.context() as patch:
        fails(patch, errno.EIO)
        with pytest.raises(FailedError):
            change(chest)
    assert dict(chest) == BEFORE
    assert chest["a"] is held
    with pytest.raises(FailedError, match=r"open (the chest|it) again"):  # no pretending, although the disk works again
        change(chest)
    assert dict(chest) == BEFORE
    path = chest.path
    chest._end()
    with Chest[Any, Any](path=path) as again:
        assert dict(again) == BEFORE
        change(again)
        assert list(again) == ["a", "large"]
        assert not [name for name in os.listdir(os.path.join(path, ".keys", "new")) if not name.startswith("owner-")]


@pytest.mark.parametrize("fails", [_fsync_fails, _commit_fails])
def test_a_transaction_on_a_full_disk_has_not_happened_and_can_be_tried_again(
    chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch, fails: Callable[[pytest.MonkeyPatch, int], None]
) -> None:
    with monkeypatch.context() as patch:
        fails(patch, errno.ENOSPC)
        with pytest.raises(DiskFullError):
            change(chest)
    assert dict(chest) == BEFORE
    change(chest)
    assert list(chest) == ["a", "large"]
    assert chest["a"] == [1, 2]
    chest.close()


def test_a_transaction_in_a_folder_that_was_removed_fails_and_memory_stays_readable(chest: Chest[Any, Any]) -> None:
    chest["a"]
    shutil.rmtree(chest.path)
    with pytest.raises(FailedError, match="removed"):
        change(chest)
    assert chest["a"] == [1]
    chest._end()
