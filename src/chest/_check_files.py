"""The part of a check that is about value files: from records to files, and from files to records.

Files with a footer say whose they are. Of those that do not (encrypted or compressed ones) only records know; whether there
is one for each is found out as it is for the order, by sums of hashes of their labels.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_128_intdigest

from . import _keys
from ._problems import KINDS, Finding, Problem
from ._records import BLOB, KIND, LOOSE, Ref
from ._trust import Trust
from ._value_files import File, ValueFile, frames_of, value_files, walk
from .abc import Record
from .engines._cursors import place as place_of
from .engines._files import FileBlobs
from .engines._labels import below, parts_of
from .engines._readonly import ReadOnlyIndex, unpack_record
from .errors import ChestError, CorruptError, MissingExtraError, TamperedError, short
from .serializers import Codec

__all__ = ["SUMS", "FileChecker", "strays"]

SUMS = 4096
_TRIES = 1000
_FEW = 10


class FileChecker:
    """What ``Checker`` is made of."""

    def __init__(self, path: str, trust: Trust) -> None:
        self.path = os.path.abspath(path)
        self._trust = trust
        self._keys_path = os.path.join(self.path, ".keys")
        self._blobs = FileBlobs(self.path, sync=False)
        self._sums = [0] * SUMS
        self._label_sums = [0] * SUMS  # of files whose name only a record tells
        self._index: ReadOnlyIndex
        self._folds = False

    @property
    def _data(self) -> str:
        return os.path.join(self._keys_path, "data.mdb")

    def _problem(self, kind: str, message: str, *, name: bytes = b"", typed: bytes = b"", path: str = "") -> Finding:
        key: Any = None
        if name:
            try:
                key = self._key(name, typed or self._typed(name))
            except Exception:
                message = f"{message} (its name in the index is {short(name)})"
        return Finding(Problem(kind, key, path or self._keys_path, message, KINDS[kind]), name)

    def _key(self, name: bytes, typed: bytes) -> Any:
        return self._trust.decode(*self._trust.key(name, typed))

    def _typed(self, name: bytes) -> bytes:
        """What gives a key back where its name does not, from the order."""

        def look(s: Any) -> bytes | None:
            data = s.get(b"index", name)
            record = None if data is None else unpack_record(name, data)
            return None if record is None else s.get(b"order", place_of(record.seq))

        data = self._index.read(look)
        n = 2 + len(name)
        return data[n:-8] if data is not None and data[2:n] == name else b""

    def _is_noted(self, snapshot: Any, what: bytes) -> bool:
        for _, note in snapshot.items(b"pending"):
            with contextlib.suppress(CorruptError):
                if what in self._trust.note(note[:-8]):
                    return True
        return False

    # --- from records to files

    def _current(self, name: bytes) -> Record | None:
        data = self._index.read(lambda s: s.get(b"index", name))
        return None if data is None else unpack_record(name, data)

    def _blob(self, name: bytes, record: Record | None) -> Iterator[Finding]:
        """The value file of a record, or of a newer one of the same key."""
        for _ in range(_TRIES):
            if record is None or record.kind & KIND != BLOB:
                return
            found = self._blob_problem(name, record)
            if found is None:
                return
            newer = self._current(name)
            if newer is not None and newer.version == record.version:
                yield found
                return
            try:
                record = None if newer is None else self._trust.record(name, newer)
            except TamperedError:
                return  # since it was first looked at: the next check finds it

    def _blob_problem(self, name: bytes, record: Record) -> Finding | None:
        trust = self._trust
        try:
            ref = Ref.unpack(record.body)
            parts_of(ref.label)
            path = self._blobs.path(ref.blob, ref.label)
        except CorruptError as error:
            message = f"its record in the index refers to no value file: {error}"
            return self._problem("record", message, name=name, path=self._data)
        if record.kind >> 2 or trust.hides:
            self._add_label(ref.label, 1)
        try:
            with File(self._blobs._open(ref.blob, ref.label)) as file:
                if file.is_regular and self._is_forgotten(ref):
                    message = "no note says that its value file is to get its own name: the next opener would remove it"
                    return self._problem("note", message, name=name, path=path)
                file.refuse_other(ref, record.kind, name, trust.seal, locked=trust.locked)
        except FileNotFoundError:
            return self._problem("missing", "its value file is missing", name=name, path=path)
        except CorruptError as error:
            message = error.message.rstrip(".")
            if isinstance(error, TamperedError):
                return self._problem("value", f"its value file is not to be trusted: {message}", name=name, path=path)
            return self._problem("value", f"its value file is damaged: {message}", name=name, path=path)
        except (MissingExtraError, MemoryError) as error:
            return self._problem("unreadable", f"its value file cannot be looked at: {error}", name=name, path=path)
        except OSError as error:
            message = f"its value file cannot be read ({error.strerror or error}): make it readable and check again"
            return self._problem("unreadable", message, name=name, path=path)
        return None

    def _is_forgotten(self, ref: Ref) -> bool:
        """Whether a value file lies in ``new/`` and no note knows of it."""
        if not os.path.lexists(self._blobs.path(ref.blob, "", new=True)):
            return False
        noted = self._index.read(lambda s: self._is_noted(s, ref.blob.encode()))
        return not noted and os.path.lexists(self._blobs.path(ref.blob, "", new=True))

    def _copy(self, name: bytes) -> Iterator[Finding]:
        """A readable copy may be missing or old, since nobody relies on it; but nothing else may lie in its place."""
        if self._trust.hides:
            return
        try:
            label = _keys.key_to_filename(self._key(name, self._typed(name)), name, folds=self._folds)
            with below(self.path, label) as (folder, last):
                found = os.stat(last, dir_fd=folder, follow_symlinks=False)
        except (ChestError, OSError, TypeError):
            return
        record = self._current(name)
        if not stat.S_ISREG(found.st_mode) and record is not None and record.kind & KIND == LOOSE:
            path = os.path.join(self.path, *label.split("/"))
            yield self._problem("copy", f"in the place of its readable copy lies something else: {path}", name=name, path=path)

    # --- from files to records

    def _broken(self, label: str, error: CorruptError) -> None:
        """A file that once was a value file: of a key that has a record it was reported with that."""

    def _add_label(self, label: str, sign: int) -> None:
        number = xxh3_128_intdigest(label.encode("utf-8", "surrogatepass"))
        self._label_sums[number % SUMS] = (self._label_sums[number % SUMS] + sign * number) % (1 << 128)

    def _differs_label(self, label: str) -> bool:
        return self._label_sums[xxh3_128_intdigest(label.encode("utf-8", "surrogatepass")) % SUMS] != 0

    def _strays(self) -> Iterator[Finding]:
        """Files with a footer, which say whose they are. Those that were compressed are opened only where the sums differ."""
        trust = self._trust
        for label, file in walk(self.path):
            with contextlib.suppress(OSError, ChestError):
                if trust.is_encrypted(file.part(slice(0, 16))) if trust.hides else frames_of(file):
                    self._add_label(label, -1)
        opens = self._differs_label if trust.seal is None and not trust.locked else lambda _: False
        for found in value_files(self.path, self._broken, trust.owns, opens):
            if self.is_stray(found):
                path = os.path.join(self.path, *found.label.split("/"))
                newer = self._current(found.name) is not None
                message = f"nothing refers to the value file {path}; its key has {'another' if newer else 'no'} value"
                typed = b"\0" if trust.seal is not None or trust.locked else found.typed  # which nobody vouches for
                yield self._problem("orphan", message, name=found.name, typed=typed, path=path)

    def _nameless(self) -> Iterator[Finding]:
        """Files of an encrypted chest that no record refers to: they do not say whose they are."""
        if not self._trust.hides or not any(self._label_sums):
            return
        suspects = {}
        for label, file in walk(self.path):
            with contextlib.suppress(OSError, ChestError):
                if self._differs_label(label) and self._trust.is_encrypted(file.part(slice(0, 16))):
                    suspects[label] = file.identity
        for _ in range(_FEW):
            version = self._index.version()
            used = set()
            for name, data in self._index.all_pairs(b"index"):
                record = unpack_record(name, data)
                if record is not None and record.kind & KIND == BLOB:
                    with contextlib.suppress(CorruptError):
                        used.update({Ref.unpack(self._trust.record(name, record).body).label} & suspects.keys())
            suspects = {
                label: identity for label, identity in suspects.items() if label not in used and self._is_free(label, identity)
            }
            if self._index.version() == version or not suspects:
                break
        else:
            return  # it is written to all the time: the next check finds them
        for label in suspects:
            path = os.path.join(self.path, label)
            yield self._problem("orphan", f"nothing refers to the value file {path}, which does not say whose it is", path=path)

    def _is_free(self, label: str, identity: tuple[int, int]) -> bool:
        """Whether a file still lies there, and no note is about it."""
        if self._index.read(lambda s: self._is_noted(s, label.encode("utf-8", "surrogatepass"))):
            return False
        try:
            with below(self.path, label) as (folder, last):
                found = os.stat(last, dir_fd=folder, follow_symlinks=False)
        except (ChestError, OSError):
            return False
        return (found.st_dev, found.st_ino) == identity

    def is_stray(self, file: ValueFile) -> bool:
        """Whether nothing refers to a value file, nor is anything to be done with it, for more than an instant."""

        def look(s: Any) -> tuple[int, bytes | None, bool]:
            label = file.label.encode("utf-8", "surrogatepass")
            return s.version, s.get(b"index", file.name), self._is_noted(s, label)

        for _ in range(_TRIES):
            version, data, noted = self._index.read(look)
            if noted:
                return False
            record = None if data is None else unpack_record(file.name, data)
            if data is not None and record is None:
                return False  # whose record is damaged
            if record is not None and record.kind & KIND == BLOB:
                try:
                    if Ref.unpack(self._trust.record(file.name, record).body).label == file.label:
                        return False
                except CorruptError:
                    return False
            if not self._is_free(file.label, file.identity):
                return False
            if self._index.version() == version:
                return True
        return False


def strays(path: str, codec: Codec, label: str | None = None) -> Iterator[str]:
    """The value files (or this one, if it is one) whose keys have another value: nothing refers to them any more.

    Of a chest without a key. Files that were compressed are not looked into.
    """
    trust = Trust(path, codec)
    checker = FileChecker(path, trust)
    checker._index = index = ReadOnlyIndex(checker._keys_path)
    try:
        for file in value_files(checker.path, checker._broken, trust.owns):
            if label in (None, file.label) and checker._current(file.name) is not None and checker.is_stray(file):
                yield file.label
    finally:
        index.close()
