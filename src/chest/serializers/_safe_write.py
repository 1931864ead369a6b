"""What the safe serializer writes: MessagePack, and how a value becomes it (see ``_safe``)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

from ..errors import MissingExtraError, short
from . import _registry

try:
    import msgspec.msgpack
except ImportError as _error:
    raise MissingExtraError("the serializer 'safe' needs the package msgspec: pip install 'chest[safe]'") from _error

__all__ = ["LATE", "Decoder", "Ext", "NotSafe", "Packer", "dumps", "encode", "packs", "publish", "refused"]

MAX_DEPTH = 100  # fixed: what is written on a shallow stack must be readable on a deep one

ATOMS = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS = frozenset({list, dict})
_FEW = 24  # members; where there are more, the time that a call takes does not count
_INT_LOW, _INT_HIGH = -(1 << 63), 1 << 64

encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
Ext = msgspec.msgpack.Ext
Decoder = msgspec.msgpack.Decoder

# Codes of extensions. What was given out once is never given another meaning.
INT, TEXT, TUPLE, ROWS, SET, FROZENSET, DICT, REGISTERED = 1, 2, 3, 4, 5, 6, 7, 8


class NotSafe(TypeError):
    """An object that cannot be written. ``path`` is where it lies, from the inside out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []

    def __str__(self) -> str:
        path = self.path[::-1]
        if len(path) > 12:
            path[8:-3] = ["..."]
        return f"value{''.join(path)} {self.args[0]}"


def refused(value: object, why: str = "") -> NotSafe:
    """The error for an object; ``why`` is what is wrong with it, where its type alone would do."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return NotSafe(
        f"is of type {name}, {why}"
        if why
        else f"is of type {name}, which is not one of the safe types. Register it (chest.safe.register), turn it into one of "
        "them, or choose serializer='pickle'"
    )


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
        except NotSafe as refusal:
            refusal.path.append(f"[{len(packed)}]")
            raise
        return packed

    def named(self, name: str, value: Any) -> Any:
        """As ``pack``, for a part that errors should call by a name."""
        try:
            return self.pack(value)
        except NotSafe as refusal:
            refusal.path.append(name)
            raise


def _pack_list(packer: Packer, value: list[Any]) -> Any:
    rows = value and not packer.careful and type(value[0]) is tuple and set(map(type, value)) == {tuple}
    if rows and ATOMS.issuperset(map(type, chain.from_iterable(value))):
        return Ext(ROWS, encode(value))  # of which there may be many: all in one call
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
    except NotSafe as refusal:
        refusal.path.append(f"[{short(list(value)[len(packed)], 40)}]")
        raise
    if plain:
        return dict(zip(keys, packed, strict=True))
    return Ext(DICT, encode(list(chain.from_iterable(zip(keys, packed, strict=True)))))


def _pack_set(code: int) -> Callable[[Packer, Any], Any]:
    def pack(packer: Packer, value: Any) -> Any:
        try:
            # In one order, so that equal sets are written alike.
            plain = not packer.careful and ATOMS.issuperset(map(type, value))
            members = sorted(map(encode, value if plain else map(packer.pack, value)))
        except NotSafe as refusal:
            refusal.path.append("{...}")
            raise
        n = len(members)
        head = (
            bytes((0x90 | n,)) if n < 16 else b"\xdc" + n.to_bytes(2, "big") if n < 1 << 16 else b"\xdd" + n.to_bytes(4, "big")
        )
        return Ext(code, b"".join((head, *members)))

    return pack


def _pack_registered(packer: Packer, value: Any) -> Any:
    registered = _registry.by_class[type(value)]
    try:
        packed = registered.pack(value)
    except NotSafe:
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
LATE = {"numpy": "_safe_numpy", "pandas": "_safe_pandas", "pyarrow": "_safe_arrow"}
"""Packages whose types are added when one is met for the first time."""


_made: dict[str, dict[type, Callable[[Packer, Any], Any]]] = {}


def packs(*kinds: type) -> Callable[[Any], Any]:
    """Mark a function as the one that packs objects of exactly these types, once its module has been published."""

    def mark(function: Callable[[Packer, Any], Any]) -> Any:
        _made.setdefault(function.__module__, {}).update(dict.fromkeys(kinds, function))
        return function

    return mark


def publish(name: str) -> None:
    """The types of a module are known from here on: not one by one, while another thread is importing it."""
    module = importlib.import_module(f"{__package__}.{name}")
    _PACKERS.update(_made.get(module.__name__, {}))


def _packer(kind: type) -> Callable[[Packer, Any], Any] | None:
    if kind in _registry.by_class:
        return _pack_registered
    package = str(kind.__module__).partition(".")[0]
    if package in LATE and package in sys.modules:
        publish(LATE[package])
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
    elif kind is tuple and ATOMS.issuperset(map(type, value)):
        try:
            return encode(Ext(TUPLE, encode(value)))
        except (OverflowError, UnicodeEncodeError):
            pass  # as above
    try:
        return encode(Packer(payloads).pack(value))
    except (OverflowError, UnicodeEncodeError):
        if payloads:
            payloads.clear()
        return encode(Packer(payloads, careful=True).pack(value))
