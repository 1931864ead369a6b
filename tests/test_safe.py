"""The safe serializer: types come back as they went in or are refused, and nothing that is stored is ever run."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import io
import mmap
import struct
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chest import Chest, CorruptError, KeyTypeError, LoadError, SerializeError, SerializerMismatchError, safe

pytest.importorskip("msgspec")
np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")

from chest import _valuefile  # noqa: E402
from chest.serializers import _safe, _safe_write  # noqa: E402

BIG = 20_000  # items of 8 bytes: beyond what stays in the stream


class Colour(enum.Enum):
    RED = 1
    ROSE = 1  # noqa: PIE796 - an alias
    BLUE = "b"


class Access(enum.IntFlag):
    R = 4
    W = 2


class Small(enum.IntEnum):
    ONE = 1


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Thing:
    name: str
    parts: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        made.append(self)


@dataclasses.dataclass(frozen=True, order=True)
class Slotted:
    __slots__ = ("x",)
    x: int


made: list[Any] = []
for _cls in (Colour, Access, Small, Pair, Thing, Slotted):
    safe.register(_cls)


def there_and_back(value: Any) -> Any:
    """Through bytes, and through a mapped file; both must give the same."""
    file = io.BytesIO()
    layout = _safe.dump(value, file, b"a note")
    stream, buffers = _safe.probe(value)
    assert stream == layout.stream
    assert [(len(buffer), read_only) for buffer, read_only in buffers] == [p[1:3] for p in layout.payloads]
    assert all(p.offset % 64 == 0 for p in layout.payloads)
    view = mmap.mmap(-1, layout.size)
    view[:] = file.getvalue()
    loaded, again = _safe.load_file(view, verify=True, digest=layout.digest)
    assert again == layout
    assert layout.note == b"a note"
    assert _safe.probe(loaded)[0] == layout.stream, "an unchanged value would look changed"
    same(loaded, value)
    same(safe.loads(safe.dumps(value)), value)
    file.seek(0)
    same(safe.load(file), value)
    return loaded


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        same(list(found), list(expected))
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (set, frozenset)):
        assert found == expected
        same(sorted(found, key=repr), sorted(expected, key=repr))
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.dtype.isalignedstruct == expected.dtype.isalignedstruct
        assert found.flags.writeable == expected.flags.writeable
        if expected.flags.forc:
            assert found.flags.f_contiguous == expected.flags.f_contiguous
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        assert (found.attrs, found.flags) == (expected.attrs, expected.flags)
        assert type(found.index) is type(expected.index)
    elif isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(found, expected, check_exact=True)
        assert type(found.array) is type(expected.array)
    elif isinstance(expected, pd.Index):
        pd.testing.assert_index_equal(found, expected, exact=True)
        assert getattr(found, "freq", None) == getattr(expected, "freq", None)
    elif isinstance(expected, (pa.Table, pa.RecordBatch)):
        assert found.equals(expected, check_metadata=True)
    elif isinstance(expected, (pa.Array, pa.ChunkedArray)):
        assert found.type == expected.type
        assert found.equals(expected)
    elif isinstance(expected, (dt.datetime, dt.time)):
        assert (found, found.fold, repr(found.tzinfo)) == (expected, expected.fold, repr(expected.tzinfo))
    else:
        assert repr(found) == repr(expected)  # also nan, -0.0 and Decimal("1.10")


keys = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters(exclude_categories=[]), max_size=5)
        | st.binary(max_size=5)
        | st.tuples(keys, keys)
        | st.frozensets(st.integers() | st.text(max_size=3), max_size=3)
        | st.decimals(allow_nan=False)
    )
)
values = st.recursive(
    keys
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=9).map(bytearray)
    | st.datetimes(timezones=st.none() | st.sampled_from([dt.timezone.utc, ZoneInfo("UTC")]))
    | st.timedeltas()
    | st.fractions()
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.lists(st.tuples(st.integers(), st.text(max_size=3)), max_size=4)
    ),
    max_leaves=30,
)


@given(values)
def test_every_value_of_the_safe_types_comes_back_with_all_types_it_had(value: Any) -> None:
    there_and_back(value)


SINGLE = [
    *(2**63, 2**64, -(2**63) - 1, 10**400, float("nan"), float("-inf"), -0.0, complex(-0.0, float("nan"))),
    *("\ud800", {"\udfff": "\ud800"}, [2**70, "\ud800", {2**70: 1}], bytearray(100_000), "x" * 100_000),
    *(decimal.Decimal("sNaN12"), decimal.Decimal("-0E+5"), Fraction(-1, 3), uuid.UUID(int=1, is_safe=uuid.SafeUUID.safe)),
    *(range(3, 9, 2), slice(1, None), ..., PurePosixPath("a/b"), PureWindowsPath("C:/x"), Path("\udcff")),
    *(dt.date(1, 1, 1), dt.time(1, 2, 3, 4, fold=1), dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=-3), "X"))),
    dt.datetime(2020, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=1, microseconds=2))),
    *(Colour.BLUE, Small.ONE, Access.R | Access.W, Access(0), Pair(1, [2]), Slotted(3), {Colour.RED: {Slotted(1)}}),
    *([(1, "a"), (2, "b")], [(1, "a"), [2]], [(1, (2,))], [()], ((),), {(): frozenset([frozenset()])}),
    *(set(range(20)), frozenset(range(70_000)), {"\ud800", 2**70}, (2**70,), ("\ud800", 1)),
    *([[]], {"a": {}}, [True, 1, 1.0], {1: 1, "1": "1", None: b"", 2.5: ()}),
]


def _name(value: Any) -> str:
    """The same in every process, whatever the order of a set."""
    return repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)[:30]


@pytest.mark.parametrize("value", SINGLE, ids=_name)
def test_what_is_special_comes_back(value: Any) -> None:
    there_and_back(value)
    there_and_back({"in": [{"a": (value,)}]})


def test_a_dataclass_is_made_as_unpickling_makes_it() -> None:
    made.clear()
    thing = Thing("x", [1, (2,)])
    assert safe.loads(safe.dumps(thing)) == thing
    assert len(made) == 1, "__post_init__ ran again"
    del thing.parts
    assert not hasattr(safe.loads(safe.dumps(thing)), "parts")


class Plain:
    pass


class Text(str):
    pass


class Rows(list):  # type: ignore[type-arg]
    pass


class Other(enum.Enum):
    A = 1


def dict_of_an_instance() -> Any:
    value = Plain()
    value.__dict__["t"] = (1, 2)  # where the values are held in the instance, the collector does not see them
    return [vars(value), {1: 2}]


def extra() -> Any:
    thing = Thing("x")
    thing.more = 1  # type: ignore[attr-defined]
    return thing


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "object": (lambda: [1, {"a": Plain()}], r"value\[1\]\['a'\] is of type .*Plain.*register.*pickle"),
    "text": (lambda: {"k": [Text("a")]}, r"value\['k'\]\[0\] is of type .*Text"),
    "key": (lambda: {Text("a"): 1}, r"value's key 'a' is of type .*Text"),
    "list": (lambda: Rows([1]), "Rows"),
    "bool": (lambda: [[], {"x": Rows()}], r"value\[1\]\['x'\] .*Rows"),
    "named tuple": (lambda: [NamedTuple("N", [("a", int)])(1)], r"value\[0\] is of type .*N"),
    "enum": (lambda: {Other.A: 1}, "Other"),
    "ordered": (lambda: OrderedDict(a=1), "OrderedDict"),
    "defaultdict": (lambda: defaultdict(list), "defaultdict"),
    "counter": (lambda: [Counter()], "Counter"),
    "field": (lambda: Thing("x", [Plain()]), r"value.parts\[0\] is of type .*Plain"),
    "set": (lambda: {("a", Other.A)}, r"value\{...\}\[1\] is of type .*Other"),
    "extra": (extra, "attributes that are no fields .more."),
    "subclass": (lambda: type("Sub", (Thing,), {})("x"), "Sub"),
    "memoryview": (lambda: memoryview(b"a"), "memoryview"),
    "function": (lambda: [len], "builtin_function"),
    "class": (lambda: int, "is of type type"),
    "zone": (lambda: dt.datetime(2020, 1, 1, tzinfo=type("Z", (dt.tzinfo,), {})()), "time zone"),
    "fraction": (lambda: Fraction(1, 1 << 70_000), "65536 bits"),
    "objects": (lambda: {"k": np.array([1, None], object)}, r"value\['k'\] is of type numpy.ndarray, with objects"),
    "record": (lambda: np.zeros(2, [("a", "O")]), "with objects"),
    "masked": (lambda: np.ma.array([1]), "MaskedArray"),
    "recarray": (lambda: np.rec.array([(1, 2.0)]), "recarray"),
    "metadata": (lambda: np.zeros(2, np.dtype("f8", metadata={"a": 1})), "metadata"),
    "sparse": (lambda: pd.Series(pd.arrays.SparseArray([0, 1])), r"value.array is of type .*Sparse"),
    "column": (lambda: pd.DataFrame({"a": [1], "b": [Plain()]}), r"value\['b'\].*Plain"),
    "frame": (lambda: type("F", (pd.DataFrame,), {})({"a": [1]}), "F"),
    "freq": (lambda: pd.date_range("2020", periods=3, freq=pd.offsets.CustomBusinessDay(holidays=["2020-01-02"])), "freq"),
    "period": (lambda: pd.Period("2020"), "Period"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_come_back_as_it_was_is_refused_with_its_type_and_place(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=f"(?s){message}"):
        safe.dumps(make())
    with pytest.raises(TypeError):
        safe.dump(make(), io.BytesIO())


def test_the_attributes_of_an_instance_are_looked_at() -> None:
    there_and_back(dict_of_an_instance())


def test_what_contains_itself_is_refused_and_depth_has_a_limit() -> None:
    loop: list[Any] = []
    loop += [{"a": (loop,)}, loop]
    with pytest.raises(TypeError, match="contains itself"):
        safe.dumps(loop)
    deep: Any = 1
    for _ in range(_safe_write.MAX_DEPTH):
        deep = [deep]
    there_and_back(deep)
    with pytest.raises(TypeError, match="100 deep"):
        safe.dumps([deep])
    deep = ()
    for _ in range(_safe_write.MAX_DEPTH - 1):
        deep = (deep,)
    there_and_back(deep)


def test_sharing_is_not_kept_and_equal_sets_are_written_alike() -> None:
    part = [1]
    found = safe.loads(safe.dumps([part, part]))
    assert found == [[1], [1]]
    assert found[0] is not found[1]
    assert safe.dumps({8, 0, 16}) == safe.dumps({16, 8, 0})


def test_registering() -> None:
    with pytest.raises(TypeError, match="pack= and unpack="):
        safe.register(Plain)
    with pytest.raises(TypeError, match="takes a class"):
        safe.register(Plain())  # type: ignore[type-var]
    with pytest.raises(ValueError, match="already"):
        safe.register(Other, f"{__name__}.Thing")
    with pytest.raises(ValueError, match="already"):
        safe.register(Thing, "another")
    assert safe.register(Thing) is Thing

    class Celsius:
        def __init__(self, degrees: float) -> None:
            self.degrees = degrees

    safe.register(Celsius, "celsius", pack=lambda c: c.degrees, unpack=Celsius)
    data = safe.dumps([Celsius(20.5)])
    assert safe.loads(data)[0].degrees == 20.5
    with pytest.raises(LoadError, match=r"(?s)kelvin.*register"):
        safe.loads(data.replace(b"celsius", b"\xa6kelvin"[1:] + b"s"))
    with pytest.raises(LoadError, match="cannot be made"):
        safe.loads(safe.dumps(Colour.RED).replace(b"RED", b"RAD"))


# --- arrays

STRUCT = np.dtype([("a", "i1"), ("b", "f8"), ("c", "M8[us]"), ("d", "i2", (2, 3))], align=True)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[], Any]] = {
    "plain": lambda: np.arange(BIG, dtype="f8"),
    "small": lambda: np.arange(5, dtype=">i4"),
    "read-only": lambda: read_only(np.arange(BIG)),
    "strided": lambda: np.arange(3 * BIG)[::3],
    "strided read-only": lambda: read_only(np.arange(3 * BIG))[::3],
    "fortran": lambda: np.arange(BIG, dtype="f4").reshape(100, -1, order="F"),
    "small fortran": lambda: np.arange(6).reshape(2, 3, order="F"),
    "dates": lambda: np.arange(BIG).astype("M8[ns]"),
    "differences": lambda: np.arange(BIG).astype("m8[25s]"),
    "records": lambda: np.ones(BIG, STRUCT),
    "few records": lambda: np.ones(2, STRUCT),
    "a field": lambda: np.ones(BIG, STRUCT)["b"],
    "titles": lambda: np.ones(2, np.dtype({"names": ["a"], "formats": ["i4"], "titles": ["T"]})),
    "gaps": lambda: np.ones(2, np.dtype({"names": ["x"], "formats": ["i4"], "offsets": [4], "itemsize": 12})),
    "one": lambda: np.array(5.0),
    "none": lambda: np.zeros((0, 5)),
    "text": lambda: np.array(["a", "bcd\ud800"]),
    "bytes": lambda: np.array([b"a\0b"]),
    "long long": lambda: np.arange(3, dtype="q"),
    "long double": lambda: np.arange(3, dtype=np.longdouble) / 3,
    "bool": lambda: np.array([True, False]),
    "void": lambda: np.zeros(3, "V7"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_with_dtype_order_and_flags(name: str) -> None:
    array = ARRAYS[name]()
    loaded = there_and_back(array)
    there_and_back({"x": [array, ("y", array)]})
    if array.nbytes >= 1 << 16 and array.flags.writeable:
        loaded[...] = loaded[-1]  # in the mapping, not in the file


SCALARS = [
    *(np.float64(1.5), np.int8(-3), np.bool_(True), np.longlong(3), np.longdouble(1) / 3, np.complex64(1j), np.float16(2)),
    *(
        np.datetime64("2020", "D"),
        np.datetime64("NaT", "s"),
        np.timedelta64(3, "h"),
        np.str_("é"),
        np.str_(""),
        np.bytes_(b"x"),
    ),
    np.ones(1, STRUCT)[0],
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: type(scalar).__name__)
def test_a_scalar_of_numpy_keeps_its_type(scalar: Any) -> None:
    found = safe.loads(safe.dumps([scalar]))[0]
    assert type(found) is type(scalar)
    assert (found.dtype, found.tobytes()) == (scalar.dtype, scalar.tobytes())


def test_what_lies_between_the_fields_of_records_is_not_made_up() -> None:
    gaps = np.frombuffer(bytearray(range(48)), np.dtype({"names": ["x"], "formats": ["i4"], "offsets": [4], "itemsize": 12}))
    assert safe.loads(safe.dumps(gaps)).view("V12").tobytes() == bytes(range(48))
    assert safe.loads(safe.dumps(gaps[::2])).view("V12").tobytes() == bytes(range(12)) + bytes(range(24, 36))


# --- pandas and Arrow

T = pd.date_range("2020", periods=3)
FRAMES: dict[str, Callable[[], Any]] = {
    "plain": lambda: pd.DataFrame({"a": np.zeros(BIG), "b": np.ones(BIG), "s": [f"t{i}" for i in range(BIG)]}),
    "empty": pd.DataFrame,
    "no columns": lambda: pd.DataFrame(index=[1, 2]),
    "no rows": lambda: pd.DataFrame(columns=["a"]),
    "matrix": lambda: pd.DataFrame(np.zeros((200, 100))),
    "twice": lambda: pd.DataFrame(np.zeros((3, 2)), columns=["a", "a"]),
    "levels": lambda: pd.DataFrame({("a", 1): [1], ("b", 2): [2.0]}).rename_axis(columns=["x", None]),
    "attrs": lambda: with_attrs(pd.DataFrame({"a": [1]})),
    "all": lambda: pd.DataFrame(
        {
            "dates": T,
            "zone": T.tz_localize("Europe/Berlin"),
            "utc": T.tz_localize("UTC"),
            "deltas": T - T[0],
            "category": pd.Categorical(["a", "b", "a"], ordered=True),
            "Int64": pd.array([1, None, 3], dtype="Int64"),
            "UInt8": pd.array([1, None, 3], dtype="UInt8"),
            "boolean": pd.array([True, None, False], dtype="boolean"),
            "Float32": pd.array([1, None, 3], dtype="Float32"),
            "period": pd.period_range("2020", periods=3, freq="M"),
            "interval": pd.interval_range(0, 3),
            "string": pd.array(["a", None, "b"], dtype="string"),
            "python": pd.array(["a", None, "b"], dtype="string[python]"),
            "arrow text": pd.array(["a", None, "b"], dtype="string[pyarrow]"),
            "arrow": pd.array([1, None, 2], dtype=pd.ArrowDtype(pa.int64())),
            "bool": [True, False, True],
            "objects": [1, "a", None],
            "lists": [[1], [2, (3,)], []],
            "missing": [pd.NA, pd.NaT, float("nan")],
        },
        index=T,
    ),
    "series": lambda: pd.Series(np.zeros(BIG), index=pd.Index(np.arange(BIG) * 2.0, name="x"), name=("a", 1)),
    "text": lambda: pd.Series(["a", None]),
    "zone": lambda: pd.Series(T.tz_localize("Asia/Tokyo")),
    "series of categories": lambda: pd.Series(["a", "b"], dtype="category"),
    "lists": lambda: pd.Series([[1], None]),
    "range": lambda: pd.RangeIndex(3, 9, 2, name="r"),
    "index": lambda: pd.Index(["a", "b"], name="q"),
    "small integers": lambda: pd.Index([1, 2], dtype="i2"),
    "days": lambda: T,
    "hours": lambda: pd.date_range("2020", periods=3, freq="2h", tz="UTC"),
    "business": lambda: pd.date_range("2020", periods=3, freq="B"),
    "no frequency": lambda: pd.DatetimeIndex(["2020", "2022"]),
    "differences": lambda: T - T[0],
    "periods": lambda: pd.period_range("2020", periods=3, freq="Q"),
    "intervals": lambda: pd.interval_range(0, 3, closed="both"),
    "categories": lambda: pd.CategoricalIndex(["a", "b"]),
    "multi": lambda: pd.MultiIndex.from_tuples([(1, "a"), (2, "b")], names=["x", None]),
    "missing integers": lambda: pd.Index([1, None], dtype="Int64"),
    "tuples": lambda: pd.Index([(1, 2), (3,)], tupleize_cols=False),
    "moment": lambda: pd.Timestamp("2020-07-01", tz=ZoneInfo("Europe/Berlin")),
    "difference": lambda: pd.Timedelta("1s"),
}


def with_attrs(frame: Any) -> Any:
    frame.attrs = {"k": [1, (2,)]}
    return frame.set_flags(allows_duplicate_labels=False)


@pytest.mark.parametrize("name", FRAMES)
def test_what_pandas_holds_comes_back_exactly(name: str) -> None:
    there_and_back(FRAMES[name]())
    there_and_back({"in": (FRAMES[name](),)})


def table() -> Any:
    return pa.table(
        {
            "a": [1, 2],
            "s": ["x", None],
            "l": [[1], [2]],
            "d": pa.array(["a", "b"]).dictionary_encode(),
            "t": pa.array([dt.datetime(2020, 1, 1)] * 2),
            "st": [{"q": 1}, {"q": 2}],
        }
    )


ARROW: dict[str, Callable[[], Any]] = {
    "table": table,
    "chunks": lambda: pa.concat_tables([table(), table()]),
    "slice": lambda: table().slice(1),
    "no rows": lambda: table().slice(0, 0),
    "metadata": lambda: table().replace_schema_metadata({"a": "b"}),
    "large": lambda: pa.table({"a": np.arange(BIG), "s": [f"x{i}" for i in range(BIG)]}),
    "batch": lambda: table().to_batches()[0],
    "empty batch": lambda: pa.RecordBatch.from_arrays([pa.array([], pa.int8())], ["x"]),
    "array": lambda: pa.array([1, None]),
    "empty array": lambda: pa.array([], pa.string()),
    "nothing": lambda: pa.nulls(3),
    "records": lambda: pa.array([{"a": 1}]),
    "chunked": lambda: pa.chunked_array([[1], [2, 3]]),
    "no chunks": lambda: pa.chunked_array([], pa.int8()),
}


@pytest.mark.parametrize("name", ARROW)
def test_what_arrow_holds_comes_back_exactly(name: str) -> None:
    there_and_back(ARROW[name]())


def test_arrays_and_tables_are_mapped_and_not_copied(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer="safe") as c:
        c["a"], c["f"] = np.zeros(10**6), pd.DataFrame(np.zeros((10**5, 5)))
        c["t"] = pa.table({"a": np.zeros(10**6)})
    with Chest(path=tmp_path / "c") as c:
        c["a"][5] = 7
        c["f"].loc[7, 2] = 3.0
        before = pa.total_allocated_bytes()
        assert c["t"]["a"][5].as_py() == 0
        assert pa.total_allocated_bytes() - before < 100_000
        assert not c["a"].flags.owndata
    with Chest(path=tmp_path / "c") as c:
        assert (c["a"][5], c["f"][2][7]) == (7, 3.0)


# --- in a chest


def test_keys_come_back_as_they_were_and_others_are_refused_when_they_are_set(tmp_path: Path) -> None:
    kept = [
        *(
            "word",
            True,
            2.0,
            2.5,
            (1, (True, None)),
            frozenset({1.0}),
            b"b",
            decimal.Decimal("1.50"),
            "k" * 900,
            ("y" * 900, 1),
        ),
        *(dt.datetime(2020, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")), uuid.UUID(int=1, is_safe=uuid.SafeUUID.safe)),
        *(Path("a/b"), Colour.RED, Slotted(2), np.int16(9), pd.Timestamp("2020-01-01 00:00:00.000000001")),
    ]
    with Chest(path=tmp_path / "c", serializer="safe", available_memory=0) as c:
        for number, key in enumerate(kept):
            c[key] = number
        for key in (Plain(), Other.A, (1, Other.A), Text("a"), OrderedDict, lambda: 1):
            with pytest.raises(KeyTypeError, match="safe"):
                c[key] = 1
        assert len(c) == len(kept)
    with Chest(path=tmp_path / "c") as c:
        same(list(c), kept)
        assert [c[key] for key in kept] == list(range(len(kept)))


def test_a_value_that_is_refused_stays_in_memory_and_the_error_says_where_it_is(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", serializer="safe") as c:
        c["x"], c["bad"] = 1, {"rows": [1, Plain()]}
        with pytest.raises(SerializeError, match=r"(?s)'bad'.*value\['rows'\]\[1\] is of type .*Plain.*register.*pickle"):
            c.sync()
        assert type(c["bad"]["rows"][1]) is Plain
        with Chest(path=tmp_path / "c") as other:
            assert dict(other) == {"x": 1}
        del c["bad"]


def test_neither_a_chest_of_another_serializer_nor_an_old_folder_opens_as_safe(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c") as c:
        c["x"] = 1
    with pytest.raises(SerializerMismatchError):
        Chest(path=tmp_path / "c", serializer="safe")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".keys").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SerializerMismatchError, match=r"0\.2"):
        Chest(path=tmp_path / "old", serializer="safe")


NO_PICKLE = """
import pickle, _pickle, sys
import numpy as np, pandas as pd, pyarrow as pa, datetime, decimal
from chest import Chest, safe

