"""The two interfaces behind a chest: a small, ordered, versioned *index*, and *blobs* that are written once.

``core`` knows only these. The default is LMDB and files (``engines``); Redis and object stores fit behind them too, because
the primitives are batches (one round trip each) and nothing here needs a lock that outlives a call. Optional powers are
methods with a working default, never flags.

Terms: ``key`` is the user's object, ``name`` its encoding (``bytes``, equal exactly for equal keys), ``seq`` the place of a
key in insertion order, ``version`` the number of the commit that wrote a record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

__all__ = ["Blobs", "Commit", "Index", "OrderItem", "Put", "Record", "Row"]


class Record(NamedTuple):
    """What the index holds for one key. ``body`` is opaque to it, and ``kind`` but for its lowest two bits (see ``commit``)."""

    version: int  # number of the commit that wrote it
    seq: int  # place in insertion order
    kind: int  # 0..255
    body: bytes


class Put(NamedTuple):
    """One record to be written.

    If the key is in the index already, its ``seq`` and ``typed`` are kept, unless ``fresh`` says that it was deleted in
    between and thus moves to the place ``seq``.
    """

    name: bytes  # 1 to 511 bytes
    seq: int
    kind: int
    body: bytes
    typed: bytes = b""  # what gives the key back where its name does not
    fresh: bool = False


Row = tuple[bytes, int, int, bytes, bytes, bool]
"""The same as a plain tuple, which is made in a fifth of the time."""


class OrderItem(NamedTuple):
    """One key in insertion order."""

    seq: int
    name: bytes
    typed: bytes


class Commit(NamedTuple):
    """What a commit did.

    ``before`` is the version of the index that it built upon: if that is not the newest version that the caller knew,
    somebody else has written in between.
    """

    version: int
    before: int


class Index(ABC):
    """Encoded key -> record, in insertion order, with atomic and durable commits.

    Any number of threads and processes may use one at the same time. A record or note that fails its checksum raises
    ``CorruptError``; nothing here ever answers damage by "absent".

    Attributes:
        generation: one unsigned 64-bit item that differs from ``version`` of every earlier snapshot as soon as somebody
            has committed. It may run ahead of the commit by an instant, never behind it.
    """

    generation: memoryview

    @abstractmethod
    def get(self, name: bytes) -> Record | None:
        """The newest record of a key, None where there is none. The hot path of a cold read."""

    def look_up(self, name: bytes) -> Record | None:
        """As ``get``, or ``NotImplemented`` where there is more to it than a look: then ``get`` tells."""
        return self.get(name)

    @abstractmethod
    def get_many(self, names: Sequence[bytes]) -> tuple[int, list[Record | None]]:
        """The version of one snapshot, and the records in it, in the order of ``names``."""

    @abstractmethod
    def commit(
        self,
        puts: Sequence[Put] = (),
        deletes: Sequence[bytes] = (),
        *,
        notes: Callable[[dict[bytes, Record]], Sequence[bytes]] | None = None,
        meta: dict[bytes, bytes] | None = None,
    ) -> Commit:
        """Write all of it or nothing: it survives the death of the process, and once ``sync`` has returned a power cut, too.

        With notes or settings it is durable at once. Names are distinct (across puts and deletes).

        A put is a ``Put`` or a tuple with the same items.

        Deleting an absent name is no error. ``notes`` is called inside the commit with those records, by name, that are
        overwritten or deleted and whose ``kind & 3`` is not 0 (nothing outside of the index belongs to those); what it returns
        is part of the commit and kept until ``settle`` has dealt with it. It must be quick, and may be called again.
        """

    @abstractmethod
    def sync(self) -> None:
        """All that was committed here is durable on return, where the index is. One call for many commits."""

    @abstractmethod
    def settle(
        self,
        finish: Callable[[bytes, Callable[[bytes], Record | None]], bool],
        *,
        ready: Callable[[], None] | None = None,
    ) -> tuple[Commit | None, int]:
        """Call ``finish(note, get)`` for every note, oldest first, while no one else can commit; forget those done.

        ``finish`` returns whether it is done, and must be able to do a thing twice. ``get`` reads the current record of a
        name. ``ready`` is called before anything is forgotten: what ``finish`` did must be durable then. Returns the commit
        that forgot them (None if there was nothing to forget) and the number of notes left.
        """

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Index]:
        """Within the block, an index that sees the newest commit and what is written to it, which belongs to this thread.

        All that is committed to it becomes visible together, and as durable as any commit, when the block ends; nothing does
        if the block raises. Nobody else can commit meanwhile; reading goes on. ``settle`` must not be called within.
        """

    @abstractmethod
    def notes(self) -> list[bytes]:
        """The notes that have not been dealt with, oldest first."""

    @abstractmethod
    def page(self, after: int | None = None, limit: int = 1000, *, reverse: bool = False) -> list[OrderItem]:
        """Up to ``limit`` keys in insertion order, beyond ``after`` (None: from the beginning, or the end if ``reverse``).

        Each page is a snapshot of its own, so a paused iteration holds nothing up.
        """

    @abstractmethod
    def names(self, prefix: bytes) -> list[bytes]:
        """All names with this prefix, sorted. For the few keys that are kept in memory."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def version(self) -> int:
        """The version of the newest commit."""

    @abstractmethod
    def last_seq(self) -> int:
        """The greatest place in use, 0 where the index is empty."""

    @abstractmethod
    def meta(self, name: bytes) -> bytes | None:
        """A setting of the chest."""

    def changed_since(self, version: int) -> tuple[int, list[tuple[bytes, bytes]] | None]:
        """The version of the newest commit, and ``(name, typed)`` of what the commits after ``version`` wrote and deleted.

        None where it is not known (any more): the caller looks through the records for newer versions.
        """
        return self.version(), None

    def give_way(self) -> bool:
        """Give up what was kept for a full disk, so that something can be deleted; False where there is nothing (more)."""
        return False

    def busy(self) -> bool:
        """Whether this thread is in the middle of a commit, so that another one would wait for ever (for finalizers)."""
        return False

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the index takes where it is stored."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; a second call does nothing."""


class Blobs(ABC):
    """Immutable values, written once under a fresh random name, so that no cache of them is ever stale."""

    @abstractmethod
    def write(self, dump: Callable[[Any], Any]) -> tuple[str, int]:
        """Let ``dump(file)`` write a new blob; its name and its size in bytes. Durable after the next ``sync``.

        If ``dump`` raises, nothing remains.
        """

    @abstractmethod
    def sync(self) -> None:
        """Everything written is durable on return. One call for a batch."""

    @abstractmethod
    def read(self, name: str, label: str) -> memoryview:
        """The bytes of a blob, writable and private to the caller where that is free of cost (copy-on-write mapping).

        Raises:
            FileNotFoundError: there is no such blob.
        """

    def read_published(self, label: str, size: int) -> memoryview | None:
        """What a blob of this label and size is mostly found as, None if it is not there, or where that is no quicker.

        The caller looks whether it is the blob that was meant: it may be an older or newer one. If not, ``read`` tells.
        """
        return None

    def read_ahead(self, view: memoryview) -> None:
        """What ``read`` gave will soon be looked at. Returns at once; does nothing where that is no quicker."""
        return

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs; what is not there is no error."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; a second call does nothing."""
