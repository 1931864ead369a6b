"""Types of the standard library for the safe serializer: numbers, dates, and what else holds a value and nothing more."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

from ..errors import CorruptError, LoadError
from ._safe_read import Unpacker, unpacks
from ._safe_write import Ext, Packer, encode, packs, refused

__all__ = ["pack_zone", "unpack_zone"]

(
    COMPLEX, BYTEARRAY, DATETIME, DATE, TIME, TIMEDELTA, DECIMAL, FRACTION, UUID_, RANGE, SLICE, ELLIPSIS, PATH,
) = range(9, 22)  # fmt: skip

_complex = struct.Struct(">dd")
_MICROSECOND = timedelta(microseconds=1)
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*").fullmatch
_MAX_BITS = 1 << 16  # of numerator and denominator: to reduce a fraction takes the square of it, and a reader must not hang


@packs(complex)
def _pack_complex(packer: Packer, value: complex) -> Any:
    return Ext(COMPLEX, _complex.pack(value.real, value.imag))


@packs(bytearray)
def _pack_bytearray(packer: Packer, value: bytearray) -> Any:
    return Ext(BYTEARRAY, bytes(value))  # a copy: another thread may resize it before it is written


unpacks(COMPLEX)(lambda unpacker, data: complex(*_complex.unpack(data)))
unpacks(BYTEARRAY)(lambda unpacker, data: bytearray(data))


# --- dates


def pack_zone(value: object, zone: tzinfo | None) -> Any:
    """A time zone as None, the key of a zone, or its offset and (where it was given one) its name."""
    if zone is None:
        return None
    if type(zone) is ZoneInfo and _ZONE(zone.key or ""):
        return zone.key
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [offset // _MICROSECOND, *name]
    raise refused(value, f"and its time zone is a {type(zone).__module__}.{type(zone).__qualname__}: use zoneinfo or timezone")


def unpack_zone(packed: Any) -> tzinfo | None:
    if packed is None:
        return None
    if type(packed) is str:
        if not _ZONE(packed):
            raise CorruptError("it names a time zone that cannot be")
        try:
            return ZoneInfo(packed)
        except Exception as error:
            raise LoadError(
                f"it needs the time zone {packed}, which this machine does not know: install tzdata and read it again"
            ) from error
    offset, *name = packed
    return timezone(timedelta(microseconds=offset), *name)


@packs(datetime)
def _pack_datetime(packer: Packer, value: datetime) -> Any:
    zone = pack_zone(value, value.tzinfo)
    parts = value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond
    return Ext(DATETIME, encode([*parts, value.fold, zone]))


@unpacks(DATETIME)
def _unpack_datetime(unpacker: Unpacker, data: memoryview) -> datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = unpacker.items(data)
    return datetime(year, month, day, hour, minute, second, microsecond, unpack_zone(zone), fold=fold)


@packs(time)
def _pack_time(packer: Packer, value: time) -> Any:
    zone = pack_zone(value, value.tzinfo)
    return Ext(TIME, encode([value.hour, value.minute, value.second, value.microsecond, value.fold, zone]))


@unpacks(TIME)
def _unpack_time(unpacker: Unpacker, data: memoryview) -> time:
    hour, minute, second, microsecond, fold, zone = unpacker.items(data)
    return time(hour, minute, second, microsecond, unpack_zone(zone), fold=fold)


# --- what an array of numbers and text describes

_EXACT: list[tuple[int, type, Callable[[Any], list[Any]], Callable[..., Any]]] = [
    (DATE, date, lambda value: [value.year, value.month, value.day], date),
    (TIMEDELTA, timedelta, lambda value: [value.days, value.seconds, value.microseconds], timedelta),
    (RANGE, range, lambda value: [value.start, value.stop, value.step], range),
    (SLICE, slice, lambda value: [value.start, value.stop, value.step], slice),
    (ELLIPSIS, type(...), lambda value: [], lambda: ...),
]


def _add(code: int, kind: type, parts: Callable[[Any], list[Any]], make: Callable[..., Any]) -> None:
    packs(kind)(lambda packer, value: Ext(code, encode(packer.items(parts(value)))))
    unpacks(code)(lambda unpacker, data: make(*unpacker.items(data)))


for _row in _EXACT:
    _add(*_row)


@packs(Decimal)
def _pack_decimal(packer: Packer, value: Decimal) -> Any:
    return Ext(DECIMAL, str(value).encode("ascii"))


unpacks(DECIMAL)(lambda unpacker, data: Decimal(str(data, "ascii")))


@packs(Fraction)
def _pack_fraction(packer: Packer, value: Fraction) -> Any:
    parts = [value.numerator, value.denominator]
    if max(part.bit_length() for part in parts) > _MAX_BITS:
        raise refused(value, f"and has more than {_MAX_BITS} bits above or below the line: store it as a tuple of integers")
    return Ext(FRACTION, encode(packer.items(parts)))


@unpacks(FRACTION)
def _unpack_fraction(unpacker: Unpacker, data: memoryview) -> Fraction:
    if len(data) > _MAX_BITS // 2:
        raise CorruptError("it holds a fraction that is too large")
    numerator, denominator = unpacker.items(data)
    return Fraction(numerator, denominator)


@packs(UUID)
def _pack_uuid(packer: Packer, value: UUID) -> Any:
    safe = value.is_safe
    return Ext(UUID_, value.bytes + (b"" if safe is SafeUUID.unknown else b"\0" if safe is SafeUUID.safe else b"\1"))


@unpacks(UUID_)
def _unpack_uuid(unpacker: Unpacker, data: memoryview) -> UUID:
    safe = {b"": SafeUUID.unknown, b"\0": SafeUUID.safe, b"\1": SafeUUID.unsafe}[bytes(data[16:])]
    return UUID(bytes=bytes(data[:16]), is_safe=safe)


_PATHS: dict[str, type] = {
    "PurePosixPath": PurePosixPath,
    "PureWindowsPath": PureWindowsPath,
    "PosixPath": PosixPath,
    "WindowsPath": WindowsPath,
}


@packs(*_PATHS.values())
def _pack_path(packer: Packer, value: Any) -> Any:
    return Ext(PATH, encode(packer.items([type(value).__name__, str(value)])))


@unpacks(PATH)
def _unpack_path(unpacker: Unpacker, data: memoryview) -> Any:
    kind, text = unpacker.items(data)
    if type(text) is not str:
        raise CorruptError("it holds a path that is no text")
    try:
        return _PATHS[kind](text)
    except NotImplementedError as error:
        raise LoadError(f"it holds a {kind}, which does not exist on this system") from error
