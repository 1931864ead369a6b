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

The footer and its checksums are those of ``_valuefile``. They find damage, not malice: a pickle may run any code that its
author likes, unless it is read with an unpickler that does not let it.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from mmap import mmap
from pickle import PickleBuffer
from typing import Any

from ._reducers import table
from ._valuefile import ALIGN, CHECKED, MARKS, Layout, Payload, Sink, Writable, bytes_of, take_apart
from .errors import ChestError, CorruptError, LoadError, short

__all__ = ["CHECKED", "Layout", "Payload", "Pickler", "dump", "dumps", "load", "probe"]

_JOINED = 1 << 20  # streams up to this size are put together in memory before they are read
_PROTO = b"\x80\x05"
_MARK = MARKS[0][2:]
_NEXT_BUFFER = b"\x97"


class Pickler(pickle.Pickler):
    """A pickler of protocol 5, in-band, that takes large values of numpy, polars and torch apart into buffers."""

    def __init__(self, file: Writable) -> None:
        super().__init__(file, 5)
        reducers = table()
        if reducers is not None:
            self.dispatch_table = reducers


class _Sink(Sink):
    """The file that the pickler sees."""

    __slots__ = ("_held",)

    def __init__(self, file: Writable | None) -> None:
        super().__init__(file)
        self._held: Any = b""  # what the pickler wrote last: the header of the payload that comes next may be its end

    def write(self, data: Any) -> None:
        if type(data) is PickleBuffer:
            self._write_payload(data.raw(), data)
            return
        self.add(self._held)
        if not self._offset and not self._held and data[:2] == _PROTO:
            data = _PROTO + _MARK + data[2:]
        self._held = data

    def _write_payload(self, raw: memoryview, buffer: PickleBuffer) -> None:
        header = _header(raw.nbytes, raw.readonly)
        held = self._held
        if type(held) is not bytes or not held.endswith(header):  # a pickler that works otherwise: left in the stream
            self.add(self._held)
            self._held = raw
            return
        gap = self.gap(len(held))
        if gap:
            if gap < 3:  # push and pop take three bytes themselves
                gap += ALIGN
            held = b"%bC%c%b0%b" % (held[: -len(header)], gap - 3, bytes(gap - 3), header)
        self.add(held)
        self._held = b""
        self.add_payload(raw, len(header), memoryview(buffer).itemsize)

    def stream(self) -> int:
        self.add(self._held)
        self._held = b""
        return super().stream()


def _header(length: int, read_only: bool) -> bytes:
    """What stands before a buffer in a pickle: BYTEARRAY8, BINBYTES or BINBYTES8."""
    if not read_only:
        return b"\x96" + length.to_bytes(8, "little")
    if length <= 0xFFFFFFFF:
        return b"B" + length.to_bytes(4, "little")
    return b"\x8e" + length.to_bytes(8, "little")


def dump(value: object, file: Writable, note: bytes = b"") -> Layout:
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


def load(
    data: memoryview | mmap | bytes,
    *,
    verify: bool = False,
    digest: int | None = None,
    payloads: bool = True,
    unpickler: Callable[..., Any] = pickle.Unpickler,
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
        unpickler: the class that reads the stream.

    Raises:
        CorruptError: what is there is not what was written.
        LoadError: it is, but unpickling it fails; the cause is attached.
        MemoryError: as it comes.
    """
    taken = take_apart(data, verify=verify, digest=digest, payloads=payloads)
    if taken is None:
        return _unpickle([bytes_of(data)], (), unpickler), None
    stream, buffers, layout = taken
    if not buffers:
        return _unpickle([stream[0]], (), unpickler), layout
    parts: list[memoryview | bytes] = []
    for piece, payload in zip(stream, layout.payloads, strict=False):  # the last piece has no payload behind it
        opcode = len(piece) - payload.header
        if piece[opcode:] != _header(payload.length, payload.read_only):
            raise CorruptError("the pickle and its footer disagree about the buffers")
        parts += (piece[:opcode], _NEXT_BUFFER)
    parts.append(stream[-1])
    if sum(map(len, parts)) <= _JOINED:
        parts = [b"".join(parts)]
    return _unpickle(parts, buffers, unpickler), layout


def _unpickle(parts: list[memoryview | bytes], buffers: Any, unpickler: Callable[..., Any]) -> Any:
    try:
        if len(parts) == 1 and unpickler is pickle.Unpickler:
            return pickle.loads(parts[0], buffers=buffers)
        file: Any = _Scattered(parts)
        return unpickler(file, buffers=buffers).load()
    except (MemoryError, ChestError):
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
