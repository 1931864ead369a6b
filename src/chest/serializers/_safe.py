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

import importlib
import sys
from collections.abc import Callable, Hashable
from itertools import chain
from mmap import mmap
from typing import Any

from .._valuefile import MARKS, Layout, Sink, Writable, bytes_of, take_apart
from ..errors import ChestError, CorruptError, KeyTypeError, LoadError, MissingExtraError, short
from . import _registry

__all__ = [
    "MAX_DEPTH",
    "Packer",
    "Refused",
    "Unpacker",
    "dump",
    "dumps",
    "load",
    "load_file",
    "loads",
    "packs",
    "probe",
    "refused",
    "typed_key",
    "unpacks",
]

try:
    _msgpack = importlib.import_module("msgspec.msgpack")
    _Raw = importlib.import_module("msgspec").Raw
except ImportError as _error:
    raise MissingExtraError("the serializer 'safe' needs the package msgspec: pip install 'chest[safe]'") from _error

MAX_DEPTH = 100  # fixed: what is written on a shallow stack must be readable on a deep one
_MARK = MARKS[1]

ATOMS = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS = frozenset({list, dict})
_FEW = 24  # members; where there are more, the time that a call takes does not count
_INT_LOW, _INT_HIGH = -(1 << 63), 1 << 64

encode: Callable[[Any], bytes] = _msgpack.Encoder().encode
Ext: Any = _msgpack.Ext

# Codes of extensions. What was given out once is never given another meaning.
INT, TEXT, TUPLE, ROWS, SET, FROZENSET, DICT, REGISTERED = 1, 2, 3, 4, 5, 6, 7, 8


class Refused(TypeError):
    """An object that cannot be written. ``path`` is where it lies, from the inside out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []

    def __str__(self) -> str:
        path = self.path[::-1]
        if len(path) > 12:
            path[8:-3] = ["..."]
        return f"value{''.join(path)} {self.args[0]}"


def refused(value: object, why: str = "") -> Refused:
    """The error for an object; ``why`` is what is wrong with it, where its type alone would do."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return Refused(
        f"is of type {name}, {why}"
        if why
        else f"is of type {name}, which is not one of the safe types. Register it (chest.safe.register), turn it into one of "
        "them, or choose serializer='pickle'"
    )


# --- writing


class Packer:
    """Turns one value into what ``msgspec`` writes as it is, object by object.

    Attributes:
        payloads: takes the large buffers; None where there is no place for them but the stream.
        careful: look at each number and text: one of them is beyond what MessagePack has.
    """

    __slots__ = ("_inside", "careful", "payloads")

    def __init__(self, payloads: list[memoryview] | None, *, careful: bool = False) -> None:
        self.payloads = payloads
        self.careful = careful
        self._inside: list[Any] = []

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMS:
            return _careful(value) if self.careful else value
        found = _PACKERS.get(kind) or _packer(kind)
        if found is None:
            raise refused(value)
        inside = self._inside
        if len(inside) == MAX_DEPTH:
            itself = len(set(map(id, inside))) < MAX_DEPTH
            raise refused(value, "and contains itself" if itself else f"and nested more than {MAX_DEPTH} deep")
        inside.append(value)
        packed = found(self, value)
        inside.pop()
        return packed

    def items(self, values: Any) -> Any:
        """The members of a list or tuple."""
        if not self.careful and ATOMS.issuperset(map(type, values)):
            return values
        packed: list[Any] = []
        try:
            for value in values:
                packed.append(self.pack(value))  # noqa: PERF401 - how many there are says where an error lies
        except Refused as refusal:
            refusal.path.append(f"[{len(packed)}]")
            raise
        return packed

    def named(self, name: str, value: Any) -> Any:
        """As ``pack``, for a part that errors should call by a name."""
        try:
            return self.pack(value)
        except Refused as refusal:
            refusal.path.append(name)
            raise


def _pack_list(packer: Packer, value: list[Any]) -> Any:
    if value and type(value[0]) is tuple and not packer.careful:
        # Rows, of which there may be many: all in one call.
        if set(map(type, value)) == {tuple} and ATOMS.issuperset(map(type, chain.from_iterable(value))):
            return Ext(ROWS, encode(value))
    return packer.items(value)


