"""Blobs as files, which carry a random name until a commit refers to them, and then the one that shows their key.

    root/.keys/new/<owner>-<random>    written, synced, not yet published
    root/<label>                       published: renamed to where a person would look for it

A reader looks in ``new/`` first and then under the label; files move in this direction only, so it finds one of them. Who
can tell whether a file is the right one may look under the label before all that: it is nearly always there.
What lies in ``new/``, belongs to no living process and is mentioned by no note of the index was never committed: the
next opener removes it. The name tells the owner, so that files of processes that are still writing are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import re
import stat
import threading
from collections.abc import Callable, Iterable
from typing import Any

from .. import _fs
from ..abc import Blobs
from ..errors import CorruptError, FailedError, PathError
from ._labels import below, parts_of
from ._mapping import map_privately, read_ahead
from ._owners import join, leave

__all__ = ["FileBlobs"]

_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_TO_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _FLAGS  # a FIFO would wait for a writer
AT_A_TIME = 1 << 20  # bytes of a file that the disk is told to begin with
_NAME = re.compile(r"[0-9a-z][0-9a-zA-Z-]{0,200}")
_is_word = re.compile(r"[0-9a-zA-Z_]{1,200}").fullmatch  # a label that can only be a file right below the root
_BEFORE_SYNCING = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EMFILE, errno.ENFILE)  # nothing was lost: try again
_UNUSABLE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ELOOP)


class _Whole(io.FileIO):
    """A file whose ``write`` writes all of it: the system's stops at 2 GiB and wherever it likes."""

    on_its_way: Callable[[int], None] | None = None  # called when another ``AT_A_TIME`` bytes have been written
    _n_new = 0

    def write(self, data: Any, /) -> int:
        done = super().write(data)
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        while done < size:
            done += super().write(pickle.PickleBuffer(data).raw()[done:])
        self._n_new += done
        if self._n_new >= AT_A_TIME and self.on_its_way is not None:
            self._n_new = 0
            self.on_its_way(self.fileno())
        return done


