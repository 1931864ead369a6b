"""Did a value change in place, and can anybody still change it?

A chest hands out the values themselves, not proxies, so it learns of an in-place change only by looking.

*Does the value differ from what is stored?* What cannot change needs no look (``is_immutable``). Large
buffers are looked at by ``_pagemap``. Everything else is pickled again.

*Does somebody still hold it?* (``held``) After ``rows = c['x']['rows']`` only ``rows`` is held, so the value's own
reference count is not enough: the references that come from inside the value are counted, and an object that has more
is held from outside. There are two mistakes to make, "held" for ever (pins memory) and "not held" (loses a change):

- Only what can change matters. Tuples and frozensets matter if something in them can.
- The walk goes through containers, instances of Python classes and numpy arrays, all of whose references are known. It
  does not enter data frames, Arrow tables and other foreign objects, where caches would look like holders.
- What unpickling would find again instead of making it anew (a time zone, a singleton) is held by a cache, and nothing
  is lost if the chest lets go of it. What cannot be pickled at all is not part of what is stored.

*Held?* is asked first: what nobody holds cannot change before it is handed out again, so a comparison after it holds good.

Not seen are: a list inside a column of a data frame, what ``np.frombuffer`` was given, attributes of functions and
classes. Where references are not counted (PyPy, free-threaded builds) all that can change may be held.
"""

from __future__ import annotations

import collections
import copyreg
import datetime
import enum
import functools
import gc
import re
import sys
import types
import weakref
from array import array
from typing import Any

__all__ = ["Held", "held", "is_immutable"]

__all__ = ["ATOMS", "IMMUTABLE", "Held", "held", "is_immutable"]

REFCOUNTS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()

IMMUTABLE: set[type] = {
    *(type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type(NotImplemented), re.Pattern),
    *(datetime.date, datetime.datetime, datetime.timedelta, datetime.time, datetime.timezone, types.GenericAlias),
}  # those of packages that are not imported for their sake (_NAMED) join it when they are met
ATOMS: set[type] = {*IMMUTABLE, type, types.FunctionType, types.ModuleType}  # a value's walk ends here
_NAMED = frozenset((
    "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "zoneinfo.ZoneInfo", "numpy.generic", "numpy.dtype",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pandas.Timestamp", "pandas.Timedelta", "pandas.Period", "pandas.Interval", "pandas.NaTType", "pandas.NAType",
    "pyarrow.Table", "pyarrow.RecordBatch", "pyarrow.ChunkedArray", "pyarrow.Array", "pyarrow.Scalar",
    "pyarrow.Schema", "pyarrow.Field", "pyarrow.DataType", "ipaddress.IPv4Address", "ipaddress.IPv6Address",
))  # fmt: skip
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType)
_MAX_MEMBERS, _MAX_DEPTH = 64, 4


def is_immutable(value: object) -> bool:
    """Whether the value certainly cannot change in place; False where finding out would take long (in deep tuples).

    Functions and classes count where pickle stores their name only. A read-only array can change: by its base.
    """
    return type(value) in IMMUTABLE or _looks_immutable(value, _MAX_DEPTH)


def _looks_immutable(value: Any, depth: int) -> bool:
    cls = type(value)
    kind = _kind(cls)
    if kind == _FROZEN and isinstance(value, (tuple, frozenset)):
        return depth > 0 and len(value) <= _MAX_MEMBERS and all(_looks_immutable(item, depth - 1) for item in value)
    if kind == _OPAQUE:
        return cls.__module__ == "pyarrow.lib" and getattr(value, "is_mutable", True) is False  # a buffer
    if cls in IMMUTABLE or isinstance(value, enum.Enum):
        return True
    # Functions and classes: what is in __main__ some picklers store by value.
    module = isinstance(value, _BY_NAME) and value.__module__ != "__main__" and sys.modules.get(value.__module__ or "")
    return bool(module) and value is functools.reduce(
        lambda found, name: getattr(found, name, None), value.__qualname__.split("."), module
    )


