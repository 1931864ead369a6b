"""Forms: bytes that are the same exactly when two objects are one key of a ``dict``.

``1``, ``1.0``, ``True`` and ``Decimal(1)`` are one key, ``1`` and ``'1'`` are two. So each builtin kind has one
canonical form, chosen by *value*, never by type. The first byte says what follows::

    s text, UTF-8 (surrogates pass)    N None                         d date             u UUID
    b bytes                            E Ellipsis                     D naive datetime   r range
    i integer of 64 bits, decimal      f double that is no integer    A aware datetime   / POSIX path
    I larger integer, sign and bytes   q other fraction, exact        T naive time       \\ Windows path, lower case
    c complex with imaginary part      z frozenset, sorted members    V aware time       e enum member
    p tuple of s, i; NUL after each    t tuple, length before each    L timedelta        g flag

``p`` exists for speed: it is built as text and encoded once. It holds for every tuple whose members' forms start with
``s`` or ``i`` and have no NUL, whatever the types of the members: it too depends on the value alone. ``h`` and ``o``
are left to names that are no forms.

**Opaque** objects have no form, because only their class (or their identity) knows what equals them: NaN, user classes,
types, functions, subclasses with an ``__eq__`` or ``__hash__`` of their own, ``pandas.Timestamp``,
``numpy.datetime64``, whatever holds one of these, and further

- numbers whose numerator or denominator has more than 32,768 bits: ``Decimal('1e1000000')`` equals ``10**1000000``, and
  there is no cheap form common to both. The limit is one of value, so equal numbers are on the same side of it;
- aware datetimes in the hour of a change of clocks: Python lets them equal nothing in another zone;
- Windows paths with a capital sigma, or that do not survive ``str``: versions of Python compare them differently.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from math import copysign
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID, SafeUUID

__all__ = ["MAX_DEPTH", "WORD", "TooDeepError", "form_of", "is_exact", "object_of", "tuple_form"]

WORD = 1 << 63  # integers below it, in absolute value, are decimal text
MAX_DEPTH = 100  # fixed, where RecursionError would let a key have a form or none depending on who asks
_MAX_BITS = 1 << 15  # of numerator and denominator; beyond, a number is opaque
_MAX_DIGITS = 10_000  # 10**10_000 has more than _MAX_BITS
_OPAQUE = b""  # no form is empty

_double = struct.Struct(">d")
_complex = struct.Struct(">dd")
_delta = struct.Struct(">iii")
_int64 = struct.Struct(">q")
_ordinal = struct.Struct(">I")
_LENGTHS = [bytes((n,)) for n in range(255)]


class TooDeepError(Exception):
    """Tuples or frozensets lie more than ``MAX_DEPTH`` deep in each other."""


def form_of(key: object) -> bytes:
    """The form of an object, empty if it is opaque (or not hashable: see ``hash``)."""
    return _ENCODERS.get(type(key), _other)(key, 0)


def is_exact(key: object) -> bool:
    """Whether ``object_of`` gives this object, which is not opaque, back from its form: type and value."""
    kind = type(key)
    return kind in _ALWAYS_EXACT or (kind in _EXACT and _EXACT[kind](key))


def object_of(form: bytes) -> Any:
    """An object with this form, of the most common type. What is no form raises anything, or gives one with another."""
    return _decoded(form, 0)


# --- encoding ---------------------------------------------------------------------------------------------------------
# Encoders take an object of exactly the type they are for, and the depth it lies at.


def _text(key: Any, depth: int) -> bytes:
    return b"s" + key.encode("utf-8", "surrogatepass")  # type: ignore[no-any-return]


def _integer(key: Any, depth: int) -> bytes:
    if -WORD < key < WORD:
        return b"i%d" % key
    bits = key.bit_length()
    if bits > _MAX_BITS:
        return _OPAQUE
    return (b"I-" if key < 0 else b"I+") + abs(key).to_bytes((bits + 7) >> 3, "big")  # type: ignore[no-any-return]


def _float(key: Any, depth: int) -> bytes:
    if key.is_integer():
        return _integer(int(key), depth)
    return b"f" + _double.pack(key) if key == key else _OPAQUE


def _complex_number(key: Any, depth: int) -> bytes:
    if not key.imag:
        return _float(key.real, depth)
    return b"c" + _complex.pack(key.real + 0.0, key.imag) if key == key else _OPAQUE  # + 0.0: -0.0 equals 0.0


def _ratio(numerator: int, denominator: int) -> bytes:
    if denominator == 1:
        return _integer(numerator, 0)
    if max(numerator.bit_length(), denominator.bit_length()) > _MAX_BITS:
        return _OPAQUE
    if not denominator & (denominator - 1):  # a power of two: perhaps a double
        try:
            double = numerator / denominator
        except OverflowError:
            pass
        else:
            if double.as_integer_ratio() == (numerator, denominator):
                return b"f" + _double.pack(double)
    return b"q" + _joined([_integer(numerator, 0), _integer(denominator, 0)])


def _fraction(key: Any, depth: int) -> bytes:
    return _ratio(key.numerator, key.denominator)


def _decimal(key: Any, depth: int) -> bytes:
    if key.is_nan():
        return _OPAQUE
    if key.is_infinite():
        return _float(float(key), depth)
    if not key:
        return _integer(0, depth)
    sign, digits, exponent = key.as_tuple()
    if abs(exponent) + len(digits) > _MAX_DIGITS:
        # Without trailing zeros and with exponent -n the denominator is at least 2**n. So what is filtered out here is
        # beyond _MAX_BITS for certain, and no power of ten is built for it.
        zeros = next(n for n, digit in enumerate(reversed(digits)) if digit)
        digits, exponent = digits[: len(digits) - zeros], exponent + zeros
        if key.adjusted() >= _MAX_DIGITS or exponent < -_MAX_BITS:
            return _OPAQUE
        key = Decimal((sign, digits, exponent))
    return _ratio(*key.as_integer_ratio())


def _joined(forms: Iterable[bytes]) -> bytes:
    parts = []
    for form in forms:
        n = len(form)
        parts.append(_LENGTHS[n] if n < 255 else b"\xff" + n.to_bytes(8, "big"))
        parts.append(form)
    return b"".join(parts)


def _members(key: Iterable[Any], depth: int) -> list[bytes] | None:
    """The forms of all members, None if one of them is opaque. All are visited: none may be nested too deep."""
    forms = [_ENCODERS.get(type(member), _other)(member, depth + 1) for member in key]
    return forms if all(forms) else None


def tuple_form(key: Any, depth: int = 0) -> bytes:
    """What ``form_of`` gives for a tuple, for those who know that it is one and are in a hurry."""
    if depth >= MAX_DEPTH:
        raise TooDeepError
    text = "p"
    for member in key:
        kind = type(member)
        if kind is str:
            text = f"{text}s{member}\0"
        elif kind is int and -WORD < member < WORD:
            text = f"{text}i{member}\0"
        else:
            break
    else:
        if text.count("\0") == len(key):
            try:
                return text.encode()
            except UnicodeEncodeError:
                return text.encode("utf-8", "surrogatepass")
    forms = _members(key, depth)
    if forms is None:
        return _OPAQUE
    if all(form[0] in b"si" and 0 not in form for form in forms):
        return b"p" + b"".join([form + b"\0" for form in forms])
    return b"t" + _joined(forms)


def _frozenset(key: Any, depth: int) -> bytes:
    if depth >= MAX_DEPTH:
        raise TooDeepError
    forms = _members(key, depth)
    return _OPAQUE if forms is None else b"z" + _joined(sorted(forms))


def _microseconds(delta: timedelta) -> int:
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _datetime(key: Any, depth: int) -> bytes:
    naive = key.replace(tzinfo=None)
    offset = key.utcoffset()
    if offset is None:
        return b"D" + _int64.pack(_microseconds(naive - datetime.min))
    if type(key.tzinfo) is not timezone:
        # Python compares by the wall clock within one zone and by the instant between two. They agree where the wall
        # clock reads this only once; where fold matters, equality with any other zone is ruled out (PEP 495).
        if key.replace(fold=1 - key.fold).utcoffset() != offset:
            return _OPAQUE
        if type(key.tzinfo).__module__ != "zoneinfo":  # zones that do not know fold
            try:
                back = key.tzinfo.fromutc((naive - offset).replace(tzinfo=key.tzinfo))
            except (ArithmeticError, ValueError, NotImplementedError):
                return _OPAQUE
            if back.replace(tzinfo=None) != naive:
                return _OPAQUE
    return b"A" + _int64.pack(_microseconds(naive - datetime.min) - _microseconds(offset))


def _time(key: Any, depth: int) -> bytes:
    clock = ((key.hour * 60 + key.minute) * 60 + key.second) * 1_000_000 + key.microsecond
    offset = key.utcoffset()
    if offset is None:
        return b"T" + _int64.pack(clock)
    if offset.microseconds:  # CPython's comparison passes over them
        return _OPAQUE
    return b"V" + _int64.pack(clock - _microseconds(offset))


def _range(key: Any, depth: int) -> bytes:
    if not key:
        return b"r"
    ends = [key[0]] if key[0] == key[-1] else [key[0], key[-1], key.step]
    forms = [_integer(end, 0) for end in ends]
    return b"r" + _joined(forms) if all(forms) else _OPAQUE


def _windows_path(key: Any, depth: int) -> bytes:
    # Versions of Python lower the parts or the whole: the two differ for a final sigma. 'a:b' may be read in two ways.
    text = str(key)
    if "\u03a3" in text or PureWindowsPath(text).parts != key.parts:
        return _OPAQUE
    return b"\\" + text.lower().encode("utf-8", "surrogatepass")


def _memoryview(key: Any, depth: int) -> bytes:
    hash(key)  # equals bytes only if it is hashable, thus read-only
    return b"b" + key.tobytes() if key.format == "B" and key.ndim == 1 else _OPAQUE


def _enum(key: Any) -> bytes:
    """The form of a member that equals itself alone. As for pickle, its class must be found under its name."""
    kind: Any = type(key)
    if kind.__eq__ is not object.__eq__ or kind.__hash__ is not Enum.__hash__:
        return _OPAQUE
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not kind:
        return _OPAQUE
    where = f"{kind.__module__}\0{kind.__qualname__}\0".encode("utf-8", "surrogatepass")
    if isinstance(key, Flag):  # combined flags have no name before Python 3.11
        value = key.value
        if type(value) is not int or kind(value) is not key:
            return _OPAQUE
        form = _integer(value, 0)
        return b"g" + where + form if form else _OPAQUE
    if kind.__members__.get(key.name) is not key:
        return _OPAQUE
    return b"e" + where + _text(key.name, 0)


def _numpy(key: Any, depth: int) -> bytes:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(key, numpy.generic):
        return _OPAQUE
    kind = key.dtype.kind
    if kind == "U":
        return _text(str.__str__(key), depth)
    if kind == "S":
        return b"b" + _bytes_value(key)
    if kind == "m":  # equal to a timedelta where it is whole microseconds
        value = key.astype("m8[us]").item()
    elif kind in "biufc":
        value = key.item()
        if type(value) is type(key):  # long doubles have no counterpart
            value = complex(key) if kind == "c" else float(key)
    else:
        return _OPAQUE
    if type(value) is type(key) or value != key or hash(value) != hash(key):
        return _OPAQUE
    return _ENCODERS.get(type(value), _other)(value, depth)


def _bytes_value(key: Any) -> bytes:
    return bytes.__getitem__(key, slice(None))


# How to get from a subclass to its value without calling what it may have overridden.
_BASES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (tuple, lambda key: tuple.__getitem__(key, slice(None))),
    (int, int.__int__),
    (bytes, _bytes_value),
    (float, float.__float__),
    (frozenset, lambda key: frozenset(frozenset.__iter__(key))),
    (complex, complex.__pos__),
    (Decimal, Decimal),
    (Fraction, lambda key: Fraction(key._numerator, key._denominator)),
)


def _other(key: Any, depth: int) -> bytes:
    """The form of what has no encoder: a subclass that equals what its base equals, a NumPy scalar, an enum member."""
    kind: Any = type(key)
    if kind.__module__ == "numpy":
        return _numpy(key, depth)
    for base, value_of in _BASES:
        if issubclass(kind, base):
            if kind.__eq__ is base.__eq__ and kind.__hash__ is base.__hash__:
                return _ENCODERS[base](value_of(key), depth)
            return _OPAQUE
    return _enum(key) if isinstance(key, Enum) else _OPAQUE


_ENCODERS: dict[type, Callable[[Any, int], bytes]] = {
    str: _text,
    bytes: lambda key, depth: b"b" + key,
    int: _integer,
    bool: lambda key, depth: b"i%d" % key,
    float: _float,
    complex: _complex_number,
    Decimal: _decimal,
    Fraction: _fraction,
    tuple: tuple_form,
    frozenset: _frozenset,
    type(None): lambda key, depth: b"N",
    type(...): lambda key, depth: b"E",
    date: lambda key, depth: b"d" + _ordinal.pack(key.toordinal()),
    datetime: _datetime,
    time: _time,
    timedelta: lambda key, depth: b"L" + _delta.pack(key.days, key.seconds, key.microseconds),
    UUID: lambda key, depth: b"u" + key.bytes,
    range: _range,
    PurePosixPath: lambda key, depth: b"/" + str(key).encode("utf-8", "surrogatepass"),
    PosixPath: lambda key, depth: b"/" + str(key).encode("utf-8", "surrogatepass"),
    PureWindowsPath: _windows_path,
    WindowsPath: _windows_path,
    memoryview: _memoryview,
}


_ALWAYS_EXACT = frozenset({str, int, bytes, type(None), type(...), date, timedelta, PurePosixPath})
_EXACT: dict[type, Callable[[Any], bool]] = {
    tuple: lambda key: all(map(is_exact, key)),
    frozenset: lambda key: all(map(is_exact, key)),
    float: lambda key: not key.is_integer(),
    complex: lambda key: bool(key.imag) and (key.real != 0 or copysign(1, key.real) > 0),
    Fraction: lambda key: _fraction(key, 0)[:1] == b"q",
    datetime: lambda key: (key.tzinfo is None or key.tzinfo is timezone.utc) and not key.fold,
    time: lambda key: key.tzinfo is None and not key.fold,
    UUID: lambda key: key.is_safe is SafeUUID.unknown,
    range: lambda key: repr(key) == repr(_ranged([key[0], key[-1], key.step] if key else [])),
    PureWindowsPath: lambda key: str(key) == str(key).lower(),
}


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decoded(form: bytes, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TooDeepError
    tag, body = form[:1], form[1:]
    if tag in (b"t", b"z"):
        members = [_decoded(member, depth + 1) for member in _split(body)]
        return tuple(members) if tag == b"t" else frozenset(members)
    return _DECODERS[tag](body)


def _split(body: bytes) -> list[bytes]:
    forms = []
    at = 0
    while at < len(body):
        n = body[at]
        at += 1
        if n == 255:
            n = int.from_bytes(body[at : at + 8], "big")
            at += 8
        forms.append(body[at : at + n])
        at += n
    return forms


def _ranged(ends: list[int]) -> range:
    if not ends:
        return range(0)
    start, last, step = ends if len(ends) == 3 else (ends[0], ends[0], 1)
    return range(start, start + 1) if start == last else range(start, last + step, step)


def _plain_tuple(body: bytes) -> tuple[str | int, ...]:
    return tuple(
        [
            form[1:].decode("utf-8", "surrogatepass") if form[0] == 0x73 else int(form[1:])  # 0x73: s
            for form in body.split(b"\0")[:-1]
        ]
    )


_DECODERS: dict[bytes, Callable[[bytes], Any]] = {
    b"s": lambda body: body.decode("utf-8", "surrogatepass"),
    b"b": lambda body: body,
    b"i": int,
    b"I": lambda body: {b"+": 1, b"-": -1}[body[:1]] * int.from_bytes(body[1:], "big"),
    b"f": lambda body: _double.unpack(body)[0],
    b"q": lambda body: Fraction(*[_decoded(form, 0) for form in _split(body)]),
    b"c": lambda body: complex(*_complex.unpack(body)),
    b"p": _plain_tuple,
    b"N": lambda body: None,
    b"E": lambda body: ...,
    b"d": lambda body: date.fromordinal(*_ordinal.unpack(body)),
    b"D": lambda body: datetime.min + timedelta(microseconds=_int64.unpack(body)[0]),
    b"A": lambda body: (datetime.min + timedelta(microseconds=_int64.unpack(body)[0])).replace(tzinfo=timezone.utc),
    b"T": lambda body: (datetime.min + timedelta(microseconds=_int64.unpack(body)[0])).time(),
    b"L": lambda body: timedelta(*_delta.unpack(body)),
    b"u": lambda body: UUID(bytes=body),
    b"r": lambda body: _ranged([_decoded(form, 0) for form in _split(body)]),
    b"/": lambda body: PurePosixPath(body.decode("utf-8", "surrogatepass")),
    b"\\": lambda body: PureWindowsPath(body.decode("utf-8", "surrogatepass")),
}
