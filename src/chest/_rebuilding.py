"""A new index, made from what can be read of the old one and from what the value files say of themselves.

Order of the steps, each of which a crash may follow:

    set aside       records and files that nothing can be made of (a copy of the record, or the file itself)
    rename          the new index takes the place of the old one, of which another name is kept beside what was set aside
    move            files that were found under another key's name go to ``.keys/new/``, where their record looks for them;
                    the new index has a note that they are to get their own name

Whoever is killed before the rename has changed nothing that counts, and after it only files are left to be moved, which the
next repair finds where they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from typing import Any

from xxhash import xxh3_64_digest, xxh3_128_digest

from . import _fs, _keys
from ._aside import Aside
from ._records import BLOB, Ref, key_note, pack_note, unpack_note
from ._value_files import File, ValueFile, look_into, open_to_read, value_files
from .abc import Record
from .engines._cursors import place as place_of
from .engines._files import FileBlobs
from .engines._labels import below, parts_of
from .engines._pages import Damage, Pages
from .engines._readonly import unpack_order, unpack_record
from .engines._salvage import Draft, salvaged
from .errors import ChestError, CorruptError

__all__ = ["Rebuild", "set_generation"]


class Rebuild:
    """See the module's head. Whoever calls has the chest to himself.

    ``extra`` of the draft holds, by prefix: ``t`` typed keys by name and place (and by name alone), ``f`` value files by name
    and content, ``n`` the newest value file of each name, ``u`` labels that are to be unlinked, ``m`` moves, ``d`` names whose
    value is lost.
    """

    def __init__(self, path: str, aside: Aside) -> None:
        self._path = path
        self._keys = os.path.join(path, ".keys")
        self._aside = aside
        self._blobs = FileBlobs(path)
        self._newest = 0  # version
        self._draft: Draft

    def run(self) -> None:
        draft_name, fd = self._blobs._create()
        os.close(fd)
        name, fd = self._blobs._create()
        try:
            self._draft = Draft(self._blobs.path(draft_name, "", new=True))
            try:
                self._read_index()
                self._read_files()
                self._judge_records()
                self._revive()
                self._enter_order()
                self._enter_settings()
                moves = [(json.loads(v), k[1:]) for k, v in self._draft.pairs(b"extra", b"m")]
                number = self._draft.finish(fd, self._blobs.path(name, "", new=True), self._newest + 1)
            finally:
                self._draft.close()
            data = os.path.join(self._keys, "data.mdb")
            if os.path.lexists(data):
                self._aside.link(data, "data.mdb")
            os.replace(self._blobs.path(name, "", new=True), data)
            _fs.fsync_folder(self._keys)
            set_generation(self._keys, number)
            for label, blob in moves:
                with contextlib.suppress(OSError), below(self._path, label) as (folder, last):
                    os.rename(last, self._blobs.path(blob.decode(), "", new=True), src_dir_fd=folder)
            _fs.fsync_folder(os.path.join(self._keys, "new"))
        finally:
            os.close(fd)
            self._blobs.remove([draft_name, name])
            self._blobs.close()

    # --- what there is

    def _read_index(self) -> None:
        try:
            pages = Pages(os.path.join(self._keys, "data.mdb"))
        except (OSError, CorruptError):
            return
        try:
            with contextlib.suppress(Damage):
                self._newest = pages.snapshot().version
            for database, key, value in salvaged(pages):
                self._take(database or self._guess(key, value), key, value)
        finally:
            pages.close()

    def _guess(self, key: bytes, value: bytes) -> bytes:
        """The database that an entry must have come from."""
        if len(value) < 8 or xxh3_64_digest(key + value[:-8]) != value[-8:]:
            return b""
        if key in (b"format", b"serializer", b"folds") and len(value) < 100:
            return b"meta"
        item = unpack_order(key, value)
        if (
            item is not None
            and item.seq >> 32
            and (item.typed[:2] == b"\x80\x05" or (not item.typed and self._is_name(item.name)))
        ):
            return b"order"
        record = unpack_record(key, value)
        return b"index" if record is not None and record.kind & 3 <= BLOB and len(key) <= 511 else b""

    @staticmethod
    def _is_name(name: bytes) -> bool:
        try:
            _keys.decode(name, b"")
        except ChestError:
            return False
        return True

    def _take(self, database: bytes, key: bytes, value: bytes) -> None:
        draft = self._draft
        if database == b"index":
            record = unpack_record(key, value)
            if record is None:
                if draft.get(b"index", key) is None:
                    self._aside.keep(key, value, "its checksum fails")
                return
            known = draft.get(b"index", key)
            old = None if known is None else unpack_record(key, known)
            if old is None or old.version < record.version:
                draft.put(b"index", key, value)
            self._newest = max(self._newest, record.version)
        elif database == b"order":
            item = unpack_order(key, value)
            if item is not None and item.typed and self._gives(item.name, item.typed):
                draft.put(b"extra", self._typed_at(item.name, item.seq), item.typed)
                draft.put(b"extra", self._typed_at(item.name), item.typed)
        elif database in (b"pending", b"meta") and len(value) >= 8 and xxh3_64_digest(key + value[:-8]) == value[-8:]:
            if database == b"pending":
                try:
                    _, blob, label = unpack_note(value[:-8])
                    if blob:
                        self._blobs.path(blob, "")
                    if label:
                        parts_of(label)
                        draft.put(b"extra", b"u" + xxh3_128_digest(label.encode("utf-8", "surrogatepass")), b"1")
                except CorruptError:
                    return
            draft.put(database, key, value)

    @staticmethod
    def _typed_at(name: bytes, seq: int | None = None) -> bytes:
        return b"t" + xxh3_128_digest(name + (b"" if seq is None else place_of(seq)))

    def _read_files(self) -> None:
        """What the value files say of themselves; those that were never published come first, and count less."""
        new = os.path.join(self._keys, "new")
        for name in os.listdir(new) if os.path.isdir(new) else ():
            with contextlib.suppress(OSError, CorruptError), open_to_read(os.path.join(new, name)) as file:
                found = look_into(file, "", lambda *_: None)
                if found is not None:
                    self._enter_file(found, name)
        for found in value_files(self._path, lambda *_: None):
            self._enter_file(found, "")

    def _enter_file(self, file: ValueFile, blob: str) -> None:
        draft = self._draft
        about: dict[str, Any] = {"label": file.label, "blob": blob, "name": file.name.hex(), "typed": file.typed.hex()}
        about |= {"size": file.layout.size, "digest": file.layout.digest, "changed": file.changed_ns}
        data = json.dumps(about).encode()
        draft.put(b"extra", b"f" + xxh3_128_digest(file.name + file.layout.digest.to_bytes(8, "little")), data)
        known = draft.get(b"extra", b"n" + xxh3_128_digest(file.name))
        old = {} if known is None else json.loads(known)
        if not old or (not blob, file.changed_ns) > (not old["blob"], old["changed"]):
            draft.put(b"extra", b"n" + xxh3_128_digest(file.name), data)
        if file.typed and draft.get(b"extra", self._typed_at(file.name)) is None:
            draft.put(b"extra", self._typed_at(file.name), file.typed)

    def _whole(self, about: dict[str, Any]) -> bool:
        ref = Ref(about["size"], about["digest"], "0", about["label"])
        try:
            with self._open(about["blob"] or "0", about["label"]) as file:
                file.refuse_other(ref)
        except (OSError, ChestError):
            return False
        return True

    def _open(self, blob: str, label: str) -> File:
        return File(self._blobs._open(blob, label))

    # --- what becomes of it

    def _judge_records(self) -> None:
        for name, data in self._draft.pairs(b"index"):
            record = unpack_record(name, data)
            assert record is not None
            problem = self._problem(name, record)
            if problem:
                self._aside.keep(name, data, problem)
                self._draft.delete(b"index", name)

    def _typed(self, name: bytes, seq: int) -> bytes:
        """What gives a key back where its name does not: from its place in the order, another place, or its file."""
        for place in (self._typed_at(name, seq), self._typed_at(name)):
            found = self._draft.get(b"extra", place)
            if found is not None and self._gives(name, found):
                return found
        return b""

    @staticmethod
    def _gives(name: bytes, typed: bytes) -> bool:
        try:
            key = _keys.decode(name, typed)
            return name[:1] == _keys.OPAQUE_PREFIX or _keys.name_of(key) == name
        except CorruptError:
            return False
        except ChestError:
            return True  # its class is not here

    def _problem(self, name: bytes, record: Record) -> str:
        """Why nothing can be made of a record; "" if it is right, or is now."""
        try:
            key = _keys.decode(name, self._typed(name, record.seq))
            del key
        except CorruptError as error:
            return f"its key is lost: {error}"
        except ChestError:
            pass
        if record.kind & 3 < BLOB:
            return ""
        if record.kind & 3 > BLOB:
            return "there is no such kind of record"
        try:
            ref = Ref.unpack(record.body)
            parts_of(ref.label)
            self._blobs.path(ref.blob, ref.label)
        except CorruptError as error:  # a value file may know better
            return f"it refers to no value file: {error}"
        try:
            with self._open(ref.blob, ref.label) as file:
                file.refuse_other(ref)
            if os.path.lexists(self._blobs.path(ref.blob, "", new=True)):
                self._note(name, ref.blob)
            return ""
        except FileNotFoundError:
            problem = "its value file is missing"
        except CorruptError as error:
            problem = f"its value file is damaged: {error}"
        except OSError:
            return ""  # it can be read by somebody else, perhaps
        found = self._draft.get(b"extra", b"f" + xxh3_128_digest(name + ref.digest.to_bytes(8, "little")))
        about = None if found is None else json.loads(found)
        if about is not None and self._whole(about) and not about["blob"]:
            self._draft.put(b"extra", b"m" + ref.blob.encode(), json.dumps(about["label"]).encode())
            self._note(name, ref.blob)
            return ""
        self._draft.put(b"extra", b"d" + xxh3_128_digest(name), b"1")
        with contextlib.suppress(OSError, ChestError):
            path = self._blobs.path(ref.blob, "", new=True)
            if os.path.lexists(path):
                self._aside.move(path, problem)
        with contextlib.suppress(OSError, ChestError):
            with below(self._path, ref.label) as (folder, last):
                mode = os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode) and not self._is_used(ref.label):
                self._aside.move_label(self._path, ref.label, f"the value of the key named {name!r}: {problem}")
        return problem

    def _is_used(self, label: str) -> bool:
        """Whether a file is whole and the value of a key: somebody has exchanged files."""
        try:
            with below(self._path, label) as (folder, last), open_to_read(last, folder) as file:
                found = look_into(file, label, lambda *_: None)
        except (OSError, ChestError):
            return False
        return found is not None

    def _note(self, name: bytes, blob: str) -> None:
        """Its value file is to get its own name."""
        n = self._draft.count(b"pending")
        while self._draft.get(b"pending", place_of(n)) is not None:
            n += 1
        note = pack_note(name, blob, "")
        self._draft.put(b"pending", place_of(n), note + xxh3_64_digest(place_of(n) + note))

    def _revive(self) -> None:
        """Value files of keys that have no record any more become records; those of keys that have another are set aside."""
        for _, data in self._draft.pairs(b"extra", b"n"):
            about = json.loads(data)
            name, label = bytes.fromhex(about["name"]), about["label"]
            if (
                self._draft.get(b"index", name) is not None
                or self._draft.get(b"extra", b"d" + xxh3_128_digest(name)) is not None
            ):
                continue
            if label and self._draft.get(b"extra", b"u" + xxh3_128_digest(label.encode("utf-8", "surrogatepass"))) is not None:
                continue  # it was deleted; only the file was still there
            try:
                key = _keys.decode(name, bytes.fromhex(about["typed"]))
            except CorruptError:
                continue
            except ChestError:
                key = None
            if not self._whole(about):
                continue
            blob = about["blob"]
            if blob:
                label = _keys.key_to_filename(key, name) if key is not None else "0" + xxh3_128_digest(name).hex()
                self._note(name, blob)
            ref = Ref(about["size"], about["digest"], blob or "0", label)
            self._newest += 1
            seq = (about["changed"] // 1000) << 12
            self._put(name, Record(self._newest, seq, BLOB, ref.pack()))
        for found in value_files(self._path, lambda *_: None):
            if self._is_left_over(found):
                why = f"an older value of the key named {found.name!r}" if self._has(found.name) else "its key is lost"
                self._aside.move_label(self._path, found.label, why)

    def _has(self, name: bytes) -> bool:
        return self._draft.get(b"index", name) is not None

    def _is_left_over(self, file: ValueFile) -> bool:
        data = self._draft.get(b"index", file.name)
        record = None if data is None else unpack_record(file.name, data)
        if record is not None and record.kind & 3 == BLOB:
            ref = Ref.unpack(record.body)
            if ref.label == file.label:
                return False
            return self._draft.get(b"extra", b"m" + ref.blob.encode()) != json.dumps(file.label).encode()
        return True

    def _put(self, name: bytes, record: Record) -> None:
        data = record.version.to_bytes(8, "little") + record.seq.to_bytes(8, "little") + bytes([record.kind]) + record.body
        self._draft.put(b"index", name, data + xxh3_64_digest(name + data))

    def _enter_order(self) -> None:
        """A place for each record: its own, or one behind the end where that is taken."""
        homeless = []
        last = 0
        for name, data in self._draft.pairs(b"index"):
            record = unpack_record(name, data)
            assert record is not None
            place = place_of(record.seq)
            if self._draft.get(b"order", place) is not None:
                homeless.append(name)
                continue
            self._enter(place, name, record.seq)
            last = max(last, record.seq)
        for name in homeless:
            data = self._draft.get(b"index", name) or b""
            record = unpack_record(name, data)
            assert record is not None
            last += 1
            self._put(name, record._replace(seq=last))
            self._enter(place_of(last), name, record.seq)

    def _enter(self, place: bytes, name: bytes, seq: int) -> None:
        data = key_note(name, self._typed(name, seq))
        self._draft.put(b"order", place, data + xxh3_64_digest(place + data))

    def _enter_settings(self) -> None:
        folds = b"1" if _fs.folds_case(self._path) else b"0"
        for name, setting in ((b"format", b"1"), (b"serializer", b"pickle"), (b"folds", folds)):
            if self._draft.get(b"meta", name) is None:
                self._draft.put(b"meta", name, setting + xxh3_64_digest(name + setting))
                self._aside.note(f"the setting {name!r} was lost, and is {setting!r} now")


def set_generation(keys: str, at_least: int) -> None:
    """Written into the file that is there: whoever reads the chest has it mapped."""
    number = at_least
    with contextlib.suppress(OSError, Damage):
        pages = Pages(os.path.join(keys, "data.mdb"))
        try:
            number = max(number, pages.snapshot().version)
        finally:
            pages.close()
    fd = os.open(os.path.join(keys, "generation"), os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        _fs.write_all(fd, number.to_bytes(8, "little"))
    finally:
        os.close(fd)
