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
import struct
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_digest, xxh3_128_intdigest

from . import _fs, _keys, _valuefile
from ._check_files import SUMS, FileChecker
from ._compression import by_number
from ._problems import Finding, Problem
from ._records import BLOB, KIND, LOOSE, unpack_note
from ._trust import SEAL, SETTINGS, is_hidden_name
from ._value_files import open_to_read, value_files, walk
from .engines._cursors import place as place_of
from .engines._labels import below, parts_of
from .engines._legacy import NEW, OLD, read_pairs
from .engines._log import items_of
from .engines._readonly import ReadOnlyIndex, unpack_order, unpack_record
from .engines._verify import structural_errors
from .errors import ChestError, CorruptError, PathError, TamperedError, short

__all__ = ["Checker"]

_FEW = 100


class Checker(FileChecker):
    """The check of one folder; ``problems`` is called once."""

    # --- the folder as a whole

    def problems(self) -> Iterator[Finding]:
        if not os.path.isdir(self.path):
            raise PathError(f"there is no folder {self.path}: give the path of a chest.", path=self.path)
        others = _fs.who_else_writes(self.path)
        if others and not self._trust.is_guarded:
            yield self._problem("unsafe", f"{others}: they can run code in the name of those who read the chest. Take it away.")
        upgrade = os.path.join(self.path, NEW)
        if os.path.isfile(self._keys_path) and not os.path.islink(self._keys_path) and os.path.getsize(self._keys_path):
            yield from self._old(self._keys_path)
            return
        if not os.path.lexists(self._keys_path) and os.path.isfile(os.path.join(self.path, OLD)) and os.path.isdir(upgrade):
            self._keys_path = upgrade
        if not os.path.lexists(self._keys_path) and not self._has_files():
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
            if self._trust.settings.get(b"format", b"1") != b"1":
                return
            yield from self._everything()
        except CorruptError as error:
            if whole:
                yield self._problem("index", error.message, path=self._data)
        finally:
            self._index.close()

    def _has_files(self) -> bool:
        """Whether a chest has left value files here."""
        for _, file in walk(self.path):
            with contextlib.suppress(OSError, ChestError):
                if self._trust.is_encrypted(file.part(slice(0, 16))):
                    return True
        return next(value_files(self.path, self._broken, lambda _: True), None) is not None

    def _old(self, keys: str) -> Iterator[Finding]:
        """A folder of chest 0.2."""
        message = "a folder of chest 0.2, without checksums: it is read as it is, and the first write upgrades it"
        yield self._problem("old-format", message, path=keys)
        loads = self._trust.loads
        if loads is None:  # it is not what the caller takes it for
            return
        try:
            pairs, _ = read_pairs(keys, None, None, False, loads)
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
        settings, damaged = {}, {}
        for name, data in index.all_pairs(b"meta"):
            if xxh3_64_digest(name + data[:-8]) == data[-8:]:
                settings[name] = data[:-8]
            else:
                damaged[name] = data[:-8]
                yield self._problem("meta", f"the setting {name!r} of the chest is damaged", path=self._data)
        if index.version() > 2 or settings:  # else it was made, and nothing was ever written
            for name in SETTINGS:
                if name not in settings and name not in damaged:
                    yield self._problem("meta", f"the setting {name.decode()!r} of the chest is missing", path=self._data)
            for kind, message in self._trust.settle(settings, damaged.get(SEAL)):
                yield self._problem(kind, message, path=self._data)
        found = self._trust.settings.get(b"format", b"1")
        if found != b"1":
            message = f"the chest has format {found!r}, which this version cannot check: install a newer chest"
            yield self._problem("format", message, path=self._data)

    def _everything(self) -> Iterator[Finding]:
        self._folds = self._trust.settings.get(b"folds") == b"1"
        trust = self._trust
        names = self._index.pairs(b"index", None, _FEW)
        if names and trust.seal is None and not trust.locked and is_hidden_name(names[0][0]):
            kind, message = trust.lose_seal()
            yield self._problem(kind, message, path=self._data)
        elif names and trust.seal is not None and not self._is_any_genuine(names):
            kind, message = trust.lose_all()
            yield self._problem(kind, message, path=self._data)
        yield from self._notes()
        for place, data in self._index.all_pairs(b"changed"):
            number = int.from_bytes(place, "big")
            if len(data) < 8 or xxh3_64_digest(place + data[:-8]) != data[-8:]:
                yield self._problem("log", f"the note of what commit {number} changed is damaged")
            elif self._trust.seal is not None and not self._trust.dark:
                try:
                    for name, typed in items_of(data[:-8]):
                        self._trust.key(name, typed)
                except (CorruptError, struct.error) as error:
                    yield self._problem("log", f"the note of what commit {number} changed is not to be trusted: {error}")
        yield from self._order()
        yield from self._records()
        yield from self._unequal()
        if not self._trust.dark:
            yield from self._strays()
            yield from self._nameless()

    def _is_any_genuine(self, records: list[tuple[bytes, bytes]]) -> bool:
        """Whether anything in the index was written with the chest's key."""
        for name, data in records:
            record = unpack_record(name, data)
            with contextlib.suppress(TamperedError):
                if record is not None:
                    self._trust.record(name, record)
                    return True
        for place, data in self._index.pairs(b"order", None, _FEW):
            item = unpack_order(place, data)
            with contextlib.suppress(TamperedError):
                if item is not None:
                    self._trust.key(item.name, item.typed)
                    return True
        return False

    def _notes(self) -> Iterator[Finding]:
        for number, data in self._index.all_pairs(b"pending"):
            try:
                if len(data) < 8 or xxh3_64_digest(number + data[:-8]) != data[-8:]:
                    raise CorruptError("it is not what was written")
                if self._trust.dark:
                    continue
                _, blob, label = unpack_note(self._trust.note(data[:-8]))
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
        at = number % SUMS
        self._sums[at] = (self._sums[at] + sign * number) % (1 << 128)

    def _differs(self, place: bytes, name: bytes) -> bool:
        return self._sums[xxh3_128_intdigest(place + name) % SUMS] != 0

    def _order(self) -> Iterator[Finding]:
        for place, data in self._index.all_pairs(b"order"):
            item = unpack_order(place, data)
            if item is None:
                yield self._problem("order", f"the key at place {int.from_bytes(place, 'big')} of the order is damaged")
                continue
            self._add(place, item.name, 1)
            if self._trust.dark:
                continue
            try:
                name, typed = self._trust.key(item.name, item.typed)
            except TamperedError as error:
                message = f"the key at place {item.seq} of the order is not to be trusted: {error}"
                yield self._problem("order", message, name=item.name, typed=b"\0")
                continue
            try:
                key = self._trust.decode(name, typed)
                if typed and name[:1] != _keys.OPAQUE_PREFIX and _keys.name_of(key) != name:
                    raise CorruptError("it is not the one that it was stored as")
            except CorruptError as error:
                yield self._problem("key", f"the key named {short(name)} is damaged: {error}", name=item.name, typed=b"\0")
            except ChestError:
                pass  # its class is not here, or it may not be decoded: no damage

    def _records(self) -> Iterator[Finding]:
        for name, data in self._index.all_pairs(b"index"):
            record = unpack_record(name, data)
            if record is None:
                yield self._problem("record", "its record in the index is damaged", name=name, path=self._data)
                continue
            self._add(place_of(record.seq), name, -1)
            if record.kind & KIND == KIND:
                message = f"its record in the index is of kind {record.kind}, which there is none of"
                yield self._problem("record", message, name=name, path=self._data)
                continue
            if self._trust.dark:
                continue
            try:
                record = self._trust.record(name, record)
            except TamperedError as error:
                yield self._problem(
                    "record", f"its record in the index is not to be trusted: {error}", name=name, path=self._data
                )
                continue
            if record.kind >> 2:
                try:
                    by_number(record.kind >> 2)
                except CorruptError as error:
                    message = f"its value cannot be looked at: {error}. Install a newer chest and check again"
                    yield self._problem("unreadable", message, name=name, path=self._data)
                    continue
            if record.kind & KIND == BLOB:
                yield from self._blob(name, record)
            elif record.kind & KIND == LOOSE:
                yield from self._copy(name)

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
        if self._trust.is_keyed:
            message = "without its index nothing tells whether this is its key: a repair looks for that page by page"
            yield self._problem("seal", message, path=self._data)
        for file in value_files(self.path, self._broken, lambda _: True):
            with below(self.path, file.label) as (folder, last), open_to_read(last, folder) as opened:
                try:
                    _valuefile.verify_file(file.layout, opened.part)
                except CorruptError as error:
                    path = os.path.join(self.path, file.label)
                    yield self._problem("value", f"the value file {path} is damaged: {error}", path=path)