def refuse(*args, **kwargs):
    raise AssertionError("pickle was asked to load")

class Refuse:
    def __init__(self, *args, **kwargs):
        refuse()

for module in (pickle, _pickle):
    module.loads = module.load = refuse
    module.Unpickler = Refuse
pickle._loads = pickle._load = refuse
pickle._Unpickler = Refuse

values = {
    "x": [1, (2, 3)], True: {1}, 1.5: "a", ("k", 2.0): {(1,): 2}, "k" * 600: None,
    decimal.Decimal("2.50"): datetime.datetime.now(datetime.timezone.utc), frozenset({1.0}): b"",
    "a": np.zeros(10**5), "f": pd.DataFrame({"a": np.zeros(10**5), "s": ["x"] * 10**5}), "t": pa.table({"a": [1]}),
    pd.Timestamp("2020-01-01 00:00:00.000000001"): 1,
}
for memory in (0, 10**9):
    with Chest(path=sys.argv[1], serializer="safe", available_memory=memory) as c:
        c.update(values)
        c["x"].append(4)
        c.flush()
        c["a"][0] = 1
        with c.transaction():
            c["y"] = [1]
    with Chest(path=sys.argv[1], available_memory=memory) as c:
        assert [type(k) for k in c] == [type(k) for k in [*values, "y"]], list(c)
        assert len(list(c.items())) == len(values) + 1
        assert c["x"][:2] == [1, (2, 3)] and c["a"][0] == 1
        c["x"].append(5)
        del c["y"]
        with open(c.key_to_filename("f"), "rb") as file:
            assert len(c.load(file)) == 10**5
        c["x"] = [1, (2, 3)]
    values["x"] = [1, (2, 3)]
