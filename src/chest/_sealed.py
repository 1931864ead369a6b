"""An index all of whose content is sealed with the chest's key: nothing that another key wrote, or another place held, is read.

It stands in front of any other index. What that one stores are closed messages: the bodies of records (bound to their name and
kind), keys (bound to their name) and notes. In an encrypted chest names are keyed hashes, and a key's true name stands beside
it in the message. What the index itself decides cannot be covered: versions, places in the order, and which records there
are. So older records of the same key, deletions and another order are not noticed.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence

from ._sealing import KEY, NOTE, RECORD, Seal
from .abc import Commit, Index, OrderItem, Put, Record
from .errors import CorruptError, TamperedError, short

__all__ = ["SealedIndex"]

_LENGTH = struct.Struct("<H")


class SealedIndex(Index):
    """What ``stored`` holds, sealed by ``seal``. Costs 2 to 5 us a record more, each way."""

    def __init__(self, index: Index, seal: Seal, path: str) -> None:
        self.stored = index
        self.seal = seal
        self._path = path  # of the chest, for errors
        self.generation = index.generation

    # --- reading

    def get(self, name: bytes) -> Record | None:
        stored = self.seal.name(name)
        record = self.stored.get(stored)
        return None if record is None else self._opened(name, stored, record)

    def get_many(self, names: Sequence[bytes]) -> tuple[int, list[Record | None]]:
        stored = [self.seal.name(name) for name in names]
        version, records = self.stored.get_many(stored)
        opened = [
            None if record is None else self._opened(name, place, record)
            for name, place, record in zip(names, stored, records, strict=True)
        ]
        return version, opened

    def notes(self) -> list[bytes]:
        return [self._opened_note(note) for note in self.stored.notes()]

    def page(self, after: int | None = None, limit: int = 1000, *, reverse: bool = False) -> list[OrderItem]:
        return [
            OrderItem(item.seq, *self._opened_key(item.name, item.typed))
            for item in self.stored.page(after, limit, reverse=reverse)
        ]

    def names(self, prefix: bytes) -> list[bytes]:
        """All names with this prefix; of an encrypted chest those of opaque keys only, which are random numbers."""
        return self.stored.names(prefix)

    def __len__(self) -> int:
        return len(self.stored)

    def version(self) -> int:
        return self.stored.version()

    def last_seq(self) -> int:
        return self.stored.last_seq()

    def meta(self, name: bytes) -> bytes | None:
        """A setting. It was authenticated when the chest was opened."""
        return self.stored.meta(name)

    def changed_since(self, version: int) -> tuple[int, list[tuple[bytes, bytes]] | None]:
        newest, changed = self.stored.changed_since(version)
        return newest, None if changed is None else [self._opened_key(name, typed) for name, typed in changed]

    def nbytes(self) -> int:
        return self.stored.nbytes()

    # --- writing

    def commit(
        self,
        puts: Sequence[Put] = (),
        deletes: Sequence[bytes] = (),
        *,
        notes: Callable[[dict[bytes, Record]], Sequence[bytes]] | None = None,
        meta: dict[bytes, bytes] | None = None,
    ) -> Commit:
        seal = self.seal
        true = {seal.name(name): name for name in [*(put[0] for put in puts), *deletes]}
        sealed = []
        for name, seq, kind, body, typed, fresh in puts:
            stored = seal.name(name)
            if seal.hides:
                typed = _LENGTH.pack(len(name)) + name + typed
            body, typed = seal.close(RECORD, kind, stored, body), seal.close(KEY, 0, stored, typed)
            sealed.append(Put(stored, seq, kind, body, typed, fresh))

        def sealed_notes(replaced: dict[bytes, Record]) -> list[bytes]:
            assert notes is not None
            opened = {}
            for stored, record in replaced.items():
                with contextlib.suppress(CorruptError):  # it does not keep its key from being written or deleted
                    opened[true[stored]] = self._opened(true[stored], stored, record)
            return [seal.close(NOTE, 0, b"", note) for note in notes(opened)]

        stored_deletes = [seal.name(name) for name in deletes]
        return self.stored.commit(sealed, stored_deletes, notes=None if notes is None else sealed_notes, meta=meta)

    def sync(self) -> None:
        self.stored.sync()

    def settle(
        self,
        finish: Callable[[bytes, Callable[[bytes], Record | None]], bool],
        *,
        ready: Callable[[], None] | None = None,
    ) -> tuple[Commit | None, int]:
        def opened(note: bytes, get: Callable[[bytes], Record | None]) -> bool:
            def opened_get(name: bytes) -> Record | None:
                stored = self.seal.name(name)
                record = get(stored)
                return None if record is None else self._opened(name, stored, record)

            return finish(self._opened_note(note), opened_get)

        return self.stored.settle(opened, ready=ready)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Index]:
        with self.stored.transaction() as index:
            yield self.in_front_of(index)

    def in_front_of(self, index: Index) -> SealedIndex:
        """The same for another view of what is stored, such as one within a transaction."""
        return SealedIndex(index, self.seal, self._path)

    def give_way(self) -> bool:
        return self.stored.give_way()

    def busy(self) -> bool:
        return self.stored.busy()

    def close(self) -> None:
        self.stored.close()
        self.generation = self.stored.generation

    # --- opening

    def _opened(self, name: bytes, stored: bytes, record: Record) -> Record:
        try:
            body = self.seal.open(RECORD, record.kind, stored, record.body)
        except TamperedError as error:
            raise TamperedError(f"the record of {short(name)} is not to be trusted: {error}", path=self._path) from None
        return Record(record.version, record.seq, record.kind, body)

    def _opened_key(self, stored: bytes, sealed: bytes) -> tuple[bytes, bytes]:
        try:
            typed = self.seal.open(KEY, 0, stored, sealed)
        except TamperedError as error:
            raise TamperedError(
                f"the order of keys in {self._path} is not to be trusted at {short(stored)}: {error}. Put the chest back "
                "from a backup.",
                path=self._path,
            ) from None
        if not self.seal.hides:
            return stored, typed
        end = _LENGTH.size + _LENGTH.unpack_from(typed)[0]
        return typed[_LENGTH.size : end], typed[end:]

    def _opened_note(self, note: bytes) -> bytes:
        try:
            return self.seal.open(NOTE, 0, b"", note)
        except TamperedError as error:
            raise TamperedError(
                f"a note of the index of {self._path} is not to be trusted: {error}. Put the chest back from a backup.",
                path=self._path,
            ) from None
