"""Plain files of values, as one writes them without any library, and joblib's: contestants for what is large."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from contestants import A_FILE_EACH, Handle, contestant
from stores import KILL, POWER


def _files(folder: str, dump: Callable[[Any, Any], None], load: Callable[[str], Any], synced: bool) -> Handle:
    os.makedirs(folder, exist_ok=True)

    def path(key: str) -> str:
        return os.path.join(folder, key)

    def put(key: str, value: Any) -> None:
        # A new file in the place of the old one: writing into a file that is mapped ends in SIGBUS.
        with open(path(key) + ".new", "wb") as file:
            dump(value, file)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(path(key) + ".new", path(key))
        if synced:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def names() -> list[str]:
        return os.listdir(folder)

    return Handle(
        lambda key: load(path(key)),
        put,
        lambda: ((name, load(path(name))) for name in names()),
        lambda: None,
        lambda key: os.unlink(path(key)),
        names,
        lambda key: os.path.exists(path(key)),
        lambda: len(names()),
    )


def _arrays(folder: str, synced: bool, mode: str | None) -> Handle:
    import numpy as np

    return _files(folder, lambda value, file: np.save(file, value), lambda path: np.load(path, mmap_mode=mode), synced)


@contestant("write + fsync, np.load mapped", POWER, POWER, limit=True)
def _mapped(folder: str, memory: int) -> Handle:
    return _arrays(folder, True, "c")


@contestant("write, np.load", KILL, KILL, limit=True)
def _plain(folder: str, memory: int) -> Handle:
    return _arrays(folder, False, None)


@contestant("write, np.load mapped r+", KILL, KILL, in_place=True, limit=True)
def _shared(folder: str, memory: int) -> Handle:
    """Changed through a shared mapping: nothing is copied, and a crash in the middle leaves half of a change."""
    plain = _arrays(folder, False, "r+")
    opened: list[Any] = []

    def get(key: str) -> Any:
        opened.append(plain.get(key))
        return opened[-1]

    def flush() -> None:
        for array in opened:
            array.flush()
        opened.clear()

    return plain._replace(get=get, close=opened.clear, flush=flush)


@contestant("joblib", KILL, KILL, **A_FILE_EACH)
def _joblib(folder: str, memory: int) -> Handle:
    """``joblib.dump`` and ``joblib.load``, arrays mapped."""
    import joblib

    return _files(folder, joblib.dump, lambda path: joblib.load(path, mmap_mode="c"), False)