# What the walk does with objects of a type:
_LEAF = 0  # cannot change, or is stored by name: not looked at
_FROZEN = 1  # is walked through; matters if something in it can change
_PLAIN = 2  # is walked through and matters
_ARRAY = 3  # likewise; numpy does not show .base and the members of object arrays to the garbage collector
_OPAQUE = 4  # matters, is not entered

_CONTAINERS = (list, dict, set, collections.deque, bytearray, types.SimpleNamespace, functools.partial, BaseException)
_NEVER_FOUND_AGAIN = {*_CONTAINERS, collections.OrderedDict, collections.defaultdict, array}
_HIDES_DICT = 1 << 2 if sys.version_info >= (3, 13) else 0  # type.__flags__ with inline values: see _hidden_dict
_kinds: dict[int, int] = {}  # by identity, so that no class is kept alive


def _kind(cls: type) -> int:
    if cls in ATOMS:
        return _LEAF
    kind = _kinds.get(id(cls))
    if kind is None:
        kind = _kinds[id(cls)] = _classify(cls)
        weakref.finalize(cls, _kinds.pop, id(cls), None).atexit = False
    return kind


def _classify(cls: type) -> int:
    mro = cls.__mro__
    if issubclass(cls, (type, types.ModuleType, enum.Enum)):
        return _LEAF
    packages = [str(base.__module__).partition(".")[0] for base in mro]
    package, numpy = packages[0], sys.modules.get("numpy")
    if "numpy" in packages and numpy is not None and issubclass(cls, (numpy.ndarray, numpy.void)):
        return _ARRAY
    bases = mro if package in ("numpy", "pyarrow") else (cls,)
    if any(f"{package}.{base.__name__}" in _NAMED for base in bases):
        IMMUTABLE.add(cls)
        ATOMS.add(cls)
        return _LEAF
    # Stored by name; lives for itself; cannot change by contract, and is cached.
    if package == "typing" or "chest" in packages or issubclass(cls, datetime.tzinfo):
        return _LEAF
    if not {"pandas", "polars", "pyarrow"}.isdisjoint(packages):
        return _OPAQUE
    # A class statement leaves one of these entries in the (heap) type or in a base of it; C types have none.
    entries = {"__slots__", "__dict__", "__weakref__"}
    python = {base for base in mro if base.__flags__ & 1 << 9 and not entries.isdisjoint(vars(base))}
    slots = (base for base in python for item in vars(base).values() if type(item) is types.MemberDescriptorType)
    has_state = cls.__dictoffset__ != 0 or any(slots)
    if issubclass(cls, (tuple, frozenset)):
        return _PLAIN if has_state else _FROZEN
    if cls in (types.MethodType, types.BuiltinMethodType, slice):
        return _FROZEN
    if (has_state and python) or issubclass(cls, _CONTAINERS):
        return _PLAIN
    return _OPAQUE if not python or set(mro) - python - ATOMS - {object} else _LEAF


class Held(enum.IntEnum):
    """Who holds a value beside the caller."""

    NO = 0  #: nobody: it cannot change any more
    INNER = 1  #: somebody holds something inside it that can change
    VALUE = 2  #: somebody holds the value itself


_PROBE = [[None]]
_SEEN = next(map(sys.getrefcount, {0: [None]}.values()))  # as in _shared, for what nothing but the dict holds
_ONE_PLACE = max(map(sys.getrefcount, [[None]])) + 1  # as in _is_tree
_MAX_ROUNDS, _MAX_FOREIGN = 4, 1000


def _references(value: object, extra: int = 0) -> int:
    """What ``held``, which has the same signature, sees of an object that only a slot of the caller's holds."""
    return sys.getrefcount(value)


