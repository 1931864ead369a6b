"""The store: values by key behind an index and blobs. It knows no memory tier and no user's dictionary order of work.

Order of a write, which every crash must leave readable: large values go to files under random names and are synced; *then*
one index commit refers to them; only then are they renamed to names that show their keys, and files that nothing refers to
any more are unlinked. What is left to do after the commit stands in the commit itself, as notes; ``settle`` works them off,
after each write and when a chest is opened. The other order (rename first) could leave a key that points at nothing.

A record is one of three kinds: PACKED (the serialized value lies in the index), LOOSE (the same, and a readable copy lies
under the key's file name) and BLOB (the body is a ``Ref`` to a value file). Each may be in an envelope (see ``_envelope``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import xxhash

from . import _fs
from ._changes import is_immutable
from ._hot import may_be_reached, pack_rows
from ._publishing import Publisher
from ._records import (
    BLOB,
    COMMIT_BYTES,
    KIND,
    LOOSE,
    PACKED,
    SMALL,
    Adopted,
    Baseline,
    FileBaseline,
    Ref,
    Unwritten,
    Written,
    key_note,
    pack_note,
)
from ._valuefile import Layout
from .abc import Put, Record, Row
from .errors import ChestError, CorruptError, DiskFullError, FailedError, SerializeError, WriteError, short

__all__ = ["Store"]

LARGE_INDEX = 100_000  # keys; in a larger one each value may lie on a page of its own, which a commit holds in memory
COMMIT_ITEMS = 4096  # so that it takes no more than this many there: 16 MiB of pages
FEW = 16  # deletions that need no more room than an index keeps in reserve

_Fill = Callable[[Iterator[Any], "_Batch", dict[Any, ChestError]], bool]
_hash = xxhash.xxh3_64_intdigest


class _Batch:
    """What one commit is to write: the nth of ``items``, ``puts`` and ``baselines`` belong together.

    Small values come by the ten thousand: a tuple for each of them would cost the garbage collector more than the rest of it.

    Attributes:
        files: names of the value files among them, which nothing refers to before the commit.
    """

    __slots__ = ("baselines", "files", "items", "puts")

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.puts: list[Row] = []
        self.baselines: list[Baseline] = []
        self.files: list[str] = []

    def add(self, item: Any, put: Row, baseline: Baseline) -> None:
        self.items.append(item)
        self.puts.append(put)
        self.baselines.append(baseline)


class Store(Publisher):
    """Values by key, on an index and blobs.

    Not locked: the chest calls it under its own lock (reads from several threads are fine, index and blobs see to that).
    """

    # --- writing

    def write(self, items: Sequence[Unwritten], deletes: Iterable[tuple[Any, bytes]] = (), *, durable: bool = True) -> Written:
        """Write values and deletions; what cannot be serialized is left out and reported.

        All or nothing up to 4 MiB of small values (and, where there are more than 100,000 keys, 4,096 of them); beyond that in
        several commits, in the order given. On return it survives a power cut, or if it need not be ``durable`` the death of
        the process: a power cut may undo the last commits then, until something else is made durable.
        On a full disk deletions go first, for the room that they make.
        """
        doomed = list(deletes)
        written = self._in_batches(items, self._serialize, doomed, durable)
        if isinstance(written.error, DiskFullError) and doomed and not written.commits and self._make_room(doomed):
            return self._in_batches(items, self._serialize, [], durable)
        return written

    def _make_room(self, doomed: list[tuple[Any, bytes]]) -> bool:
        """Delete a few at first, which takes a few pages, and then more and more: each commit frees some for the next."""
        start, n = 0, len(doomed)
        while start < len(doomed):
            error = self._in_batches((), self._serialize, doomed[start : start + n]).error
            if error is None:
                start, n = start + n, 2 * n
            elif not isinstance(error, DiskFullError) or not (n > FEW or self.index.give_way()):
                return False
            else:
                n = FEW
        return True

    def adopt(self, items: Sequence[Adopted]) -> Written:
        """Take over values of another store with the same serializer. Otherwise as ``write``."""
        return self._in_batches(items, self._take_over, [])

    def _in_batches(self, items: Sequence[Any], fill: _Fill, doomed: list[tuple[Any, bytes]], durable: bool = True) -> Written:
        if self.before_writing is not None:
            self.before_writing()
            self.before_writing = None
        written = Written([], {})
        rest = iter(items)
        batch = _Batch()
        try:
            while fill(rest, batch, written.failed):
                self._commit(batch, doomed, written)
                batch, doomed = _Batch(), []
            if batch.items or doomed:
                self._commit(batch, doomed, written)
            if durable:
                self.index.sync()
        except ChestError as error:
            self._discard(batch)
            return written._replace(error=error)
        except OSError as error:
            self._discard(batch)
            problem = _fs.as_disk_full(error, self.path) or WriteError(
                f"the chest at {self.path} could not be written: {error}. What is not on disk stays in memory: make what it "
                "needs work and flush again.",
                path=self.path,
            )
            problem.__cause__ = error
            return written._replace(error=problem)
        except BaseException:
            self._discard(batch)
            raise
        return written

    def _discard(self, batch: _Batch) -> None:
        with contextlib.suppress(OSError):  # the next opener removes them
            self.blobs.remove(batch.files)

    def _serialize(self, items: Iterator[Unwritten], batch: _Batch, failed: dict[Any, ChestError]) -> bool:
        """Put values into a batch until it is full; False if they are all in it."""
        dumps, dumps_plain, encode, fixed = self.codec.dumps, self.codec.dumps_plain, self.codec.encode, is_immutable
        size, small = 0, 0 if self._files_only else 2 * SMALL
        wraps = self._envelope is not None and self._envelope.compression is not None  # which is done one by one
        most = COMMIT_ITEMS if len(self.index) > LARGE_INDEX else sys.maxsize
        part, n_failed = islice(items, most), len(failed)
        while True:
            item, more = pack_rows(
                part,
                dumps,
                dumps_plain,
                fixed,
                _hash,
                0 if wraps else small,
                SMALL,
                COMMIT_BYTES - size,
                batch.items,
                batch.puts,
                batch.baselines,
            )
            size += more
            if item is None:
                return size >= COMMIT_BYTES or len(batch.items) + len(failed) - n_failed >= most
            key, value = item.key, item.value
            try:
                name, typed = encode(key) or (self.name(key, create=True) or b"", self.codec.typed(key))
                row: Row
                if item.dirty:
                    item.lent = may_be_reached(item)  # asked before: see `_changes`
                if item.size < small and len(body := dumps(value)) < SMALL:
                    baseline: Baseline = None if fixed(value) else _hash(body)
                    kind = PACKED
                    if self._envelope is not None:
                        kind, body = self._envelope.wrap(kind, body)
                    row = name, item.seq, kind, body, typed, item.fresh
                else:
                    row, baseline = self._serialize_blob(item, name, typed, batch)
                    body = row[3]
            except Exception as error:
                failed[key] = self._refusal(key, value, error)
                continue
            batch.add(item, row, baseline)
            size += len(body)
            if size >= COMMIT_BYTES:
                return True

    def _refusal(self, key: Any, value: Any, error: Exception) -> ChestError:
        """Why a value could not be written. Raises what concerns all of them."""
        if isinstance(error, (DiskFullError, FailedError, MemoryError)):
            raise error
        if isinstance(error, ChestError):
            return error
        if isinstance(error, OSError):
            refusal: ChestError = WriteError(
                f"the value of {short(key)} could not be written: {error}. It stays in memory: make what it needs work and "
                "flush again.",
                key=key,
            )
        else:
            refusal = SerializeError(
                f"the value of {short(key)} ({type(value).__qualname__}) cannot be written by {self.codec.name}: "
                f"{type(error).__name__}: {error}. It stays in memory: change or delete it, or choose another serializer.",
                key=key,
            )
        refusal.__cause__ = error
        return refusal

    def _serialize_blob(self, item: Unwritten, name: bytes, typed: bytes, batch: _Batch) -> tuple[Row, Baseline]:
        layout: list[Layout] = []
        baseline: Baseline
        value = item.value
        fixed = is_immutable(value)
        files = self._files
        note = key_note(name, typed)

        def dump(file: Any) -> None:
            if files is not None:
                layout.append(files.dump(value, file, note))
            elif self._opener is None:
                self.codec.dump_to(value, file)
            else:
                self.codec.dump(value, file)

        wrapping = None if self._envelope is None else self._envelope.wrapping(name, dump, stops=self._files is not None)
        blob, size = self.blobs.write(wrapping or dump)
        try:
            if not self._files_only and (size if wrapping is None else wrapping.plain) < SMALL:  # smaller than it looked
                body = self.codec.dumps(value)
                self.blobs.remove([blob])
                baseline = None if fixed else _hash(body)
                kind, body = (PACKED, body) if self._envelope is None else self._envelope.wrap(PACKED, body)
                return Put(name, item.seq, kind, body, typed, item.fresh), baseline
            if layout:
                digest, baseline = layout[-1].digest, FileBaseline(layout[-1], None)
            else:
                digest = _hash(self.blobs.read(blob, "")) if wrapping is None else wrapping.digest
                baseline = None if fixed else self.codec.digest(value)
            label = self._free_label(item.key, name)
        except BaseException:
            self.blobs.remove([blob])
            raise
        kind, ref = BLOB, Ref(size, digest or 1, blob, label)
        if wrapping is not None:
            ref = ref._replace(plain=wrapping.plain if wrapping.method else 0, seal=wrapping.seal)
            kind |= wrapping.method << 2
        batch.files.append(blob)
        return Put(name, item.seq, kind, ref.pack(), typed, item.fresh), None if fixed else baseline

    def _take_over(self, items: Iterator[Adopted], batch: _Batch, failed: dict[Any, ChestError]) -> bool:
        size = 0
        for item in items:
            key, seq, record, path = item
            try:
                name, typed = self.codec.encode(key) or (self.name(key, create=True) or b"", self.codec.typed(key))
                method = record.kind & ~KIND
                kind, body = PACKED | method, record.body
                if record.kind & KIND == BLOB:
                    kind, body = BLOB | method, self._link(key, name, Ref.unpack(body), path, batch)
            except (DiskFullError, FailedError):
                raise
            except ChestError as error:
                failed[key] = error
                continue
            batch.add(item, Put(name, seq, kind, body, typed), None)
            size += len(body)
            if size >= COMMIT_BYTES:
                return True
        return False

    def _link(self, key: Any, name: bytes, ref: Ref, path: str, batch: _Batch) -> bytes:
        """A reference to a value file, like ``ref``, of this store's own."""
        blob = self.blobs.link(path)
        try:
            body = ref._replace(blob=blob, label=self._free_label(key, name)).pack()
        except BaseException:
            self.blobs.remove([blob])
            raise
        batch.files.append(blob)
        return body

    def _commit(self, batch: _Batch, deletes: Sequence[tuple[Any, bytes]], written: Written) -> None:
        """Commit a batch and do what the commit leaves to be done."""
        items, puts = batch.items, batch.puts
        if batch.files:
            self.blobs.sync()
        copies = self._make_loose(items, puts)
        left: list[bytes] = []

        def notes(replaced: dict[bytes, Record]) -> list[bytes]:
            left[:] = self._notes(replaced, items, puts, deletes) if replaced or files else []
            return left

        files, batch.files = batch.files, []  # from here on they must stay, unless the index says that it wrote nothing
        try:
            commit = self.index.commit(cast("list[Put]", puts), [name for _, name in deletes], notes=notes)
        except DiskFullError:
            self.blobs.remove(files)
            raise
        self.commits.append((commit.before, commit.version))
        written.commits.append((commit.version, items, batch.baselines))
        if left:
            try:
                self.settle()
            except (FailedError, CorruptError):
                raise
            except OSError:  # all is committed; names wait for the next time
                pass
        self._write_copies(copies)

    def _notes(
        self, replaced: dict[bytes, Record], items: list[Any], puts: list[Row], deletes: Sequence[tuple[Any, bytes]]
    ) -> list[bytes]:
        """What has to be done after a commit that writes these puts and replaces these records."""
        keys = {name: key for key, name in deletes} | {
            put[0]: item.key for item, put in zip(items, puts, strict=True) if put[0] in replaced
        }
        old = {
            name: (ref.blob, ref.label) if ref else ("", self.label(keys[name], name))
            for name, record in replaced.items()
            for ref in [Ref.unpack(record.body) if record.kind & KIND == BLOB else None]
        }
        new = {name: (kind & KIND, body) for name, _, kind, body, _, _ in puts if kind & KIND == BLOB or name in old}
        left = []
        for name, (blob, label) in old.items():
            kind, _ = new.get(name, (PACKED, b""))
            if kind == PACKED or (kind == LOOSE and blob):
                left.append(pack_note(name, blob, label))
        for name, (kind, body) in new.items():
            if kind == BLOB:
                left.append(pack_note(name, Ref.unpack(body).blob, old.get(name, ("", ""))[1]))
        return left
