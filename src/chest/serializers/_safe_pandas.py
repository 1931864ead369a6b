"""Data frames, series and indexes of pandas for the safe serializer. Imported when one is met, or read, for the first time.

A frame is its blocks (columns of one type that pandas keeps in one array), its two indexes, ``attrs`` and flags. So the
arrays of a large frame are mapped, and changed in place, as they lie. What an array of pandas holds is written by its
kind: dates as the integers below them, masked arrays as data and mask, categories as codes and an index, Arrow's as Arrow,
objects as a list of safe values. A kind that is not known here is refused, as are subclasses.

pandas has no public way to take blocks out, and one to put them together since 3.0 only; pyarrow uses the same places.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pandas

from ..errors import CorruptError, LoadError, MissingExtraError
from ._safe_read import Unpacker, unpacks
from ._safe_types import pack_zone, unpack_zone
from ._safe_write import Ext, NotSafe, Packer, encode, packs, refused

__all__: list[str] = []

np: Any = numpy
pd: Any = pandas  # whose annotations know nothing of its blocks

FRAME, SERIES, INDEX, COLUMN, MISSING, STAMP = 48, 49, 50, 51, 52, 53

_arrays = pd.arrays
_NumpyArray = getattr(_arrays, "NumpyExtensionArray", None) or _arrays.PandasArray
_MASKED = (_arrays.IntegerArray, _arrays.FloatingArray, _arrays.BooleanArray)
_FREQUENCY = re.compile(r"[-+A-Za-z0-9]{1,40}").fullmatch


# --- arrays


class _Column:
    """An array of pandas, on its way through ``Packer.pack``, which bounds how deep they lie in each other."""

    __slots__ = ("values",)

    def __init__(self, values: Any) -> None:
        self.values = values


@packs(_Column)
def _pack_column(packer: Packer, column: _Column) -> Any:
    values = column.values
    if type(values) is _NumpyArray:
        values = values._ndarray
    return Ext(COLUMN, encode(_parts(packer, values)))


def _parts(packer: Packer, values: Any) -> list[Any]:
    pack = packer.pack
    kind = type(values)
    if kind is np.ndarray:
        if values.dtype != object:
            return ["numpy", pack(values)]
        return ["object", list(values.shape), pack(values.ravel().tolist())]
    if kind in (_arrays.DatetimeArray, _arrays.TimedeltaArray):
        name = "datetime" if kind is _arrays.DatetimeArray else "timedelta"
        return [name, pack(values._ndarray), _zone(values)]
    if kind is pd.Categorical:
        return ["categorical", pack(values.codes), pack(values.categories), bool(values.ordered)]
    if kind is _arrays.PeriodArray:
        return ["period", pack(values.asi8), _frequency(values, values.dtype.freq, values.freqstr)]
    if kind is _arrays.IntervalArray:
        return ["interval", pack(values.left), pack(values.right), values.closed]
    if kind in _MASKED:
        return ["masked", pack(values._data), pack(values._mask)]
    dtype = values.dtype
    if isinstance(dtype, pd.StringDtype):
        missing = "NA" if dtype.na_value is pd.NA else "nan"
        if dtype.storage == "python":
            texts = [None if text is dtype.na_value or text != text else text for text in values._ndarray.tolist()]
            return ["string", "python", missing, pack(texts)]
        return ["string", dtype.storage, missing, pack(values._pa_array)]
    if isinstance(dtype, pd.ArrowDtype) and kind is _arrays.ArrowExtensionArray:
        return ["arrow", pack(values._pa_array)]
    raise refused(values, f"(dtype {dtype}), which cannot be written: turn it into another dtype")


def _zone(values: Any) -> Any:
    zone = getattr(values.dtype, "tz", None)
    pytz = sys.modules.get("pytz")
    if pytz is not None and isinstance(zone, pytz.tzinfo.BaseTzInfo) and zone.zone in pytz.all_timezones_set:
        return {"pytz": zone.zone}
    return pack_zone(values, zone)


def _unpack_zone(packed: Any) -> Any:
    if type(packed) is not dict:
        return unpack_zone(packed)
    try:
        import pytz
    except ImportError as error:
        raise MissingExtraError("it needs a time zone of the package pytz: install it and read it again") from error
    name = packed["pytz"]
    if name not in pytz.all_timezones_set:
        raise LoadError(f"it needs the time zone {name!r}, which this pytz does not know")
    return pytz.timezone(name)


def _frequency(values: Any, frequency: Any, text: Any) -> Any:
    """An offset as its text, where that gives it back."""
    if frequency is None:
        return None
    if _FREQUENCY(text):
        try:
            if _offset(text, period=type(values) is _arrays.PeriodArray) == frequency:
                return str(text)
        except (ValueError, TypeError):
            pass
    raise refused(values, f"with the frequency {frequency!r}, which its text does not give back: set freq to None")


def _offset(text: Any, *, period: bool) -> Any:
    if text is None:
        return None
    if type(text) is not str or not _FREQUENCY(text):
        raise CorruptError("it has a frequency that cannot be")
    return pd.PeriodDtype(text).freq if period else pd.tseries.frequencies.to_offset(text)


def _objects(items: Any, shape: Any) -> Any:
    """An array of these objects; numpy by itself would take lists among them for dimensions."""
    if type(items) is not list:
        raise CorruptError("it has a column that is none")
    return np.fromiter(items, object, len(items)).reshape(shape)


@unpacks(COLUMN)
def _unpack_column(unpacker: Unpacker, data: memoryview) -> Any:
    kind, *rest = unpacker.items(data)
    return _BUILD[kind](*rest)


def _build_numpy(values: Any) -> Any:
    if type(values) is not np.ndarray:
        raise CorruptError("it has a column that is none")
    return values


def _build_dates(cls: Any) -> Callable[[Any, Any], Any]:
    def build(values: Any, zone: Any) -> Any:
        _build_numpy(values)
        if values.dtype.kind != ("M" if cls is _arrays.DatetimeArray else "m"):
            raise CorruptError("it has dates that are none")
        found = _unpack_zone(zone)
        unit = np.datetime_data(values.dtype)[0]
        dtype = values.dtype if found is None else pd.DatetimeTZDtype(unit, found)
        return cls._simple_new(values, dtype=dtype)

    return build


def _build_categories(codes: Any, categories: Any, ordered: Any) -> Any:
    # Checks that the codes lie within the categories: pandas would read beyond them.
    return pd.Categorical.from_codes(_build_numpy(codes), categories=categories, ordered=bool(ordered))


def _build_masked(data: Any, mask: Any) -> Any:
    kind = _build_numpy(data).dtype.kind
    cls: Any = _arrays.BooleanArray if kind == "b" else _arrays.FloatingArray if kind == "f" else _arrays.IntegerArray
    return cls(data, mask, copy=False)


def _build_string(storage: Any, missing: Any, values: Any) -> Any:
    na: Any = {"NA": pd.NA, "nan": np.nan}[missing]
    dtype: Any = pd.StringDtype(storage) if missing == "NA" and storage == "python" else _string_dtype(storage, na)
    if storage == "python":
        if any(text is not None and type(text) is not str for text in values):
            raise CorruptError("it has a column of text that is none")
        # Not through a constructor that infers: what is missing is put in as it is.
        cls = dtype.construct_array_type()
        objects = _objects([na if text is None else text for text in values], -1)
        return cls(objects, dtype=dtype) if "dtype" in inspect.signature(cls).parameters else cls(objects)
    return dtype.__from_arrow__(values)


def _string_dtype(storage: Any, na: Any) -> Any:
    return pd.StringDtype(storage) if na is pd.NA else pd.StringDtype(storage, na_value=na)


_BUILD: dict[str, Callable[..., Any]] = {
    "numpy": _build_numpy,
    "object": lambda shape, items: _objects(items, shape),
    "datetime": _build_dates(_arrays.DatetimeArray),
    "timedelta": _build_dates(_arrays.TimedeltaArray),
    "categorical": _build_categories,
    "period": lambda values, frequency: _arrays.PeriodArray(
        _build_numpy(values), dtype=pd.PeriodDtype(_offset(frequency, period=True))
    ),
    "interval": lambda left, right, closed: _arrays.IntervalArray.from_arrays(left, right, closed, copy=False),
    "masked": _build_masked,
    "string": _build_string,
    "arrow": lambda values: _arrays.ArrowExtensionArray(values),
}


# --- indexes


_INDEXES = (pd.Index, pd.PeriodIndex, pd.CategoricalIndex, pd.IntervalIndex)


@packs(*_INDEXES)
def _pack_index(packer: Packer, index: Any) -> Any:
    name = packer.named(".name", index.name)
    return Ext(INDEX, encode(["index", packer.named(".array", _Column(index.array)), name]))


@packs(pd.DatetimeIndex, pd.TimedeltaIndex)
def _pack_dates(packer: Packer, index: Any) -> Any:
    column = packer.named(".array", _Column(index.array))
    frequency = _frequency(index, index.freq, index.freqstr)
    return Ext(INDEX, encode(["dates", column, packer.named(".name", index.name), frequency]))


@packs(pd.RangeIndex)
def _pack_range(packer: Packer, index: Any) -> Any:
    return Ext(INDEX, encode(["range", index.start, index.stop, index.step, packer.named(".name", index.name)]))


@packs(pd.MultiIndex)
def _pack_levels(packer: Packer, index: Any) -> Any:
    levels = packer.named(".levels", list(index.levels))
    codes = packer.pack([np.asarray(codes) for codes in index.codes])
    return Ext(INDEX, encode(["multi", levels, codes, packer.named(".names", list(index.names))]))


@unpacks(INDEX)
def _unpack_index(unpacker: Unpacker, data: memoryview) -> Any:
    kind, *rest = unpacker.items(data)
    if kind == "range":
        start, stop, step, name = rest
        return pd.RangeIndex(start, stop, step, name=name)
    if kind == "multi":
        levels, codes, names = rest
        return pd.MultiIndex(levels=levels, codes=codes, names=names)  # checked: pandas reads what the codes say
    if kind == "dates":
        values, name, frequency = rest
        cls = pd.DatetimeIndex if type(values) is _arrays.DatetimeArray else pd.TimedeltaIndex
        return cls(values, freq=_offset(frequency, period=False), name=name, copy=False)
    values, name = rest
    if kind != "index" or not hasattr(values, "dtype"):
        raise CorruptError("it has an index that is none")
    return pd.Index(values, dtype=values.dtype, name=name, copy=False)


# --- frames


def _rest(packer: Packer, value: Any) -> list[Any]:
    return [packer.named(".attrs", value.attrs), bool(value.flags.allows_duplicate_labels)]


def _with_rest(value: Any, attrs: Any, duplicates: Any) -> Any:
    if type(attrs) is not dict:
        raise CorruptError("it has attributes that are none")
    if attrs:
        value.attrs = attrs
    if not duplicates:
        value.flags.allows_duplicate_labels = False
    return value


@packs(pd.DataFrame)
def _pack_frame(packer: Packer, frame: Any) -> Any:
    index, columns = packer.named(".index", frame.index), packer.named(".columns", frame.columns)
    blocks = []
    for block in frame._mgr.blocks:
        places = block.mgr_locs.as_array
        try:
            blocks.append([packer.pack(np.asarray(places, "<i8")), packer.pack(_Column(block.values))])
        except NotSafe as refusal:
            refusal.path.append(f"[{frame.columns[places[0]]!r}]")
            raise
    return Ext(FRAME, encode([blocks, index, columns, *_rest(packer, frame)]))


@unpacks(FRAME)
def _unpack_frame(unpacker: Unpacker, data: memoryview) -> Any:
    blocks, index, columns, *rest = unpacker.items(data)
    if not isinstance(index, pd.Index) or not isinstance(columns, pd.Index):
        raise CorruptError("it has a frame without an index")
    found = [(values, np.asarray(places, np.intp)) for places, values in blocks]
    placed = np.concatenate([places for _, places in found]) if found else np.empty(0, np.intp)
    if not np.array_equal(np.sort(placed), np.arange(len(columns))):
        raise CorruptError("it has a frame whose columns do not fit together")
    for values, places in found:
        if values.shape not in ((len(places), len(index)), (len(index),)) or (values.ndim == 1 and len(places) != 1):
            raise CorruptError("it has a frame whose columns are of different length")
    return _with_rest(_frame(found, index, columns), *rest)


def _frame(blocks: list[tuple[Any, Any]], index: Any, columns: Any) -> Any:
    try:
        from pandas.api.internals import create_dataframe_from_blocks
    except ImportError:
        from pandas.core.internals import BlockManager
        from pandas.core.internals.api import make_block

        made = tuple(make_block(values, placement=places) for values, places in blocks)
        manager = BlockManager(made, [columns, index])
        return pd.DataFrame._from_mgr(manager, manager.axes)
    return create_dataframe_from_blocks(blocks, index, columns)


@packs(pd.Series)
def _pack_series(packer: Packer, series: Any) -> Any:
    index, name = packer.named(".index", series.index), packer.named(".name", series.name)
    column = packer.named(".array", _Column(series.array))
    return Ext(SERIES, encode([column, index, name, *_rest(packer, series)]))


@unpacks(SERIES)
def _unpack_series(unpacker: Unpacker, data: memoryview) -> Any:
    values, index, name, *rest = unpacker.items(data)
    if not isinstance(index, pd.Index) or not hasattr(values, "dtype"):
        raise CorruptError("it has a series that is none")
    return _with_rest(pd.Series(values, index=index, dtype=values.dtype, name=name, copy=False), *rest)


# --- single values


@packs(type(pd.NA), type(pd.NaT))
def _pack_missing(packer: Packer, value: Any) -> Any:
    return Ext(MISSING, b"NA" if value is pd.NA else b"NaT")


unpacks(MISSING)(lambda unpacker, data: {b"NA": pd.NA, b"NaT": pd.NaT}[bytes(data)])


@packs(pd.Timestamp, pd.Timedelta)
def _pack_stamp(packer: Packer, value: Any) -> Any:
    dates = type(value) is pd.Timestamp
    zone = pack_zone(value, value.tzinfo) if dates else None
    packed = [dates, value._value, value.unit, zone, value.fold if dates else 0]
    return Ext(STAMP, encode(packed))


@unpacks(STAMP)
def _unpack_stamp(unpacker: Unpacker, data: memoryview) -> Any:
    dates, number, unit, zone, fold = unpacker.items(data)
    if type(number) is not int or unit not in ("s", "ms", "us", "ns"):
        raise CorruptError("it has a moment that is none")
    if not dates:
        return pd.Timedelta(np.timedelta64(number, unit))
    stamp = pd.Timestamp(np.datetime64(number, unit))
    found = unpack_zone(zone)
    stamp = stamp if found is None else stamp.tz_localize("UTC").tz_convert(found)
    return stamp.replace(fold=fold) if stamp.fold != fold else stamp