def held(value: Any, extra: int = 0) -> Held:
    """Whether anybody but the caller holds the value, or something inside it that can change.

    To be called directly, and with a value that is read in the call, ``held(entry.value)``: then the entry's reference
    is the caller's only one; ``extra`` is the number of others, 1 for ``v = entry.value; held(v, 1)``. The answer is
    that of the moment; after NO no other thread can change the value. Costs 0.4 us for an array or data frame; else it
    grows with the value, by 30 ns for a number or text, 0.2 us for a list and 1 us for an instance inside it.
    """
    cls = type(value)
    if cls in ATOMS:
        return Held.NO
    # Compared anew each time: debuggers that replace the evaluation of frames change how calls pass references.
    excess = sys.getrefcount(value) - _references(_PROBE[0]) - extra
    kind = _kinds.get(id(cls)) or _kind(cls)
    if not REFCOUNTS or kind == _LEAF:
        return Held.VALUE if kind else Held.NO
    if kind == _OPAQUE:
        return Held.VALUE if excess > 0 and excess > _foreign_references([value])[id(value)] else Held.NO
    if kind == _ARRAY:
        if not cls.__dictoffset__ and not value.dtype.hasobject and (excess > 0 or value.base is None):
            return Held.VALUE if excess > 0 else Held.NO
    elif not cls.__flags__ & _HIDES_DICT and ATOMS.issuperset(map(type, gc.get_referents(value))):
        return Held.VALUE if excess > 0 and kind == _PLAIN else Held.NO
    if _is_tree(value, kind):
        return Held.VALUE if excess > 0 and (kind != _FROZEN or _can_change(value, set())) else Held.NO
    passed: dict[int, Any] = {}
    for _ in range(_MAX_ROUNDS):
        seen, counts = _walk(value, kind, passed)
        if excess > counts[id(value)] and (kind != _FROZEN or _can_change(value, set(passed))):
            return Held.VALUE
        shared = _shared(seen, counts, set(passed))
        if not shared:
            return Held.NO
        # What lies inside an object that is found again (its class's table of all of them) is shared too: walk past it.
        found_again = _found_again(seen, shared)
        if not found_again:
            break
        passed.update(found_again)
    return Held.INNER


def _is_tree(value: Any, kind: int) -> bool:
    """Whether all that may matter in a value has one reference, that of its place there: then nobody holds it."""
    level, kinds = [value], {type(value): kind}
    while level:
        level, kinds = _members(level, kinds)
        if level and max(map(sys.getrefcount, level)) > _ONE_PLACE:
            return False
    return True


def _walk(value: Any, kind: int, leave_out: dict[int, Any]) -> tuple[dict[int, Any], dict[int, int]]:
    """All that may matter in a value, by identity, and the number of references to it from inside; the value first.

    Level by level, so that few calls do the work for many objects. Both dicts have the same order.
    """
    seen: dict[int, Any] = {id(value): value}
    references: list[int] = []
    level, kinds = [value], {type(value): kind}
    while level:
        members, kinds = _members(level, kinds)
        members = [member for member in members if id(member) not in leave_out]
        if _FROZEN in kinds.values():
            # Rows of numbers and text end here. If one of them is met again elsewhere, its count is of no interest.
            frozen = [member for member in members if kinds[type(member)] == _FROZEN]
            if ATOMS.issuperset(map(type, gc.get_referents(*frozen))):
                members = [member for member in members if kinds[type(member)] != _FROZEN]
        references += map(id, members)
        level = list({id(member): member for member in members if id(member) not in seen}.values())
        seen.update(zip(map(id, level), level, strict=True))
    return seen, {**dict.fromkeys(seen, 0), **collections.Counter(references)}


def _members(level: list[Any], kinds: dict[type, int]) -> tuple[list[Any], dict[type, int]]:
    """What these objects refer to, as often as they do, without leaves; and the kinds of that."""
    present = kinds.values()
    if _OPAQUE in present:
        level = [item for item in level if kinds[type(item)] != _OPAQUE]
    members = gc.get_referents(*level)
    if _ARRAY in present:
        for item in level:
            if kinds[type(item)] == _ARRAY:
                _add_hidden(item, members)
    if _HIDES_DICT:
        members += [_hidden_dict(item) for item in level if type(item).__flags__ & _HIDES_DICT]
    found = {cls: kind for cls in set(map(type, members)) - ATOMS if (kind := _kind(cls)) != _LEAF}
    return [member for member in members if type(member) in found] if found else [], found


