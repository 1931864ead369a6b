"""What is wrong with a chest's folder: every checksum, every reference in both directions, beside whoever writes.

Nothing is written, and LMDB is not asked: the index is read page by page (``engines._readonly``), so no damage ends the
process. What looks wrong is looked at again: a problem that the next commit takes away is none.

Whether order and records belong together is found out without looking one up for each of the other: both are added up, as
hashes of place and name, in some thousand sums. Only where two sums differ is each key looked up. So memory stays bounded
and ten million keys take some minutes.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_digest, xxh3_128_intdigest

from . import _fs, _keys, _valuefile
from ._problems import KINDS, Finding, Problem
from ._records import BLOB, LOOSE, Ref, unpack_note
from ._value_files import File, ValueFile, open_to_read, value_files
from .abc import Record
from .engines._cursors import place as place_of
from .engines._files import FileBlobs
from .engines._labels import below, parts_of
from .engines._legacy import NEW, OLD, read_pairs
from .engines._readonly import ReadOnlyIndex, unpack_order, unpack_record
from .engines._verify import structural_errors
from .errors import ChestError, CorruptError, PathError, short

__all__ = ["Checker", "strays"]

_SUMS = 4096
_TRIES = 1000


class Checker:
    """The check of one folder; ``problems`` is called once."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._keys_path = os.path.join(self.path, ".keys")
        self._blobs = FileBlobs(self.path, sync=False)
        self._sums = [0] * _SUMS
        self._index: ReadOnlyIndex
        self._folds = False

    def _problem(self, kind: str, message: str, *, name: bytes = b"", typed: bytes = b"", path: str = "") -> Finding:
        key: Any = None
        if name:
            try:
                key = _keys.decode(name, typed or self._typed(name))
            except Exception:
                message = f"{message} (its name in the index is {short(name)})"
        return Finding(Problem(kind, key, path or self._keys_path, message, KINDS[kind]), name)

    def _typed(self, name: bytes) -> bytes:
        """What gives a key back where its name does not, from the order."""

        def look(s: Any) -> bytes | None:
            data = s.get(b"index", name)
            record = None if data is None else unpack_record(name, data)
            return None if record is None else s.get(b"order", place_of(record.seq))

        data = self._index.read(look)
        n = 2 + len(name)
        return data[n:-8] if data is not None and data[2:n] == name else b""

    # --- the folder as a whole

    def problems(self) -> Iterator[Finding]:
        if not os.path.isdir(self.path):
            raise PathError(f"there is no folder {self.path}: give the path of a chest.", path=self.path)
        others = _fs.who_else_writes(self.path)
        if others:
            yield self._problem("unsafe", f"{others}: they can run code in the name of those who read the chest. Take it away.")
        upgrade = os.path.join(self.path, NEW)
        if os.path.isfile(self._keys_path) and not os.path.islink(self._keys_path):
            yield from self._old(self._keys_path)
            return
        if not os.path.lexists(self._keys_path) and os.path.isfile(os.path.join(self.path, OLD)) and os.path.isdir(upgrade):
            self._keys_path = upgrade
        if not os.path.lexists(self._keys_path) and next(value_files(self.path, self._broken), None) is None:
            raise PathError(f"there is no chest at {self.path}: give the path of one.", path=self.path)
        yield from self._around()
        whole = True
        if not os.path.islink(self._keys_path) and os.path.isfile(self._data) and not os.path.islink(self._data):
            for error in structural_errors(self._keys_path):
                whole = False
                yield self._problem("index", f"the index is damaged: {error}", path=self._data)
        try:
            self._index = ReadOnlyIndex(self._keys_path)
        except ChestError as error:
            if whole or isinstance(error, PathError):
                yield self._problem("index", error.message, path=self._data)
            yield from self._files_alone()
            return
        try:
            yield from self._settings()
            if (self._index.meta(b"format") or b"") not in (b"", b"1"):
                return
            yield from self._everything()
        except CorruptError as error:
            if whole:
                yield self._problem("index", error.message, path=self._data)
        finally:
            self._index.close()

    @property
    def _data(self) -> str:
        return os.path.join(self._keys_path, "data.mdb")

    def _old(self, keys: str) -> Iterator[Finding]:
        """A folder of chest 0.2."""
        message = "a folder of chest 0.2, without checksums: it is read as it is, and the first write upgrades it"
        yield self._problem("old-format", message, path=keys)
        try:
            pairs, _ = read_pairs(keys, None, None, False)
        except CorruptError as error:
            yield Finding(Problem("index", None, keys, error.message, ""))
            return
        for key, filename in pairs:
            label = filename.replace(os.sep, "/")
            try:
                with below(self.path, label) as (folder, last):
                    found = os.stat(last, dir_fd=folder, follow_symlinks=False)
                problem = "" if stat.S_ISREG(found.st_mode) else "is no regular file"
            except FileNotFoundError:
                problem = "is missing"
            except (ChestError, OSError) as error:
                problem = f"cannot be read: {error}"
            if problem:
                path = os.path.join(self.path, filename)
                kind = "missing" if problem == "is missing" else "value"
                message = f"the value file of {short(key)} {problem}: put it back from a backup, or delete the key"
                yield Finding(Problem(kind, key, path, message, ""))

    def _around(self) -> Iterator[Finding]:
        """What lies around the index."""
        for name in ("", "new"):
            folder = os.path.join(self._keys_path, name) if name else self._keys_path
            if os.path.lexists(folder) and not stat.S_ISDIR(os.lstat(folder).st_mode):
                yield self._problem("index", f"{folder} is no folder", path=folder)
        for name in ("data.mdb", "lock.mdb", "generation", "reserve"):
            file = os.path.join(self._keys_path, name)
            try:
                regular = stat.S_ISREG(os.lstat(file).st_mode)
            except OSError:
                continue
            if not regular:
                yield self._problem("generation" if name == "generation" else "index", f"{file} is no regular file", path=file)

    def _settings(self) -> Iterator[Finding]:
        index = self._index
        version = index.version()
        path = os.path.join(self._keys_path, "generation")
        try:
            with open_to_read(path) as file:
                data = file.part(slice(0, 8)) if file.is_regular else b""
                if file.is_regular and (len(data) < 8 or int.from_bytes(data, "little") < version):
                    message = f"the generation is {int.from_bytes(data, 'little')} and the newest commit {version}: what was"
                    yield self._problem("generation", f"{message} written last is not noticed by others", path=path)
        except OSError:
            pass  # it is made by the next opener
        for name, data in index.all_pairs(b"meta"):
            if xxh3_64_digest(name + data[:-8]) != data[-8:]:
                yield self._problem("meta", f"the setting {name!r} of the chest is damaged", path=self._data)
        if index.read(lambda s: s.get(b"meta", b"format")) is None:
            if index.version() > 2:  # else it was made, and nothing was ever written
                yield self._problem("meta", "the setting 'format' of the chest is missing", path=self._data)
        else:
            try:
                found = index.meta(b"format")
            except CorruptError:
                return
            if found != b"1":
                message = f"the chest has format {found!r}, which this version cannot check: install a newer chest"
                yield self._problem("format", message, path=self._data)

    def _everything(self) -> Iterator[Finding]:
        with contextlib.suppress(CorruptError):
            self._folds = self._index.meta(b"folds") == b"1"
        yield from self._notes()
        for place, data in self._index.all_pairs(b"changed"):
            if len(data) < 8 or xxh3_64_digest(place + data[:-8]) != data[-8:]:
                yield self._problem("log", f"the note of what commit {int.from_bytes(place, 'big')} changed is damaged")
        yield from self._order()
        yield from self._records()
        yield from self._unequal()
        yield from self._strays()

    def _notes(self) -> Iterator[Finding]:
        for number, data in self._index.all_pairs(b"pending"):
            try:
                if len(data) < 8 or xxh3_64_digest(number + data[:-8]) != data[-8:]:
                    raise CorruptError("it is not what was written")
                _, blob, label = unpack_note(data[:-8])
                if blob:
                    self._blobs.path(blob, "")
                if label:
                    parts_of(label)
            except CorruptError as error:
                message = f"a note of what is left to do after a commit is damaged ({error}): the chest cannot be opened"
                yield self._problem("note", message, path=self._data)

    # --- order and records

    def _add(self, place: bytes, name: bytes, sign: int) -> None:
        number = xxh3_128_intdigest(place + name)
        at = number % _SUMS
        self._sums[at] = (self._sums[at] + sign * number) % (1 << 128)

    def _differs(self, place: bytes, name: bytes) -> bool:
        return self._sums[xxh3_128_intdigest(place + name) % _SUMS] != 0

    def _order(self) -> Iterator[Finding]:
        for place, data in self._index.all_pairs(b"order"):
            item = unpack_order(place, data)
            if item is None:
                yield self._problem("order", f"the key at place {int.from_bytes(place, 'big')} of the order is damaged")
                continue
            self._add(place, item.name, 1)
            try:
                key = _keys.decode(item.name, item.typed)
                if item.typed and item.name[:1] != _keys.OPAQUE_PREFIX and _keys.name_of(key) != item.name:
                    raise CorruptError("it is not the one that it was stored as")
            except CorruptError as error:
                yield self._problem("key", f"the key named {short(item.name)} is damaged: {error}", name=item.name, typed=b"\0")
            except ChestError:
                pass  # its class is not here: no damage

    def _records(self) -> Iterator[Finding]:
        for name, data in self._index.all_pairs(b"index"):
            record = unpack_record(name, data)
            if record is None:
                yield self._problem("record", "its record in the index is damaged", name=name, path=self._data)
                continue
            self._add(place_of(record.seq), name, -1)
            if record.kind & 3 == BLOB:
                yield from self._blob(name, record)
            elif record.kind & 3 == LOOSE:
                yield from self._copy(name)
            elif record.kind & 3 == 3:
                message = f"its record in the index is of kind {record.kind}, which there is none of"
                yield self._problem("record", message, name=name, path=self._data)

    def _current(self, name: bytes) -> Record | None:
        data = self._index.read(lambda s: s.get(b"index", name))
        return None if data is None else unpack_record(name, data)

    def _blob(self, name: bytes, record: Record | None) -> Iterator[Finding]:
        """The value file of a record, or of a newer one of the same key."""
        for _ in range(_TRIES):
            if record is None or record.kind & 3 != BLOB:
                return
            found = self._blob_problem(name, record)
            if found is None:
                return
            newer = self._current(name)
            if newer is not None and newer.version == record.version:
                yield found
                return
            record = newer

    def _blob_problem(self, name: bytes, record: Record) -> Finding | None:
        try:
            ref = Ref.unpack(record.body)
            parts_of(ref.label)
            path = self._blobs.path(ref.blob, ref.label)
        except CorruptError as error:
            return self._problem(
                "record", f"its record in the index refers to no value file: {error}", name=name, path=self._data
            )
        try:
            with File(self._blobs._open(ref.blob, ref.label)) as file:
                if file.is_regular and self._is_forgotten(name, ref):
                    message = "no note says that its value file is to get its own name: the next opener would remove it"
                    return self._problem("note", message, name=name, path=path)
                file.refuse_other(ref)
        except FileNotFoundError:
            return self._problem("missing", "its value file is missing", name=name, path=path)
        except CorruptError as error:
            return self._problem("value", f"its value file is damaged: {error.message.rstrip('.')}", name=name, path=path)
        except OSError as error:
            message = f"its value file cannot be read ({error.strerror or error}): make it readable and check again"
            return self._problem("unreadable", message, name=name, path=path)
        return None

    def _is_forgotten(self, name: bytes, ref: Ref) -> bool:
        """Whether a value file lies in ``new/`` and no note knows of it."""
        if not os.path.lexists(self._blobs.path(ref.blob, "", new=True)):
            return False

        def noted(s: Any) -> bool:
            return any(ref.blob.encode() in note for _, note in s.items(b"pending"))

        return not self._index.read(noted) and os.path.lexists(self._blobs.path(ref.blob, "", new=True))

    def _copy(self, name: bytes) -> Iterator[Finding]:
        """A readable copy may be missing or old, since nobody relies on it; but nothing else may lie in its place."""
        try:
            key = _keys.decode(name, self._typed(name))
            label = _keys.key_to_filename(key, name, folds=self._folds)
            with below(self.path, label) as (folder, last):
                found = os.stat(last, dir_fd=folder, follow_symlinks=False)
        except (ChestError, OSError, TypeError):
            return
        record = self._current(name)
        if not stat.S_ISREG(found.st_mode) and record is not None and record.kind & 3 == LOOSE:
            path = os.path.join(self.path, *label.split("/"))
            yield self._problem("copy", f"in the place of its readable copy lies something else: {path}", name=name, path=path)

    def _unequal(self) -> Iterator[Finding]:
        """Keys that stand in the order and not among the records, or the other way round; or in two places."""
        if not any(self._sums):
            return
        for place, data in self._index.all_pairs(b"order"):
            item = unpack_order(place, data)
            if item is not None and self._differs(place, item.name) and self._pair(place, item.name) == (True, False):
                message = f"it stands at place {item.seq} of the order, and its record does not"
                yield self._problem("order", message, name=item.name, typed=item.typed)
        for name, data in self._index.all_pairs(b"index"):
            record = unpack_record(name, data)
            if record is None:
                continue
            place = place_of(record.seq)
            if self._differs(place, name) and self._pair(place, name) == (False, True):
                yield self._problem("order", "it has a record, and no place in the order", name=name)

    def _pair(self, place: bytes, name: bytes) -> tuple[bool, bool]:
        """Whether the order has the name at this place, and whether the record of the name says so; in one snapshot."""

        def look(s: Any) -> tuple[bytes | None, bytes | None]:
            return s.get(b"order", place), s.get(b"index", name)

        ordered, recorded = self._index.read(look)
        item = None if ordered is None else unpack_order(place, ordered)
        if recorded is not None and unpack_record(name, recorded) is None:
            return False, False  # reported already
        record = None if recorded is None else unpack_record(name, recorded)
        return item is not None and item.name == name, record is not None and place_of(record.seq) == place

    # --- files

    def _files_alone(self) -> Iterator[Finding]:
        """Without an index: whether the value files are whole."""
        for file in value_files(self.path, self._broken):
            with below(self.path, file.label) as (folder, last), open_to_read(last, folder) as opened:
                try:
                    _valuefile.verify_file(file.layout, opened.part)
                except CorruptError as error:
                    path = os.path.join(self.path, file.label)
                    yield self._problem("value", f"the value file {path} is damaged: {error}", path=path)

    def _broken(self, label: str, error: CorruptError) -> None:
        """A file that once was a value file: of a key that has a record it was reported with that."""

    def _strays(self) -> Iterator[Finding]:
        for file in value_files(self.path, self._broken):
            if self.is_stray(file):
                path = os.path.join(self.path, *file.label.split("/"))
                newer = self._current(file.name) is not None
                message = f"nothing refers to the value file {path}; its key has {'another' if newer else 'no'} value"
                yield self._problem("orphan", message, name=file.name, typed=file.typed, path=path)

    def is_stray(self, file: ValueFile) -> bool:
        """Whether nothing refers to a value file, nor is anything to be done with it, for more than an instant."""

        def look(s: Any) -> tuple[int, bytes | None, bool]:
            label = file.label.encode("utf-8", "surrogatepass")
            return s.version, s.get(b"index", file.name), any(label in note for _, note in s.items(b"pending"))

        for _ in range(_TRIES):
            version, data, noted = self._index.read(look)
            if noted:
                return False
            record = None if data is None else unpack_record(file.name, data)
            if data is not None and record is None:
                return False  # whose record is damaged
            if record is not None and record.kind & 3 == BLOB:
                try:
                    if Ref.unpack(record.body).label == file.label:
                        return False
                except CorruptError:
                    return False
            try:
                with below(self.path, file.label) as (folder, last):
                    found = os.stat(last, dir_fd=folder, follow_symlinks=False)
            except (ChestError, OSError):
                return False
            if (found.st_dev, found.st_ino) != file.identity:
                return False
            if self._index.version() == version:
                return True
        return False


def strays(path: str, label: str | None = None) -> Iterator[str]:
    """The value files (or this one, if it is one) whose keys have another value: nothing refers to them any more."""
    checker = Checker(path)
    checker._index = index = ReadOnlyIndex(checker._keys_path)
    try:
        for file in value_files(checker.path, checker._broken):
            if label in (None, file.label) and checker._current(file.name) is not None and checker.is_stray(file):
                yield file.label
    finally:
        index.close()
