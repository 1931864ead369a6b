"""What a value is wrapped in between its serializer and the disk: compression, the seal of a key, or both, in this order.

Each value says itself how it was written: the upper bits of its record's kind are the number of the method that compressed it
(0: none), and what the seal needs stands in the record. So values of one chest may be mixed, and reading needs no setting
but the key. Records as such are sealed by ``_sealed``, values in them only compressed here.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Iterable
from typing import Any

from xxhash import xxh3_64

from ._compression import Compression, Enough, Frames, Sample, by_number, inflate, private_memory
from ._sealing import Seal
from .errors import CorruptError, TamperedError

__all__ = ["Envelope", "Wrapping", "open_body", "open_file"]

SMALLEST = 256  # bytes: below, nothing is gained
LARGEST = 1 << 16  # what lies in the index is smaller

_SIZE = struct.Struct("<I")


class Envelope:
    """How a chest writes values: ``compression``, ``seal``, or both."""

    def __init__(self, compression: Compression | None, seal: Seal | None) -> None:
        self.compression = compression
        self.seal = seal

    @property
    def hides(self) -> bool:
        """Whether nothing of a value may be readable without the key."""
        return self.seal is not None and self.seal.hides

    def wrap(self, kind: int, body: bytes) -> tuple[int, bytes]:
        """A value for the index, compressed if that pays; its record's kind and body."""
        compression = self.compression
        if compression is None or len(body) < SMALLEST:
            return kind, body
        wrapped = _SIZE.pack(len(body)) + compression.compress(body)
        if len(wrapped) > 0.8 * len(body):
            return kind, body
        return kind | compression.method.number << 2, wrapped

    def wrapping(self, name: bytes, dump: Callable[[Any], Any], *, stops: bool) -> Wrapping:
        """``dump`` into a value file.

        Args:
            name: of the key whose value it is.
            stops: ``dump`` may be interrupted while a sample is taken.
        """
        compression = self.compression
        if compression is not None:
            sample = Sample(compression, stops=stops)
            with contextlib.suppress(Enough):
                dump(_Sampled(sample))
            if not sample.pays():
                compression = None
        return Wrapping(compression, self.seal, name, dump)


class _Written(io.RawIOBase):
    """A file that is written from its beginning to its end. It learns from the pickler which buffer comes next."""

    def __init__(self, below: Any) -> None:
        self._below = below
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def next_buffer(self, view: memoryview, itemsize: int) -> bool:
        """What comes next is this, numbers of this size. True if it need not be written."""
        return False

    def write(self, data: Any) -> int:
        # A copy, unless nobody can change it: what is hashed, compressed and signed must be the same bytes.
        part = data if type(data) is bytes else bytes(data)
        self._at += len(part)
        self._below.write(part)
        return len(part)


class _Sampled(_Written):
    _below: Sample

    def next_buffer(self, view: memoryview, itemsize: int) -> bool:
        return self._below.next_buffer(view, itemsize)


class _Hashed(_Written):
    def __init__(self, below: Any) -> None:
        super().__init__(below)
        self.hash = xxh3_64()

    def next_buffer(self, view: memoryview, itemsize: int) -> bool:
        if isinstance(self._below, Frames):
            self._below.next_buffer(len(view), itemsize)
        return False

    def write(self, data: Any) -> int:
        part = data if type(data) is bytes else bytes(data)
        self.hash.update(part)
        return super().write(part)


class Wrapping:
    """Writes a value into a file in its envelope.

    Attributes (once it was called):
        plain: bytes that were written to it.
        digest: xxh3 of them.
        seal: what the record says of the seal.
        method: the number of the method that compressed it, 0 if none did.
    """

    def __init__(self, compression: Compression | None, seal: Seal | None, name: bytes, dump: Callable[[Any], Any]) -> None:
        self.method = 0 if compression is None else compression.method.number
        self.plain = self.digest = 0
        self.seal = b""
        self._compression = compression
        self._seal = seal
        self._name = name
        self._dump = dump

    def __call__(self, file: Any) -> None:
        below: Any = file
        sealing = frames = None
        if self._seal is not None:
            below = sealing = self._seal.writer(self._seal.name(self._name), file.write)
        if self._compression is not None:
            below = frames = Frames(self._compression, below.write)
        top = _Hashed(below)
        self._dump(top)
        if frames is not None:
            frames.close()
        if sealing is not None:
            self.seal = sealing.close()
        self.plain, self.digest = top.tell(), top.hash.intdigest()


def open_body(kind: int, body: bytes) -> bytes:
    """A value of the index as its serializer wrote it. Raises CorruptError, MissingExtraError."""
    method = kind >> 2
    if not method:
        return body
    if len(body) < _SIZE.size:
        raise CorruptError("its compressed value is cut short")
    (size,) = _SIZE.unpack_from(body)
    if size >= LARGEST:
        raise CorruptError(f"a value of the index cannot have {size} bytes")
    return bytes(inflate(by_number(method), [memoryview(body)[_SIZE.size :]], size, len(body)))


def open_file(seal: Seal | None, kind: int, name: bytes, view: memoryview, plain: int, said: bytes) -> memoryview:
    """A value file as its serializer wrote it, in private memory.

    Args:
        seal: of the chest.
        kind, plain, said: what the record says.
        name: whose record it is, in the index.
        view: the file.

    Raises:
        TamperedError: its seal is broken; nothing of it was looked at.
        CorruptError: it cannot be decompressed.
        MissingExtraError: a package for that is not installed.
    """
    parts: Iterable[Any] = [view]
    stored = len(view)
    if seal is not None:
        if not said:
            raise TamperedError("it has no seal")
        parts = seal.read(view, name, said, private_memory)
        stored = seal.plain_size(len(view))
    elif said:
        raise CorruptError("it was written with a key, and the chest has none")
    if kind >> 2:
        return inflate(by_number(kind >> 2), parts, plain, stored)
    if seal is not None and not seal.hides:
        (whole,) = parts  # which is private already
        return memoryview(whole)
    target = private_memory(max(stored, 0))
    at = 0
    for part in parts:
        target[at : at + len(part)] = part
        at += len(part)
    return target
