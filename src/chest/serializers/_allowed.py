"""Pickles that may only name what is allowed: ``Chest(allow=[...])``.

A pickle is a program that can import any module and call anything in it. What it may call is decided in ``find_class``,
the one place where a name becomes an object; here it finds

- what an entry names exactly (``"package.module.Class"``, ``"package.module.function"``),
- classes that are defined in a module that an entry names (not functions, and nothing that the module has imported),
- a short list of types of the standard library that cannot do anything but hold a value,
- for the entries ``numpy``, ``pandas``, ``pyarrow``, ``polars`` and ``torch`` the classes and functions by which these
  packages rebuild their values, one by one: the packages as a whole have functions that run any code.

Nothing is imported before its name has been found allowed. ``getattr``, which pickles of bound methods and of enums ask
for, is a stand-in that knows a handful of answers.

An allow-list bounds what a pickle can call, not what it can do with that: it may call an allowed class with any arguments,
set attributes of what it has found, and take memory. For folders of somebody who means harm there is ``serializer="safe"``.
"""

from __future__ import annotations

import _compat_pickle
import copyreg
import enum
import functools
import io
import pickle
import re
import sys
import types
from collections.abc import Iterable
from typing import Any

from .. import _pickled
from ..errors import NotAllowedError, short

__all__ = ["AllowedPickles"]

_PythonUnpickler: Any = pickle._Unpickler
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*").fullmatch


def _names(module: str, names: str) -> set[tuple[str, str]]:
    return {(module, name) for name in names.split()}


_STANDARD = {
    *_names("builtins", "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"),
    *_names("builtins", "Ellipsis NotImplemented"),
    *_names("collections", "Counter OrderedDict defaultdict deque"),
    *_names("datetime", "date datetime time timedelta timezone"),
    *_names("zoneinfo", "ZoneInfo"),
    *_names("decimal", "Decimal"),
    *_names("fractions", "Fraction"),
    *_names("uuid", "SafeUUID UUID"),
    *_names("pathlib", "PosixPath PurePosixPath PureWindowsPath WindowsPath"),
    *_names("pathlib._local", "PosixPath PurePosixPath PureWindowsPath WindowsPath"),
    *_names("array", "_array_reconstructor array"),
    *_names("ipaddress", "IPv4Address IPv4Interface IPv4Network IPv6Address IPv6Interface IPv6Network"),
    *_names("types", "SimpleNamespace"),
    # They make an instance of a class that the pickle has had to find first.
    *_names("copyreg", "__newobj__ __newobj_ex__ _reconstructor"),
}