def _hidden_dict(item: Any) -> dict[str, Any] | None:
    """The dict of an instance, of which some releases since 3.13 show the garbage collector the values only."""
    own = getattr(item, "__dict__", None)
    return own if type(own) is dict and not any(member is own for member in gc.get_referents(item)) else None


def _add_hidden(item: Any, members: list[Any], *, is_field: bool = False) -> None:
    """Add what a numpy array refers to without the garbage collector knowing. Members belong to the last ``base``."""
    if item.base is not None and not is_field:
        if _kind(type(item.base)) in (_ARRAY, _PLAIN):  # _PLAIN: as_strided puts an instance in between
            members.append(item.base)
    elif item.dtype.names is None and item.dtype.hasobject:
        members.extend(item.flat)
    for name in item.dtype.names or () if item.base is None or is_field else ():
        if item.dtype[name].hasobject:
            _add_hidden(item[name], members, is_field=True)


def _shared(seen: dict[int, Any], counts: dict[int, int], frozen: set[int]) -> set[int]:
    """What can change and has more references than come from inside (by identity), the value itself left out."""
    # No name may refer to one of the objects meanwhile: that would be one more reference.
    known = zip(seen, map(sys.getrefcount, seen.values()), counts.values(), strict=True)
    excess = {identity: total - inside - _SEEN for identity, total, inside in known if total > inside + _SEEN}
    excess.pop(next(iter(seen)), None)
    if not excess:
        return set()
    foreign = _foreign_references([member for member in seen.values() if _kind(type(member)) == _OPAQUE])
    return {
        identity
        for identity, n in excess.items()
        if n > foreign[identity] and (_kind(type(seen[identity])) != _FROZEN or _can_change(seen[identity], frozen))
    }


def _can_change(value: Any, frozen: set[int]) -> bool:
    """Whether a tuple, frozenset or method leads to what can change; ``frozen`` collects those that do not."""
    level = [value]
    while level:
        frozen.update(map(id, level))
        level = [member for member in gc.get_referents(*level) if id(member) not in frozen and _kind(type(member))]
        if any(_kind(type(member)) != _FROZEN for member in level):
            return True
    return False


def _foreign_references(level: list[Any]) -> collections.Counter[int]:
    """The references, by identity, from the insides of foreign objects: pandas 2 keeps accessors (``s.str``)."""
    references: collections.Counter[int] = collections.Counter()
    kinds, seen = dict.fromkeys(map(type, level), _PLAIN), set(map(id, level))
    while level and len(seen) < _MAX_FOREIGN:
        members, kinds = _members(level, dict.fromkeys(kinds, _PLAIN))
        references.update(map(id, members))
        level = list({id(member): member for member in members if id(member) not in seen}.values())
        seen.update(map(id, level))
    return references


def _found_again(seen: dict[int, Any], shared: set[int]) -> dict[int, Any]:
    """Those that letting go of loses nothing. Of what is not shared, classes are left at the first that is not."""
    found, made_anew = {}, {type(next(iter(seen.values())))}
    for identity, member in seen.items():
        if identity in shared or type(member) not in made_anew:
            if _is_found_again(member):
                found[identity] = member
            else:
                made_anew.add(type(member))
    return found


def _is_found_again(value: Any) -> bool:
    """Whether unpickling would give this very object, or pickling cannot store it. Asked only where it costs little."""
    cls: Any = type(value)
    if cls in _NEVER_FOUND_AGAIN or ((kind := _kind(cls)) == _ARRAY and (not cls.__dictoffset__ or value.size > 1)):
        return False  # (np.ma.masked is an array, and one for all)
    reduce = copyreg.dispatch_table.get(cls)
    usual = (object.__new__, object.__reduce__, object.__reduce_ex__)
    if reduce is None and kind != _OPAQUE and (cls.__new__, cls.__reduce__, cls.__reduce_ex__) == usual:
        return False
    try:
        recipe = value.__reduce_ex__(5) if reduce is None else reduce(value)
        if isinstance(recipe, str):
            return True
        build, arguments = recipe[:2]
        return all(isinstance(a, type) or is_immutable(a) for a in arguments) and build(*arguments) is value
    except Exception:
        return kind == _OPAQUE