class FileBlobs(Blobs):
    """Blobs in files below ``root``.

    Args:
        root: the chest's folder.
        sync: values are durable when ``sync`` returns, renames when ``publish`` does.
        opener: opens files for writing instead of ``open``, as in ``opener(path, mode="w" + mode)``.
        mode: "b" or "t", for ``opener`` only.
    """

    def __init__(self, root: str, *, sync: bool = True, opener: Callable[..., Any] | None = None, mode: str = "b") -> None:
        self.root = root
        self._prefix = os.path.join(root, "")
        self._new = os.path.join(root, ".keys", "new")
        self._sync = sync
        self._opener = opener
        self._mode = mode
        self._joined: tuple[tuple[int, int], _fs.Owner] | None = None
        self._lock = threading.RLock()
        self._unsynced: set[str] = set()  # folders
        self._failed = False

    # --- writing

    def write(self, dump: Callable[[Any], Any]) -> tuple[str, int]:
        """Let ``dump(file)`` write a new blob; its name and its size in bytes. Durable after the next ``sync``.

        ``file`` is unbuffered. If ``dump`` raises, nothing remains.

        Raises:
            DiskFullError: nothing was lost.
            FailedError: the disk did not take what it had accepted; nothing is written any more.
        """
        name, fd = self._create()
        path = os.path.join(self._new, name)
        try:
            if self._opener is None:
                with _Whole(fd, "wb") as file:
                    if self._sync:
                        file.on_its_way = self._start_writing_back
                    dump(file)
                    return name, self._written(file.fileno())
            os.close(fd)
            with self._opener(path, mode="w" + self._mode) as file:
                dump(file)
            fd = os.open(path, os.O_RDONLY | _FLAGS)
            try:
                return name, self._written(fd)
            finally:
                os.close(fd)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            full = _fs.as_disk_full(error, path) if isinstance(error, OSError) else None
            if full is not None:
                raise full from error
            raise

    def _written(self, fd: int) -> int:
        if self._sync:
            self._durably(os.fsync, fd)
        self._unsynced.add(self._new)
        return os.fstat(fd).st_size

    def _start_writing_back(self, fd: int) -> None:
        """While the rest is hashed and copied, the disk has something to do: a third of the time that a large file takes."""
        self._durably(_fs.start_writing_back, fd)

    def _durably(self, sync: Callable[[Any], None], what: Any) -> None:
        try:
            sync(what)
        except OSError as error:
            if error.errno in _BEFORE_SYNCING:
                raise
            self._failed = True  # the kernel has dropped what it could not write: a second try would seem to succeed
            raise self._failure() from error

    def _failure(self) -> FailedError:
        return FailedError(
            f"the disk under {self.root} failed: what it accepted it could not keep. Nothing more is written; what is "
            "in memory stays readable. Look after the disk, then open the chest again.",
            path=self.root,
        )

    def _create(self) -> tuple[str, int]:
        """A new empty file in ``new/``."""
        if self._failed:
            raise self._failure()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        try:
            owner = self._owner()
            while True:
                name = f"{owner.token}-{os.urandom(8).hex()}"
                with contextlib.suppress(FileExistsError):
                    return name, os.open(os.path.join(self._new, name), flags, 0o600)
        except OSError as error:
            full = _fs.as_disk_full(error, self._new)
            if full is not None:
                raise full from error
            if error.errno in _UNUSABLE:
                raise PathError(
                    f"no value file can be made in {self._new}: {error.strerror}. Was the folder moved, removed or "
                    "made read-only while the chest was open? Put it back, or open the chest again.",
                    path=self._new,
                ) from error
            raise

    def _owner(self) -> _fs.Owner:
        joined = self._joined
        if joined is None or joined[1].pid != os.getpid():
            with self._lock:
                joined = self._joined
                if joined is None or joined[1].pid != os.getpid():
                    self._make_new()
                    joined = self._joined = join(self._new)
        return joined[1]

    def _make_new(self) -> None:
        keys = os.path.dirname(self._new)
        if not stat.S_ISDIR(os.lstat(self.root + os.sep).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.root)
        for folder in (keys, self._new):
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise PathError(f"{folder} is no folder: move it away.", path=folder) from None
            else:
                if self._sync:
                    self._durably(_fs.fsync_folder, os.path.dirname(folder))

    def link(self, path: str) -> str:
        """A new blob with the content of a file, by a hard link, or by a copy across file systems; its name."""
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError(f"{path} is no regular file", path=path)
        name, fd = self._create()
        os.close(fd)
        new = os.path.join(self._new, name)
        try:
            os.unlink(new)
            try:
                os.link(path, new, follow_symlinks=False)
            except (OSError, NotImplementedError):
                return self.write(lambda file: _copy(path, file))[0]
            fd = os.open(new, os.O_RDONLY | _FLAGS)
            try:
                self._written(fd)  # its own chest may have written it without syncing
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise
        return name

    def sync(self) -> None:
        """Everything written is durable on return, and every rename. One call for a batch."""
        if not self._sync:
            self._unsynced.clear()
            return
        with self._lock:  # a second caller must wait for the first: what it wrote may be in that one's batch
            if self._failed:
                raise self._failure()
            while self._unsynced:
                folder = next(iter(self._unsynced))
                try:
                    self._durably(_fs.fsync_folder, folder)
                except FileNotFoundError:  # removed since: that is what must be durable then
                    if folder != self.root:
                        self._unsynced.add(os.path.dirname(folder))
                self._unsynced.discard(folder)

    def write_copy(self, label: str, data: bytes) -> None:
        """A copy of a small value lies under its label, for people to look at. Never synced, never read by chest.

        Raises:
            OSError: it cannot (something that is no file is in the way, for instance).
        """
        name, fd = self._create()
        path = os.path.join(self._new, name)
        try:
            try:
                _fs.write_all(fd, data)
            finally:
                os.close(fd)
            with below(self.root, label, create=True) as (folder, last):
                os.replace(path, last, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise

    # --- reading

    def read(self, name: str, label: str) -> memoryview:
        """The bytes of a blob: a private, writable mapping, which stays valid when the file is renamed or removed.

        Raises:
            FileNotFoundError: there is no such blob.
            CorruptError: something that is no regular file lies in its place, or the label leads elsewhere.
        """
        fd = self._open(name, label)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise CorruptError(f"{self.path(name, label)} is no regular file", path=self.path(name, label))
            return map_privately(fd, found.st_size) if found.st_size else memoryview(b"")
        finally:
            os.close(fd)

    def read_ahead(self, view: memoryview) -> None:
        read_ahead(view)

    def read_published(self, label: str, size: int) -> memoryview | None:
        """What lies under a label, as ``read`` gives it, if it is a regular file of this size.

        Which is mostly the blob that the caller looks for. But it may be another one that has, or had, the same label.

        Raises:
            OSError, CorruptError: nothing can be read there.
        """
        if _is_word(label):
            fd = os.open(self._prefix + label, _TO_READ)
        else:
            with below(self.root, label) as (folder, last):
                fd = os.open(last, _TO_READ, dir_fd=folder)
        try:
            found = os.fstat(fd)
            if found.st_size != size or not size or not stat.S_ISREG(found.st_mode):
                return None
            return map_privately(fd, size)
        finally:
            os.close(fd)

    def _open(self, name: str, label: str) -> int:
        path = self.path(name, label, new=True)
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # .keys of chest 0.2 is a file
                return os.open(path, _TO_READ)
            if not label:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            path = self.path(name, label, new=False)
            if "/" not in label:
                return os.open(path, _TO_READ)
            with below(self.root, label) as (folder, last):
                return os.open(last, _TO_READ, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
                raise CorruptError(f"{path} is a link or a device, not a file of this chest", path=path) from error
            if isinstance(error, PathError):
                raise CorruptError(error.message, path=error.path) from error
            raise

    def path(self, name: str, label: str, *, new: bool | None = None) -> str:
        """Where the file of a blob is right now (with ``new``: where it is before or after it is published)."""
        if not _NAME.fullmatch(name):
            raise CorruptError(f"{name[:80]!r} is no name of a value file")
        path = os.path.join(self._new, name)
        if new or not label or (new is None and os.path.lexists(path)):
            return path
        return os.path.join(self.root, *parts_of(label))

    def exists(self, label: str) -> bool:
        """Whether anything at all lies under the label."""
        try:
            with below(self.root, label) as (folder, last):
                os.stat(last, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except PathError:  # something else is in the way
            return True
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return False
            raise
        return True

    # --- names

    def publish(self, name: str, label: str, *, replace: bool = False, sync: bool | None = None) -> bool:
        """Rename a blob to its label; True when that was done, now or before (or the blob is gone), else False.

        Without ``replace`` nothing that lies there is touched. By default the rename is durable on return: the note
        that tells of it must not be forgotten before. ``sync=False`` puts that off to the next ``sync``.
        """
        path = self.path(name, label, new=True)
        if self._is_gone(path):
            return True
        try:
            with below(self.root, label, create=True) as (folder, last):
                if not replace:
                    try:
                        os.stat(last, dir_fd=folder, follow_symlinks=False)
                        return False
                    except FileNotFoundError:
                        pass
                os.replace(path, last, dst_dir_fd=folder)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, PathError):
            return self._is_gone(path)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EINVAL):
                return False
            full = _fs.as_disk_full(error, path)
            if full is not None:
                raise full from error
            raise
        parts = parts_of(label)
        # All folders on the way: some may have been made for it.
        self._unsynced |= {self._new, *(os.path.join(self.root, *parts[:n]) for n in range(len(parts)))}
        if self._sync if sync is None else sync:
            self.sync()
        return True

    @staticmethod
    def _is_gone(path: str) -> bool:
        """Not as ``os.path.lexists``, which takes every error for an answer: what cannot be looked at is not gone."""
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return False

    def unlink(self, label: str) -> None:
        """What lies under a label is gone if it is a file or a link, and so are folders above it that are empty now."""
        try:
            with below(self.root, label) as (folder, last):
                if stat.S_ISDIR(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
                    return
                os.unlink(last, dir_fd=folder)
        except FileNotFoundError:
            pass
        except PathError:
            return
        parts = parts_of(label)
        self._unsynced.add(os.path.dirname(os.path.join(self.root, *parts)))  # even if it was gone: maybe not durably so
        with contextlib.suppress(OSError):  # not empty, or a link: not ours to remove
            while len(parts) > 1:
                parts.pop()
                os.rmdir(os.path.join(self.root, *parts))

    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs that are not published; what is not there is no error."""
        for path in [self.path(name, "", new=True) for name in names]:
            with contextlib.suppress(FileNotFoundError):
                if self._has_new():
                    os.unlink(path)

    def _has_new(self) -> bool:
        """Whether ``new/`` is a folder: through a link one would come to files that are not the chest's."""
        try:
            return stat.S_ISDIR(os.lstat(self._new).st_mode)
        except OSError:
            return False

    def sweep(self, noted: Callable[[], Iterable[bytes | str]]) -> int:
        """Remove what dead processes wrote and never committed; the number of files.

        ``noted`` is called only if there is such a file, and only after its process is known to be dead: what that one
        committed can be seen by then. A file whose name occurs in one of the notes stays.
        """
        if not self._has_new():
            return 0
        # Files before owners: whoever owns one of them was there before it.
        names = [name for name in os.listdir(self._new) if _NAME.fullmatch(name) and not name.startswith("owner-")]
        dead = set(_fs.dead_owners(self._new))
        alive = set(_fs.owners(self._new)) - dead
        left = [name for name in names if name.rpartition("-")[0] not in alive]
        if left:
            notes = b"\0".join(os.fsencode(note) for note in noted())
            left = [name for name in left if name.encode() not in notes]
            self.remove(left)
        for token in dead:
            _fs.forget(self._new, token)
        return len(left)

    def close(self) -> None:
        """Own nothing any more. Views that were read stay valid."""
        with self._lock:
            joined, self._joined = self._joined, None
            if joined is not None:
                leave(*joined)


def _copy(path: str, file: Any) -> None:
    with open(path, "rb") as source:
        while part := source.read(1 << 20):
            file.write(part)
