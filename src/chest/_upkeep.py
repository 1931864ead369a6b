"""What keeps a chest in good order: checking it, giving room back, making a copy of it while others write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator
from typing import NamedTuple, TypeVar

from . import _fs
from ._backup import backup
from ._check_files import strays
from ._processes import Portable
from ._repairing import Problem, found_by
from ._sealed import SealedIndex
from ._trust import Trust
from .engines._legacy import LegacyIndex
from .engines._lmdb import LmdbIndex
from .errors import ChestError

__all__ = ["Stats", "Upkeep"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Stats(NamedTuple):
    """Counts since the chest was opened, and sizes now, in bytes."""

    keys: int
    in_memory: int
    memory_bytes: int
    disk_bytes: int
    hits: int
    misses: int
    spills: int
    writes: int


class Upkeep(Portable[K, V]):
    """The part of a chest that is about its folder as a whole."""

    _guarded: bool  # nobody who can write to the folder can run code in this process

    def check(self) -> Iterator[Problem]:
        """What is wrong with the folder, as ``chest.check`` finds it: of all that was committed, beside whoever writes.

        It is read as this chest reads it: with its serializer, its allow-list and its key. What is unwritten in memory is not
        looked at. Nothing is written. To have it mended, close the chest and call ``chest.check(path, repair=True)``.
        """
        self._usable()
        store = self._store
        index = store.index
        seal = index.seal if isinstance(index, SealedIndex) else None
        return found_by(Trust(self.path, store.codec, allow=self._given["allow"], seal=seal, guarded=self._guarded))

    def compact(self) -> int:
        """Give the room back to the disk that deleted and replaced values have left; the number of bytes.

        The index, which otherwise never shrinks, is copied without its free pages and takes the place of the old one at one
        instant, so that a crash leaves the one or the other. What is unwritten is written first. Value files that their keys
        have another value than are removed (crashes leave none; a copied folder may). Needs room for a second index, and takes
        about a second for each GB of it. Other chests of this process go on when it is done, chests that only read go on
        meanwhile.

        Raises:
            InUseError: another process has the chest open. Nothing has changed.
            DiskFullError: there is no room for the copy. Nothing has changed.
            ReadOnlyError, and what ``sync`` raises.
        """
        with self.lock:
            index = self._to_copy("compact")
            before = _fs.folder_bytes(self.path)
            store = self._store
            blobs = store.blobs
            if store.plain:
                for label in list(strays(self.path, store.codec)):
                    with index.transaction():
                        if label in strays(self.path, store.codec, label):
                            blobs.unlink(label)
            name, fd = blobs._create()
            try:
                index.compact(fd, blobs.path(name, "", new=True))
            except OSError as error:
                raise _fs.as_disk_full(error, self.path) or error from error
            finally:
                os.close(fd)
                blobs.remove([name])
            blobs.sync()
            return max(0, before - _fs.folder_bytes(self.path))

    def backup(self, dest: str | os.PathLike[str]) -> None:
        """A chest lies at ``dest`` that holds what this one holds now; durable on return, and whole or not there at all.

        Others may read and write meanwhile; writers wait as long as it takes to copy the index (about a second for each GB).
        What is unwritten here is written first. On the same file system value files are hard-linked, which takes no room:
        they are never changed, only replaced. Readable copies of small values are not copied.

        Args:
            dest: a folder that is not there yet, or empty.

        Raises:
            PathError: there is something at ``dest``, it lies within the chest, or cannot be made.
            DiskFullError: there is no room.
            ReadOnlyError, and what ``sync`` raises.
        """
        dest = os.fspath(dest)
        with self.lock:
            index = self._to_copy("backup")
        sealed = self._store.index
        backup(self._store, index, dest, sealed.in_front_of if isinstance(sealed, SealedIndex) else lambda index: index)

    def _to_copy(self, method: str) -> LmdbIndex:
        """The index, with everything written."""
        self._writable()
        self._no_transaction(method)
        self.sync()
        index = self._store.index
        if isinstance(index, SealedIndex):
            index = index.stored
        if isinstance(index, LegacyIndex):
            index = index.upgrade()
        if not isinstance(index, LmdbIndex):
            raise ChestError(f"{method}() is of no use to this chest at {self.path}", path=self.path)
        with contextlib.suppress(OSError):
            self._store.settle()
            self._take_commits()
        return index

    def stats(self) -> Stats:
        """Counts and sizes. Costs a walk through the folder."""
        with self.lock:
            return Stats(
                len(self),
                len(self._entries),
                self._tier.usage,
                _fs.folder_bytes(self.path),
                self._hits,
                self._misses,
                self._spills,
                self._writes,
            )

    def __str__(self) -> str:
        return f"<{type(self).__name__} at {self.path}>"

    def __repr__(self) -> str:
        if self._closed and not self._forked:
            return f"<{type(self).__name__} at {self.path}: closed>"
        try:
            s = self.stats()
        except ChestError as error:
            return f"<{type(self).__name__} at {self.path}: {error}>"
        keys = f"{s.keys:,} key{'' if s.keys == 1 else 's'}"
        return (
            f"<{type(self).__name__} at {self.path}: {keys}, {_size(s.memory_bytes)} in memory, {_size(s.disk_bytes)} on disk>"
        )

    def _no_transaction(self, method: str) -> None:
        raise NotImplementedError


def _size(n: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
