"""Classes of the user's that the safe serializer may write and make again, each under a name.

Registered classes are trusted: making an instance runs what the class does for it. A dataclass and a named tuple are made
without ``__init__`` and ``__new__`` of their own, as unpickling would.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

__all__ = ["Registered", "by_class", "by_name", "register"]

C = TypeVar("C", bound=type)


class Registered(NamedTuple):
    """How instances of a class become a value of the safe types, and the other way round."""

    name: str
    cls: type
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


by_class: dict[type, Registered] = {}
by_name: dict[str, Registered] = {}


def register(
    cls: C,
    name: str | None = None,
    *,
    pack: Callable[[Any], Any] | None = None,
    unpack: Callable[[Any], Any] | None = None,
) -> C:
    """From now on chests with ``serializer="safe"`` can hold instances of this class: of it, not of its subclasses.

    Works as a decorator, too. It has to be done in every process that reads or writes such values, before it does.

    Args:
        cls: an enum, a dataclass, a named tuple; any class with ``pack`` and ``unpack``.
        name: what stands for the class in what is written; "module.Class" if None. To be kept when the class is moved.
        pack, unpack: an instance as a value of other types that can be written, and the instance again.

    Returns:
        The class.

    Raises:
        TypeError: it is none of these classes, or what makes it needs ``pack`` and ``unpack``.
        ValueError: the name stands for another class, or the class is registered under another name.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register() takes a class, not {cls!r}")
    name = f"{cls.__module__}.{cls.__qualname__}" if name is None else name
    if (pack is None) != (unpack is None):
        raise TypeError("give both pack= and unpack=, or neither")
    if pack is None or unpack is None:
        pack, unpack = _ways(cls)
    known = by_name.get(name)
    if known is not None and known.cls is not cls:
        if (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} stands for {known.cls!r} already: choose another one")
        del by_class[known.cls]  # its module was loaded again
    known = by_class.get(cls)
    if known is not None and known.name != name:
        raise ValueError(f"{cls!r} is registered as {known.name!r} already: values would be written under two names")
    by_class[cls] = by_name[name] = Registered(name, cls, pack, unpack)
    return cls


def _ways(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(cls, enum.Flag):
        return _flag_value, cls
    if issubclass(cls, enum.Enum):
        return _member_name(cls), cls.__members__.__getitem__
    if issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
        if cls.__dictoffset__:
            raise TypeError(f"{cls!r} adds attributes to a named tuple: give pack= and unpack=, or add __slots__ = () to it")
        return _tuple_ways(cls)
    if dataclasses.is_dataclass(cls):
        try:
            plain: Any = object.__new__
            plain(cls)
        except TypeError as error:
            raise TypeError(f"{cls!r} is no plain dataclass ({error}): give pack= and unpack=") from error
        return _dataclass_ways(cls)
    raise TypeError(f"{cls!r} is neither an enum nor a dataclass nor a named tuple: give pack= and unpack=")


def _flag_value(member: Any) -> int:
    value = member.value
    if type(value) is not int:
        raise TypeError(f"its value is of type {type(value).__qualname__}")
    return value


def _member_name(cls: Any) -> Callable[[Any], str]:
    members = cls.__members__

    def pack(member: Any) -> str:
        name: str = member.name
        if members.get(name) is not member:
            raise TypeError("it is no member that its class knows by name")
        return name

    return pack


def _tuple_ways(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    n = len(cls._fields)

    def unpack(items: Any) -> Any:
        if type(items) is not list or len(items) != n:
            raise TypeError(f"it has {n} fields, and {len(items)} are stored")
        return tuple.__new__(cls, items)

    return lambda value: list(tuple.__iter__(value)), unpack


def _dataclass_ways(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    names = [field.name for field in dataclasses.fields(cls)]
    known = frozenset(names)

    def pack(value: Any) -> dict[str, Any]:
        beyond = getattr(value, "__dict__", {}).keys() - known
        if beyond:
            raise TypeError(f"it has attributes that are no fields ({', '.join(sorted(map(str, beyond)))})")
        missing = object()
        found = ((name, getattr(value, name, missing)) for name in names)
        return {name: member for name, member in found if member is not missing}

    def unpack(fields: Any) -> Any:
        if type(fields) is not dict or not known.issuperset(fields):
            raise TypeError(f"fields are stored that it does not have: {', '.join(map(str, set(fields) - known))}")
        value = object.__new__(cls)
        for name, member in fields.items():
            object.__setattr__(value, name, member)  # frozen ones forbid the plain way
        return value

    return pack, unpack
