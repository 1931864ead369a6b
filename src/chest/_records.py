"""What the store keeps in the index, and what it tells of a value: records, notes and baselines."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ._valuefile import Layout
from .abc import Record
from .errors import ChestError, CorruptError

__all__ = [
    "BLOB",
    "COMMIT_BYTES",
    "KIND",
    "LOOSE",
    "PACKED",
    "SMALL",
    "Adopted",
    "Baseline",
    "FileBaseline",
    "Loaded",
    "Picture",
    "Ref",
    "Unwritten",
    "Written",
    "key_note",
    "pack_note",
    "unpack_key_note",
    "unpack_note",
]  # fmt: skip

PACKED, LOOSE, BLOB = 0, 1, 2  # the lowest two bits of a record's kind; the others are how its value was compressed
KIND = 3
SMALL = 65_536  # bytes; serialized below this, a value lives in the index
COMMIT_BYTES = 4 << 20  # serialized small values of one commit: bounds the memory that a write needs beside the values


class Ref(NamedTuple):
    """What a BLOB record says of its value file.

    ``digest`` identifies the content: of the footer for value files, of all bytes for others, 0 where it is not known (files
    of chest 0.2). ``label`` is the path below the chest's folder that shows the key. ``plain`` is the size of what was
    compressed, 0 where nothing was, and ``seal`` what the chest's key says of a file.
    """

    size: int
    digest: int
    blob: str
    label: str
    plain: int = 0
    seal: bytes = b""

    def pack(self) -> bytes:
        blob = self.blob.encode()
        body = _REF.pack(self.size, self.digest, len(blob)) + blob + self.label.encode("utf-8", "surrogatepass")
        return body + b"\0" + _PLAIN.pack(self.plain) + self.seal if self.plain or self.seal else body

    @classmethod
    def unpack(cls, body: bytes) -> Ref:
        try:
            size, digest, length = _REF.unpack_from(body)
            start = _REF.size + length
            if start > len(body):
                raise CorruptError("a record of the index is cut short")
            label, zero, more = body[start:].partition(b"\0")
            plain = _PLAIN.unpack_from(more)[0] if zero else 0
            seal = more[_PLAIN.size :]
            if zero and not plain and not seal:
                raise CorruptError("a record of the index ends in nothing")
            return cls(size, digest, body[_REF.size : start].decode(), label.decode("utf-8", "surrogatepass"), plain, seal)
        except (struct.error, UnicodeDecodeError) as error:
            raise CorruptError("a record of the index is no reference to a value file") from error


_REF = struct.Struct("<QQB")
_PLAIN = struct.Struct("<Q")


class FileBaseline(NamedTuple):
    """What a value with large buffers looked like when it was last read or written.

    ``view`` is the private mapping that its buffers lie in, None if they are in memory of their own. Such a value may have come
    out of an envelope: ``again`` opens that once more. ``outline`` is that of an array, see ``_pagemap.outline_of``.
    """

    layout: Layout
    view: memoryview | None
    again: Callable[[], memoryview] | None = None
    outline: Any = None


class Picture(Protocol):
    """What a value that was loaded looked like."""

    def matches(self, value: object) -> bool:
        """Whether it still looks like that."""


Baseline = bytes | int | Picture | FileBaseline | None
"""What a value is compared with. None: it cannot change. Bytes: what it was loaded from. A number: the hash of its serialized
bytes as it was, which it would be written as again."""


class Loaded(NamedTuple):
    """A value as it came from the store."""

    value: Any
    record: Record
    baseline: Baseline


class Unwritten(Protocol):
    """A value to be written, as the memory tier's entries are. ``size`` is an estimate, in bytes."""

    key: Any
    value: Any
    size: int
    seq: int
    fresh: bool
    dirty: bool
    lent: bool


class Adopted(NamedTuple):
    """A value to be taken over from another store, as its record and, if it has one, the path of its file."""

    key: Any
    seq: int
    record: Record
    path: str


class Written(NamedTuple):
    """What became of a batch of writes.

    ``commits``: for each its version, what it has written, and the baselines of that. ``failed``: key -> why this value could
    not be written. ``error`` is set where nothing more could be written at all; what is in ``commits`` is committed even so.
    """

    commits: list[tuple[int, list[Any], list[Baseline]]]
    failed: dict[Any, ChestError]
    error: ChestError | None = None


def pack_note(name: bytes, blob: str, label: str) -> bytes:
    """What a commit leaves to be done for one key: publish ``blob``, unlink ``label`` (either may be empty)."""
    b = blob.encode()
    return struct.pack("<HH", len(name), len(b)) + name + b + label.encode("utf-8", "surrogatepass")


def unpack_note(note: bytes) -> tuple[bytes, str, str]:
    try:
        n, b = struct.unpack_from("<HH", note)
        if 4 + n + b > len(note):
            raise CorruptError("a note of the index is cut short")
        return note[4 : 4 + n], note[4 + n : 4 + n + b].decode(), note[4 + n + b :].decode("utf-8", "surrogatepass")
    except (struct.error, UnicodeDecodeError) as error:
        raise CorruptError("a note of the index is none") from error


def key_note(name: bytes, typed: bytes) -> bytes:
    """What a value file says of its key, so that a lost index can be rebuilt."""
    return struct.pack("<H", len(name)) + name + typed


def unpack_key_note(note: bytes) -> tuple[bytes, bytes] | None:
    """The name and the typed key that a value file tells; None if it tells none."""
    if len(note) < 3:
        return None
    end = 2 + note[0] + (note[1] << 8)
    return (note[2:end], note[end:]) if 2 < end <= len(note) else None
