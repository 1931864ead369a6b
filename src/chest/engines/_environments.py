"""All LMDB environments of this process, one per folder, and what becomes of them when it forks.

**One per folder.** A second environment on one folder in one process destroys the locks of the first. So they are kept here,
counted, under device and inode of ``data.mdb`` (a path may be renamed or linked); none is closed while another chest uses it.

**Fork.** The child must not use what it inherits: its reads would take slots in the parent's name that nobody ever clears.
Nor can it just forget: py-lmdb does not open a folder again before the inherited environment is closed. And closing is
harmless only if at the time of the fork no transaction was open, none of the parent's operations was under way (``close``
would wait for it for ever), and no reader's slot was taken: the slots lie in shared memory, and the child would free those
of the parent, whose next reader would then share its slot with another one and lose its snapshot. py-lmdb keeps a slot until
the ended transaction is collected, and a traceback may hold that; so slots are freed by hand.

Hence, before a fork, in this order: the writers' locks (a transaction that spans a user's code holds its own all the time),
the gate, and the lock of this registry. The first are several and may be held by threads that want each other's, so nobody
waits for one while holding another; and as a thread that closes an environment holds the registry's lock and waits for the
gate, that lock is only tried: if it is taken, all is given back and begun again. No lock of a chest is needed, nor any other:
the child takes over nothing that they guard, and makes them anew.

What cannot be waited for (the forking thread's own transaction), or not for long (another thread's that goes on and on), is
lost to the child: it neither uses nor closes it, and cannot open that folder again. It says so.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
import time
from _thread import get_ident
from typing import Any, NoReturn

import lmdb

from .. import _fs
from ..errors import ChestError, DiskFullError, InUseError, PathError
from . import _reserve
from ._datafile import forget_stump, prepare_lock, refuse_damaged
from ._environment import FULL, Environment, code_of, damaged, identity_of
from ._gate import GATE

__all__ = ["ENVIRONMENTS", "Environments"]

PATIENCE_S = 10.0  # a fork waits this long for the transactions of other threads
_PAUSE_S = 0.001


class Environments:
    """All open environments of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a chest may be collected, and closed, while this thread is in here
        self._open: dict[tuple[int, int], Environment] = {}
        self._forking: dict[int, list[Environment]] = {}  # thread -> those in which nothing happens while it forks
        self._lost: dict[tuple[int, int], Environment] = {}  # of the parent's, those that could not be closed

    def open(self, folder: str, *, sync: bool, create: bool, map_size: int | None = None) -> Environment:
        """The environment of a folder, to be given back by ``release``.

        Raises:
            PathError: the folder cannot hold one, or (without ``create``) holds none.
            CorruptError: what lies there is damaged.
            DiskFullError: there is no room for it.
        """
        folder = os.path.abspath(folder)
        data = os.path.join(folder, "data.mdb")
        is_new = False
        with self._lock:
            try:
                with contextlib.suppress(FileNotFoundError):
                    if identity_of(data) in self._lost:
                        raise ChestError(
                            f"this process was forked within a transaction of the chest in {os.path.dirname(folder)}, and "
                            "cannot open it: fork before the transaction begins, or start the process by spawn.",
                            path=folder,
                        )
                    env = self._open.get(identity_of(data))
                    if env is not None:
                        env.n_users += 1
                        return env
                is_new = refuse_damaged(folder)
                if is_new:
                    if not create:
                        raise PathError(f"there is no index in {folder}", path=folder)
                    _make_folder(folder)
                prepare_lock(folder)
                env = Environment(folder, sync=sync, map_size=map_size)
                if sync:
                    _reserve.keep(folder)
                if is_new and sync:
                    _sync_folders(folder)
            except lmdb.Error as error:
                if is_new:
                    forget_stump(data)
                raise _opening_error(error, folder) from error
            except OSError as error:
                if is_new:
                    forget_stump(data)
                full = _fs.as_disk_full(error, folder)
                if full is not None:
                    raise full from error
                if isinstance(error, ChestError):
                    raise
                raise PathError(f"{folder} cannot hold an index: {error.strerror or error}", path=folder) from error
            self._open[env.files["data.mdb"]] = env
            return env

    def release(self, env: Environment) -> None:
        """One user less; the last one closes it."""
        with self._lock:
            env.n_users -= 1
            if not env.lost and not env.n_users and (env.abandoned is None or env.may_be_closed()):
                self._open.pop(env.files["data.mdb"], None)
                env.close()

    def refuse_open(self, folder: str) -> None:
        """Raises InUseError if this process has the index in a folder open."""
        with self._lock:
            try:
                is_open = identity_of(os.path.join(folder, "data.mdb")) in self._open
            except OSError:
                return
        if is_open:
            path = os.path.dirname(os.path.abspath(folder))
            raise InUseError(f"this process has the chest at {path} open: close it and try again.", path=path)

    def compact(self, env: Environment, fd: int, path: str) -> None:
        """A copy of the index without its free pages has taken its place. Made in this file, on the same file system.

        All of this process's chests in the folder go on with it. See ``Environment.replace_by_copy`` for errors.
        """
        while True:
            with env._alone():
                # Only tried, as before a fork: its holder may be waiting for the gate.
                if self._lock.acquire(blocking=False):
                    try:
                        self._open.pop(env.files["data.mdb"], None)
                        try:
                            env.replace_by_copy(fd, path)
                        finally:
                            self._open[env.files["data.mdb"]] = env
                        return
                    finally:
                        self._lock.release()
            time.sleep(_PAUSE_S)

    # --- fork

    def before_fork(self) -> None:
        """Nothing happens in the environments that are held from here on."""
        if self._open:
            with contextlib.suppress(ImportError):  # a module that a thread is importing now is locked in the child for ever
                import ctypes  # noqa: F401 - the one that this package imports late
        until = time.monotonic() + PATIENCE_S
        held: list[Environment] = []
        alone = locked = False
        try:
            while get_ident() not in GATE.inside:
                known = list(self._open.values())
                held = _hold_writers(known, until)
                alone = GATE.seize(until)
                locked = alone and self._lock.acquire(blocking=False)
                if locked and list(self._open.values()) == known:  # else one was opened or closed meanwhile
                    for env in held:
                        _free_slots(env)
                    self._forking[get_ident()] = held
                    return
                self._let_go(held, alone, locked)
                held, alone, locked = [], False, False
                if time.monotonic() > until:
                    return
                time.sleep(_PAUSE_S)
        except BaseException:  # an interrupt; the fork takes place nevertheless
            self._let_go(held, alone, locked)
            raise

    def _let_go(self, held: list[Environment], alone: bool, locked: bool) -> None:
        if locked:
            self._lock.release()
        if alone:
            GATE.release()
        for env in held:
            env._writer.release()

    def after_fork_in_parent(self) -> None:
        held = self._forking.pop(get_ident(), None)
        if held is not None:
            self._let_go(held, True, True)

    def after_fork_in_child(self) -> None:
        held = self._forking.pop(get_ident(), None)
        if held is not None:
            self._let_go(held, True, True)
        inherited = [*self._open.values()]
        self._lock, self._open, self._forking = threading.RLock(), {}, {}
        GATE.after_fork()
        for env in inherited:
            env.lost = True
            env._writer, env._writing = threading.Lock(), 0
            env.begin = functools.partial(_refuse, env)
            if held is not None and env in held:
                env._env.close()
            else:
                self._lost[env.files["data.mdb"]] = env
                _keep_for_ever(env._env)


