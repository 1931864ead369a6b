"""The store: values by key behind an index and blobs. It knows no memory tier and no user's dictionary order of work.

Order of a write, which every crash must leave readable: large values go to files under random names and are synced; *then*
one index commit refers to them; only then are they renamed to names that show their keys, and files that nothing refers to
any more are unlinked. What is left to do after the commit stands in the commit itself, as notes; ``settle`` works them off,
after each write and when a chest is opened. The other order (rename first) could leave a key that points at nothing.

A record is one of three kinds: PACKED (the serialized value lies in the index), LOOSE (the same, and a readable copy lies
under the key's file name) and BLOB (the body is a ``Ref`` to a value file).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import xxhash

from . import _changes, _keys, _pickled, errors
from .abc import Blobs, Index, OrderItem, Put, Record
from .errors import ChestError, CorruptError, DiskFullError, FailedError, LoadError, SerializeError, WriteError, short
from .serializers import Codec, ViewFile

__all__ = ["BLOB", "LOOSE", "PACKED", "FileBaseline", "Loaded", "Ref", "Store", "Written"]

PACKED, LOOSE, BLOB = 0, 1, 2
SMALL = 65_536  # bytes; serialized below this, a value lives in the index
COMMIT_BYTES = 4 << 20  # serialized small values of one commit: bounds the memory that a write needs beside the values

_hash = xxhash.xxh3_64_intdigest


class Ref(NamedTuple):
    """What a BLOB record says of its value file.

    ``digest`` identifies the content: of the footer for value files, of all bytes for others, 0 where it is not known (files
    of chest 0.2). ``label`` is the path below the chest's folder that shows the key.
    """

    size: int
    digest: int
    blob: str
    label: str

    def pack(self) -> bytes:
        blob = self.blob.encode()
        return _REF.pack(self.size, self.digest, len(blob)) + blob + self.label.encode("utf-8", "surrogatepass")

    @classmethod
    def unpack(cls, body: bytes) -> Ref:
        try:
            size, digest, length = _REF.unpack_from(body)
            start = _REF.size + length
            label = body[start:].decode("utf-8", "surrogatepass")
            return cls(size, digest, body[_REF.size : start].decode(), label)
        except (struct.error, UnicodeDecodeError) as error:
            raise CorruptError("a record of the index is no reference to a value file") from error


_REF = struct.Struct("<QQB")


class FileBaseline(NamedTuple):
    """What a value with large buffers looked like when it was last read or written.

    ``view`` is the private mapping that its buffers lie in, None if they are in memory of their own.
    """

    layout: _pickled.Layout
    view: memoryview | None


class Loaded(NamedTuple):
    """A value as it came from the store. ``baseline``: None (cannot change), a hash of its bytes, or a FileBaseline."""

    value: Any
    record: Record
    baseline: int | FileBaseline | None


class Written(NamedTuple):
    """What became of a batch of writes.

    ``done``: key -> (version, baseline). ``failed``: key -> why this value could not be written. ``error`` is set where
    nothing more could be written at all; what is in ``done`` is committed even so.
    """

    done: dict[Any, tuple[int, int | FileBaseline | None]]
    failed: dict[Any, ChestError]
    error: ChestError | None = None


class Item(NamedTuple):
    """One value to be written; ``size`` is an estimate. ``raw`` is its record in another store, with the path of its file."""

    key: Any
    value: Any
    size: int
    seq: int
    fresh: bool = False
    raw: tuple[Record, str] | None = None


def pack_note(name: bytes, blob: str, label: str) -> bytes:
    """What a commit leaves to be done for one key: publish ``blob``, unlink ``label`` (either may be empty)."""
    b = blob.encode()
    return struct.pack("<HH", len(name), len(b)) + name + b + label.encode("utf-8", "surrogatepass")


def unpack_note(note: bytes) -> tuple[bytes, str, str]:
    n, b = struct.unpack_from("<HH", note)
    return note[4 : 4 + n], note[4 + n : 4 + n + b].decode(), note[4 + n + b :].decode("utf-8", "surrogatepass")


class Store:
    """Values by key, on an index and blobs.

    Not locked: the chest calls it under its own lock (reads from several threads are fine, index and blobs see to that).
    """

    def __init__(
        self,
        path: str,
        index: Index,
        blobs: Any,
        codec: Codec,
        *,
        label: Callable[[Any], str] | None = None,
        opener: Callable[..., Any] | None = None,
        loose: int | None = 100,
        verify: bool = False,
        folds: bool = False,
    ) -> None:
        self.path = path
        self.index = index
        self.blobs: Any = blobs
        self.codec = codec
        self._label = label
        self._opener = opener
        self._files_only = loose is None or opener is not None or label is not None
        self._loose = loose or 0
        self._verify = verify
        self._folds = folds
        self._opaque: dict[Any, bytes] | None = None
        self._opaque_names: set[bytes] = set()
        self._opaque_version = -1
        self.commits: list[tuple[int, int]] = []  # (before, version) of own commits, for the chest to take out
        self.before_writing: Callable[[], object] | None = None  # once: folders of chest 0.2 are upgraded then

    # --- keys

    def name(self, key: Hashable, *, create: bool = False) -> bytes | None:
        """The key's name in the index; None for a key of a class of its own that was never written here.

        Raises:
            KeyTypeError: ``create``, and the key cannot be written.
            TypeError: the key is unhashable.
        """
        name = _keys.name_of(key)
        if name is not None:
            if create:
                self._check_typed(key)
            return name
        opaque = self._opaque_keys()
        name = opaque.get(key)
        if name is None and create:
            _keys.pickled_key(key)  # refused now, not when it is written
            name = opaque[key] = _keys.opaque_name()
            self._opaque_names.add(name)
        return name

    def _check_typed(self, key: Hashable) -> None:
        _keys.encode(key)

    def _opaque_keys(self) -> dict[Any, bytes]:
        """Keys whose equality only their class knows, held in memory from the first use on."""
        version = self.index.version()
        if self._opaque is None or version != self._opaque_version:
            if self._opaque is None:
                self._opaque = {}
            found = [n for n in self.index.names(_keys.OPAQUE_PREFIX) if n not in self._opaque_names]
            for name, record in zip(found, self.index.get_many(found)[1], strict=True):
                if record is None:
                    continue
                items = self.index.page(record.seq - 1, 1)
                if items and items[0].name == name:
                    self._opaque[_keys.decode(name, items[0].typed)] = name
                    self._opaque_names.add(name)
            self._opaque_version = version
        return self._opaque

    def label(self, key: Hashable, name: bytes) -> str:
        """The path below the folder that shows the key."""
        if self._label is not None:
            return os.fspath(self._label(key)).replace(os.sep, "/")
        return _keys.key_to_filename(key, name, folds=self._folds)

    def _free_label(self, key: Hashable, name: bytes) -> str:
        """The key's label, or a variant of it where a file that is not this key's lies there already."""
        label = self.label(key, name)
        if self.blobs.exists(label):
            old = self.index.get(name)
            if old is None or old.kind == PACKED or (old.kind == BLOB and Ref.unpack(old.body).label != label):
                return f"{label}~{_hash(name + os.urandom(8)):016x}"
        return label

    # --- reading

    def load(self, key: Hashable, name: bytes) -> Loaded | None:
        """The newest value of a key, None where there is none.

        Raises:
            CorruptError: what is stored is damaged.
            LoadError: it is whole but cannot be loaded.
        """
        try:
            record = self.index.get(name)
            return None if record is None else self._decode(key, name, record)
        except LoadError as error:
            raise self._about(key, error) from error.__cause__

    def decode_for(self, key: Hashable, name: bytes, record: Record) -> Loaded | None:
        """As ``load``, for a record that was read in a batch."""
        try:
            return self._decode(key, name, record)
        except LoadError as error:
            raise self._about(key, error) from error.__cause__

    def _decode(self, key: Hashable, name: bytes, record: Record) -> Loaded | None:
        """The value behind a record; None if it was deleted meanwhile."""
        if record.kind != BLOB:
            try:
                value = self.codec.loads(record.body)
            except Exception as error:
                raise self._unloadable(key, error) from error
            return Loaded(value, record, None if _changes.is_immutable(value) else _hash(record.body))
        while True:
            ref = Ref.unpack(record.body)
            try:
                return self._read_blob(key, ref, record)
            except (FileNotFoundError, CorruptError) as error:
                # It may have been replaced since the record was read; only if it was not is this damage.
                newer = self.index.get(name)
                if newer is None:
                    return None
                if newer.version == record.version:
                    if isinstance(error, CorruptError):
                        raise
                    path = self.blobs.path(ref.blob, ref.label)
                    raise CorruptError(
                        f"the file of the value is gone ({path}). Put it back from a backup, or delete the key.", path=path
                    ) from error
                record = newer
                if record.kind != BLOB:
                    return self._decode(key, name, record)

    def _read_blob(self, key: Hashable, ref: Ref, record: Record) -> Loaded:
        path = self.blobs.path(ref.blob, ref.label)
        try:
            view = self.blobs.read(ref.blob, ref.label)
            if len(view) != ref.size and ref.digest:
                raise CorruptError(f"the file {path} has {len(view)} bytes instead of {ref.size}", path=path)
            if self.codec.native and self._opener is None:
                value, layout = _pickled.load(view, verify=self._verify, digest=ref.digest or None)
                if _changes.is_immutable(value):
                    return Loaded(value, record, None)
                if layout is not None:
                    return Loaded(value, record, FileBaseline(layout, view))
                return Loaded(value, record, self.codec.digest(value))
            if ref.digest and _hash(view) != ref.digest:
                raise CorruptError(f"the content of {path} is not what was written", path=path)
        except LoadError as error:
            error.path = error.path or path
            raise
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LoadError(f"the file {path} cannot be read: {error.strerror or error}", path=path) from error
        except Exception as error:
            raise self._unloadable(key, error, path) from error
        try:
            value = self._load_foreign(view, path)
        except Exception as error:
            raise self._unloadable(key, error, path) from error
        return Loaded(value, record, None if _changes.is_immutable(value) else self.codec.digest(value))

    def _load_foreign(self, view: memoryview, path: str) -> Any:
        if self._opener is None:
            return self.codec.load_from(ViewFile(view))
        with self._opener(path, mode="r" + ("t" if self.codec.text else "b")) as file:
            return self.codec.load(file)

    def _unloadable(self, key: Hashable, error: BaseException, path: str | None = None) -> LoadError:
        where = f" (in {path})" if path else ""
        return LoadError(
            f"the value of {short(key)}{where} cannot be loaded by {self.codec.name}: {type(error).__name__}: {error}. "
            "The stored bytes are unharmed: make what it needs importable (or give the right load=) and read it again.",
            key=key,
            path=path,
        )

    def _about(self, key: Hashable, error: LoadError) -> LoadError:
        """The error with the key in its message and as an attribute."""
        if error.key is None and short(key) not in error.message:
            return type(error)(f"the value of {short(key)}: {error.message}", key=key, path=error.path)
        return error

    # --- has it changed?

    def changed(self, key: Hashable, value: Any, version: int, baseline: int | FileBaseline | None) -> bool:
        """Whether a value differs from what its baseline says; True where that cannot be told.

        Pickles are compared first with what is stored and, where they differ, with what *loading and pickling again* gives:
        a loaded value may pickle to other bytes than it came from (interned text, an older protocol) without having changed.
        """
        if baseline is None:
            return False
        try:
            if isinstance(baseline, FileBaseline):
                return self._file_changed(key, value, version, baseline)
            if _hash(self.codec.dumps(value)) == baseline:
                return False
            again = self._load_again(key, version)
            return again is None or self.codec.digest(again.value) != self.codec.digest(value)
        except Exception:
            return True  # the write that follows says what is wrong with it

    def _load_again(self, key: Hashable, version: int) -> Loaded | None:
        name = self.name(key)
        record = None if name is None else self.index.get(name)
        if name is None or record is None or record.version != version:
            return None
        return self._decode(key, name, record)

    def _file_changed(self, key: Hashable, value: Any, version: int, baseline: FileBaseline) -> bool:
        stream, buffers = _pickled.probe(value)
        layout = baseline.layout
        stored: memoryview | None = None
        if stream != layout.stream or len(buffers) != len(layout.payloads):
            again = self._load_again(key, version)
            if again is None or not isinstance(again.baseline, FileBaseline):
                return True
            if _pickled.probe(again.value)[0] != stream or len(buffers) != len(layout.payloads):
                return True
            stored = again.baseline.view
        start = 0 if baseline.view is None else _changes.address_of(baseline.view)
        for (buffer, _), payload in zip(buffers, layout.payloads, strict=True):
            if len(buffer) != payload.length:
                return True
            private = bool(start) and start <= _changes.address_of(buffer) < start + layout.size
            if private and stored is None:
                again = self._load_again(key, version)
                stored = again.baseline.view if again and isinstance(again.baseline, FileBaseline) else None
            part = None if stored is None else stored[payload.offset : payload.offset + payload.length]
            if not _changes.same_payload(buffer, payload.checksum, part, private=private):
                return True
        return False

    # --- writing

    def write(self, items: Sequence[Item], deletes: Iterable[tuple[Any, bytes]] = ()) -> Written:
        """Write values and deletions; what cannot be serialized is left out and reported.

        All or nothing up to 4 MiB of small values; beyond that in several commits, in the order given. Durable on return.
        """
        if self.before_writing is not None:
            self.before_writing()
            self.before_writing = None
        written = Written({}, {})
        doomed = list(deletes)
        batch: list[tuple[Item, Put, int | FileBaseline | None]] = []
        size = 0
        try:
            for item in items:
                try:
                    put, baseline = self._serialize(item)
                except (DiskFullError, FailedError):
                    raise
                except ChestError as error:
                    written.failed[item.key] = error
                    continue
                batch.append((item, put, baseline))
                size += len(put.body)
                if size >= COMMIT_BYTES:
                    self._commit(batch, doomed, written)
                    batch, doomed, size = [], [], 0
            if batch or doomed:
                self._commit(batch, doomed, written)
                batch = []
        except FailedError as error:
            # Whether the commit reached the disk is unknown: its files must stay for the next opener to decide.
            return written._replace(error=error)
        except ChestError as error:
            self._discard(batch)
            return written._replace(error=error)
        except BaseException:
            self._discard(batch)
            raise
        return written

    def _discard(self, batch: Sequence[tuple[Item, Put, Any]]) -> None:
        self.blobs.remove([Ref.unpack(put.body).blob for _, put, _ in batch if put.kind == BLOB])

    def _serialize(self, item: Item) -> tuple[Put, int | FileBaseline | None]:
        key, value = item.key, item.value
        encoded = _keys.encode(key)
        if encoded is None:
            name = self.name(key, create=True)
            assert name is not None
            typed = _keys.pickled_key(key)
        else:
            name, typed = encoded
        fixed = _changes.is_immutable(value)
        try:
            if item.raw is not None:
                return self._take_over(item, name, typed), None
            if not self._files_only and item.size < 2 * SMALL:
                body = self.codec.dumps(value)
                if len(body) < SMALL:
                    return Put(name, item.seq, PACKED, body, typed, item.fresh), None if fixed else _hash(body)
            return self._serialize_blob(item, name, typed, fixed)
        except (ChestError, MemoryError):
            raise
        except OSError as error:
            raise WriteError(f"the value of {short(key)} could not be written: {error}. It stays in memory.", key=key) from error
        except Exception as error:
            raise SerializeError(
                f"the value of {short(key)} ({type(value).__qualname__}) cannot be written by {self.codec.name}: "
                f"{type(error).__name__}: {error}. It stays in memory: change or delete it, or choose another serializer.",
                key=key,
            ) from error

    def _serialize_blob(
        self, item: Item, name: bytes, typed: bytes, fixed: bool
    ) -> tuple[Put, int | FileBaseline | None]:
        layout: list[_pickled.Layout] = []
        value = item.value
        native = self.codec.native and self._opener is None
        note = _keys_note(name, typed)

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

    def _take_over(self, item: Item, name: bytes, typed: bytes) -> Put:
        """A record of another store with the same serializer: its file is linked, or copied across file systems."""
        assert item.raw is not None
        record, path = item.raw
        if record.kind != BLOB:
            return Put(name, item.seq, PACKED, record.body, typed, item.fresh)
        blob = self.blobs.link(path)
        try:
            ref = Ref.unpack(record.body)._replace(blob=blob, label=self._free_label(item.key, name))
        except BaseException:
            self.blobs.remove([blob])
            raise
        return Put(name, item.seq, BLOB, ref.pack(), typed, item.fresh)

    def _commit(
        self,
        batch: Sequence[tuple[Item, Put, int | FileBaseline | None]],
        deletes: Sequence[tuple[Any, bytes]],
        written: Written,
    ) -> None:
        keys: dict[bytes, Any] = {name: key for key, name in deletes}
        puts: list[Put] = []
        copies: list[tuple[str, bytes]] = []
        count = len(self.index)
        loose = not self._files_only and count < self._loose
        blobs = False
        for item, put, _ in batch:
            keys[put.name] = item.key
            if put.kind == BLOB:
                blobs = True
            elif loose and count + len(copies) < self._loose:
                label = self.label(item.key, put.name)
                if self._free_label(item.key, put.name) == label:
                    copies.append((label, put.body))
                    put = put._replace(kind=LOOSE)
            puts.append(put)
        if blobs:
            self.blobs.sync()
        new = {put.name: put for put in puts}
        left: list[bytes] = []

        def notes(replaced: dict[bytes, Record]) -> list[bytes]:
            left.clear()
            old = {
                name: (ref.blob, ref.label) if ref else ("", self.label(keys[name], name))
                for name, record in replaced.items()
                for ref in [Ref.unpack(record.body) if record.kind == BLOB else None]
            }
            for name, (blob, label) in old.items():
                put = new.get(name)
                if put is None or put.kind == PACKED or (put.kind == LOOSE and blob):
                    left.append(pack_note(name, blob, label))
            for name, put in new.items():
                if put.kind == BLOB:
                    left.append(pack_note(name, Ref.unpack(put.body).blob, old.get(name, ("", ""))[1]))
            return left

        commit = self.index.commit(puts, [name for _, name in deletes], notes=notes)
        self.commits.append((commit.before, commit.version))
        for item, _, baseline in batch:
            written.done[item.key] = (commit.version, baseline)
        if left:
            self.settle()
        for label, body in copies:
            self._write_copy(label, body)

    def _write_copy(self, label: str, body: bytes) -> None:
        """A convenience: a copy that cannot be written is no reason to fail a write that is committed."""
        try:
            self.blobs.write_copy(label, body)
        except OSError:
            return

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


def _keys_note(name: bytes, typed: bytes) -> bytes:
    """What a value file says of its key, so that a lost index can be rebuilt."""
    return struct.pack("<H", len(name)) + name + typed
