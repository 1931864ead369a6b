"""The safe serializer: values as MessagePack, of which nothing can ever be run.

None, bool, integers of 64 bits, floats, text, bytes, lists and dicts with such keys are plain MessagePack, so that a
value made of them takes one call of ``msgspec`` each way. Everything else is an extension, whose data mostly is
MessagePack again; the codes stand in ``docs/format.md``. What has no code is refused, and never turned into something else:
``msgspec`` by itself would write tuples, sets, dates and subclasses as lists, text and dicts.

So what was written is looked through *after* it was written: that the encoder came to an end says that nothing contains
itself, and the look takes a few calls per level (all members of all lists of that level, at once) and not one per object.
Only where that finds something other than the plain types is the value packed anew, object by object.

In a value file large buffers follow the stream (``_valuefile``), and an extension refers to one by its number.

Reading: ``msgspec`` checks every length against what is left, and so do the extensions; depth is bounded by Python's limit of
recursion, and by ``MAX_DEPTH`` when writing, far below it.
"""

from __future__ import annotations

from collections.abc import Hashable
from mmap import mmap
from typing import Any

from .._valuefile import MARKS, Layout, Sink, Writable, bytes_of, take_apart
from ..errors import CorruptError, KeyTypeError, short
from . import _safe_read, _safe_write
from ._safe_read import Unpacker, explained, loads
from ._safe_write import dumps

__all__ = ["dump", "dumps", "load", "load_file", "loads", "probe", "typed_key"]

_MARK = MARKS[1]

for _part in (_safe_write, _safe_read):
    _part.publish("_safe_types")  # those of the standard library; those of packages follow when one is met


def typed_key(key: Hashable) -> bytes:
    """A key as ``dumps`` writes it. Raises KeyTypeError."""
    try:
        return dumps(key)
    except TypeError as error:
        raise KeyTypeError(
            f"The key {short(key)} of type {type(key).__qualname__} cannot be written by safe: {error}.", key=key
        ) from error


def _written(value: Any, sink: Sink) -> None:
    payloads: list[memoryview] = []
    data = dumps(value, payloads)
    if len(data) < 1 << 16:
        sink.add(_MARK + data)
    else:
        sink.add(_MARK)
        sink.add(data)
    for raw in payloads:
        gap = sink.gap()
        if gap:
            sink.add(bytes(gap))
        sink.add_payload(raw, gap)


def dump(value: Any, file: Writable, note: bytes = b"") -> Layout:
    """The value stands in ``file`` as a value file, from its current position on, which must be its beginning.

    Large arrays are written from where they lie; Arrow's and the rest of the value pass through memory once. Not durable by
    itself.

    Raises:
        TypeError: as ``dumps``.
    """
    sink = Sink(file)
    _written(value, sink)
    return sink.close(note)


def probe(value: Any) -> tuple[int, list[tuple[memoryview, bool]]]:
    """The checksum of the stream that ``dump`` would write, and the payloads as they lie in memory: see ``_pickled.probe``."""
    sink = Sink(None)
    _written(value, sink)
    return sink.stream(), sink.buffers


def load_file(
    data: memoryview | mmap | bytes, *, verify: bool = False, digest: int | None = None, payloads: bool = True
) -> tuple[Any, Layout | None]:
    """The value, and the layout of its file: as ``_pickled.load``, with its arguments. Raises CorruptError, LoadError."""
    taken = take_apart(data, verify=verify, digest=digest, payloads=payloads)
    if taken is None:
        return loads(bytes_of(data)), None
    stream, buffers, layout = taken
    gaps = [payload.header for payload in layout.payloads]
    sizes = [len(piece) - gap for piece, gap in zip(stream, [*gaps, 0], strict=True)]
    if stream[0][: len(_MARK)] != _MARK or any(sizes[1:]):
        raise CorruptError("this is a value file, but none of safe's")
    try:
        return Unpacker(buffers).decode(stream[0][len(_MARK) : sizes[0]]), layout
    except Exception as error:
        raise explained(error) from error


def load(file: Any) -> Any:
    """The value of a file, of a value file as well as of what ``dumps`` gives. Raises CorruptError, LoadError."""
    return load_file(file.read())[0]
