"""The value file: a stream, with large buffers in it or behind it that can be mapped, and a footer that describes them.

::

    stream, PAYLOADs among it at multiples of 64 | table of payloads | note | trailer

What the stream is written in is the serializer's (``_pickled``: a plain pickle, ``serializers._safe``: MessagePack); here is
what they share: how a file is written through one sink, checked, and taken apart again. Checksums (xxh3): one of the
stream, one of each payload, one of the footer. The latter covers the others and thus identifies the content of the file.
They find damage, not malice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any, NamedTuple, Protocol

from xxhash import xxh3_64, xxh3_64_intdigest

from .errors import CorruptError

__all__ = [
    "ALIGN",
    "CHECKED",
    "MARKS",
    "Layout",
    "Parts",
    "Payload",
    "Sink",
    "Writable",
    "footer_of",
    "read_footer",
    "take_apart",
    "verify_file",
]

CHECKED = 1 << 20  # payloads up to this size are verified on every load
ALIGN = 64
MARKS = (b"\x80\x05C\x05chest0", b"\xa7chest-1")
"""How the streams of files with a footer begin, in pickles and in MessagePack: it tells a file that has lost its footer
from one that never had any."""

_CHUNK = 1 << 20  # written in parts that are still in the processor's cache after they were hashed
_PLAIN_CHUNK = 2 << 20  # ... of which no copy is made
_MAGIC = b"CHESTv1\n"
_ENTRY = struct.Struct("<QQQBB6x")  # offset, length, checksum, header, read-only
_TRAILER = struct.Struct("<QQQQQ8s")  # checksum of the stream, its end, n payloads, n note, digest, magic
_SEALED = 16  # digest and magic, which the digest does not cover


class Writable(Protocol):
    def write(self, data: Any, /) -> int | None: ...


class Payload(NamedTuple):
    """A buffer in a value file. ``header`` is the number of bytes of the stream before it that belong to it."""

    offset: int
    length: int
    read_only: bool
    header: int
    checksum: int


class Layout(NamedTuple):
    """What the footer says. ``size`` is that of the whole file; ``digest`` differs if anything in the file does."""

    size: int
    stream: int
    payloads: tuple[Payload, ...]
    digest: int
    note: bytes


class Parts(NamedTuple):
    """A file taken apart: the stream before, between and behind the payloads, and the payloads as views on the file."""

    stream: list[memoryview]
    buffers: list[memoryview | bytearray]
    layout: Layout


class Sink:
    """What a value file is written through. Without a file it only works out what would be written.

    Attributes:
        buffers: the payloads, each with whether it is read-only.
    """

    __slots__ = ("_next_buffer", "_offset", "_payloads", "_stream", "_write", "buffers")

    def __init__(self, file: Writable | None) -> None:
        self._write = None if file is None else file.write
        # Of those who want to know which buffer comes next, and may not want it.
        self._next_buffer = getattr(file, "next_buffer", None)
        self._offset = 0
        self._stream = xxh3_64()
        self._payloads: list[Payload] = []
        self.buffers: list[tuple[memoryview, bool]] = []

    def add(self, data: Any) -> None:
        """The next piece of the stream."""
        if len(data) <= _CHUNK and type(data) is bytes:
            self._stream.update(data)
            self._put(data)
        else:
            self._put_all(memoryview(data), self._stream, copy=type(data) is not bytes)
        self._offset += len(data)

    def gap(self, n: int = 0) -> int:
        """How many bytes are missing to a multiple of 64, ``n`` bytes from here."""
        return -(self._offset + n) % ALIGN

    def add_payload(self, raw: memoryview, header: int = 0, itemsize: int = 1) -> None:
        """A buffer, right here, of numbers of this size: the stream must have been brought to a multiple of 64."""
        self.buffers.append((raw, raw.readonly))
        checksum = 0
        if self._write is not None:
            payload = xxh3_64()
            if self._next_buffer is None or not self._next_buffer(raw, itemsize):
                self._put_all(raw, payload, copy=raw.nbytes <= CHECKED or self._next_buffer is not None)
            checksum = payload.intdigest()
        self._payloads.append(Payload(self._offset, raw.nbytes, raw.readonly, header, checksum))
        self._offset += raw.nbytes

    def _put_all(self, raw: memoryview, hasher: xxh3_64, *, copy: bool) -> None:
        """Hash and write.

        With ``copy``, hash and write a copy of each part: another thread that changes the value in between can then
        tear it, as it can with any pickler, but not make a file that fails the checks of every load.
        """
        size = _CHUNK if copy else _PLAIN_CHUNK
        # Up to a multiple of the chunk first. The kernel keeps what is written in blocks as large as their place in the file
        # allows, and fills a mapping by the block: where they are small, reading all of it takes half as long again.
        start, stop = 0, size - self._offset % size
        while start < len(raw):
            part: memoryview | bytes = raw[start:stop]
            if copy:
                part = bytes(part)
            hasher.update(part)
            self._put(part)
            start, stop = stop, stop + size

    def _put(self, data: memoryview | bytes) -> None:
        write = self._write
        if write is None:
            return
        n = write(data)
        if n is None or n == len(data):
            return
        rest = memoryview(data)
        while n is not None and n != len(rest):
            if not 0 < n < len(rest):  # also what would loop for ever
                raise OSError(f"write() of the file took {n} of {len(rest)} bytes")
            rest = rest[n:]
            n = write(rest)

    def stream(self) -> int:
        """The checksum of the stream, complete."""
        return self._stream.intdigest()

    def close(self, note: bytes) -> Layout:
        """Write the footer."""
        stream = self.stream()
        payloads = self._payloads
        parts = [_ENTRY.pack(p.offset, p.length, p.checksum, p.header, p.read_only) for p in payloads]
        head = struct.pack("<QQQQ", stream, self._offset, len(payloads), len(note))
        covered = b"".join((*parts, note, head))
        digest = xxh3_64_intdigest(covered)
        self._put(b"%b%b%b" % (covered, struct.pack("<Q", digest), _MAGIC))
        return Layout(self._offset + len(covered) + _SEALED, stream, tuple(payloads), digest, bytes(note))


def read_footer(data: memoryview | mmap | bytes) -> Layout | None:
    """The layout of a value file, None where the data has no footer and was not written with one.

    Only the footer is read and checked, and the first bytes.

    Raises:
        CorruptError: the footer is damaged, or has gone.
    """
    view = bytes_of(data)
    return footer_of(len(view), view.__getitem__)


def footer_of(size: int, part: Callable[[slice], bytes | memoryview]) -> Layout | None:
    """As ``read_footer``, for a file of which parts can be had."""
    if size < _TRAILER.size or part(slice(size - 8, size)) != _MAGIC:
        if bytes(part(slice(0, min(10, size)))).startswith(MARKS):
            raise CorruptError("the footer is missing: the file was cut short or its end is damaged")
        return None
    stream, end, n_payloads, n_note, digest, _ = _TRAILER.unpack(part(slice(size - _TRAILER.size, size)))
    table_end = end + n_payloads * _ENTRY.size
    if table_end + n_note + _TRAILER.size != size:
        raise CorruptError(f"the file has {size} bytes, which is not what its footer says")
    footer = part(slice(end, size))
    if xxh3_64_intdigest(footer[:-_SEALED]) != digest:
        raise CorruptError("the footer fails its checksum")
    payloads = []
    free = 0
    for offset, length, checksum, header, read_only in _ENTRY.iter_unpack(footer[: table_end - end]):
        if read_only > 1 or offset - header < free or offset + length > end:
            raise CorruptError("the footer describes buffers that cannot be")
        free = offset + length
        payloads.append(Payload(offset, length, read_only == 1, header, checksum))
    return Layout(size, stream, tuple(payloads), digest, bytes(footer[table_end - end : table_end - end + n_note]))


def verify_file(layout: Layout, part: Callable[[slice], bytes | memoryview]) -> None:
    """All that stands before the footer is as it was written. Reads it from its beginning to its end, in pieces.

    Raises:
        CorruptError: it is not.
    """
    stream = xxh3_64()
    start = 0
    for payload in layout.payloads:
        _hash_part(stream, part, start, payload.offset)
        start = payload.offset + payload.length
        buffer = xxh3_64()
        _hash_part(buffer, part, payload.offset, start)
        if buffer.intdigest() != payload.checksum:
            raise CorruptError(f"the buffer of {payload.length} bytes at {payload.offset} fails its checksum")
    _hash_part(stream, part, start, layout.size - _TRAILER.size - len(layout.note) - len(layout.payloads) * _ENTRY.size)
    if stream.intdigest() != layout.stream:
        raise CorruptError("the stream fails its checksum")


def _hash_part(hasher: xxh3_64, part: Callable[[slice], bytes | memoryview], start: int, end: int) -> None:
    for at in range(start, end, _CHUNK):
        hasher.update(part(slice(at, min(end, at + _CHUNK))))


def take_apart(
    data: memoryview | mmap | bytes, *, verify: bool = False, digest: int | None = None, payloads: bool = True
) -> Parts | None:
    """A file's stream and payloads, None for data without a footer, of which nothing can be said.

    Where ``data`` is writable the payloads are views on it, writable if they were when they were written; otherwise those
    that were writable are copied. The footer, the stream and payloads up to ``CHECKED`` bytes are verified; larger
    payloads are not read at all.

    Args:
        data: a whole file; best a mapping with ``ACCESS_COPY``, so that changes stay private.
        verify: check all payloads.
        digest: what the layout's ``digest`` must be.
        payloads: False checks none of them: they may have been changed in the mapping.

    Raises:
        CorruptError: what is there is not what was written.
    """
    view = bytes_of(data)
    layout = read_footer(view)
    if layout is None:
        if digest is not None:
            raise CorruptError("the footer is missing")
        return None
    if digest is not None and layout.digest != digest:
        raise CorruptError("this is the file of another value, or an older one")
    end = layout.size - len(layout.payloads) * _ENTRY.size - len(layout.note) - _TRAILER.size
    stream: list[memoryview] = []
    buffers: list[memoryview | bytearray] = []
    start = 0
    for offset, length, read_only, _, checksum in layout.payloads:
        stream.append(view[start:offset])
        payload = view[offset : offset + length]
        if payloads and (verify or length <= CHECKED) and xxh3_64_intdigest(payload) != checksum:
            raise CorruptError(f"the buffer of {length} bytes at {offset} fails its checksum")
        start = offset + length
        buffers.append(payload.toreadonly() if read_only else bytearray(payload) if view.readonly else payload)
    stream.append(view[start:end])
    hasher = xxh3_64()
    for piece in stream:
        hasher.update(piece)
    if hasher.intdigest() != layout.stream:
        raise CorruptError("the stream fails its checksum")
    return Parts(stream, buffers, layout)


def bytes_of(data: memoryview | mmap | bytes) -> memoryview:
    """A flat view on the bytes."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
