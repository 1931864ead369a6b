"""Arrays and scalars of numpy for the safe serializer. Imported when one is met, or read, for the first time.

An array is its dtype, shape and order, and its bytes as they lie in memory. In a value file those of a large one follow
the stream, are mapped when it is loaded, and can be changed in place just as those in a pickle can. Dtypes are
written as numpy describes them, never as code: ``_build`` takes nothing but the forms that ``_describe`` gives.
"""

from __future__ import annotations

import math
import re
from pickle import PickleBuffer  # a view on memory; nothing is pickled
from typing import Any

import numpy

from .._reducers import LARGE
from ..errors import CorruptError
from ._safe_read import Unpacker, unpacks
from ._safe_write import Ext, NotSafe, Packer, encode, packs, refused

__all__ = ["array_of", "in_place", "pack_array"]

np: Any = numpy  # whose annotations know fewer types than it takes

ARRAY, SCALAR = 32, 33

_PLAIN = re.compile(r"[<>|=][biufcmMSUV]\d*(\[\d*[A-Za-z]+\])?|[<>|=][qQlLgG]").fullmatch


def _describe(dtype: Any) -> Any:
    """A dtype as text or as a dict of texts and numbers. Raises NotSafe."""
    if dtype.metadata:
        raise refused(dtype, "and carries metadata, which would be lost")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _describe(base), "shape": list(shape)}
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        described = {
            "names": list(dtype.names),
            "formats": [_describe(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
            "aligned": dtype.isalignedstruct,
        }
        if any(title is not None and type(title) is not str for title in described["titles"]):
            raise refused(dtype, "and has titles that are no text")
    else:
        described = dtype.str
        if _PLAIN(described) and np.dtype(described).char != dtype.char:
            described = dtype.str[0] + dtype.char  # long long, where it is as long as long is
    if _build_or_none(described) != dtype or dtype.type is not _build(described).type:
        raise refused(dtype, f"({dtype}), which cannot be written")
    return described


def _build_or_none(described: Any) -> Any:
    try:
        return _build(described)
    except CorruptError:
        return None


def _build(described: Any) -> Any:
    if type(described) is str and _PLAIN(described):
        return np.dtype(described)
    if type(described) is dict and described.keys() == {"base", "shape"}:
        return np.dtype((_build(described["base"]), tuple(described["shape"])))
    if type(described) is dict and described.keys() == {"names", "formats", "offsets", "titles", "itemsize", "aligned"}:
        spec = {name: described[name] for name in ("names", "offsets", "itemsize")}
        spec["formats"] = [_build(part) for part in described["formats"]]
        if any(title is not None for title in described["titles"]):
            spec["titles"] = described["titles"]
        return np.dtype(spec, align=bool(described["aligned"]))
    raise CorruptError("it has an array of a type that is none")


@packs(np.ndarray)
def pack_array(packer: Packer, array: Any) -> Any:
    dtype, flags = array.dtype, array.flags
    if dtype.hasobject:
        raise refused(
            array, "with objects in it: turn it into a list, or into an array of numbers, dates or text of fixed length"
        )
    try:
        described = _describe(dtype)
    except NotSafe as refusal:
        refusal.path.append(".dtype")
        raise
    read_only = not flags.writeable
    fortran = flags.f_contiguous and not flags.c_contiguous
    place: Any = b""
    if array.nbytes:
        # Dates and records of dates have no buffer; the plain bytes below them do. And who copies records leaves out
        # what lies between their fields: whatever was in that memory before would be written.
        raw = array.view(f"V{dtype.itemsize}")
        if not flags.forc:
            raw = raw.copy(order="C")
            raw.flags.writeable = not read_only
        place = PickleBuffer(raw).raw()
    return Ext(ARRAY, encode([described, list(array.shape), fortran, read_only, in_place(packer, place)]))


def in_place(packer: Packer, raw: Any) -> Any:
    """A buffer as the stream holds it: the number of a payload, or its bytes."""
    if packer.payloads is None or len(raw) < LARGE:
        return raw
    packer.payloads.append(raw)
    return len(packer.payloads) - 1


@unpacks(ARRAY)
def _unpack_array(unpacker: Unpacker, data: memoryview) -> Any:
    described, shape, fortran, read_only, place = unpacker.items(data)
    return array_of(unpacker, _build(described), shape, fortran, read_only, place)


def array_of(unpacker: Unpacker, dtype: Any, shape: list[int], fortran: bool, read_only: bool, place: Any) -> Any:
    raw, inline = unpacker.buffer(place)
    order: Any = "F" if fortran else "C"
    if dtype.hasobject or any(type(n) is not int or n < 0 for n in shape):
        raise CorruptError("it has an array that cannot be")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise CorruptError("it has an array of another size than its shape says")
    if not len(raw):
        array: Any = np.empty(shape, dtype, order)
    else:
        array = np.ndarray(tuple(shape), f"V{dtype.itemsize}" if dtype.names and inline else dtype, raw, 0, None, order)
        if inline:
            array = array.copy(order="K")
            if dtype.names:
                array = array.view(dtype)
    if read_only and array.flags.writeable:
        array.flags.writeable = False
    return array


_SCALARS = [kind for kind in set(np.sctypeDict.values()) if kind is not np.object_]


@packs(*_SCALARS)
def _pack_scalar(packer: Packer, value: Any) -> Any:
    kind = type(value)
    if kind is np.str_:
        return Ext(SCALAR, encode(["U", packer.pack(str.__str__(value))]))
    if kind is np.bytes_:
        return Ext(SCALAR, encode(["S", bytes.__getitem__(value, slice(None))]))
    if value.dtype.hasobject:
        raise refused(value, "with objects in it")
    return Ext(SCALAR, encode([_describe(value.dtype), value.tobytes()]))


@unpacks(SCALAR)
def _unpack_scalar(unpacker: Unpacker, data: memoryview) -> Any:
    described, raw = unpacker.items(data)
    if described == "U" and type(raw) is str:
        return np.str_(raw)
    if type(raw) is not bytes:
        raise CorruptError("it has a scalar that cannot be")
    if described == "S":
        return np.bytes_(raw)
    return array_of(unpacker, _build(described), [], False, False, raw)[()]
