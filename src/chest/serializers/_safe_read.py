"""How the safe serializer makes values of what it has written (see ``_safe``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..errors import ChestError, CorruptError, LoadError, short
from . import _registry
from ._safe_write import DICT, FROZENSET, INT, REGISTERED, ROWS, SET, TEXT, TUPLE, Decoder

__all__ = ["Unpacker", "explained", "loads", "publish", "unpacks"]


class Unpacker:
    """Reads one value, whose large buffers lie outside of the stream."""

    __slots__ = ("_buffers", "decode")

    def __init__(self, buffers: list[memoryview | bytearray]) -> None:
        self._buffers = buffers
        self.decode: Callable[[Any], Any] = Decoder(ext_hook=self._extension).decode

    def _extension(self, code: int, data: memoryview) -> Any:
        found = _UNPACKERS.get(code)
        if found is None:
            late = _LATE_CODES.get(code)
            if late is None:
                raise CorruptError(f"it has an extension {code}, which nothing writes")
            try:
                publish(late)
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


_made: dict[str, dict[int, Callable[[Unpacker, memoryview], Any]]] = {}


def unpacks(code: int) -> Callable[[Any], Any]:
    """Mark a function as the one that makes the objects of an extension, once its module has been published."""

    def mark(function: Callable[[Unpacker, memoryview], Any]) -> Any:
        _made.setdefault(function.__module__, {})[code] = function
        return function

    return mark


def publish(name: str) -> None:
    """The extensions of a module are known from here on: not one by one, while another thread is importing it."""
    module = importlib.import_module(f"{__package__}.{name}")
    _UNPACKERS.update(_made.get(module.__name__, {}))


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
        raise explained(error) from error


def explained(error: Exception) -> Exception:
    if isinstance(error, (ChestError, MemoryError)):
        return error
    if isinstance(error, RecursionError):
        return LoadError("it is nested too deep for what is left of the stack: read it from a less deep place")
    return CorruptError(f"this is nothing that safe writes ({type(error).__name__}: {short(str(error), 200)})")
