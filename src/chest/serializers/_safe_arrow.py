"""Tables, batches and arrays of pyarrow for the safe serializer, as streams of Arrow IPC.

Reading maps the buffers, and then looks through them (``validate(full=True)``): Arrow by itself trusts offsets and
lengths, and would read beyond the end of the file where they lie. That costs a read of all offsets and text, and none of
numbers. Compressed bodies, which nothing here writes, are refused before Arrow would make room for what they say they are.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from ..errors import CorruptError
from ._safe_numpy import in_place
from ._safe_read import Unpacker, unpacks
from ._safe_write import Ext, Packer, encode, packs, refused

__all__ = ["pack_arrow", "unpack_arrow"]

ARROW = 40

_KINDS: dict[type, str] = {pa.Table: "table", pa.RecordBatch: "batch", pa.ChunkedArray: "chunked"}
_ARRAYS = [kind for kind in vars(pa.lib).values() if isinstance(kind, type) and issubclass(kind, pa.Array)]


@packs(*_KINDS, *_ARRAYS)
def pack_arrow(packer: Packer, value: Any) -> Any:
    kind = _KINDS.get(type(value), "array")
    if kind == "array":
        batches, schema = [pa.RecordBatch.from_arrays([value], [""])], None
    elif kind == "chunked":
        table = pa.Table.from_arrays([value], [""])
        batches, schema = table.to_batches(), table.schema
    else:
        batches, schema = value.to_batches() if kind == "table" else [value], value.schema
    schema = batches[0].schema if schema is None else schema
    if not pa.ipc.read_schema(schema.serialize()).equals(schema, check_metadata=True):
        raise refused(value, "with a type that Arrow does not find again (an extension type that is not registered?)")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    raw = memoryview(sink.getvalue()).toreadonly()
    rows = value.num_rows if kind == "table" and not value.num_columns else None
    if rows:
        raise refused(value, "with rows but without columns")
    return Ext(ARROW, encode([kind, in_place(packer, raw)]))


@unpacks(ARROW)
def _unpack(unpacker: Unpacker, data: memoryview) -> Any:
    kind, place = unpacker.items(data)
    return unpack_arrow(kind, unpacker.buffer(place)[0])


def unpack_arrow(kind: Any, raw: Any) -> Any:
    buffer = pa.py_buffer(raw)
    _refuse_compressed(buffer)
    with pa.ipc.open_stream(buffer) as reader:
        table = reader.read_all()
    table.validate(full=True)
    if kind == "table":
        return table
    if kind == "chunked" and table.num_columns == 1:
        return table.column(0)
    batches = table.to_batches()
    if kind in ("batch", "array") and not batches:  # an empty one
        batches = [pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)]
    if kind == "batch" and len(batches) == 1:
        return batches[0]
    if kind == "array" and len(batches) == 1 and table.num_columns == 1:
        return batches[0].column(0)
    raise CorruptError("it has Arrow data that does not fit together")


def _refuse_compressed(buffer: Any) -> None:
    """Look at the head of each message: a FlatBuffer whose header is a RecordBatch, or a DictionaryBatch with one in it."""
    for message in _messages(buffer):
        metadata = memoryview(message.metadata)
        (root,) = struct.unpack_from("<I", metadata)
        (kind,) = struct.unpack_from("<B", metadata, place) if (place := _field(metadata, root, 1)) else (0,)
        header = _field(metadata, root, 2)
        if kind not in (2, 3) or not header:
            continue
        batch = _follow(metadata, header)
        if kind == 2:
            inner = _field(metadata, batch, 1)
            if not inner:
                continue
            batch = _follow(metadata, inner)
        if _field(metadata, batch, 3):
            raise CorruptError("it has Arrow data that is compressed, which nothing writes")


def _messages(buffer: Any) -> Any:
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(buffer))
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field of a table lies, 0 if it is left out."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, table - back + 4 + 2 * number)
    return table + offset if offset else 0


def _follow(data: memoryview, place: int) -> int:
    (offset,) = struct.unpack_from("<I", data, place)
    return int(place + offset)