print("done")
"""


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_PICKLE, str(tmp_path / "c")], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


def test_a_file_can_be_read_without_chest(tmp_path: Path) -> None:
    import msgspec

    with Chest(path=tmp_path / "c", serializer="safe") as c:
        c["x"] = {"big": np.arange(BIG), "n": [1, "a"]}
        c.sync()
        data = Path(c.key_to_filename("x")).read_bytes()
    # As docs/explanation/safe.md has it.
    *_, end, n, _, _, magic = struct.unpack("<QQQQQ8s", data[-48:])
    assert magic == b"CHESTv1\n"
    payloads = [struct.unpack_from("<QQQBB6x", data, end + 32 * i) for i in range(n)]

    def extension(code: int, inside: memoryview) -> Any:
        assert code == 32
        dtype, shape, fortran, _, place = msgspec.msgpack.decode(inside)
        offset, length, *_ = payloads[place]
        return np.frombuffer(data[offset : offset + length], dtype).reshape(shape, order="F" if fortran else "C")

    stream = data[8 : payloads[0][0] - payloads[0][3]]
    value = msgspec.msgpack.decode(stream, ext_hook=extension)
    assert value["n"] == [1, "a"]
    assert (value["big"] == np.arange(BIG)).all()


# --- hostile bytes


def hostile(code: int, *parts: Any) -> bytes:
    return _safe_write.encode(_safe_write.Ext(code, _safe_write.encode(list(parts))))


def categorical(codes: Any) -> bytes:
    column = ["categorical", np.asarray(codes), pd.Index(["a"]), False]
    packer = _safe_write.Packer(None)
    return hostile(51, column[0], *map(packer.pack, column[1:]))


def compressed() -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    big = pa.table({"a": np.zeros(BIG)})
    with pa.ipc.new_stream(sink, big.schema, options=options) as writer:
        writer.write_table(big)
    return hostile(40, "table", sink.getvalue().to_pybytes())


def overrun() -> bytes:
    """Text whose offsets lead beyond its end."""
    data = bytearray(safe.dumps(pa.array(["abc", "def"])))
    at = data.index(struct.pack("<III", 0, 3, 6))
    data[at : at + 12] = struct.pack("<III", 0, 3, 1 << 30)
    return bytes(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "an array of four thousand million": lambda: b"\xdd\xff\xff\xff\xff",
    "such arrays in each other": lambda: b"\xdd\xff\xff\xff\xff" * 100_000,
    "a map of as many": lambda: b"\xdf\xff\xff\xff\xff",
    "bytes of as many": lambda: b"\xc6\xff\xff\xff\xff",
    "depth": lambda: b"\x91" * 1_000_000,
    "depth of extensions": lambda: nested_extensions(5_000),
    "a key that is no key": lambda: b"\x81\x81\x01\x02\x03",
    "an unknown extension": lambda: hostile(99),
    "an odd dict": lambda: hostile(_safe_write.DICT, 1, 2, 3),
    "a dict with lists for keys": lambda: hostile(_safe_write.DICT, [1], 2),
    "a set of lists": lambda: hostile(_safe_write.SET, [1]),
    "rows of nothing": lambda: hostile(_safe_write.ROWS, 1),
    "a zone outside of the folder": lambda: hostile(11, 2020, 1, 1, 0, 0, 0, 0, 0, "../../etc/passwd"),
    "a fraction that takes for ever": lambda: _safe_write.encode(_safe_write.Ext(16, b"\x92" + b"\xc4\xff" * 40_000)),
    "a pickled dtype": lambda: hostile(32, "O", [1], False, False, b"x" * 8),
    "a dtype of objects": lambda: hostile(32, "|O", [1], False, False, b"x" * 8),
    "an array of another size": lambda: hostile(32, "<f8", [1 << 40], False, False, b"x" * 8),
    "an array of a negative size": lambda: hostile(32, "<f8", [-1, -1], False, False, b"x" * 8),
    "a buffer that is not there": lambda: hostile(32, "<f8", [1], False, False, 5),
    "records of objects": lambda: hostile(
        32,
        {"names": ["a"], "formats": ["|O"], "offsets": [0], "titles": [None], "itemsize": 8, "aligned": False},
        *([1], False, False, b"x" * 8),
    ),
    "categories out of range": lambda: categorical([0, 7]),
    "categories far out of range": lambda: categorical(np.array([1 << 40])),
    "compressed Arrow": compressed,
    "text beyond its end": overrun,
    "no Arrow": lambda: hostile(40, "table", b"ARROW1" * 20),
    "a frame of other places": lambda: hostile(48, [[[0], [1]]], 1, 2, {}, True),
    "a frequency": lambda: hostile(50, "dates", None, None, "__import__"),
}


def nested_extensions(n: int) -> bytes:
    data = b"\x90"
    for _ in range(n):
        data = b"\x91\xc9" + len(data).to_bytes(4, "big") + bytes([_safe_write.TUPLE]) + data
    return data


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_a_documented_error(name: str) -> None:
    data = HOSTILE[name]()
    with pytest.raises((CorruptError, LoadError)):
        safe.loads(data)
    file = io.BytesIO()
    sink = _valuefile.Sink(file)
    sink.add(b"\xa7chest-1" + data)
    sink.close(b"")
    with pytest.raises((CorruptError, LoadError)):
        _safe.load_file(file.getvalue())


def test_files_that_are_not_safes_are_refused() -> None:
    import pickle

    from chest import _pickled

    file = io.BytesIO()
    _pickled.dump([np.zeros(BIG)], file)
    for data in (pickle.dumps([1]), file.getvalue()):
        with pytest.raises(CorruptError):
            _safe.load_file(data)
    file = io.BytesIO()
    safe.dump([np.zeros(BIG)], file)
    with pytest.raises(CorruptError, match="footer"):
        _safe.load_file(file.getvalue()[:-1])


def test_without_msgspec_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['msgspec'] = None\n"
        "from chest import Chest, MissingExtraError, safe\n"
        "import enum; safe.register(enum.Enum('E', 'A'))\n"
        "for do in (lambda: Chest(serializer='safe'), lambda: safe.dumps(1)):\n"
        "    try: do()\n"
        "    except MissingExtraError as error: print(error)\n"
        "with Chest() as c: c['x'] = 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("chest[safe]") == 2, done.stderr


def test_threads_that_meet_a_package_for_the_first_time_wait_for_each_other() -> None:
    code = (
        "import numpy as np, pandas as pd, threading, sys\n"
        "from chest import safe\n"
        "safe.dumps(1); sys.setswitchinterval(1e-6); failed = []\n"
        "def work(value):\n"
        "    try: safe.loads(safe.dumps(value))\n"
        "    except BaseException as error: failed.append(repr(error))\n"
        "values = [np.zeros(3), pd.Series([1]), np.float64(1), pd.NaT] * 10\n"
        "threads = [threading.Thread(target=work, args=(value,)) for value in values]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(failed or 'done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stdout + done.stderr
