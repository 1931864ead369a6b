"""This process as the owner of the value files that it is writing: once in each folder, however many chests use it."""

from __future__ import annotations

import os
import threading

from .. import _fs

__all__ = ["join", "leave"]

_owners: dict[tuple[int, int], tuple[_fs.Owner, int]] = {}
_owners_lock = threading.RLock()  # a chest may be collected, and closed, while this thread is in here


def join(folder: str) -> tuple[tuple[int, int], _fs.Owner]:
    """This process as an owner in the folder, to be given to ``leave``."""
    found = os.stat(folder)
    key = (found.st_dev, found.st_ino)
    with _owners_lock:
        owner, count = _owners.get(key, (None, 0))
        if owner is None:
            owner = _fs.Owner.claim(folder)
        _owners[key] = owner, count + 1
        return key, owner


def leave(key: tuple[int, int], owner: _fs.Owner) -> None:
    """One user less; with the last one the process owns nothing there any more."""
    with _owners_lock:
        found, count = _owners.get(key, (None, 0))
        if found is not owner:
            return
        if count > 1:
            _owners[key] = owner, count - 1
        else:
            del _owners[key]
            owner.release()


def _after_fork_in_child() -> None:
    """The owners are the parent's."""
    global _owners_lock
    _owners_lock = threading.RLock()
    for owner, _ in _owners.values():
        owner.release()  # closes a descriptor, and nothing else
    _owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