def _hold_writers(envs: list[Environment], until: float) -> list[Environment]:
    """Those environments whose writers' locks this thread holds now: all but its own, and those that were not to be had."""
    todo = [env for env in envs if env._writing != get_ident()]
    while True:
        held: list[Environment] = []
        for env in todo:
            if not env._writer.acquire(timeout=0.0 if held else max(0.0, until - time.monotonic())):
                break
            held.append(env)
        else:
            return held
        for other in held:
            other._writer.release()
        todo.remove(env)
        if time.monotonic() < until:
            todo.insert(0, env)  # to be waited for, with nothing in hand
        else:
            until = 0.0


def _free_slots(env: Environment) -> None:
    """No transaction that has ended keeps its reader's slot."""
    with contextlib.suppress(lmdb.Error):
        slots = [line.split() for line in env._env.readers().splitlines()]
        if any(slot[:1] == [str(os.getpid())] for slot in slots):
            env._env.set_mapsize(env.map_size)  # which ends them all


def _refuse(env: Environment, *_: Any, **__: Any) -> NoReturn:
    env.refuse_lost()
    raise AssertionError


def _keep_for_ever(env: Any) -> None:
    """It is not even collected when the interpreter ends: that would close it."""
    with contextlib.suppress(ImportError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(env))


def _make_folder(folder: str) -> None:
    os.makedirs(folder, 0o700, exist_ok=True)
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)


def _sync_folders(folder: str) -> None:
    """LMDB never syncs folders. Of those above the chest's own some may not be readable, and are older than it is."""
    _fs.fsync_folder(folder)
    for _ in range(2):
        folder = os.path.dirname(folder)
        with contextlib.suppress(PermissionError):
            _fs.fsync_folder(folder)


def _opening_error(error: lmdb.Error, folder: str) -> Exception:
    if isinstance(error, (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError, lmdb.PageNotFoundError)):
        return damaged(folder, str(error))
    if isinstance(error, lmdb.MemoryError):
        return MemoryError(f"no address space for the index in {folder} (RLIMIT_AS?)")
    if code_of(error) in FULL or (code_of(error) == errno.EIO and _fs.disk_is_full(folder)):
        return DiskFullError(f"the disk is full ({folder}): make room and try again.", path=folder)
    return PathError(f"{folder} cannot hold an index: {error}", path=folder)


ENVIRONMENTS = Environments()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=ENVIRONMENTS.before_fork,
        after_in_parent=ENVIRONMENTS.after_fork_in_parent,
        after_in_child=ENVIRONMENTS.after_fork_in_child,
    )
