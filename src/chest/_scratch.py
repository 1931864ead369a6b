"""Scratch folders: of processes, not of people. They go with the last process that uses them, however it ends.

Each process that uses one keeps an owner's file in its ``.keys`` (see ``_fs``): the one that made it, a forked child that
uses what it has inherited, a process that was sent the chest. Whoever lets go looks whether another owner lives, and only if
there is none removes the folder. Joining and this look are never at the same time: both hold the *door*, a lock on the folder
itself. (A ``flock`` here, since a folder cannot be locked by ``lockf``. What a child inherits of it does no harm: it is held
for an instant, and unlocked by hand.)

A forked child inherits no ownership: what it inherited it must join.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator

from . import _fs
from .errors import PathError

__all__ = ["Shared", "is_shared", "join_scratch", "make_scratch", "remove_scratch", "sweep_scratch"]

_SUFFIX, _DEAD = ".chest", ".chest.dead"
_PATIENCE_S = 5.0  # nobody holds a door that long who will ever let go of it

_held: dict[str, tuple[_fs.Owner, int]] = {}  # path -> this process as its owner, and how many chests use it
_swept: set[tuple[int, str]] = set()
_lock = threading.RLock()  # a chest may be collected, and its folder removed, while this thread is in here


class Shared(str):
    """The path of a scratch folder that is there already: of another process, or of another chest of this one."""

    __slots__ = ()


def make_scratch(dir: str | None = None) -> str:
    """A new folder that lives as long as the processes that use it at most, for this user only (0700).

    Folders that dead processes left behind are removed first, once per process.
    """
    place = os.path.abspath(dir or tempfile.gettempdir())
    if (os.getpid(), place) not in _swept:
        _swept.add((os.getpid(), place))
        sweep_scratch(place)
    while True:
        path = tempfile.mkdtemp(suffix=_SUFFIX, dir=place)
        try:
            os.mkdir(_keys(path), 0o700)
            owner = _fs.Owner.claim(_keys(path))
        except FileNotFoundError:  # swept before it had an owner
            if not os.path.isdir(place):
                raise
            continue
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        with _lock:
            _held[path] = owner, 1
        return path


def join_scratch(path: str) -> str:
    """The folder stays until this process, too, has let go of it, by as many calls of ``remove_scratch``; its path.

    Raises:
        PathError: it is gone.
    """
    path = str(path)
    with _lock:
        owner, count = _held.get(path, (None, 0))
        if owner is None:
            try:
                with _door(path):
                    owner = _fs.Owner.claim(_keys(path))
            except (FileNotFoundError, NotADirectoryError):
                raise PathError(
                    f"the scratch chest at {path} is gone: it was closed, or the process that used it has ended. Keep it open "
                    "as long as others need it, or give it a path.",
                    path=path,
                ) from None
        _held[path] = owner, count + 1
        return path


def remove_scratch(path: str) -> None:
    """One use less of a folder of this process; after the last one it is gone, unless another process uses it."""
    with _lock:
        owner, count = _held.get(path, (None, 0))
        if owner is None:
            return
        if count > 1:
            _held[path] = owner, count - 1
            return
        del _held[path]
        dead = None
        with contextlib.suppress(OSError), _door(path):
            keys = _keys(path)
            others = set(_fs.owners(keys)) - {owner.token}
            if others <= set(_fs.dead_owners(keys)):
                dead = _doom(path)
            else:
                owner.release()  # before the door opens: the next one that lets go must not take it for alive
    if dead is not None:
        _erase(dead)
    owner.release()


def is_shared(path: str) -> bool:
    """Whether somebody else uses a folder of this process: another process, or another chest."""
    with _lock:
        owner, count = _held.get(path, (None, 0))
    if owner is None or count > 1:
        return owner is not None
    others = set(_fs.owners(_keys(path))) - {owner.token}
    return not others <= set(_fs.dead_owners(_keys(path)))


def sweep_scratch(dir: str | None = None) -> int:
    """Remove the scratch folders of this user whose owners have all died; their number. Links are never followed."""
    place = dir or tempfile.gettempdir()
    try:
        with os.scandir(place) as entries:
            found = [e.path for e in entries if e.name.endswith((_SUFFIX, _DEAD))]
    except OSError:
        return 0
    n_stale = 0
    for path in found:
        if not (_is_own_folder(path) and _is_stale(path)):
            continue
        dead = None
        with _lock, contextlib.suppress(OSError), _door(path):
            if _is_stale(path):  # nobody has joined it since
                dead = _doom(path)
        if dead is not None:
            _erase(dead)
            n_stale += 1
    return n_stale


def _keys(path: str) -> str:
    return os.path.join(path, ".keys")


@contextlib.contextmanager
def _door(path: str) -> Iterator[None]:
    """No process joins the folder meanwhile, and none removes it. Raises OSError if there is no such folder."""
    if _fs._fcntl is None:  # no processes can be told apart there
        os.stat(path)
        yield
        return
    fcntl = _fs._fcntl
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.001)
            except OSError:  # a file system without
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _is_stale(path: str) -> bool:
    keys = _keys(path)
    tokens = _fs.owners(keys) if _is_own_folder(keys) else []
    # A folder without an owner is none of ours, or is being made just now.
    return bool(tokens) and len(_fs.dead_owners(keys)) == len(tokens)


def _is_own_folder(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _doom(path: str) -> str | None:
    """Its name from now on, under which nobody opens what is half gone, and the next sweep knows it."""
    if path.endswith(_DEAD) or os.name == "nt":  # there, open files keep a folder from being renamed
        return path
    try:
        os.rename(path, path + ".dead")
    except OSError:
        return None
    return path + ".dead"


def _erase(path: str) -> None:
    for folder, mark in ((path, ".keys"), (_keys(path), _fs.PREFIX)):  # what the sweep knows it by goes last
        for name in os.listdir(folder) if _is_own_folder(folder) else []:
            if not name.startswith(mark):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
    shutil.rmtree(path, ignore_errors=True)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    for owner, _ in _held.values():
        owner.release()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
