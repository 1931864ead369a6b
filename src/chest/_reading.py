"""The reading half of the store: keys and their names, values behind records, and whether a value has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import xxhash

from . import _changes, _keys, _pagemap
from ._envelope import Envelope, open_body, open_file
from ._hot import picture
from ._records import BLOB, KIND, LOOSE, PACKED, Baseline, FileBaseline, Loaded, Ref
from .abc import Index, Record
from .errors import CorruptError, LoadError, MissingExtraError, short
from .serializers import Codec, ViewFile

__all__ = ["Reader"]

_hash = xxhash.xxh3_64_intdigest
_loaded = tuple.__new__
ATOMS = frozenset((str, bytes, int, float, bool, type(None)))  # most small values, and it pays to look for them first


class Reader:
    """What ``Store`` is made of, and can read; its attributes are those of a store."""

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
        envelope: Envelope | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self.index = index
        self.blobs: Any = blobs
        self.codec = codec
        self._files = codec.files if opener is None else None  # what writes value files that map
        self._label = label
        self._opener = opener
        self._files_only = loose is None or opener is not None or label is not None
        self._loose = 0 if loose is None or (envelope is not None and envelope.hides) else loose
        self._verify = verify
        self._folds = folds
        self._envelope = envelope
        self._maps = self._files is not None and (envelope is None or envelope.seal is None)
        self.read_only = read_only
        self._opaque: dict[Any, bytes] | None = None
        self._opaque_names: set[bytes] = set()
        self._opaque_version = -1
        self.commits: list[tuple[int, int]] = []  # (before, version) of own commits, for the chest to take out
        self.before_writing: Callable[[], object] | None = None  # once: folders of chest 0.2 are upgraded then

    @property
    def plain(self) -> bool:
        """Whether another chest may take over records and files as they are: neither an ``open`` of the user's wrote them,
        nor are they bound to a key."""
        return self._opener is None and (self._envelope is None or self._envelope.seal is None)

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
                self.codec.encode(key)
            return name
        opaque = self._opaque_keys()
        name = opaque.get(key)
        if name is None and create:
            self.codec.typed(key)  # refused now, not when it is written
            name = opaque[key] = _keys.opaque_name()
            self._opaque_names.add(name)
        return name

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
                    self._opaque[self.codec.decode(name, items[0].typed)] = name
                    self._opaque_names.add(name)
            self._opaque_version = version
        return self._opaque

    def label(self, key: Hashable, name: bytes) -> str:
        """The path below the folder that shows the key, or in an encrypted chest does not."""
        if self._label is not None:
            return os.fspath(self._label(key)).replace(os.sep, "/")
        if self._envelope is not None and self._envelope.hides:
            assert self._envelope.seal is not None
            return self._envelope.seal.label(name)
        return _keys.key_to_filename(key, name, folds=self._folds)

    def _free_label(self, key: Hashable, name: bytes) -> str:
        """The key's label, or a variant of it where a file that is not this key's lies there already."""
        label = self.label(key, name)
        if self.blobs.exists(label):
            try:
                old = self.index.get(name)
            except CorruptError:  # whose file this is cannot be told any more
                old = None
            if old is None or old.kind & KIND == PACKED or (old.kind & KIND == BLOB and Ref.unpack(old.body).label != label):
                return f"{label}~{_hash(name + os.urandom(8)):016x}"
        return label

    def has(self, name: bytes) -> bool:
        """Whether there is a record of this name, be it damaged: it can be overwritten and deleted."""
        try:
            return self.index.get(name) is not None
        except CorruptError:
            return True

    def has_each(self, names: Sequence[bytes]) -> list[bool]:
        """As ``has``, for many."""
        try:
            return [record is not None for record in self.index.get_many(names)[1]]
        except CorruptError:
            return [self.has(name) for name in names]

    # --- reading

    def load(self, key: Hashable, name: bytes) -> Loaded | None:
        """The newest value of a key, None where there is none.

        Raises:
            CorruptError: what is stored is damaged.
            LoadError: it is whole but cannot be loaded.
        """
        try:
            record = self.index.get(name)
            if record is None:
                return None
            return self._decode_packed(key, record) if record[2] < BLOB else self._decode(key, name, record)
        except LoadError as error:
            raise self._about(key, error) from error.__cause__

    def decode_for(self, key: Hashable, name: bytes, record: Record) -> Loaded | None:
        """As ``load``, for a record that was read in a batch."""
        try:
            return self._decode_packed(key, record) if record[2] < BLOB else self._decode(key, name, record)
        except LoadError as error:
            raise self._about(key, error) from error.__cause__

    def _decode(self, key: Hashable, name: bytes, record: Record) -> Loaded | None:
        """The value behind a record; None if it was deleted meanwhile."""
        if record.kind & KIND != BLOB:
            return self._decode_packed(key, record)
        while True:
            ref = Ref.unpack(record.body)
            try:
                return self._read_blob(key, name, ref, record)
            except (FileNotFoundError, CorruptError) as error:
                # It may have been replaced since the record was read; only if it was not is this damage.
                newer = self.index.get(name)
                if newer is None:
                    return None
                if newer.version == record.version:
                    if isinstance(error, CorruptError):
                        raise
                    path = self.blobs.path(ref.blob, ref.label)
                    raise CorruptError(f"its file {path} is gone", path=path) from error
                record = newer
                if record.kind & KIND != BLOB:
                    return self._decode(key, name, record)

    def _decode_packed(self, key: Hashable, record: Record) -> Loaded:
        body = record[3]
        if record[2] > LOOSE:
            body = open_body(record[2], body)
        try:
            value = self.codec.loads(body)
        except LoadError:
            raise
        except Exception as error:
            raise self._unloadable(key, error) from error
        if type(value) in ATOMS:
            return _loaded(Loaded, (value, record, None))
        baseline = picture(value)  # now, before anybody else can hold it
        return _loaded(Loaded, (value, record, baseline or (None if _changes.is_immutable(value) else body)))

    def _read_blob(self, key: Hashable, name: bytes, ref: Ref, record: Record) -> Loaded:
        path = None
        try:
            loaded = self._read_published(ref, record)
            if loaded is not None:
                return loaded
            path = self.blobs.path(ref.blob, ref.label)
            view = self.blobs.read(ref.blob, ref.label)
            if len(view) != ref.size and ref.digest:
                raise CorruptError(f"the file {path} has {len(view)} bytes instead of {ref.size}", path=path)
            again = None
            seal = None if self._envelope is None else self._envelope.seal
            if record.kind > BLOB or seal is not None or ref.seal:
                stored = name if seal is None else seal.name(name)
                again = partial(open_file, seal, record.kind, stored, view, ref.plain, ref.seal)
                view = again()
            if self._files is not None:
                return self._load_mapped(view, ref, record, again)
            if ref.digest and _hash(view) != ref.digest:
                raise CorruptError(f"the content of {path} is not what was written", path=path)
        except LoadError as error:
            error.path = error.path or path or self.blobs.path(ref.blob, ref.label)
            raise
        except (FileNotFoundError, MissingExtraError):
            raise
        except OSError as error:
            raise LoadError(
                f"the file {path} cannot be read ({error.strerror or error}): make it readable and try again", path=path
            ) from error
        except Exception as error:
            raise self._unloadable(key, error, path or self.blobs.path(ref.blob, ref.label)) from error
        try:
            value = self._load_foreign(view, path)
        except LoadError as error:
            error.path = error.path or path
            raise
        except Exception as error:
            raise self._unloadable(key, error, path) from error
        return Loaded(value, record, None if _changes.is_immutable(value) else self.codec.digest(value))

    def _read_published(self, ref: Ref, record: Record) -> Loaded | None:
        """The value of a file that carries the name of its key already, as nearly all do: its digest tells that it is the one.

        None if it is not, or if anything is wrong with it. The order that certainly finds it then says what.
        """
        if record[2] != BLOB or not self._maps or not ref.digest or ref.seal or not ref.label:
            return None
        try:
            view = self.blobs.read_published(ref.label, ref.size)
            return None if view is None else self._load_mapped(view, ref, record)
        except (OSError, CorruptError):
            return None

    def _load_mapped(self, view: memoryview, ref: Ref, record: Record, again: Callable[[], memoryview] | None = None) -> Loaded:
        """The value of a file that maps; ``again`` opens the envelope that it came out of once more."""
        assert self._files is not None
        value, layout = self._files.load(view, verify=self._verify or again is not None, digest=ref.digest or None)
        if _changes.is_immutable(value):
            return Loaded(value, record, None)
        if layout is not None:
            baseline = FileBaseline(layout, None, again)
            if again is None:
                outline = _pagemap.outline_of(value) if len(layout.payloads) == 1 else None
                baseline = FileBaseline(layout, view, None, outline)
            return Loaded(value, record, baseline)
        return Loaded(value, record, self.codec.digest(value))

    def read_ahead(self, loaded: Loaded) -> None:
        """The disk begins to read a value that is only mapped so far."""
        if isinstance(loaded.baseline, FileBaseline) and loaded.baseline.view is not None:
            self.blobs.read_ahead(loaded.baseline.view)

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
        """The error as people need it: with the key, the file, and what to do."""
        if error.key is not None or short(key) in error.message:
            return error
        where = f" (in {error.path})" if error.path and error.path not in error.message else ""
        what = error.message.rstrip(".")
        if isinstance(error, CorruptError):
            advice = "Put it back from a backup, or make do without: delete the key, or set it again."
            return type(error)(f"the value of {short(key)}{where} is damaged: {what}. {advice}", key=key, path=error.path)
        return type(error)(f"the value of {short(key)}{where} cannot be loaded: {what}.", key=key, path=error.path)

    # --- has it changed?

    def changed(self, key: Hashable, value: Any, version: int, baseline: Baseline) -> bool:
        """Whether a value differs from what its baseline says; True where that cannot be told.

        A loaded value may pickle to other bytes than it came from (interned text, an older protocol) without having changed.
        So where pickles differ, what *loading and pickling again* gives is compared. What it came from is at hand for that:
        the store may hold a newer value by now, which a value that was only read must not be written over.
        """
        if baseline is None:
            return False
        try:
            if isinstance(baseline, FileBaseline):
                return self._file_changed(key, value, version, baseline)
            if isinstance(baseline, bytes):
                data = self.codec.dumps(value)
                return data != baseline and data != self.codec.dumps(self.codec.loads(baseline))
            if isinstance(baseline, int):
                return _hash(self.codec.dumps(value)) != baseline and self.codec.digest(value) != baseline
            return not baseline.matches(value)
        except Exception:
            return True  # the write that follows says what is wrong with it

    def _load_again(self, key: Hashable, version: int) -> Loaded | None:
        name = self.name(key)
        record = None if name is None else self.index.get(name)
        if name is None or record is None or record.version != version:
            return None
        return self._decode(key, name, record)

    def _file_changed(self, key: Hashable, value: Any, version: int, baseline: FileBaseline) -> bool:
        files = self._files
        assert files is not None  # that is where such a baseline comes from
        layout = baseline.layout
        start = 0 if baseline.view is None else _pagemap.address_of(baseline.view)
        if baseline.outline and _pagemap.is_untouched(value, baseline.outline, start + layout.payloads[0].offset):
            return False
        stream, buffers = files.probe(value)
        stored: memoryview | None = None
        if len(buffers) != len(layout.payloads):
            return True
        if stream != layout.stream:
            source = baseline.view if baseline.again is None else baseline.again()
            if source is None or files.probe(files.load(source, payloads=False)[0])[0] != stream:
                return True
        # Most mappings were only read: then one look at all of it says so, and the file is not mapped once more.
        untouched = start and layout.size > _pagemap.HASH_BELOW and _pagemap.written_pages(start, layout.size) == []
        for (buffer, _), payload in zip(buffers, layout.payloads, strict=True):
            if len(buffer) != payload.length:
                return True
            private = bool(start) and start <= _pagemap.address_of(buffer) < start + layout.size
            if private and untouched:
                continue
            if private and stored is None:
                again = self._load_again(key, version)
                stored = again.baseline.view if again and isinstance(again.baseline, FileBaseline) else None
            part = None if stored is None else stored[payload.offset : payload.offset + payload.length]
            if not _pagemap.same_payload(buffer, payload.checksum, part, private=private):
                return True
        return False
