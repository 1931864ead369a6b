"""The value file: a plain pickle whose large buffers can be mapped.

::

    PROTO 5 | mark | frame | padding header PAYLOAD | frame | ... | frame STOP | table of payloads | note | trailer

CPython's C pickler, asked for protocol 5 in-band and given a file, flushes what it has when it meets a buffer of 64 KiB
or more, with the opcode header of the buffer (5 or 9 bytes) at the end, and then hands the ``PickleBuffer`` itself to
``file.write``. So a file object can see every payload without a copy, and put opcodes that do nothing (push some bytes,
pop them) before its header, such that the payload starts at a multiple of 64. Large objects lie outside of pickle's
frames, so the padding is legal there; what is left is a pickle that anybody's ``pickle.load`` reads, stopping before
the footer. Values of ``bytes``, ``str`` and ``bytearray`` reach ``write`` under their own types and stay in the stream:
a view in their place would have the wrong type.

On loading, the header and payload are replaced by ``NEXT_BUFFER``, and the payloads are passed beside the stream as
views on the file. The ``MEMOIZE`` that followed the payload stays where it was, and so the memo counts as before.

The mark, eight bytes that do nothing, tells a file that has lost its footer from a pickle that never had one.

Checksums (xxh3): one of the stream, one of each payload, one of the footer. The latter covers the others and thus
identifies the content of the file. They find damage, not malice: a pickle may run any code that its author likes.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable
from mmap import mmap
from pickle import PickleBuffer
from typing import Any, NamedTuple, Protocol

from xxhash import xxh3_64, xxh3_64_intdigest

from chest._reducers import table
from chest.errors import CorruptError, LoadError, short

__all__ = ["CHECKED", "Layout", "Payload", "Pickler", "dump", "dumps", "footer_of", "load", "probe", "read_footer", "verify"]

CHECKED = 1 << 20  # payloads up to this size are verified on every load
ALIGN = 64

_CHUNK = 1 << 20  # written in parts that are still in the processor's cache after they were hashed
_JOINED = 1 << 20  # streams up to this size are put together in memory before they are read
_PROTO = b"\x80\x05"
_MARK = b"C\x05chest0"
_MAGIC = b"CHESTv1\n"
_ENTRY = struct.Struct("<QQQBB6x")  # offset, length, checksum, header, read-only
_TRAILER = struct.Struct("<QQQQQ8s")  # checksum of the stream, end of the pickle, n payloads, n note, digest, magic
_SEALED = 16  # digest and magic, which the digest does not cover
_NEXT_BUFFER = b"\x97"


class _Writable(Protocol):
    def write(self, data: Any, /) -> int | None: ...


class Payload(NamedTuple):
    """A buffer in a value file. ``header`` is the number of bytes of the opcode before it."""

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


class Pickler(pickle.Pickler):
    """A pickler of protocol 5, in-band, that takes large values of numpy, polars and torch apart into buffers."""

    def __init__(self, file: _Writable) -> None:
        super().__init__(file, 5)
        reducers = table()
        if reducers is not None:
            self.dispatch_table = reducers


class _Sink:
    """The file that the pickler sees. Without a ``write`` of its own it only works out what it would write.

    Attributes:
        buffers: the payloads, each with whether it is read-only.
    """

    __slots__ = ("_held", "_offset", "_payloads", "_stream", "_write", "buffers")

    def __init__(self, file: _Writable | None) -> None:
        self._write = None if file is None else file.write
        self._offset = 0
        self._held: Any = b""  # what the pickler wrote last: the header of the payload that comes next may be its end
        self._stream = xxh3_64()
        self._payloads: list[Payload] = []
        self.buffers: list[tuple[memoryview, bool]] = []

    def write(self, data: Any) -> None:
        if type(data) is PickleBuffer:
            self._write_payload(data.raw())
            return
        self._flush()
        if not self._offset and not self._held and data[:2] == _PROTO:
            data = _PROTO + _MARK + data[2:]
        self._held = data

    def _write_payload(self, raw: memoryview) -> None:
        header = _header(raw.nbytes, raw.readonly)
        held = self._held
        if type(held) is not bytes or not held.endswith(header):  # a pickler that works otherwise: left in the stream
            self._flush()
            self._held = raw
            return
        gap = -(self._offset + len(held)) % ALIGN
        if gap:
            if gap < 3:  # push and pop take three bytes themselves
                gap += ALIGN
            held = b"%bC%c%b0%b" % (held[: -len(header)], gap - 3, bytes(gap - 3), header)
        self._held = held
        self._flush()
        self._held = b""
        self.buffers.append((raw, raw.readonly))
        checksum = 0
        if self._write is not None:
            payload = xxh3_64()
            self._put_all(raw, payload, copy=raw.nbytes <= CHECKED)
            checksum = payload.intdigest()
        self._payloads.append(Payload(self._offset, raw.nbytes, raw.readonly, len(header), checksum))
        self._offset += raw.nbytes

    def _flush(self) -> None:
        held = self._held
        if len(held) <= _CHUNK and type(held) is bytes:
            self._stream.update(held)
            self._put(held)
        else:
            self._put_all(memoryview(held), self._stream, copy=type(held) is not bytes)
        self._offset += len(held)

    def _put_all(self, raw: memoryview, hasher: xxh3_64, *, copy: bool) -> None:
        """Hash and write.

        With ``copy``, hash and write a copy of each part: another thread that changes the value in between can then
        tear it, as it can with any pickler, but not make a file that fails the checks of every load.
        """
        for start in range(0, len(raw), _CHUNK):
            part: memoryview | bytes = raw[start : start + _CHUNK]
            if copy:
                part = bytes(part)
            hasher.update(part)
            self._put(part)

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
        self._flush()
        self._held = b""
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


def _header(length: int, read_only: bool) -> bytes:
    """What stands before a buffer in a pickle: BYTEARRAY8, BINBYTES or BINBYTES8."""
    if not read_only:
        return b"\x96" + length.to_bytes(8, "little")
    if length <= 0xFFFFFFFF:
        return b"B" + length.to_bytes(4, "little")
    return b"\x8e" + length.to_bytes(8, "little")


def dump(value: object, file: _Writable, note: bytes = b"") -> Layout:
    """The value stands in ``file``, from its current position on, which must be its beginning.

    Buffers are written from where they lie: beyond pickle's own memory, about 2 MB are needed. Not durable by itself.

    Args:
        file: anything with ``write(data) -> int | None``; writes may be short, None means all of it.
        note: bytes of the caller, kept in the footer.

    Raises:
        Exception: whatever pickling the value or writing raises. The file is of no use then.
    """
    sink = _Sink(file)
    Pickler(sink).dump(value)
    return sink.close(note)


def probe(value: object) -> tuple[int, list[tuple[memoryview, bool]]]:
    """The checksum of the stream that ``dump`` would write, and the payloads as they lie in memory.

    Each payload comes with whether it is read-only. Where the stream and the payloads equal what was written, the value
    has not changed. The converse does not hold: a loaded value may share text differently and so pickle to another
    stream (the same one each time it is loaded), and pandas pickles some of what it caches when it is read.

    Costs the pickling of all but the payloads, which are not read. The views keep the value's memory exported.
    """
    sink = _Sink(None)
    Pickler(sink).dump(value)
    return sink.stream(), sink.buffers


def dumps(value: object) -> bytes:
    """The value as a plain pickle of protocol 5, without alignment and footer: for small values."""
    reducers = table(small=True) if "torch" in sys.modules else None  # looked up here: this is called for each small value
    if reducers is None:
        return pickle.dumps(value, 5)
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5)
    pickler.dispatch_table = reducers
    pickler.dump(value)
    return file.getvalue()


def read_footer(data: memoryview | mmap | bytes) -> Layout | None:
    """The layout of a value file, None where the data has no footer and was not written with one.

    Only the footer is read and checked, and the first bytes.

    Raises:
        CorruptError: the footer is damaged, or has gone.
    """
    view = _bytes_of(data)
    return footer_of(len(view), view.__getitem__)


def footer_of(size: int, part: Callable[[slice], bytes | memoryview]) -> Layout | None:
    """As ``read_footer``, for a file of which parts can be had."""
    if size < _TRAILER.size or part(slice(size - 8, size)) != _MAGIC:
        if part(slice(0, 10)) == _PROTO + _MARK:
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


def verify(layout: Layout, part: Callable[[slice], bytes | memoryview]) -> None:
    """All that stands before the footer is as it was written. Reads it from its beginning to its end, in pieces.

    Raises:
        CorruptError: it is not.
    """
    stream = xxh3_64()
    start = 0
    for payload in layout.payloads:
        _hash_part(stream, part, start, payload.offset)
        if part(slice(payload.offset - payload.header, payload.offset)) != _header(payload.length, payload.read_only):
            raise CorruptError("the pickle and its footer disagree about the buffers")
        start = payload.offset + payload.length
        buffer = xxh3_64()
        _hash_part(buffer, part, payload.offset, start)
        if buffer.intdigest() != payload.checksum:
            raise CorruptError(f"the buffer of {payload.length} bytes at {payload.offset} fails its checksum")
    _hash_part(stream, part, start, layout.size - _TRAILER.size - len(layout.note) - len(layout.payloads) * _ENTRY.size)
    if stream.intdigest() != layout.stream:
        raise CorruptError("the pickle fails its checksum")


def _hash_part(hasher: xxh3_64, part: Callable[[slice], bytes | memoryview], start: int, end: int) -> None:
    for at in range(start, end, _CHUNK):
        hasher.update(part(slice(at, min(end, at + _CHUNK))))


def load(
    data: memoryview | mmap | bytes, *, verify: bool = False, digest: int | None = None, payloads: bool = True
) -> tuple[Any, Layout | None]:
    """The value, and the layout of its file (None for a pickle without footer, which is loaded as it is).

    Where ``data`` is writable, large buffers of the value are views on it, writable if they were; otherwise those that
    were writable are copied. The value holds ``data`` as long as it needs it.

    The footer, the stream and payloads up to ``CHECKED`` bytes are verified; larger payloads are not read at all.

    Args:
        data: a whole file; best a mapping with ``ACCESS_COPY``, so that changes stay private.
        verify: check all payloads.
        digest: what the layout's ``digest`` must be.
        payloads: False checks none of them: they may have been changed in the mapping.

    Raises:
        CorruptError: what is there is not what was written.
        LoadError: it is, but unpickling it fails; the cause is attached.
        MemoryError: as it comes.
    """
    view = _bytes_of(data)
    layout = read_footer(view)
    if layout is None:
        if digest is not None:
            raise CorruptError("the footer is missing")
        return _unpickle([view], ()), None
    if digest is not None and layout.digest != digest:
        raise CorruptError("this is the file of another value, or an older one")
    n_footer = len(layout.payloads) * _ENTRY.size + len(layout.note) + _TRAILER.size
    end = layout.size - n_footer
    if not layout.payloads:
        view = view[:end]
        if xxh3_64_intdigest(view) != layout.stream:
            raise CorruptError("the pickle fails its checksum")
        return _unpickle([view], ()), layout
    hasher = xxh3_64()
    parts: list[memoryview | bytes] = []
    buffers: list[memoryview | bytearray] = []
    start = 0
    for offset, length, read_only, header, checksum in layout.payloads:
        hasher.update(view[start:offset])
        opcode = offset - header
        if view[opcode:offset] != _header(length, read_only):
            raise CorruptError("the pickle and its footer disagree about the buffers")
        payload = view[offset : offset + length]
        if payloads and (verify or length <= CHECKED) and xxh3_64_intdigest(payload) != checksum:
            raise CorruptError(f"the buffer of {length} bytes at {offset} fails its checksum")
        parts += (view[start:opcode], _NEXT_BUFFER)
        start = offset + length
        buffers.append(payload.toreadonly() if read_only else bytearray(payload) if view.readonly else payload)
    parts.append(view[start:end])
    hasher.update(parts[-1])
    if hasher.intdigest() != layout.stream:
        raise CorruptError("the pickle fails its checksum")
    if sum(map(len, parts)) <= _JOINED:
        parts = [b"".join(parts)]
    return _unpickle(parts, buffers), layout


def _bytes_of(data: memoryview | mmap | bytes) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _unpickle(parts: list[memoryview | bytes], buffers: Any) -> Any:
    try:
        if len(parts) == 1:
            return pickle.loads(parts[0], buffers=buffers)
        file: Any = _Scattered(parts)
        return pickle.Unpickler(file, buffers=buffers).load()
    except MemoryError:
        raise
    except Exception as error:
        raise LoadError(
            f"it cannot be unpickled: {short(error, 200)}. Make what it needs importable and read it again"
        ) from error


class _Scattered:
    """A file made of parts. What lies within one part is read without a copy.

    The C unpickler takes views from ``read``, so that a ``str`` is decoded right from the file, and has ``bytes``
    written into place by ``readinto``.
    """

    __slots__ = ("_at", "_part", "_rest")

    def __init__(self, parts: list[memoryview | bytes]) -> None:
        self._rest = parts[::-1]
        self._part: memoryview = memoryview(b"")
        self._at = 0

    def read(self, n: int) -> memoryview | bytes:
        at = self._at
        if at + n <= len(self._part):
            self._at = at + n
            return self._part[at : at + n]
        found = []
        while n and (self._at < len(self._part) or self._advance()):
            piece = self._part[self._at : self._at + n]
            self._at += len(piece)
            n -= len(piece)
            found.append(piece)
        return b"".join(found)

    def readinto(self, target: memoryview) -> int:
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("protocol 5 has no lines of text")

    def _advance(self) -> bool:
        if not self._rest:
            return False
        self._part, self._at = memoryview(self._rest.pop()), 0
        return True
