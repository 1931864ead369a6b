"""An LMDB environment, with the rules that LMDB leaves to its callers.

- Nobody opens ``data.mdb`` or ``lock.mdb`` by hand while the environment is open: closing such a descriptor drops the
  locks. What is to be read in them is read before.
- The map must not be resized under a transaction of this process: each runs inside of the gate.
- A transaction is begun, used and ended in one function call, and nothing in between waits for a user's code.
- After a failed write the kernel has dropped the pages, and the next sync would succeed: the environment is failed
  then, and takes no more commits. It can still be read.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
import time
from _thread import get_ident
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lmdb

from .. import _fs
from ..errors import ChestError, CorruptError, DiskFullError, FailedError
from ._alone import alone
from ._gate import GATE
from ._pages import renumber

__all__ = ["FULL", "Environment", "code_of", "damaged", "identity_of"]

T = TypeVar("T")

# Costs address space only: the file grows as it is used. Windows would allocate it.
MAP_SIZE = 64 << 20 if os.name == "nt" else 256 << 30 if sys.maxsize > 2**32 else 256 << 20
SMALLEST_MAP = 64 << 20
N_READERS = 1024
_TRIES = 200
FULL = (errno.ENOSPC, errno.EDQUOT)


class Environment:
    """One open LMDB environment, shared by all indexes of this process on its folder.

    Attributes:
        begin: begins a transaction, inside of the gate only.
        index, order, pending, meta, changed: its databases.
        generation: see ``Index``.
        map_size: bytes.
        failed: why it takes no more commits, or None.
        abandoned: a write transaction that another thread than its own (by ident) has ended.
        newest, durable: the number of the last commit of this process, and of one that no power cut can undo.
        lost: this process was forked off the one that opened it, and must not touch it.
    """

    begin: Callable[..., Any]
    index: Any
    order: Any
    pending: Any
    meta: Any
    changed: Any

    def __init__(self, folder: str, *, sync: bool, map_size: int | None) -> None:
        self.folder = folder
        self.sync = sync
        self.map_size = map_size or MAP_SIZE
        self.failed: str | None = None
        self.lost = False
        self.abandoned: tuple[Any, int] | None = None
        self.n_users = 1
        self.newest = self.durable = 0
        self._writer = threading.Lock()  # the threads of this process queue here, not inside of the gate
        self._writing = 0  # the thread that holds it
        self._attach()
        try:
            self.data = os.path.join(folder, "data.mdb")
            self.generation = self._map_generation()
            self.files = {name: identity_of(os.path.join(folder, name)) for name in _FILES}
        except BaseException:
            self._env.close()
            raise

    # --- opening

    def _attach(self) -> None:
        while True:
            try:
                env = lmdb.open(
                    self.folder,
                    map_size=self.map_size,
                    max_dbs=8,
                    max_readers=N_READERS,
                    max_spare_txns=0,
                    readahead=False,  # where the index is larger than memory, 17 times faster to read at random
                    mode=0o600,
                    sync=self.sync,
                    metasync=False,  # a commit is whole after a power cut, or undone: `sync_to_disk` makes it last
                    writemap=False,
                    create=False,
                    lib_version=0,
                )
                break
            except lmdb.MapResizedError:
                continue  # somebody else has made it larger between LMDB's two looks at it
            except (lmdb.MemoryError, MemoryError):  # RLIMIT_AS
                if self.map_size <= SMALLEST_MAP:
                    raise
                self.map_size = max(SMALLEST_MAP, self.map_size // 4)
        try:
            self.map_size = env.info()["map_size"]
            env.reader_check()
            if env.stat()["entries"] < len(_DATABASES):
                with env.begin(write=True) as txn:
                    for name in _DATABASES:
                        env.open_db(name.encode(), txn=txn)
            for name in _DATABASES:
                setattr(self, name, env.open_db(name.encode(), create=False))
        except BaseException:
            env.close()
            raise
        self._env = env
        self.begin = env.begin

    def _map_generation(self) -> memoryview:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        fd = os.open(os.path.join(self.folder, "generation"), flags, 0o600)
        try:
            if os.fstat(fd).st_size < 8:  # written, not stretched: a hole could not be filled on a full disk (SIGBUS)
                _fs.write_all(fd, bytes(8))
            view = memoryview(mmap.mmap(fd, 8)).cast("Q")
        finally:
            os.close(fd)
        if view[0] != self._env.info()["last_txnid"]:
            # Somebody is committing, or died doing so. Readers of a generation that is ahead would check each time.
            with self._env.begin(write=True) as txn:
                view[0] = txn.id() - 1
        return view

    # --- transactions

    def read(self, work: Callable[[Any], T]) -> T:
        """What ``work`` returns, which is given a read transaction and may be called again."""
        inside, ident = GATE.inside, get_ident()
        for attempt in range(_TRIES):
            seen = self.map_size
            try:
                inside.append(ident)
                if GATE.shut:
                    GATE.wait(ident)
                txn = self.begin()
                try:
                    return work(txn)
                finally:
                    txn.abort()
            except (lmdb.MapResizedError, lmdb.ReadersFullError, lmdb.PanicError) as error:
                problem = error
            except lmdb.Error as error:
                raise self.translated(error) from error
            finally:
                inside.remove(ident)
            self._recover(problem, seen, attempt)
        raise ChestError(f"more than {N_READERS} readers at a time in {self.folder}", path=self.folder) from problem

    def write(self, folder: str, work: Callable[[Any], tuple[T, bool]]) -> T:
        """What ``work`` returns, which is given a write transaction and says whether it wrote; it may be called again.

        Args:
            folder: the path by which the caller knows it.
        """
        inside, ident = GATE.inside, get_ident()
        if self._writing == ident:
            raise ChestError(
                f"this thread is in the middle of a commit to {folder}: use the chest whose transaction it is in there (in a "
                "signal handler or finalizer, write later).",
                path=folder,
            )
        with self._writer:
            self._reclaim(folder)
            try:
                self._writing = ident
                for attempt in range(_TRIES):
                    if self.failed is not None:
                        raise FailedError(self.failed, path=folder)
                    seen = self.map_size
                    try:
                        inside.append(ident)
                        if GATE.shut:
                            GATE.wait(ident)
                        txn = self.begin(write=True)
                        try:
                            self._refuse_moved(folder)
                            result, wrote = work(txn)
                            if wrote:
                                self._commit(txn)
                            else:
                                txn.commit()  # writes nothing, and is not kept waiting as `abort` is
                            return result
                        except BaseException:
                            self.give_up(txn)
                            raise
                    except (lmdb.MapFullError, lmdb.MapResizedError) as error:
                        problem = error
                    except lmdb.Error as error:
                        raise self.translated(error) from error
                    finally:
                        inside.remove(ident)
                    self._recover(problem, seen, attempt)
            finally:
                self._writing = 0
        raise ChestError(f"the index in {folder} cannot grow", path=folder) from problem

    def give_up(self, txn: Any) -> None:
        """End a write transaction, and nothing of it is written."""
        if not self.lost:  # else it is the parent's
            with GATE.calm():  # while others read without a pause it would take seconds
                txn.abort()

    def _reclaim(self, folder: str) -> None:
        """A transaction that another thread has ended is given up by its own one, or when that is dead (the lock is robust)."""
        if self.abandoned is None:
            return
        txn, ident = self.abandoned
        if ident != get_ident() and ident in sys._current_frames():
            raise ChestError(
                f"a transaction on {folder} was ended by another thread than the one that began it, which alone can let go of "
                "its lock: use the chest in that thread (`sync` will do), or let the thread end.",
                path=folder,
            )
        self.give_up(txn)
        self.abandoned = None

    def may_be_closed(self) -> bool:
        """Whether no thread holds LMDB's lock, which could not be released any more."""
        with contextlib.suppress(ChestError), self._writer:
            self._reclaim(self.folder)
        return self.abandoned is None

    def refuse_lost(self) -> None:
        """Raises ChestError in a process that was forked off within a transaction: it is the parent's."""
        if self.lost:
            raise ChestError(
                f"the index in {self.folder} was opened by the parent of this process, before the fork: open the chest again.",
                path=self.folder,
            )

    def _commit(self, txn: Any) -> None:
        self.refuse_lost()
        # Stored while this thread holds the writers' lock, so that nobody can see the commit under the old generation.
        # If an interrupt comes in between, it stays: whether the commit took place is not known here.
        version = txn.id()
        self.generation[0] = version
        try:
            txn.commit()
            self.newest = version
        except (lmdb.MapFullError, lmdb.MemoryError, lmdb.TxnFullError):
            raise
        except lmdb.Error as error:
            if self._is_full(error):
                self._take_back()
                raise DiskFullError(
                    f"the disk is full ({self.folder}). Nothing was lost: make room and try again.", path=self.folder
                ) from error
            raise self._fail(error) from error

    def _take_back(self) -> None:
        """The generation is that of the last commit again: a lock is needed, or it could be another's newer one."""
        with contextlib.suppress(lmdb.Error), self.begin(write=True) as txn:
            self.generation[0] = txn.id() - 1

    def _is_full(self, error: lmdb.Error) -> bool:
        # LMDB reports a write that fell short as EIO.
        return code_of(error) in FULL or (code_of(error) == errno.EIO and _fs.disk_is_full(self.folder))

    def _fail(self, error: lmdb.Error) -> FailedError:
        self.failed = (
            f"the index in {self.folder} could not be written ({error}): it takes nothing more. What is in memory, and "
            "what was committed before, stays readable. Look after the disk, close every chest of this folder, and "
            "open it again."
        )
        return FailedError(self.failed, path=self.folder)

    def _refuse_moved(self, folder: str) -> None:
        """Commits into files that have no name any more, or that nobody else shares, would be lost in silence."""
        # Of a scratch folder, which nobody shares, one look is enough.
        for name, identity in list(self.files.items())[: None if self.sync else 1]:
            path = os.path.join(folder, name)
            try:
                if identity_of(path) == identity:
                    continue
            except OSError:
                pass
            raise FailedError(
                f"{path} was moved, removed or replaced while the chest was open. Nothing was written; what is in "
                "memory stays readable. Put it back, or open the chest again.",
                path=folder,
            )

    def translated(self, error: lmdb.Error) -> Exception:
        """The error to raise instead of one of LMDB's."""
        if isinstance(error, lmdb.BadValsizeError):
            return ValueError("a name in the index must have 1 to 511 bytes")
        if isinstance(error, lmdb.MemoryError):
            return MemoryError(f"no memory for a transaction in {self.folder}")
        if isinstance(error, lmdb.TxnFullError):
            return ChestError(f"one commit in {self.folder} is too large: write less at a time", path=self.folder)
        if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError)):
            return damaged(self.folder, str(error))
        if self._is_full(error):
            return DiskFullError(f"the disk is full ({self.folder}): make room and try again.", path=self.folder)
        if isinstance(error, lmdb.PanicError) or code_of(error) == errno.EIO:
            return self._fail(error)
        return FailedError(f"the index in {self.folder} cannot be used: {error}", path=self.folder)

    def is_held(self) -> bool:
        """Whether this thread is in the middle of a commit, or of a transaction."""
        return self._writing == get_ident()

    # --- recovering, outside of the gate

    def _recover(self, problem: lmdb.Error, seen: int, attempt: int) -> None:
        """What the last attempt lacked is there, or it is worth another one."""
        if isinstance(problem, lmdb.ReadersFullError):
            if not self._env.reader_check():
                time.sleep(0.001)
            return
        if isinstance(problem, lmdb.PanicError):  # nothing can be read until it is opened again
            if attempt:
                raise self._fail(problem) from problem
            self._fail(problem)
            with self._alone():
                self._env.close()
                self._attach()
            return
        if isinstance(problem, lmdb.MapFullError) and attempt == 0 and self._env.reader_check():
            return  # the pages that a dead reader held back can be used again
        with self._alone():
            if self.map_size != seen:
                return  # another thread was faster
            size = seen * 2
            with contextlib.suppress(OSError):
                while size <= os.stat(self.data).st_size:
                    size *= 2
            # LMDB gives up the old map before it asks for the new one, and could not go on without.
            if not _fits(size - seen):
                raise MemoryError(f"no address space to let the index in {self.folder} grow to {size} bytes (RLIMIT_AS?)")
            self._env.set_mapsize(size)
            self.map_size = size

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No transaction of this process is open: neither one inside of the gate nor one that spans a user's code."""
        with contextlib.nullcontext() if self._writing == get_ident() else self._writer, GATE.alone():
            yield

    def sync_to_disk(self) -> None:
        """All that this process has committed is durable."""
        newest = self.newest
        try:
            with GATE.entered():  # a child that was forked meanwhile could not close what it inherits
                self._env.sync(True)
                self.durable = max(self.durable, newest)
        except lmdb.Error as error:
            raise self._fail(error) from error

    def copy_to(self, fd: int) -> None:
        """The newest commit stands in this file, without free pages. Others may write meanwhile."""
        try:
            with GATE.entered():
                self._env.copyfd(fd, compact=True)
        except lmdb.Error as error:
            raise self.translated(error) from error

    def replace_by_copy(self, fd: int, path: str) -> None:
        """``data.mdb`` is a copy of itself without free pages, made in this file. The caller is alone in this process.

        Raises:
            InUseError: another process has it open. Nothing has changed.
            DiskFullError: there is no room for the copy. Nothing has changed.
        """
        self.refuse_lost()
        if self.failed is not None or self.abandoned is not None:
            raise FailedError(self.failed or "a transaction was ended by another thread", path=self.folder)
        self._env.close()
        try:
            with alone(self.folder):
                env = lmdb.open(
                    self.folder, readonly=True, lock=False, create=False, map_size=self.map_size, max_dbs=8, lib_version=0
                )
                try:
                    newest = int(env.info()["last_txnid"])
                    env.copyfd(fd, compact=True)
                except lmdb.Error as error:
                    raise self.translated(error) from error
                finally:
                    env.close()
                number = renumber(path, newest + 1)
                os.fsync(fd)
                self.generation[0] = number  # ahead of the commit, as ever: a crash in between misleads nobody
                os.replace(path, self.data)
                if self.sync:
                    _fs.fsync_folder(self.folder)
        finally:
            self._attach()
            self.files = {name: identity_of(os.path.join(self.folder, name)) for name in _FILES}

    def reader_check(self) -> None:
        """The slots of readers that have died are free, and so are the pages that they held."""
        with GATE.entered():
            self._env.reader_check()

    def close(self) -> None:
        """Let go of the environment; nobody uses it any more."""
        with GATE.alone():
            self._env.close()


_DATABASES = ("index", "order", "pending", "meta", "changed")
_FILES = ("data.mdb", "lock.mdb", "generation")


def identity_of(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def code_of(error: lmdb.Error) -> int:
    code: int = getattr(error, "code", 0)  # errors of the binding itself have none
    return code


def _fits(size: int) -> bool:
    if os.name == "nt":
        return True
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def damaged(folder: str, what: str) -> CorruptError:
    """The error for an index that is not what was written."""
    return CorruptError(
        f"the index in {folder} is damaged: {what}. Put the folder back from a backup; the value files beside it are "
        "unharmed, and pickle.load reads them.",
        path=folder,
    )