_NUMPY_SCALARS = (
    "bool bool_ byte bytes_ cdouble clongdouble complex128 complex256 complex64 csingle datetime64 double float128 float16 "
    "float32 float64 half int16 int32 int64 int8 intc intp long longdouble longlong object_ short single str_ timedelta64 "
    "ubyte uint uint16 uint32 uint64 uint8 uintc uintp ulong ulonglong ushort void"
)
_PANDAS_CLASSES = (
    "ArrowDtype BooleanDtype Categorical CategoricalDtype CategoricalIndex DataFrame DatetimeIndex DatetimeTZDtype "
    "Float32Dtype Float64Dtype Index Int16Dtype Int32Dtype Int64Dtype Int8Dtype Interval IntervalDtype IntervalIndex "
    "MultiIndex NA Period PeriodDtype PeriodIndex RangeIndex Series SparseDtype StringDtype TimedeltaIndex Timedelta "
    "Timestamp UInt16Dtype UInt32Dtype UInt64Dtype UInt8Dtype"
)
_PANDAS_ARRAYS = (
    "ArrowExtensionArray ArrowStringArray BooleanArray Categorical DatetimeArray FloatingArray IntegerArray IntervalArray "
    "NumpyExtensionArray PeriodArray SparseArray StringArray TimedeltaArray"
)
_OFFSETS = (
    "BQuarterBegin BQuarterEnd BYearBegin BYearEnd BusinessDay BusinessHour BusinessMonthBegin BusinessMonthEnd Day Hour Micro "
    "Milli Minute MonthBegin MonthEnd Nano QuarterBegin QuarterEnd Second SemiMonthBegin SemiMonthEnd Week YearBegin YearEnd"
)
_ARROW = (
    "_reconstruct_record_batch _reconstruct_table _restore_array binary binary_view bool_ chunked_array date32 date64 "
    "decimal128 decimal256 decimal32 decimal64 dictionary duration field fixed_size_binary float16 float32 float64 int16 int32 "
    "int64 int8 large_binary large_list large_string list_ map_ null py_buffer run_end_encoded scalar schema string "
    "string_view struct time32 time64 timestamp type_for_alias uint16 uint32 uint64 uint8"
)
_POLARS_TYPES = (
    "Array Binary Boolean Categorical Categories Date Datetime Decimal Duration Enum Field Float32 Float64 Int128 Int16 Int32 "
    "Int64 Int8 List Null String Struct Time UInt16 UInt32 UInt64 UInt8"
)
_PACKAGES: dict[str, set[tuple[str, str]]] = {
    "numpy": {
        *_names("numpy", f"dtype ndarray matrix recarray record {_NUMPY_SCALARS}"),
        *_names("numpy.rec", "recarray record"),
        *_names("numpy.ma", "MaskedArray"),
        *_names("numpy.ma.core", "MaskedArray _mareconstruct"),
        *(pair for core in ("numpy.core", "numpy._core") for pair in _names(f"{core}.multiarray", "_reconstruct scalar")),
        *_names("numpy.core.numeric", "_frombuffer"),
        *_names("numpy._core.numeric", "_frombuffer"),
    },
    "pandas": {
        *_names("pandas", _PANDAS_CLASSES),
        *_names("pandas.arrays", _PANDAS_ARRAYS),
        *_names("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
        *_names("pandas._libs.internals", "_unpickle_block"),
        *_names("pandas._libs.interval", "Interval __pyx_unpickle_IntervalMixin"),
        *_names("pandas._libs.missing", "NA"),
        *_names("pandas._libs.sparse", "BlockIndex IntIndex"),
        *_names("pandas._libs.tslibs.nattype", "__nat_unpickle _nat_unpickle"),
        *_names("pandas._libs.tslibs.offsets", _OFFSETS),
        *_names("pandas._libs.tslibs.period", "Period"),
        *_names("pandas._libs.tslibs.timedeltas", "Timedelta _timedelta_unpickle"),
        *_names("pandas._libs.tslibs.timestamps", "Timestamp _unpickle_timestamp"),
        *_names("pandas.core.arrays.arrow.array", "ArrowExtensionArray"),
        *_names("pandas.core.arrays.boolean", "BooleanArray BooleanDtype"),
        *_names("pandas.core.arrays.categorical", "Categorical"),
        *_names("pandas.core.arrays.datetimes", "DatetimeArray"),
        *_names("pandas.core.arrays.floating", "Float32Dtype Float64Dtype FloatingArray"),
        *_names("pandas.core.arrays.integer", "Int16Dtype Int32Dtype Int64Dtype Int8Dtype IntegerArray"),
        *_names("pandas.core.arrays.integer", "UInt16Dtype UInt32Dtype UInt64Dtype UInt8Dtype"),
        *_names("pandas.core.arrays.interval", "IntervalArray"),
        *_names("pandas.core.arrays.numpy_", "NumpyExtensionArray"),
        *_names("pandas.core.arrays.period", "PeriodArray"),
        *_names("pandas.core.arrays.sparse.array", "SparseArray"),
        *_names("pandas.core.arrays.string_", "StringArray StringArrayNumpySemantics StringDtype"),
        *_names("pandas.core.arrays.string_arrow", "ArrowStringArray ArrowStringArrayNumpySemantics"),
        *_names("pandas.core.arrays.timedeltas", "TimedeltaArray"),
        *_names(
            "pandas.core.dtypes.dtypes", "ArrowDtype CategoricalDtype DatetimeTZDtype IntervalDtype PeriodDtype SparseDtype"
        ),
        *_names("pandas.core.frame", "DataFrame"),
        *_names("pandas.core.series", "Series"),
        *_names("pandas.core.indexes.base", "Index _new_Index"),
        *_names("pandas.core.indexes.category", "CategoricalIndex"),
        *_names("pandas.core.indexes.datetimes", "DatetimeIndex _new_DatetimeIndex"),
        *_names("pandas.core.indexes.interval", "IntervalIndex _new_IntervalIndex"),
        *_names("pandas.core.indexes.multi", "MultiIndex"),
        *_names("pandas.core.indexes.period", "PeriodIndex _new_PeriodIndex"),
        *_names("pandas.core.indexes.range", "RangeIndex"),
        *_names("pandas.core.indexes.timedeltas", "TimedeltaIndex _new_TimedeltaIndex"),
        *_names("pandas.core.internals.managers", "BlockManager SingleBlockManager"),
        *_names("pytz", "_UTC _p"),  # the time zones of pandas 2
    },
    "pyarrow": _names("pyarrow.lib", _ARROW),
    "polars": {
        *_names("polars.dataframe.frame", "DataFrame"),
        *_names("polars.series.series", "Series"),
        *_names("polars.schema", "Schema"),
        *_names("polars.datatypes.classes", _POLARS_TYPES),
    },
    "torch": _names("torch", "Tensor from_numpy bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"),
}
# A package's values hold those of others.
_NEEDS = {"pandas": ("numpy", "pyarrow"), "polars": ("pyarrow",), "torch": ("numpy",)}

# What `getattr` may be asked for: methods without effects that rebuild a value.
_METHODS = {("numpy", "ndarray", "view"), ("torch", "Tensor", "view"), ("zoneinfo", "ZoneInfo", "_unpickle")}


def _method(owner: Any, name: str) -> Any:
    """What stands in for ``getattr``: members of enums, and ``_METHODS``."""
    if isinstance(owner, enum.EnumMeta) and name in owner.__members__:
        return owner.__members__[name]
    for module, qualname, method in _METHODS:
        if name == method and owner is getattr(sys.modules.get(module), qualname, None):
            return getattr(owner, method)
    raise NotAllowedError(f"its pickle asks for the attribute {short(name)} of {short(owner)}, and allow= cannot allow that")


def _latin1(text: str, encoding: str) -> bytes:
    """What stands in for ``codecs.encode``, by which protocols 0 to 2 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise NotAllowedError(f"its pickle asks for the codec {short(encoding)}, and allow= cannot allow that")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {("builtins", "getattr"): _method, ("_codecs", "encode"): _latin1}


class _Bytes:
    """A file whose ``read`` gives ``bytes``, as the unpickler written in Python needs it."""

    def __init__(self, file: Any) -> None:
        self.readline = file.readline
        self._read = file.read

    def read(self, n: int) -> bytes:
        return bytes(self._read(n))

    def readinto(self, target: Any) -> int:
        data = self._read(len(target))
        target[: len(data)] = data
        return len(data)


class AllowedPickles:
    """Dumps and loads pickles, the latter with what is allowed only.

    Args:
        allow: dotted names of classes and functions, of modules, or of the packages above.

    Raises:
        TypeError, ValueError: an entry is no dotted name.
    """

    def __init__(self, allow: Iterable[str]) -> None:
        if isinstance(allow, str):
            raise TypeError(f"allow is the text {allow!r}: give a list of names")
        entries = list(allow)
        for entry in entries:
            if not isinstance(entry, str):
                raise TypeError(f"allow names {short(entry)}: give names as text, 'package.module.Class' for instance")
            if not _DOTTED(entry):
                raise ValueError(f"allow names {entry!r}: give dotted names, 'package.module.Class' for instance")
        self._entries = frozenset(entries)
        packages = {name for entry in entries if entry in _PACKAGES for name in (entry, *_NEEDS.get(entry, ()))}
        self._known = _STANDARD.union(*(_PACKAGES[name] for name in packages))
        find_class = self._find_class

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str, /) -> Any:
                return find_class(module, name)

        class Slow(_PythonUnpickler):  # type: ignore[misc]
            """Codes of ``copyreg`` whose object is known are not looked up in the fast one: it never asks ``find_class``."""

            def find_class(self, module: str, name: str) -> Any:
                return find_class(module, name)

            def get_extension(self, code: int) -> None:
                key = copyreg._inverted_registry.get(code)  # type: ignore[attr-defined]
                if not key:
                    raise pickle.UnpicklingError(f"the extension code {code} is not registered")
                self.append(find_class(*key))

        self._fast, self._slow = Unpickler, Slow
        self.load_file = functools.partial(_pickled.load, unpickler=self._unpickler)

    def _unpickler(self, file: Any, **options: Any) -> Any:
        if copyreg._extension_registry or copyreg._extension_cache:  # type: ignore[attr-defined]
            return self._slow(_Bytes(file), **options)
        return self._fast(file, **options)

    def load(self, file: Any) -> Any:
        """As ``pickle.load``. Raises NotAllowedError."""
        return self._unpickler(file).load()

    def loads(self, data: Any) -> Any:
        """As ``pickle.loads``. Raises NotAllowedError."""
        return self._unpickler(io.BytesIO(data)).load()

    def _find_class(self, module: str, name: str) -> Any:
        # Protocols 0 to 2 use the names of Python 2; who means the old ones gets the new ones too.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        stand_in = _STAND_INS.get((module, name))
        if stand_in is not None:
            return stand_in
        if (module, name) in self._known:
            return self._found(module, name)
        full = f"{module}.{name}"
        if full in self._entries:
            found = self._found(module, name)
            if isinstance(found, type) or (callable(found) and not isinstance(found, types.ModuleType)):
                return found
        elif module in self._entries and module not in _PACKAGES:
            found = self._found(module, name)
            if isinstance(found, type) and (found.__module__, found.__qualname__) == (module, name):
                return found
        package = module.partition(".")[0]
        advice = (
            f"If you trust it, add {full!r} to allow="
            if package not in _PACKAGES or package in self._entries
            else f"Add {package!r} to allow= if it belongs to a value of that package, or {full!r} if you trust it"
        )
        raise NotAllowedError(f"its pickle asks for {full}, which is not allowed. {advice}")

    @staticmethod
    def _found(module: str, name: str) -> Any:
        """The object of this name. On the way there lie classes only: modules have imported more than they are."""
        __import__(module)
        found: Any = sys.modules[module]
        *outer, last = name.split(".")
        for part in outer:
            found = getattr(found, part)
            if not isinstance(found, type) or found.__module__ != module:
                raise NotAllowedError(
                    f"its pickle asks for {module}.{name}, which is not defined there: allow= cannot allow that"
                )
        return getattr(found, last)
