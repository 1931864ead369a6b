"""What a rebuilt index is made from: what can be read of the old one, and what the value files say of themselves.

In a sealed chest files say nothing that can be believed: there it is the records that know their files.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_digest, xxh3_128_digest

from . import _keys
from ._aside import Aside
from ._records import BLOB, KIND, LOOSE, PACKED, unpack_note
from ._trust import SEAL, SETTINGS, Trust, is_hidden_name
from ._value_files import ValueFile, look_into, open_to_read, value_files, walk
from ._valuefile import MARKS
from .abc import OrderItem, Record
from .engines._cursors import place as place_of
from .engines._files import FileBlobs
from .engines._labels import parts_of
from .engines._pages import Damage, Pages
from .engines._readonly import unpack_order, unpack_record
from .engines._salvage import Draft, salvaged
from .errors import ChestError, CorruptError, SerializerMismatchError, TamperedError

__all__ = ["Gathered", "label_at"]


class Gathered:
    """What ``Rebuild`` is made of.

    ``extra`` of the draft holds, by prefix: ``t`` typed keys by name and place (and by name alone), ``f`` value files by name
    and content, ``n`` the newest value file of each name, ``u`` labels that are to be unlinked, ``m`` moves, ``d`` names whose
    value is lost, ``w`` files that are wrong where they lie, ``l`` labels that records refer to, and of a sealed chest ``z``
    files by their size.
    """

    def __init__(self, path: str, aside: Aside, trust: Trust) -> None:
        self._path = path
        self._trust = trust
        self._keys = os.path.join(path, ".keys")
        self._aside = aside
        self._blobs = FileBlobs(path)
        self._newest = 0  # version
        self._draft: Draft

    # --- how it is to be read

    def _settle(self) -> None:
        """What a damaged index still says of the chest's settings, and which serializer is its own."""
        trust = self._trust
        if not trust.is_settled:
            settings = {}
            for _, key, value in self._salvaged():
                if key in (*SETTINGS, SEAL) and xxh3_64_digest(key + value[:-8]) == value[-8:]:
                    settings[key] = value[:-8]
            for _ in trust.settle(settings):
                pass
        if trust.refusal is None and trust.serializer is None:
            found = self._serializer()
            trust.settings[b"serializer"] = found.encode()
            trust.use(found)
            self._aside.note(f"the setting 'serializer' was lost, and is {found!r} now")
        if trust.refusal is not None:
            raise trust.refusal

    def _salvaged(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        try:
            pages = Pages(os.path.join(self._keys, "data.mdb"))
        except (OSError, CorruptError):
            return
        try:
            with contextlib.suppress(Damage):
                self._newest = pages.snapshot().version
            yield from salvaged(pages)
        finally:
            pages.close()

    def _serializer(self) -> str:
        """Which one has written what is there, as far as that shows without reading any of it."""
        for file in value_files(self._path, lambda *_: None, lambda _: True, lambda _: True):
            return "safe" if file.start.startswith(MARKS[1]) else "pickle"
        others = False
        for database, key, value in self._salvaged():
            record = unpack_record(key, value) if database == b"index" else None
            if record is not None and record.kind in (PACKED, LOOSE):
                if record.body[:2] == b"\x80\x05" and record.body[-1:] == b".":
                    return "pickle"
                others = True
        if others:
            raise SerializerMismatchError(
                f"the chest at {self._path} has lost the setting that says which serializer is its own: give serializer=.",
                path=self._path,
            )
        return "pickle"

    # --- what there is

    def _read_index(self) -> None:
        for database, key, value in self._salvaged():
            self._take(database or self._guess(key, value), key, value)

    def _guess(self, key: bytes, value: bytes) -> bytes:
        """The database that an entry must have come from."""
        if len(value) < 8 or xxh3_64_digest(key + value[:-8]) != value[-8:]:
            return b""
        if key in (*SETTINGS, SEAL) and len(value) < 200:
            return b"meta"
        item = unpack_order(key, value)
        if item is not None and item.seq >> 32 and self._is_item(item):
            return b"order"
        record = unpack_record(key, value)
        if record is None or record.kind & KIND > BLOB or len(key) > 511:
            return b""
        return b"" if self._trust.seal is not None and not self._is_genuine(key, record) else b"index"

    def _is_item(self, item: OrderItem) -> bool:
        if self._trust.seal is None and item.typed:
            return item.typed[:2] == b"\x80\x05" or self._trust.serializer == "safe"
        try:
            name, typed = self._trust.key(item.name, item.typed)
            if not typed:
                _keys.decode(name, b"")
        except ChestError:
            return False
        return True

    def _is_genuine(self, name: bytes, record: Record) -> bool:
        try:
            self._trust.record(name, record)
        except TamperedError:
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
            if not self._is_genuine(key, record):
                self._aside.keep(key, value, "it was not written with the chest's key, or was changed since")
                return
            if is_hidden_name(key) and self._trust.seal is None:
                self._trust.lose_seal()
                assert self._trust.refusal is not None
                raise self._trust.refusal
            known = draft.get(b"index", key)
            old = None if known is None else unpack_record(key, known)
            if old is None or old.version < record.version:
                draft.put(b"index", key, value)
            self._newest = max(self._newest, record.version)
        elif database == b"order":
            item = unpack_order(key, value)
            if item is not None and item.typed and self._trust.gives(item.name, item.typed):
                draft.put(b"extra", self._typed_at(item.name, item.seq), item.typed)
                draft.put(b"extra", self._typed_at(item.name), item.typed)
        elif database == b"pending" and len(value) >= 8 and xxh3_64_digest(key + value[:-8]) == value[-8:]:
            try:
                _, blob, label = unpack_note(self._trust.note(value[:-8]))
                if blob:
                    self._blobs.path(blob, "")
                if label:
                    parts_of(label)
                    draft.put(b"extra", label_at(b"u", label), b"1")
            except CorruptError:
                return
            draft.put(database, key, value)

    @staticmethod
    def _typed_at(name: bytes, seq: int | None = None) -> bytes:
        return b"t" + xxh3_128_digest(name + (b"" if seq is None else place_of(seq)))

    def _read_files(self) -> None:
        """What the value files say of themselves; those that were never published come first, and count less."""
        sealed = self._trust.seal is not None
        for label, file in walk(self._path):
            with contextlib.suppress(OSError, CorruptError):
                if sealed:
                    self._draft.put(b"extra", label_at(b"z" + place_of(file.size), label), json.dumps(label).encode())
                elif self._trust.is_encrypted(file.part(slice(0, 16))):
                    self._trust.lose_seal()
        if self._trust.refusal is not None:
            raise self._trust.refusal
        if sealed:
            return
        new = os.path.join(self._keys, "new")
        for name in os.listdir(new) if os.path.isdir(new) else ():
            with contextlib.suppress(OSError, CorruptError), open_to_read(os.path.join(new, name)) as file:
                found = look_into(file, "", lambda *_: None, lambda _: True)
                if found is not None and self._trust.owns(found.start):
                    self._enter_file(found, name)
        for found in value_files(self._path, lambda *_: None, self._trust.owns, lambda _: True):
            self._enter_file(found, "")

    def _enter_file(self, file: ValueFile, blob: str) -> None:
        draft = self._draft
        about: dict[str, Any] = {"label": file.label, "blob": blob, "name": file.name.hex(), "typed": file.typed.hex()}
        about |= {"size": file.size, "digest": file.layout.digest, "changed": file.changed_ns}
        about |= {"method": file.method, "plain": file.layout.size if file.method else 0}
        data = json.dumps(about).encode()
        draft.put(b"extra", b"f" + xxh3_128_digest(file.name + file.layout.digest.to_bytes(8, "little")), data)
        known = draft.get(b"extra", b"n" + xxh3_128_digest(file.name))
        old = {} if known is None else json.loads(known)
        if not old or (not blob, file.changed_ns) > (not old["blob"], old["changed"]):
            draft.put(b"extra", b"n" + xxh3_128_digest(file.name), data)
        if file.typed and draft.get(b"extra", self._typed_at(file.name)) is None:
            draft.put(b"extra", self._typed_at(file.name), file.typed)


def label_at(prefix: bytes, label: str) -> bytes:
    """A place in the draft for something about a label."""
    return prefix + xxh3_128_digest(label.encode("utf-8", "surrogatepass"))
