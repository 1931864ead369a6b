"""The index of a folder in which not a byte may change: it is read page by page, beside whoever writes.

No lock is taken and no place among LMDB's readers, since both mean to write. Each call reads within one snapshot, and reads
again where a writer has taken that away meanwhile. The file is looked at by name each time: if another one has taken its
place (a compaction, a repair), that one is read from then on.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

from xxhash import xxh3_64_digest as _digest

from ..abc import Commit, Index, OrderItem, Put, Record
from ..errors import ChestError, ClosedError, PathError, ReadOnlyError
from ._cursors import place as _place
from ._environment import damaged
from ._pages import Damage, Pages, Snapshot

__all__ = ["ReadOnlyIndex", "unpack_order", "unpack_record"]

T = TypeVar("T")

_RECORD = struct.Struct("<QQB")
_TRIES = 1000
_PAGE_BYTES = 4 << 20


class ReadOnlyIndex(Index):
    """See the module's head. 10 us for a key.

    Raises:
        PathError: there is no index, or it may not be read.
        CorruptError: it is damaged.
    """

    def __init__(self, folder: str) -> None:
        self._folder = os.path.abspath(folder)
        self._data = os.path.join(self._folder, "data.mdb")
        self._lock = threading.RLock()
        self._pages: Pages | None = None
        self._closed = False
        self.generation = memoryview(bytes(8)).cast("Q")
        try:
            self.version()
        except FileNotFoundError as error:
            path = os.path.dirname(self._folder)
            raise PathError(
                f"there is no chest in {path}, and none is made with read_only=True: give the path of one.", path=path
            ) from error
        except ChestError:
            self.close()
            raise
        except OSError as error:
            raise PathError(f"the index {self._data} cannot be read: {error.strerror}.", path=self._data) from error
        try:
            self.generation = self._map_generation()
        except BaseException:
            self.close()
            raise

    def _map_generation(self) -> memoryview:
        """Without one that can be read, it never fits, and so every hit looks at the index."""
        never = memoryview(bytes([255] * 8)).cast("Q")
        try:
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
            fd = os.open(os.path.join(self._folder, "generation"), flags)
        except OSError:
            return never
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size < 8:
                return never
            view = memoryview(mmap.mmap(fd, 8, access=mmap.ACCESS_READ)).cast("Q")
        except (OSError, ValueError):
            return never
        finally:
            os.close(fd)
        return view if view[0] >= self.version() else never  # a copy of a folder may have an older one

    # --- snapshots

    def read(self, work: Callable[[Snapshot], T]) -> T:
        """What ``work`` returns, which is given a snapshot and may be called again."""
        problem: Exception | None = None
        with self._lock:
            for _ in range(_TRIES):
                if self._closed:
                    raise ClosedError("the index is closed")
                try:
                    pages = self._opened()
                    snapshot = pages.snapshot()
                except Damage as error:
                    problem = error  # a meta page may have been read while it was written
                    snapshot = None
                if snapshot is None:
                    continue
                try:
                    result = work(snapshot)
                except (Damage, struct.error, IndexError, RecursionError) as error:
                    problem = error
                    if snapshot.holds() and self._is_current(pages):
                        raise damaged(self._folder, str(error)) from error
                    continue
                if snapshot.holds() and self._is_current(pages):
                    return result
                problem = None
        if problem is not None:
            raise damaged(self._folder, str(problem)) from problem
        raise ChestError(f"{self._folder} is written to faster than it can be read here: try again.", path=self._folder)

    def _opened(self) -> Pages:
        if self._pages is None or not self._is_current(self._pages):
            if self._pages is not None:
                self._pages.close()
                self._pages = None
            self._pages = Pages(self._data)
        return self._pages

    def _is_current(self, pages: Pages) -> bool:
        try:
            found = os.stat(self._data, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == pages.identity

    # --- the interface

    def get(self, name: bytes) -> Record | None:
        """The newest record of a key, None where there is none."""
        data = self.read(lambda s: s.get(b"index", name))
        return None if data is None else self._record(name, data)

    def get_many(self, names: Sequence[bytes]) -> tuple[int, list[Record | None]]:
        """Records in the order of ``names``, and the version of a snapshot that none of them is older than.

        Beside a busy writer many of them cannot be read in one snapshot.
        """
        version = self.version()
        return version, [self.get(name) for name in names]

    def page(self, after: int | None = None, limit: int = 1000, *, reverse: bool = False) -> list[OrderItem]:
        """Up to ``limit`` keys in insertion order, beyond ``after``; fewer beside a busy writer."""
        if after is not None and (after <= 0 if reverse else after >= 2**64 - 1):
            return []
        start = None if after is None else _place(min(max(0, after), 2**64 - 1))
        items = self.pairs(b"order", start, limit, reverse=reverse)
        if reverse and after is not None and after >= 2**64:
            items = self.pairs(b"order", None, limit, reverse=True)
        found = [self._item(place, data) for place, data in items]
        if found and after is not None and (found[-1].seq >= after if reverse else found[-1].seq <= after):
            raise damaged(self._folder, "its order goes back")  # else whoever asks for the next page would go on for ever
        return found

    def pairs(self, database: bytes, after: bytes | None, limit: int, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """Pairs of a database beyond a key, as they are: whether they are what was written is not looked at."""
        n = limit

        def work(snapshot: Snapshot) -> list[tuple[bytes, bytes]]:
            nonlocal n
            found: list[tuple[bytes, bytes]] = []
            room = _PAGE_BYTES
            limit, n = n, max(1, n // 2)  # the next attempt is content with less
            for pair in snapshot.items(database, after, reverse=reverse):
                if len(found) >= limit or room < 0:
                    break
                found.append(pair)
                room -= len(pair[1])
            return found

        return self.read(work)

    def all_pairs(self, database: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All pairs of a database, a thousand at a time."""
        after = None
        while found := self.pairs(database, after, 1000):
            yield from found
            last = found[-1][0]
            if after is not None and last <= after:  # it would go on for ever
                raise damaged(self._folder, "its keys are out of order")
            after = last

    def names(self, prefix: bytes) -> list[bytes]:
        """All names with this prefix, sorted."""

        def work(snapshot: Snapshot) -> list[bytes]:
            found: list[bytes] = []
            if prefix and snapshot.get(b"index", prefix) is not None:
                found.append(prefix)
            for name, _ in snapshot.items(b"index", prefix or None):
                if not name.startswith(prefix):
                    break
                found.append(name)
            return found

        return self.read(work)

    def notes(self) -> list[bytes]:
        """The notes that have not been dealt with, oldest first."""
        found = self.read(lambda s: list(s.items(b"pending")))
        return [self._plain("a note", number, data) for number, data in found]

    def __len__(self) -> int:
        return self.read(lambda s: s.tree(b"order").entries)

    def version(self) -> int:
        """The version of the newest commit."""
        return self.read(lambda s: s.version)

    def last_seq(self) -> int:
        """The greatest place in use, 0 where the index is empty."""
        found = self.pairs(b"order", None, 1, reverse=True)
        return int.from_bytes(found[0][0], "big") if found else 0

    def meta(self, name: bytes) -> bytes | None:
        """A setting of the chest."""
        data = self.read(lambda s: s.get(b"meta", name))
        return None if data is None else self._plain("a setting", name, data)

    def nbytes(self) -> int:
        """The size of the index's file."""
        return os.stat(self._data).st_size

    def close(self) -> None:
        """Let go of everything; a second call does nothing."""
        with self._lock:
            self._closed = True
            self.generation = memoryview(bytes(8)).cast("Q")
            if self._pages is not None:
                self._pages.close()
                self._pages = None

    def _record(self, name: bytes, data: bytes) -> Record:
        record = unpack_record(name, data)
        if record is None:
            raise damaged(self._folder, f"a record ({name[:40]!r}) is not what was written")
        return record

    def _item(self, place: bytes, data: bytes) -> OrderItem:
        item = unpack_order(place, data)
        if item is None:
            raise damaged(self._folder, f"the order ({place!r}) is not what was written")
        return item

    def _plain(self, what: str, key: bytes, data: bytes) -> bytes:
        if _digest(key + data[:-8]) != data[-8:]:
            raise damaged(self._folder, f"{what} ({key[:40]!r}) is not what was written")
        return data[:-8]

    # --- writing

    def _refuse(self) -> NoReturn:
        path = os.path.dirname(self._folder)
        raise ReadOnlyError(f"the chest at {path} was opened with read_only=True: open it without to write to it.", path=path)

    def commit(self, puts: Sequence[Put] = (), deletes: Sequence[bytes] = (), **_: Any) -> Commit:
        self._refuse()

    def sync(self) -> None:
        """There is nothing that would not be durable yet."""

    def settle(self, finish: Any, *, ready: Any = None) -> tuple[Commit | None, int]:
        self._refuse()

    def transaction(self) -> AbstractContextManager[Index]:
        self._refuse()


def unpack_record(name: bytes, data: bytes) -> Record | None:
    """A record as the index holds it, None if that is not what was written."""
    if len(data) < _RECORD.size + 8 or _digest(name + data[:-8]) != data[-8:]:
        return None
    version, seq, kind = _RECORD.unpack_from(data)
    return Record(version, seq, kind, data[_RECORD.size : -8])


def unpack_order(place: bytes, data: bytes) -> OrderItem | None:
    """An item of the order as the index holds it, None if that is not what was written."""
    if len(place) != 8 or len(data) < 10 or _digest(place + data[:-8]) != data[-8:]:
        return None
    end = 2 + data[0] + (data[1] << 8)
    if end > len(data) - 8:
        return None
    return OrderItem(int.from_bytes(place, "big"), data[2:end], data[end:-8])
