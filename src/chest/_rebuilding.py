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
from ._compression import by_number
from ._gathering import Gathered, label_at
from ._records import BLOB, KIND, Ref, key_note, pack_note
from ._trust import SEAL
from ._value_files import File, ValueFile, look_into, open_to_read, value_files, walk
from .abc import Record
from .engines._cursors import place as place_of
from .engines._labels import below, parts_of
from .engines._pages import Damage, Pages
from .engines._readonly import unpack_record
from .engines._salvage import Draft
from .errors import ChestError, CorruptError, MissingExtraError

__all__ = ["Rebuild", "set_generation"]

_MANY = 1000  # files that are tried


class Rebuild(Gathered):
    """See the module's head. Whoever calls has the chest to himself.

    Records and keys of a sealed chest stay as they were sealed: they are bound to names, and not to places.
    """

    def run(self) -> None:
        """Make the new index.

        Raises:
            WrongKeyError, CorruptError, SerializerMismatchError: it cannot be made of what there is, or not without the key.
                Nothing has changed.
        """
        self._settle()
        draft_name, fd = self._blobs._create()
        os.close(fd)
        name, fd = self._blobs._create()
        try:
            self._draft = Draft(self._blobs.path(draft_name, "", new=True))
            try:
                self._read_index()
                self._read_files()
                self._judge_records()
                self._set_aside_the_wrong()
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

    def _whole(self, about: dict[str, Any]) -> bool:
        ref = Ref(about["size"], about["digest"], "0", about["label"], about["plain"])
        return self._is_whole(about["blob"] or "0", about["label"], ref, about["method"] << 2)

    def _is_whole(self, blob: str, label: str, ref: Ref, kind: int, name: bytes = b"") -> bool:
        try:
            with self._open(blob, label) as file:
                file.refuse_other(ref, kind, name, self._trust.seal)
        except (OSError, ChestError, MemoryError):
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
            if found is not None and self._trust.gives(name, found):
                return found
        return b""

    def _problem(self, name: bytes, record: Record) -> str:
        """Why nothing can be made of a record; "" if it is right, or is now."""
        typed = self._typed(name, record.seq)
        try:
            if self._trust.hides and not typed:
                raise CorruptError("in an encrypted chest only the order knows it")
            if typed or self._trust.seal is None:
                self._trust.decode(*self._trust.key(name, typed))
            else:
                _keys.decode(name, b"")
        except CorruptError as error:
            return f"its key is lost: {error}"
        except ChestError:
            pass
        if record.kind & KIND < BLOB:
            return ""
        if record.kind & KIND > BLOB:
            return "there is no such kind of record"
        try:
            ref = Ref.unpack(self._trust.record(name, record).body)
            parts_of(ref.label)
            self._blobs.path(ref.blob, ref.label)
        except CorruptError as error:  # a value file may know better
            return f"it refers to no value file: {error}"
        try:
            by_number(record.kind >> 2) if record.kind >> 2 else None
        except CorruptError:
            return self._use(ref)  # of a newer version
        try:
            with self._open(ref.blob, ref.label) as file:
                file.refuse_other(ref, record.kind, name, self._trust.seal)
            if os.path.lexists(self._blobs.path(ref.blob, "", new=True)):
                self._note(self._true_name(name, typed), ref.blob)
            return self._use(ref)
        except FileNotFoundError:
            problem = "its value file is missing"
        except CorruptError as error:
            problem = f"its value file is damaged: {error}"
        except (OSError, MissingExtraError, MemoryError):
            return self._use(ref)  # it can be read by somebody else, perhaps
        elsewhere = self._found(name, ref, record.kind)
        if elsewhere is not None:
            self._draft.put(b"extra", b"m" + ref.blob.encode(), json.dumps(elsewhere).encode())
            self._draft.put(b"extra", label_at(b"l", elsewhere), b"1")
            self._note(self._true_name(name, typed), ref.blob)
            return ""
        self._draft.put(b"extra", b"d" + xxh3_128_digest(name), b"1")
        with contextlib.suppress(OSError, ChestError):
            path = self._blobs.path(ref.blob, "", new=True)
            if os.path.lexists(path):
                self._aside.move(path, problem)
        why = f"the value of the key named {name!r}: {problem}"
        self._draft.put(b"extra", label_at(b"w", ref.label), json.dumps([ref.label, why]).encode())
        return problem

    def _true_name(self, name: bytes, typed: bytes) -> bytes:
        return self._trust.key(name, typed)[0] if typed else name

    def _use(self, ref: Ref) -> str:
        self._draft.put(b"extra", label_at(b"l", ref.label), b"1")
        return ""

    def _found(self, name: bytes, ref: Ref, kind: int) -> str | None:
        """Where the value file of a record lies under another name."""
        if self._trust.seal is None:
            data = self._draft.get(b"extra", b"f" + xxh3_128_digest(name + ref.digest.to_bytes(8, "little")))
            about = None if data is None else json.loads(data)
            return about["label"] if about is not None and not about["blob"] and self._whole(about) else None
        for number, (_, data) in enumerate(self._draft.pairs(b"extra", b"z" + place_of(ref.size))):
            label: str = json.loads(data)
            if self._is_whole("0", label, ref, kind, name):
                return label
            if number >= _MANY:
                break
        return None

    def _set_aside_the_wrong(self) -> None:
        """What lies in the place of a lost value, unless it is the value of another key: somebody may have exchanged files."""
        for _, data in self._draft.pairs(b"extra", b"w"):
            label, why = json.loads(data)
            with contextlib.suppress(OSError, ChestError):
                with below(self._path, label) as (folder, last):
                    mode = os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode) and not self._is_used(label):
                    self._aside.move_label(self._path, label, why)

    def _is_used(self, label: str) -> bool:
        """Whether a file is whole and the value of a key."""
        if self._draft.get(b"extra", label_at(b"l", label)) is not None:
            return True
        if self._trust.seal is not None:
            return False
        try:
            with below(self._path, label) as (folder, last), open_to_read(last, folder) as file:
                found = look_into(file, label, lambda *_: None, lambda _: True)
        except (OSError, ChestError):
            return False
        return found is not None and self._trust.owns(found.start)

    def _note(self, name: bytes, blob: str) -> None:
        """The value file of the key with this true name is to get its own."""
        n = self._draft.count(b"pending")
        while self._draft.get(b"pending", place_of(n)) is not None:
            n += 1
        note = self._trust.sealed_note(pack_note(name, blob, ""))
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
            if label and self._draft.get(b"extra", label_at(b"u", label)) is not None:
                continue  # it was deleted; only the file was still there
            try:
                key = self._trust.decode(name, bytes.fromhex(about["typed"]))
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
            ref = Ref(about["size"], about["digest"], blob or "0", label, about["plain"])
            self._newest += 1
            seq = (about["changed"] // 1000) << 12
            self._use(ref)
            self._put(name, Record(self._newest, seq, BLOB | about["method"] << 2, ref.pack()))
        if self._trust.seal is not None:
            self._set_aside_the_nameless()
            return

        def opens(label: str) -> bool:
            return self._draft.get(b"extra", label_at(b"l", label)) is None

        for found in value_files(self._path, lambda *_: None, self._trust.owns, opens):
            if self._is_left_over(found):
                why = f"an older value of the key named {found.name!r}" if self._has(found.name) else "its key is lost"
                self._aside.move_label(self._path, found.label, why)

    def _set_aside_the_nameless(self) -> None:
        """Files that only somebody with the key can have written for a record, and that no record refers to any more.

        Those of a signed chest say themselves whose they are, but nothing says that this is true.
        """
        left = []
        for label, file in walk(self._path):
            with contextlib.suppress(OSError, ChestError):
                if self._draft.get(b"extra", label_at(b"l", label)) is None:
                    start = file.part(slice(0, 16))
                    if self._trust.is_encrypted(start) if self._trust.hides else self._is_ours(file, label):
                        left.append(label)
        for label in left:
            self._aside.move_label(self._path, label, "no record that is to be trusted refers to it")

    def _is_ours(self, file: File, label: str) -> bool:
        found = look_into(file, label, lambda *_: None)
        return found is not None and self._trust.owns(found.start)

    def _has(self, name: bytes) -> bool:
        return self._draft.get(b"index", name) is not None

    def _is_left_over(self, file: ValueFile) -> bool:
        data = self._draft.get(b"index", file.name)
        record = None if data is None else unpack_record(file.name, data)
        if record is not None and record.kind & KIND == BLOB:
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
        data = key_note(name, self._typed(name, seq) or self._trust.sealed_key(name))
        self._draft.put(b"order", place, data + xxh3_64_digest(place + data))

    def _enter_settings(self) -> None:
        trust = self._trust
        folds = b"1" if _fs.folds_case(self._path) else b"0"
        settings: dict[bytes, bytes | None] = dict(trust.settings)
        for name, setting in ((b"format", b"1"), (b"serializer", (trust.serializer or "pickle").encode()), (b"folds", folds)):
            if settings.setdefault(name, setting) == setting and name not in trust.settings:
                self._aside.note(f"the setting {name!r} was lost, and is {setting!r} now")
        if trust.seal is not None:
            settings[SEAL] = trust.seal.signed_setting(dict(settings))
        for name, value in settings.items():
            assert value is not None
            self._draft.put(b"meta", name, value + xxh3_64_digest(name + value))


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