def _careful(value: Any) -> Any:
    kind = type(value)
    if kind is int and not _INT_LOW <= value < _INT_HIGH:
        return Ext(INT, value.to_bytes((value.bit_length() >> 3) + 1, "big", signed=True))
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return Ext(TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _pack_dict(packer: Packer, value: dict[Any, Any]) -> Any:
    careful = packer.careful
    plain = ATOMS.issuperset(map(type, value)) and not (careful and any(_careful(key) is not key for key in value))
    if plain and not careful and ATOMS.issuperset(map(type, value.values())):
        return value
    keys = list(value) if plain else [packer.named(f"'s key {short(key)}", key) for key in value]
    packed: list[Any] = []
    try:
        for member in value.values():
            packed.append(packer.pack(member))  # noqa: PERF401 - as above
    except Refused as refusal:
        refusal.path.append(f"[{short(list(value)[len(packed)], 40)}]")
        raise
    if plain:
        return dict(zip(keys, packed, strict=True))
    return Ext(DICT, encode(list(chain.from_iterable(zip(keys, packed, strict=True)))))


def _pack_set(code: int) -> Callable[[Packer, Any], Any]:
    def pack(packer: Packer, value: Any) -> Any:
        try:
            # In one order, so that equal sets are written alike.
            members = sorted([encode(packer.pack(member)) for member in value])
        except Refused as refusal:
            refusal.path.append("{...}")
            raise
        return Ext(code, encode([_Raw(member) for member in members]))

    return pack


def _pack_registered(packer: Packer, value: Any) -> Any:
    registered = _registry.by_class[type(value)]
    try:
        packed = registered.pack(value)
    except Refused:
        raise
    except Exception as error:
        raise refused(value, f"and {error}") from error
    if type(packed) is dict:
        packed = {name: packer.named(f".{name}", member) for name, member in packed.items() if type(name) is str} or packed
    else:
        packed = packer.pack(packed)
    return Ext(REGISTERED, encode([registered.name, packed]))


_PACKERS: dict[type, Callable[[Packer, Any], Any]] = {
    list: _pack_list,
    dict: _pack_dict,
    tuple: lambda packer, value: Ext(TUPLE, encode(packer.items(value))),
    set: _pack_set(SET),
    frozenset: _pack_set(FROZENSET),
}
_LATE = {"numpy": "_safe_numpy", "pandas": "_safe_pandas", "pyarrow": "_safe_arrow"}
"""Packages whose types are added when one is met for the first time."""


def packs(*kinds: type) -> Callable[[Any], Any]:
    """Mark a function as the one that packs objects of exactly these types."""

    def mark(function: Callable[[Packer, Any], Any]) -> Any:
        _PACKERS.update(dict.fromkeys(kinds, function))
        return function

    return mark


def _packer(kind: type) -> Callable[[Packer, Any], Any] | None:
    if kind in _registry.by_class:
        return _pack_registered
    package = str(kind.__module__).partition(".")[0]
    late = _LATE.get(package)
    if late is not None and package in sys.modules:
        importlib.import_module(f"{__package__}.{late}")
    return _PACKERS.get(kind)


def _is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether all of a finite list or dict is of the plain types, exactly."""
    if not depth or len(value) > _FEW:
        return _is_plain_level([value], depth)
    if type(value) is dict:
        for key in value:
            if type(key) is not str and type(key) not in ATOMS:
                return False
        value = value.values()
    for member in value:
        kind = type(member)
        if kind is str or kind is int or kind is float:
            continue
        if kind is list or kind is dict:
            if member and not _is_plain(member, depth - 1):
                return False
        elif kind not in ATOMS:
            return False
    return True


def _is_plain_level(level: list[Any], depth: int) -> bool:
    """As ``_is_plain``, for many lists and dicts: a few calls see all of their members. Slower for few."""
    is_atomic = ATOMS.issuperset
    while depth:
        lists = [member for member in level if type(member) is list]
        members: list[Any] = list(chain.from_iterable(lists))
        if len(lists) < len(level):
            dicts = [member for member in level if type(member) is dict] if lists else level
            if not is_atomic(map(type, chain.from_iterable(dicts))):
                return False
            # Not gc.get_referents: of some dicts that instances keep their attributes in it shows nothing.
            members += chain.from_iterable(map(dict.values, dicts))
        if is_atomic(map(type, members)):
            return True
        level = [member for member in members if type(member) not in ATOMS]
        if not _CONTAINERS.issuperset(map(type, level)):
            return False
        depth -= 1
    return False


def dumps(value: Any, payloads: list[memoryview] | None = None) -> bytes:
    """The value as MessagePack.

    Args:
        value: what is to be written.
        payloads: takes the large buffers; None leaves them in what is returned.

    Raises:
        TypeError: it holds something that is not one of the safe types; the message says what and where.
    """
    kind = type(value)
    if kind is dict or kind is list or kind in ATOMS:
        try:
            data = encode(value)
        except (OverflowError, UnicodeEncodeError, TypeError, RecursionError):
            pass  # something is in it that is not plain; what, is found out below
        else:
            if kind in ATOMS or _is_plain(value):
                return data
    try:
        return encode(Packer(payloads).pack(value))
    except (OverflowError, UnicodeEncodeError):
        if payloads:
            payloads.clear()
        return encode(Packer(payloads, careful=True).pack(value))


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


# --- reading


class Unpacker:
    """Reads one value, whose large buffers lie outside of the stream."""

    __slots__ = ("_buffers", "decode")

    def __init__(self, buffers: list[memoryview | bytearray]) -> None:
        self._buffers = buffers
        self.decode: Callable[[Any], Any] = _msgpack.Decoder(ext_hook=self._extension).decode

    def _extension(self, code: int, data: memoryview) -> Any:
        found = _UNPACKERS.get(code)
        if found is None:
            late = _LATE_CODES.get(code)
            if late is None:
                raise CorruptError(f"it has an extension {code}, which nothing writes")
            try:
                importlib.import_module(f"{__package__}.{late}")
            except ImportError as error:
                raise LoadError(f"it needs a package that is missing: {error}. Install it and read it again") from error
            found = _UNPACKERS[code]
        return found(self, data)

    def items(self, data: Any) -> list[Any]:
        """The members of an array."""
        found = self.decode(data)
        if type(found) is not list:
            raise CorruptError("it has an extension whose data is no array")
        return found

    def buffer(self, place: Any) -> tuple[Any, bool]:
        """A buffer, by its number or in the stream; and whether it lies in the stream, which is not to be kept."""
        if type(place) is bytes:
            return place, True
        if type(place) is not int or not 0 <= place < len(self._buffers):
            raise CorruptError("it refers to a buffer that is not there")
        return self._buffers[place], False


def _unpack_dict(unpacker: Unpacker, data: memoryview) -> dict[Any, Any]:
    flat = unpacker.items(data)
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _unpack_registered(unpacker: Unpacker, data: memoryview) -> Any:
    name, packed = unpacker.items(data)
    registered = _registry.by_name.get(name)
    if registered is None:
        raise LoadError(f"it holds a {short(name)}, which is not registered: call chest.safe.register for it and read it again")
    try:
        return registered.unpack(packed)
    except Exception as error:
        raise LoadError(f"a {name} cannot be made of what is stored ({type(error).__name__}: {error})") from error


_UNPACKERS: dict[int, Callable[[Unpacker, memoryview], Any]] = {
    INT: lambda unpacker, data: int.from_bytes(data, "big", signed=True),
    TEXT: lambda unpacker, data: bytes(data).decode("utf-8", "surrogatepass"),
    TUPLE: lambda unpacker, data: tuple(unpacker.items(data)),
    ROWS: lambda unpacker, data: list(map(tuple, unpacker.items(data))),
    SET: lambda unpacker, data: set(unpacker.items(data)),
    FROZENSET: lambda unpacker, data: frozenset(unpacker.items(data)),
    DICT: _unpack_dict,
    REGISTERED: _unpack_registered,
}
_LATE_CODES = {  # the modules may be imported by a file that names them: they are chest's own
    **dict.fromkeys(range(32, 40), "_safe_numpy"),
    **dict.fromkeys(range(40, 44), "_safe_arrow"),
    **dict.fromkeys(range(48, 56), "_safe_pandas"),
}


def unpacks(code: int) -> Callable[[Any], Any]:
    """Mark a function as the one that makes the objects of an extension."""

    def mark(function: Callable[[Unpacker, memoryview], Any]) -> Any:
        _UNPACKERS[code] = function
        return function

    return mark


_decode_small = Unpacker([]).decode


def loads(data: Any) -> Any:
    """The value that ``dumps`` wrote.

    Raises:
        CorruptError: this is nothing that it writes.
        LoadError: it needs what is not there: a class that is registered, a package, a time zone.
    """
    try:
        return _decode_small(data)
    except Exception as error:
        raise _explained(error) from error


def _explained(error: Exception) -> Exception:
    if isinstance(error, (ChestError, MemoryError)):
        return error
    if isinstance(error, RecursionError):
        return LoadError("it is nested too deep for what is left of the stack: read it from a less deep place")
    return CorruptError(f"this is nothing that safe writes ({type(error).__name__}: {short(str(error), 200)})")


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
        raise _explained(error) from error


def load(file: Any) -> Any:
    """The value of a file, of a value file as well as of what ``dumps`` gives. Raises CorruptError, LoadError."""
    return load_file(file.read())[0]


from . import _safe_types as _safe_types  # noqa: E402 - the types of the standard library, which need what stands above
