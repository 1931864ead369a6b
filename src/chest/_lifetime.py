"""What happens to chests that nobody closes: at the interpreter's exit they are closed here.

``atexit`` functions run after all threads but daemons have ended, so a chest that threads still use is closed last; a daemon
that goes on using it gets a ``ClosedError``.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from typing import Protocol

__all__ = ["close_later", "forget", "remember"]


class _Closes(Protocol):
    def close(self) -> None: ...


_lock = threading.RLock()  # a chest may be collected, and closed, while this thread is in here
_open: weakref.WeakValueDictionary[int, _Closes] = weakref.WeakValueDictionary()  # by id: chests are unhashable, as dicts are
_later: list[_Closes] = []  # collected in the middle of a commit, which closing would wait for


def remember(chest: _Closes) -> None:
    """The chest will be closed at exit, if not before."""
    close_those_left()
    with _lock:
        _open[id(chest)] = chest


def forget(chest: _Closes) -> None:
    """It has been closed."""
    with _lock:
        _open.pop(id(chest), None)


def close_later(chest: _Closes) -> None:
    """It was collected while this thread was writing to the same folder: it is closed when the next chest is opened."""
    _later.append(chest)


def close_those_left() -> None:
    """Close what could not be closed when it was collected."""
    while _later:
        _later.pop().close()


def _at_exit(pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child: what it inherited is its parent's to write
    with _lock:
        chests = [*_open.values(), *_later]
    for chest in chests:
        try:
            chest.close()
        except Exception as error:
            print(f"chest: at exit: {type(error).__name__}: {error}", file=sys.stderr)


atexit.register(_at_exit, os.getpid())
