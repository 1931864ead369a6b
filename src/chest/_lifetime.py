"""What happens to chests that nobody closes: at the interpreter's exit they are closed here.

``atexit`` functions run after all threads but daemons have ended, so a chest that threads still use is closed last; a daemon
that goes on using it gets a ``ClosedError``. A child process of ``multiprocessing`` ends by ``os._exit``, which runs none of
them, but first it runs finalizers of its own: there, chests are closed by one of these. (A worker that is killed, as by
``Pool.terminate``, writes nothing; nor does one that calls ``os._exit`` itself.)

After a fork the child's chests are told that they are inherited. What they held is their parent's to write, so the child has
no open chest at all until one of them is used. Nothing is locked for that: the child takes over nothing that another thread
may have left half done.
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
    _shared: bool

    def close(self) -> None: ...

    def _inherited(self) -> None: ...


_lock = threading.RLock()  # a chest may be collected, and closed, while this thread is in here
_open: weakref.WeakValueDictionary[int, _Closes] = weakref.WeakValueDictionary()  # by id: chests are unhashable, as dicts are
_later: list[_Closes] = []  # collected in the middle of a commit, which closing would wait for
_finalizing: set[int | str] = set()  # processes (this one, by pid) with a finalizer, and whether children will have one


def remember(chest: _Closes) -> None:
    """The chest will be closed at exit, if not before."""
    close_those_left()
    with _lock:
        _open[id(chest)] = chest
    _close_before_os_exit()


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


def _at_exit() -> None:
    with _lock:
        chests = [*_open.values(), *_later]
    for chest in chests:
        try:
            chest.close()
        except Exception as error:
            print(f"chest: at exit: {type(error).__name__}: {error}", file=sys.stderr)


class _Child:
    """Lives as long as the process."""


_child = _Child()


def _close_before_os_exit() -> None:
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if process is None or util is None:
        return
    if "after fork" not in _finalizing:
        # A child unpickles its arguments, which may be chests, before it begins by forgetting all finalizers.
        _finalizing.add("after fork")
        util.register_after_fork(_child, _finalize)
    if process.parent_process() is not None:
        _finalize(_child)


def _finalize(_: _Child) -> None:
    if os.getpid() not in _finalizing:
        _finalizing.add(os.getpid())
        sys.modules["multiprocessing.util"].Finalize(None, _at_exit, exitpriority=0)


def _after_fork_in_parent() -> None:
    for reference in _open.valuerefs():  # without the lock: its holder may be waiting for what the fork still holds
        chest = reference()
        if chest is not None:
            chest._shared = True


def _after_fork_in_child() -> None:
    global _lock, _open
    _lock = threading.RLock()
    inherited = [*(reference() for reference in _open.valuerefs()), *_later]
    _open = weakref.WeakValueDictionary()
    for chest in inherited:
        if chest is not None:
            chest._inherited()
    _later.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
