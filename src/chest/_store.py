"""The store: values by key behind an index and blobs. It knows no memory tier and no user's dictionary order of work.

Order of a write, which every crash must leave readable: large values go to files under random names and are synced; *then*
one index commit refers to them; only then are they renamed to names that show their keys, and files that nothing refers to
any more are unlinked. What is left to do after the commit stands in the commit itself, as notes; ``settle`` works them off,
after each write and when a chest is opened. The other order (rename first) could leave a key that points at nothing.

A record is one of three kinds: PACKED (the serialized value lies in the index), LOOSE (the same, and a readable copy lies
under the key's file name) and BLOB (the body is a ``Ref`` to a value file).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import xxhash

from . import _keys, _pickled, errors
from ._changes import is_immutable
from ._reading import Reader
from ._records import (
    BLOB,
    COMMIT_BYTES,
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
    unpack_note,
)
from .abc import OrderItem, Put, Record
from .errors import ChestError, DiskFullError, FailedError, SerializeError, WriteError, short

__all__ = ["Store"]

_Ready = tuple[Any, Put, Baseline]  # what is written, its record to be, and its baseline from then on
_Make = Callable[[Any], _Ready]
_put = tuple.__new__
_hash = xxhash.xxh3_64_intdigest


class Store(Reader):
    """Values by key, on an index and blobs.

    Not locked: the chest calls it under its own lock (reads from several threads are fine, index and blobs see to that).
    """

    # --- writing

    def write(self, items: Sequence[Unwritten], deletes: Iterable[tuple[Any, bytes]] = ()) -> Written:
        """Write values and deletions; what cannot be serialized is left out and reported.

        All or nothing up to 4 MiB of small values; beyond that in several commits, in the order given. Durable on return.
        On a full disk deletions go first, for the room that they make.
        """
        doomed = list(deletes)
        written = self._in_batches(items, self._serialize, doomed)
        if isinstance(written.error, DiskFullError) and doomed and not written.done:
            room = self._in_batches((), self._serialize, doomed)
            if room.error is None:
                return self._in_batches(items, self._serialize, [])
        return written

    def adopt(self, items: Sequence[Adopted]) -> Written:
        """Take over values of another store with the same serializer. Otherwise as ``write``."""
        return self._in_batches(items, self._take_over, [])

    def _in_batches(self, items: Sequence[Any], make: _Make, doomed: list[tuple[Any, bytes]]) -> Written:
        if self.before_writing is not None:
            self.before_writing()
            self.before_writing = None
        written = Written([], {})
        batch: list[_Ready] = []
        size = 0
        try:
            for item in items:
                try:
                    ready = make(item)
                except (DiskFullError, FailedError):
                    raise
                except ChestError as error:
                    written.failed[item.key] = error
                    continue
                batch.append(ready)
                size += len(ready[1][3])
                if size >= COMMIT_BYTES:
                    self._commit(batch, doomed, written)
                    doomed, size = [], 0
            if batch or doomed:
                self._commit(batch, doomed, written)
        except ChestError as error:
            self._discard(batch)
            return written._replace(error=error)
        except BaseException:
            self._discard(batch)
            raise
        return written

    def _discard(self, batch: Sequence[_Ready]) -> None:
        self.blobs.remove([Ref.unpack(put.body).blob for _, put, _ in batch if put.kind == BLOB])

    def _serialize(self, item: Unwritten) -> _Ready:
        key, value = item.key, item.value
        encoded = _keys.encode(key)
        if encoded is None:
            name = self.name(key, create=True)
            assert name is not None
            typed = _keys.pickled_key(key)
        else:
            name, typed = encoded
        fixed = is_immutable(value)
        try:
            if item.size < 2 * SMALL and not self._files_only:
                body = self.codec.dumps(value)
                if len(body) < SMALL:
                    put = _put(Put, (name, item.seq, PACKED, body, typed, item.fresh))
                    return item, put, None if fixed else _hash(body)
            return (item, *self._serialize_blob(item, name, typed, fixed))
        except (ChestError, MemoryError):
            raise
        except OSError as error:
            raise WriteError(
                f"the value of {short(key)} could not be written: {error}. It stays in memory: make what it needs work and "
                "flush again.",
                key=key,
            ) from error
        except Exception as error:
            raise SerializeError(
                f"the value of {short(key)} ({type(value).__qualname__}) cannot be written by {self.codec.name}: "
                f"{type(error).__name__}: {error}. It stays in memory: change or delete it, or choose another serializer.",
                key=key,
            ) from error

    def _serialize_blob(self, item: Unwritten, name: bytes, typed: bytes, fixed: bool) -> tuple[Put, Baseline]:
        layout: list[_pickled.Layout] = []
        value = item.value
        native = self.codec.native and self._opener is None
        note = key_note(name, typed)

        def dump(file: Any) -> None:
            if native:
                layout.append(_pickled.dump(value, file, note))
            elif self._opener is None:
                self.codec.dump_to(value, file)
            else:
                self.codec.dump(value, file)

        blob, size = self.blobs.write(dump)
        try:
            if not self._files_only and size < SMALL:  # smaller than it looked
                body = self.codec.dumps(value)
                self.blobs.remove([blob])
                return Put(name, item.seq, PACKED, body, typed, item.fresh), None if fixed else _hash(body)
            baseline: Baseline
            if native:
                digest, baseline = layout[0].digest, FileBaseline(layout[0], None)
            else:
                digest, baseline = _hash(self.blobs.read(blob, "")), None if fixed else self.codec.digest(value)
            label = self._free_label(item.key, name)
        except BaseException:
            self.blobs.remove([blob])
            raise
        ref = Ref(size, digest or 1, blob, label)
        return Put(name, item.seq, BLOB, ref.pack(), typed, item.fresh), None if fixed else baseline

    def _take_over(self, item: Adopted) -> _Ready:
        key, seq, record, path = item
        name, typed = _keys.encode(key) or (self.name(key, create=True) or b"", _keys.pickled_key(key))
        if record.kind != BLOB:
            return item, Put(name, seq, PACKED, record.body, typed), None
        blob = self.blobs.link(path)
        try:
            ref = Ref.unpack(record.body)._replace(blob=blob, label=self._free_label(key, name))
        except BaseException:
            self.blobs.remove([blob])
            raise
        return item, Put(name, seq, BLOB, ref.pack(), typed), None

    def _commit(self, batch: list[_Ready], deletes: Sequence[tuple[Any, bytes]], written: Written) -> None:
        """Commit a batch, which is empty afterwards, and do what the commit leaves to be done."""
        puts = [put for _, put, _ in batch]
        if any(put[2] == BLOB for put in puts):
            self.blobs.sync()
        copies = self._make_loose(batch, puts)
        left: list[bytes] = []

        def notes(replaced: dict[bytes, Record]) -> list[bytes]:
            left[:] = self._notes(replaced, batch_keys(), puts)
            return left

        def batch_keys() -> dict[bytes, Any]:
            return {name: key for key, name in deletes} | {put.name: item.key for item, put, _ in ready}

        ready = list(batch)
        batch.clear()  # from here on its files must stay, unless the index says that it wrote nothing
        try:
            commit = self.index.commit(puts, [name for _, name in deletes], notes=notes)
        except DiskFullError:
            self._discard(ready)
            raise
        self.commits.append((commit.before, commit.version))
        written.done.extend([(item, commit.version, baseline) for item, _, baseline in ready])
        if left:
            with contextlib.suppress(DiskFullError):  # all is committed; names wait for the next time
                self.settle()
        for label, body in copies:
            with contextlib.suppress(OSError):  # a convenience, and no reason to fail what is committed
                self.blobs.write_copy(label, body)

    def _make_loose(self, batch: list[_Ready], puts: list[Put]) -> list[tuple[str, bytes]]:
        """While there are few keys, small values get a readable copy: their puts are marked, the copies returned."""
        copies: list[tuple[str, bytes]] = []
        room = 0 if self._files_only else self._loose - len(self.index)
        if room > 0:
            for number, (item, put, _) in enumerate(batch):
                if len(copies) >= room:
                    break
                if put.kind == PACKED:
                    label = self.label(item.key, put.name)
                    if self._free_label(item.key, put.name) == label:
                        copies.append((label, put.body))
                        puts[number] = put._replace(kind=LOOSE)
        return copies

    def _notes(self, replaced: dict[bytes, Record], keys: dict[bytes, Any], puts: list[Put]) -> list[bytes]:
        """What has to be done after a commit that writes these puts and replaces these records."""
        old = {
            name: (ref.blob, ref.label) if ref else ("", self.label(keys[name], name))
            for name, record in replaced.items()
            for ref in [Ref.unpack(record.body) if record.kind == BLOB else None]
        }
        new = {put.name: put for put in puts if put.kind == BLOB or put.name in old}
        left = []
        for name, (blob, label) in old.items():
            put = new.get(name)
            if put is None or put.kind == PACKED or (put.kind == LOOSE and blob):
                left.append(pack_note(name, blob, label))
        for name, put in new.items():
            if put.kind == BLOB:
                left.append(pack_note(name, Ref.unpack(put.body).blob, old.get(name, ("", ""))[1]))
        return left

    def settle(self) -> int:
        """Do what commits left to be done: rename new files to the names of their keys, unlink what was replaced."""
        commit, left = self.index.settle(self._finish, ready=self.blobs.sync)
        if commit is not None:
            self.commits.append((commit.before, commit.version))
        return left

    def _finish(self, note: bytes, get: Callable[[bytes], Record | None]) -> bool:
        # Runs while nobody else can commit: what the record says now is what the folder must look like.
        name, blob, old = unpack_note(note)
        record = get(name)
        ref = Ref.unpack(record.body) if record is not None and record.kind == BLOB else None
        if blob:
            if ref is not None and ref.blob == blob:
                if not self.blobs.publish(blob, ref.label, replace=old == ref.label, sync=False):
                    return False
            else:
                self.blobs.remove([blob])
        if old and (ref is None or ref.label != old):  # a readable copy is written after this
            self.blobs.unlink(old)
        return True

    # --- files

    def file_of(self, key: Hashable, name: bytes) -> str | None:
        """The path of a file that holds the key's newest value, written now if it lies in the index only."""
        record = self.index.get(name)
        if record is None:
            return None
        if record.kind == BLOB:
            ref = Ref.unpack(record.body)
            return str(self.blobs.path(ref.blob, ref.label))
        label = self.label(key, name)
        path = os.path.join(self.path, *label.split("/"))
        if record.kind == LOOSE:
            try:
                with open(path, "rb") as file:
                    if file.read() == record.body:
                        return path
            except OSError:
                pass
        elif self.blobs.exists(label):
            raise errors.PathError(
                f"{path} is in the way: a file that is none of this chest's lies under the name of {short(key)}. Move it away.",
                key=key,
                path=path,
            )
        else:
            # Recorded first: a copy that no record knows of would outlive its value.
            commit = self.index.commit([Put(name, record.seq, LOOSE, record.body)])
            self.commits.append((commit.before, commit.version))
        self.blobs.write_copy(label, record.body)
        return path

    def path_of(self, record: Record) -> str:
        """Where the value file of a record lies, "" if it has none."""
        if record.kind != BLOB:
            return ""
        ref = Ref.unpack(record.body)
        return str(self.blobs.path(ref.blob, ref.label))

    def labels(self) -> Iterable[str]:
        """The labels of all files that belong to values."""
        after = None
        while items := self.index.page(after):
            after = items[-1].seq
            for item, record in zip(items, self.index.get_many([i.name for i in items])[1], strict=True):
                if record is None:
                    continue
                if record.kind == BLOB:
                    yield Ref.unpack(record.body).label
                elif record.kind == LOOSE:
                    yield self.label(self.key(item), item.name)

    def key(self, item: OrderItem) -> Any:
        """The key of an item of the order, with the type it was first set with."""
        return _keys.decode(item.name, item.typed)

    def close(self) -> None:
        self.blobs.close()
        self.index.close()
