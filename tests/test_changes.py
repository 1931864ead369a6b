"""In-place changes: what cannot change, which pages were written, and who still holds a value."""

from __future__ import annotations

import array
import collections
import copy
import copyreg
import ctypes
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import gc
import io
import ipaddress
import itertools
import logging
import mmap
import os
import pathlib
import pickle
import platform
import random
import re
import sys
import threading
import types
import typing
import uuid
import warnings
import weakref
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from chest import _changes, _pagemap
from chest._changes import Held, held, is_immutable
from chest._pagemap import address_of, same_payload, written_pages

np = pytest.importorskip("numpy")

counts_references = pytest.mark.skipif(not _changes.REFCOUNTS, reason="references are not counted here")


class Slot:
    """Stands for the entry of a chest: the one place that refers to the value."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def ask(entry: Slot) -> Held:
    """Apart from the ``assert``: pytest keeps what it looks at in one in variables of its own."""
    return held(entry.value)


def ask_knowing_of_one(entry: Slot) -> Held:
    by_position, by_name = held(entry.value, 1), held(entry.value, extra=1)
    assert by_position is by_name
    return by_position


class Color(enum.Enum):
    RED = 1
    LISTED = [1]  # noqa: RUF012 - an enum member with a value that can change


class WithDict:
    shared_by_class = [1, 2]  # noqa: RUF012 - what the class holds is no part of an instance

    def __init__(self, *members: Any) -> None:
        self.members = list(members)
        self.name = "x"


class WithSlots:
    __slots__ = ("members", "name", "unset")

    def __init__(self, *members: Any) -> None:
        self.members = list(members)
        self.name = "x"


class WithBoth(WithSlots):
    def __init__(self, *members: Any) -> None:
        super().__init__(*members)
        self.extra = {"a": []}


@dataclasses.dataclass(slots=True)
class SlottedData:
    x: list[int]
    y: int = 0


@dataclasses.dataclass(frozen=True)
class FrozenData:
    x: tuple[int, ...]


class Pair(NamedTuple):
    left: Any
    right: Any


class ListWithAttributes(list[Any]):
    pass


class Node:
    def __init__(self, parent: Node | None = None) -> None:
        self.parent = parent
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)


class Interned:
    """One instance for each name, as time zones and symbols are; shares a table with the rest of the program."""

    made: dict[str, Interned] = {}  # noqa: RUF012

    def __new__(cls, name: str) -> Interned:
        if name not in cls.made:
            cls.made[name] = super().__new__(cls)
            cls.made[name].table = cls.made
        return cls.made[name]

    table: Any

    def __reduce__(self) -> Any:
        return Interned, (next(name for name, made in self.made.items() if made is self),)


class Sentinel:
    __slots__ = ()

    def __reduce__(self) -> str:
        return "SENTINEL"


class DictSentinel:
    def __reduce__(self) -> str:
        return "DICT_SENTINEL"


class Marker:
    __slots__ = ()


class Registered:
    """Found again by a function that is registered with copyreg."""


class TupleWithAttributes(tuple[Any, ...]):
    pass


class ListedSlots:
    __slots__ = ["members"]

    def __init__(self, *members: Any) -> None:
        self.members = list(members)


class Tagged(np.ndarray):
    """An array with attributes."""


def tagged() -> Tagged:
    a = Tagged((3,))
    a.tags = [1]
    return a


class Zone(datetime.tzinfo):
    """As other packages make them: cached instances with attributes."""

    def __init__(self) -> None:
        self.transitions = [1]


OWN_ZONE = Zone()
SENTINEL, DICT_SENTINEL, MARKER, REGISTERED = Sentinel(), DictSentinel(), Marker(), Registered()
copyreg.pickle(Registered, lambda x: "REGISTERED")
WITH_SENTINEL = (SENTINEL, (DICT_SENTINEL, 1))
LONG_CONSTANT = tuple((i, (i, frozenset({i}))) for i in range(100))


def tree() -> Node:
    root = Node()
    for _ in range(3):
        Node(Node(root))
    return root


def cyclic_list() -> list[Any]:
    a: list[Any] = [1]
    a.append(a)
    a.append({"back": a, "other": [a, a]})
    return a


def same_twice() -> list[Any]:
    inner = [1]
    return [inner, {"again": inner}, (inner, inner)]


def object_array() -> Any:
    a = np.empty(3, dtype=object)
    a[:] = [[1], {"x": []}, None]
    return a


def record_array() -> Any:
    a = np.zeros(2, dtype=[("n", "i4"), ("inner", [("o", object)]), ("two", object, (2,))])
    a["inner"]["o"][0] = [1]
    a["two"][1, 1] = {"x": [2]}
    return a


def materialised() -> WithDict:
    x = WithDict([1], {"a": []})
    vars(x)["later"] = [1]
    return x


def with_own_dict() -> list[Any]:
    x = WithDict([1])
    return [x, vars(x)]


def with_new_dict() -> WithDict:
    x = WithDict([1])
    x.__dict__ = {"members": [1], "other": {}}
    return x


def with_many_attributes() -> WithDict:
    x = WithDict()
    for i in range(100):
        setattr(x, f"attribute{i}", [i])
    return x


# Made anew for each test. What cannot change all the way down stands in IMMUTABLE.
MUTABLE: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, "a", None],
    "empty list": list,
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(b"abc"),
    "array": lambda: array.array("i", [1, 2]),
    "deque": lambda: collections.deque([[1], 2], 5),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "OrderedDict": lambda: collections.OrderedDict(a=[1], b={}),
    "Counter": lambda: collections.Counter("abca"),
    "ChainMap": lambda: collections.ChainMap({"a": [1]}, {}),
    "UserDict": lambda: collections.UserDict({"a": [1]}),
    "three levels": lambda: {"a": [{"b": [[1], 2]}, ({3}, [])], "c": ([],)},
    "tuple of lists": lambda: ([1], [2]),
    "rows": lambda: [(i, str(i)) for i in range(50)],
    "rows with a list": lambda: [(1, 2), (3, [4])],
    "namedtuple": lambda: [Pair([1], Pair(1, {2}))],
    "set of frozensets": lambda: {frozenset({1, 2}), frozenset({frozenset({3})})},
    "frozenset of instances": lambda: frozenset({WithDict([1]), WithSlots()}),
    "dict with tuple keys": lambda: {(1, "a"): [1], ((2, 3), 4): {}},
    "slice": lambda: [slice(1, None)],
    "list subclass": lambda: ListWithAttributes([[1], 2]),
    "instance": lambda: WithDict([1], {"a": 2}),
    "instance with its dict": materialised,
    "instance with many attributes": with_many_attributes,
    "instance beside its dict": with_own_dict,
    "instance with another dict": with_new_dict,
    "instance with slots": lambda: WithSlots([1], 2),
    "instance with slots and a dict": lambda: WithBoth([1]),
    "empty instance": lambda: types.SimpleNamespace(),
    "namespace": lambda: types.SimpleNamespace(a=[1]),
    "dataclass with slots": lambda: [SlottedData([1]), SlottedData([2])],
    "frozen dataclass": lambda: FrozenData((1, 2)),
    "class attribute": lambda: [WithDict(), WithDict.shared_by_class[0]],
    "exception": lambda: ValueError("x", [1]),
    "partial": lambda: functools.partial(print, [1], end=""),
    "bound method": lambda: [WithDict([1]).__init__, [].append],  # type: ignore[misc]
    "same object twice": same_twice,
    "cycle": cyclic_list,
    "tree with parents": tree,
    "enum members": lambda: [Color.RED, Color.LISTED, {Color.RED: [1]}],
    "functions and classes": lambda: [len, copy.copy, WithDict, int, str.upper, math_like, os, logging.getLogger("x")],
    "time zones": lambda: [
        datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
        datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        zoneinfo.ZoneInfo("UTC"),
        OWN_ZONE,
        datetime.datetime(2020, 1, 1, tzinfo=OWN_ZONE),
    ],
    "patterns": lambda: [re.compile("a+b"), decimal.Decimal(1), pathlib.Path("a"), list[int]],
    "interned": lambda: [Interned("a"), {"x": Interned("b")}, (Interned("c"),)],
    "sentinels": lambda: {"x": SENTINEL, "y": [DICT_SENTINEL], "z": NotImplemented},
    "shared markers": lambda: [MARKER, REGISTERED, WITH_SENTINEL, [WITH_SENTINEL]],
    "typing": lambda: [typing.List[int], typing.Optional[str], {"x": typing.Any}],  # noqa: UP006, UP045
    "tuple with attributes": lambda: TupleWithAttributes((1, 2)),
    "listed slots": lambda: ListedSlots(1),
    "array with attributes": tagged,
    "owned record": lambda: record_array()[0].copy(),
    "lock that is left out": lambda: types.SimpleNamespace(lock=LOCK),
    "constants": lambda: {"long": LONG_CONSTANT, "shape": ((1, 2), (3, (4, 5))), "names": frozenset({"a", ("b", "c")})},
    "random generator": lambda: [random.Random(1)],
    "streams": lambda: [io.BytesIO(b"abc"), io.StringIO("abc")],
    "iterators": lambda: [iter([1, 2]), iter({1: 2})],
    "deep": lambda: functools.reduce(lambda inner, _: [inner], range(5000), []),
    "deep tuples": lambda: functools.reduce(lambda inner, _: (inner, 1), range(3000), [[]]),
    "ndarray": lambda: np.zeros(3),
    "ndarray with a hidden base": lambda: np.arange(12).reshape(3, 4)[1:, ::2],
    "ndarrays": lambda: {"a": np.zeros(3), "b": [np.ones(2), np.arange(4).reshape(2, 2)]},
    "two views of a base": lambda: list(np.arange(6).reshape(2, 3)),
    "object array": object_array,
    "view of an object array": lambda: object_array()[1:],
    "list of object arrays": lambda: [object_array(), object_array()[::-1]],
    "record array": record_array,
    "records": lambda: [record_array()[0], np.zeros(2, "i4,f8")[1]],
    "0-d object array": lambda: np.array([1, [2]], dtype=object)[1:].reshape(()),
    "numpy scalars": lambda: [np.float64(1), np.dtype("f8"), np.dtype("i4,f8"), np.bool_(True), np.sin, np.str_("a")],
    "masked array": lambda: [np.ma.array([1, 2], mask=[True, False]), np.ma.masked],
    "strided": lambda: np.lib.stride_tricks.as_strided(np.arange(4), (2,), (16,)),
    "numpy generator": lambda: [np.random.default_rng(1), np.random.RandomState(1)],
    "record view": lambda: np.rec.array([(1, 2.0)], dtype="i4,f8"),
}
LOCK = threading.Lock()


def math_like(x: Any) -> Any:
    return x


IMMUTABLE: dict[str, Any] = {
    "None": None,
    "bool": True,
    "int": 10**30,
    "float": 1.5,
    "complex": 1j,
    "str": "abc",
    "bytes": b"abc",
    "range": range(5),
    "ellipsis": ...,
    "date": datetime.date(2020, 1, 1),
    "datetime": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    "time": datetime.time(1),
    "timedelta": datetime.timedelta(1),
    "timezone": datetime.timezone.utc,
    "ZoneInfo": zoneinfo.ZoneInfo("UTC"),
    "Decimal": decimal.Decimal("1.5"),
    "Fraction": fractions.Fraction(1, 3),
    "UUID": uuid.UUID(int=5),
    "path": pathlib.Path("/x"),
    "pure path": pathlib.PureWindowsPath("x"),
    "IP address": ipaddress.ip_address("127.0.0.1"),
    "enum member": Color.RED,
    "tuple": (1, "a", (2.0, frozenset({3}))),
    "empty tuple": (),
    "namedtuple": Pair(1, (2, None)),
    "frozenset": frozenset({1, (2, 3)}),
    "numpy float": np.float64(1),
    "numpy bool": np.bool_(True),
    "numpy str": np.str_("a"),
    "numpy datetime": np.datetime64("2020-01-01"),
    "dtype": np.dtype("f8"),
    "function": copy.deepcopy,
    "builtin": len,
    "class": collections.OrderedDict,
    "this module's class": WithDict,
}


# --- what cannot change


@pytest.mark.parametrize("name", IMMUTABLE)
def test_what_cannot_change_is_immutable_and_never_held(name: str) -> None:
    holder = IMMUTABLE[name]
    assert is_immutable(holder)
    entry = Slot(holder)
    assert ask(entry) is Held.NO


@pytest.mark.parametrize("name", MUTABLE)
def test_what_can_change_is_not_immutable(name: str) -> None:
    assert not is_immutable(MUTABLE[name]())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(([],), id="tuple of a list"),
        pytest.param(((((((1,),),),),),), id="deeper than is looked"),
        pytest.param(tuple(range(65)), id="longer than is looked"),
        pytest.param(lambda: 1, id="lambda"),
        pytest.param(type("Local", (), {}), id="class without a name to find it by"),
        pytest.param(type("Text", (str,), {})("a"), id="str subclass with attributes"),
        pytest.param([].append, id="method of a list"),
        pytest.param(np.void(b"abc"), id="np.void"),
        pytest.param(slice([1], None), id="slice"),
    ],
)
def test_what_may_change_is_not_immutable(value: Any) -> None:
    assert not is_immutable(value)


def test_what_is_stored_by_value_because_it_stands_in_main_is_not_immutable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_immutable(math_like)
    monkeypatch.setattr(math_like, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "math_like", math_like, raising=False)
    assert not is_immutable(math_like)


def test_a_read_only_array_is_not_immutable() -> None:
    a = np.zeros(3)
    a.flags.writeable = False
    assert not is_immutable(a)


def test_arrow_tables_are_immutable_and_tables_with_in_place_methods_are_not() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"x": [1, 2], "y": ["a", "b"]})
    for value in (table, table["x"], table["x"].chunk(0), table.schema, pa.scalar(1), pa.int32(), pa.py_buffer(b"ab")):
        assert is_immutable(value)
    assert not is_immutable(pa.py_buffer(bytearray(b"ab")))
    pl = pytest.importorskip("polars")
    assert not is_immutable(pl.DataFrame({"x": [1]}))
    assert not is_immutable(pl.Series([1]))


def test_pandas_scalars_are_immutable_and_frames_are_not() -> None:
    pd = pytest.importorskip("pandas")
    for value in (pd.Timestamp("2020"), pd.Timedelta(1), pd.NaT, pd.NA, pd.Period("2020"), pd.Interval(0, 1)):
        assert is_immutable(value), value
    assert not is_immutable(pd.Series([1]))
    assert not is_immutable(pd.Index([1]))
    entry = Slot([pd.NaT, pd.NA, pd.Timestamp("2020", tz="UTC")])
    assert ask(entry) is Held.NO


# --- who holds it


@counts_references
@pytest.mark.parametrize("name", MUTABLE)
def test_a_value_that_nobody_holds_is_not_held(name: str) -> None:
    entry = Slot(MUTABLE[name]())
    assert ask(entry) is Held.NO
    assert ask(entry) is Held.NO, "asking leaves no references behind"


@counts_references
@pytest.mark.parametrize("name", MUTABLE)
def test_a_value_that_somebody_holds_is_held_until_it_is_let_go(name: str) -> None:
    entry = Slot(MUTABLE[name]())
    holder = [entry.value]
    assert ask(entry) is Held.VALUE
    assert ask_knowing_of_one(entry) is Held.NO
    holder.append(entry.value)
    assert ask_knowing_of_one(entry) is Held.VALUE
    holder.clear()
    assert ask(entry) is Held.NO


@counts_references
@pytest.mark.parametrize("name", [name for name in MUTABLE if "interned" not in name and "lock" not in name])
def test_what_was_loaded_from_a_pickle_is_not_held(name: str) -> None:
    made = MUTABLE[name]()
    try:
        data = pickle.dumps(made, 5)
    except Exception as error:
        pytest.skip(f"cannot be pickled: {error}")
    del made
    entry = Slot(pickle.loads(data))
    assert ask(entry) is Held.NO


def grab(entry: Slot, way: Callable[[Any], Any], expected: Held) -> None:
    """What ``way`` gets hold of makes the value held, for just as long as it lives."""
    assert ask(entry) is Held.NO
    something = way(entry.value)
    assert ask(entry) is expected
    del something
    assert ask(entry) is Held.NO


@counts_references
@pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(lambda: [[1], 2], lambda v: v[0], id="list in a list"),
        pytest.param(lambda: [[]], lambda v: v[0], id="empty list"),
        pytest.param(lambda: {"a": {"b": [{"c": set()}]}}, lambda v: v["a"]["b"][0]["c"], id="deep"),
        pytest.param(lambda: {"a": {"b": [{"c": set()}]}}, lambda v: v["a"]["b"], id="in the middle"),
        pytest.param(lambda: {WithDict([1]): 1}, lambda v: next(iter(v)), id="key"),
        pytest.param(lambda: [bytearray(3)], lambda v: v[0], id="bytearray"),
        pytest.param(lambda: [bytearray(3)], lambda v: memoryview(v[0]), id="view of a bytearray"),
        pytest.param(lambda: [array.array("i", [1])], lambda v: memoryview(v[0]), id="view of an array"),
        pytest.param(lambda: ([1], 2), lambda v: v[0], id="list in a tuple"),
        pytest.param(lambda: {"pair": ([1], 2)}, lambda v: v["pair"], id="tuple with a list"),
        pytest.param(lambda: [(1, 2), (3, [4])], lambda v: v[1], id="row with a list"),
        pytest.param(lambda: [(1, (2, [3]))], lambda v: v[0][1], id="tuple in a tuple with a list"),
        pytest.param(lambda: [Pair([1], 2)], lambda v: v[0], id="namedtuple with a list"),
        pytest.param(lambda: [frozenset({WithSlots()})], lambda v: v[0], id="frozenset with an instance"),
        pytest.param(lambda: collections.deque([[1]]), lambda v: v[0], id="in a deque"),
        pytest.param(lambda: collections.OrderedDict(a=[1]), lambda v: v["a"], id="in an OrderedDict"),
        pytest.param(lambda: collections.defaultdict(list, a=[1]), lambda v: v["a"], id="in a defaultdict"),
        pytest.param(lambda: ListWithAttributes([[1]]), lambda v: v[0], id="in a list subclass"),
        pytest.param(lambda: WithDict([1]), lambda v: v.members, id="attribute"),
        pytest.param(lambda: WithDict([1]), vars, id="dict of an instance"),
        pytest.param(lambda: types.SimpleNamespace(a=1), vars, id="dict of a namespace"),
        pytest.param(lambda: [Node(), 1], lambda v: vars(v[0]), id="dict of an inner instance"),
        pytest.param(lambda: FrozenData((1, 2)), vars, id="dict of an instance of atoms"),
        pytest.param(with_own_dict, lambda v: v[1], id="dict that is a member too"),
        pytest.param(with_new_dict, vars, id="dict that was put in place of the first"),
        pytest.param(materialised, lambda v: v.later, id="attribute in a dict that was asked for"),
        pytest.param(with_many_attributes, lambda v: v.attribute99, id="one of many attributes"),
        pytest.param(lambda: WithSlots([1]), lambda v: v.members, id="slot"),
        pytest.param(lambda: WithBoth([1]), lambda v: v.extra["a"], id="beside slots"),
        pytest.param(lambda: [SlottedData([1])], lambda v: v[0], id="dataclass"),
        pytest.param(lambda: types.SimpleNamespace(a=[1]), lambda v: v.a, id="in a namespace"),
        pytest.param(lambda: ValueError([1]), lambda v: v.args[0], id="in an exception"),
        pytest.param(lambda: functools.partial(print, [1]), lambda v: v.args, id="in a partial"),
        pytest.param(same_twice, lambda v: v[0], id="same object twice"),
        pytest.param(cyclic_list, lambda v: v[2]["other"], id="in a cycle"),
        pytest.param(tree, lambda v: v.children[1].children[0], id="leaf of a tree"),
        pytest.param(lambda: [[1], 2], lambda v: iter(v[0]), id="iterator of an inner list"),
        pytest.param(lambda: {"a": {"b": 1}}, lambda v: v["a"].items(), id="view of an inner dict"),
        pytest.param(lambda: [[1]], lambda v: v[0].append, id="method of an inner list"),
        pytest.param(lambda: [WithDict()], lambda v: v[0].__init__, id="method of an inner instance"),
        pytest.param(lambda: [io.BytesIO()], lambda v: v[0], id="stream"),
        pytest.param(lambda: [iter([1, 2])], lambda v: v[0], id="iterator"),
        pytest.param(lambda: [random.Random(1)], lambda v: v[0].random, id="method of a random generator"),
        pytest.param(lambda: [Interned("a"), [1]], lambda v: v[1], id="beside what is interned"),
        pytest.param(lambda: {"a": np.zeros(3)}, lambda v: v["a"], id="ndarray"),
        pytest.param(lambda: {"a": np.zeros(5)}, lambda v: v["a"][2:5], id="view of an inner ndarray"),
        pytest.param(lambda: {"a": np.zeros(5)}, lambda v: v["a"][2:5][::2].T, id="view of a view"),
        pytest.param(lambda: {"a": np.zeros(5)}, lambda v: memoryview(v["a"]), id="memoryview of an inner ndarray"),
        pytest.param(lambda: {"a": np.zeros(5)}, lambda v: v["a"].flat, id="flat iterator"),
        pytest.param(lambda: np.arange(12).reshape(3, 4), lambda v: v[1:], id="view beside a view"),
        pytest.param(lambda: np.zeros(2, "i4,f8")[1], lambda v: v.base, id="array of a record"),
        pytest.param(object_array, lambda v: v[0], id="member of an object array"),
        pytest.param(lambda: object_array()[1:], lambda v: v[0]["x"], id="inside a member of a view"),
        pytest.param(record_array, lambda v: v["inner"]["o"][0], id="member of a nested record"),
        pytest.param(record_array, lambda v: v["two"][1, 1]["x"], id="member of a subarray"),
        pytest.param(lambda: np.array([1, [2]], dtype=object)[1:].reshape(()), lambda v: v.item(), id="in 0-d"),
        pytest.param(lambda: record_array()[0].copy(), lambda v: v["inner"]["o"], id="member of an owned record"),
        pytest.param(lambda: np.lib.stride_tricks.as_strided(np.arange(4)), lambda v: v.base.base, id="strided"),
        pytest.param(tagged, lambda v: v.tags, id="attribute of an array"),
        pytest.param(lambda: [TupleWithAttributes((1,))], lambda v: v[0], id="tuple with attributes"),
        pytest.param(lambda: ListedSlots([1]), lambda v: v.members, id="listed slot"),
        pytest.param(lambda: [ListedSlots()], lambda v: v[0], id="instance with listed slots"),
        pytest.param(lambda: [np.ma.array([1], mask=[1])], lambda v: v[0].mask, id="mask"),
        pytest.param(lambda: np.ma.array([1], mask=[1]), lambda v: v.mask, id="mask of the value"),
        pytest.param(lambda: [np.random.default_rng(1)], lambda v: v[0], id="numpy generator"),
    ],
)
def test_who_holds_something_inside_holds_the_value(make: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    grab(Slot(make()), way, Held.INNER)


@counts_references
@pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(lambda: [1], iter, id="iterator"),
        pytest.param(lambda: {1: 2}, lambda v: v.items(), id="items"),
        pytest.param(lambda: {1: 2}, lambda v: iter(v.values()), id="iterator of values"),
        pytest.param(lambda: [1], lambda v: v.append, id="bound method"),
        pytest.param(lambda: WithDict(), lambda v: v.__init__, id="method of an instance"),
        pytest.param(lambda: [1, 2], lambda v: (x for x in v), id="generator"),
        pytest.param(lambda: [1, 2], lambda v: lambda: v, id="closure"),
        pytest.param(lambda: [1, 2], lambda v: functools.partial(print, v), id="partial"),
        pytest.param(lambda: bytearray(3), memoryview, id="memoryview"),
        pytest.param(lambda: ([1], 2), lambda v: [v], id="tuple with a list"),
        pytest.param(cyclic_list, lambda v: [v], id="cycle"),
        pytest.param(tree, lambda v: [v], id="root of a tree"),
        pytest.param(lambda: np.zeros(5), lambda v: v[1:], id="view"),
        pytest.param(lambda: np.zeros(5), memoryview, id="memoryview of an array"),
        pytest.param(lambda: np.zeros(5), lambda v: v.__array_interface__ and v.data, id="data of an array"),
        pytest.param(lambda: object_array(), lambda v: v[1:], id="view of an object array"),
        pytest.param(lambda: np.zeros(2, "i4,f8"), lambda v: v[0], id="record"),
    ],
)
def test_who_can_reach_all_of_the_value_holds_it(make: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    grab(Slot(make()), way, Held.VALUE)


@counts_references
@pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(lambda: ["text" * 5, 10**20], lambda v: v[:], id="copy of atoms"),
        pytest.param(lambda: [(1, 2), (3, 4)], lambda v: v[0], id="row"),
        pytest.param(lambda: [(1, (2, 3)), ([],)], lambda v: v[0][1], id="row of atoms beside one with a list"),
        pytest.param(lambda: {"a": frozenset({1})}, lambda v: v["a"], id="frozenset"),
        pytest.param(lambda: WithDict(), lambda v: type(v).shared_by_class, id="attribute of the class"),
        pytest.param(lambda: np.zeros(3), lambda v: v[0], id="numpy scalar"),
        pytest.param(lambda: {1: [2]}, lambda v: v.copy() and None, id="nothing"),
        pytest.param(lambda: (1, (2, "a")), lambda v: [v, v[1]], id="tuple of atoms"),
        pytest.param(lambda: [re.compile("x+y")], lambda v: v[0], id="pattern"),
    ],
)
def test_who_holds_what_cannot_change_holds_nothing(make: Callable[[], Any], way: Callable[[Any], Any]) -> None:
    entry = Slot(make())
    something = way(entry.value)
    assert ask(entry) is Held.NO
    del something


def test_weak_references_hold_nothing() -> None:
    entry = Slot(WithDict([1], WithDict()))
    weak = weakref.ref(entry.value), weakref.ref(entry.value.members[1])
    if _changes.REFCOUNTS:
        assert ask(entry) is Held.NO
    assert weak[0]() is entry.value


@counts_references
def test_what_the_program_shares_by_design_hides_no_real_holder() -> None:
    logger = logging.getLogger("chest.tests.shared")
    entry = Slot({"log": logger, "x": [1], "interned": Interned("z"), "masked": [np.ma.masked]})
    assert ask(entry) is Held.NO
    x = entry.value["x"]
    assert ask(entry) is Held.INNER
    del x
    assert ask(entry) is Held.NO


@counts_references
def test_an_instance_whose_class_stores_its_whole_state_is_not_taken_for_a_shared_one() -> None:
    class_with_reduce = type("WithReduce", (WithDict,), {"__reduce__": lambda self: (WithDict, (1, 2))})
    grab(Slot([class_with_reduce([1])]), lambda v: v[0], Held.INNER)


@counts_references
def test_a_class_whose_reduce_fails_counts_as_held_while_it_is() -> None:
    def fail(self: Any, protocol: int = 0) -> Any:
        raise TypeError("no")

    grab(Slot([type("Refuses", (), {"__reduce_ex__": fail})()]), lambda v: v[0], Held.INNER)


@counts_references
def test_data_frames_are_held_only_by_references_to_themselves() -> None:
    pd = pytest.importorskip("pandas")

    def frame() -> Any:
        return pd.DataFrame({"x": [1.0, 2.0], "y": ["a", "b"]})

    grab(Slot(frame()), lambda v: [v], Held.VALUE)
    grab(Slot({"frame": frame(), "series": frame()["x"]}), lambda v: v["frame"], Held.INNER)
    grab(Slot([frame(), frame().index]), lambda v: (v[0].copy and None) or v[1], Held.INNER)
    entry = Slot(frame())
    column = entry.value["x"]
    assert ask(entry) is Held.NO
    del column


@counts_references
def test_what_pandas_keeps_in_a_frame_that_refers_to_the_frame_is_no_holder() -> None:
    pd = pytest.importorskip("pandas")
    entry, inside = Slot(pd.Series(["a", "b"])), Slot({"x": pd.Series(["a", "b"])})
    assert entry.value.str.upper()[0] == "A"
    assert inside.value["x"].str.upper()[0] == "A"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas takes it for a column
        for series in (entry.value, inside.value["x"]):
            series._mine = [series, (series,)]
    del series
    assert ask(entry) is Held.NO
    assert ask(inside) is Held.NO
    holder = inside.value["x"]
    assert ask(inside) is Held.INNER
    del holder
    holder = entry.value
    assert ask(entry) is Held.VALUE
    del holder


@counts_references
def test_arrow_and_polars_tables_inside_a_value_are_held_only_by_references_to_themselves() -> None:
    pl = pytest.importorskip("polars")
    grab(Slot([pl.DataFrame({"x": [1, 2]}), pl.Series([1])]), lambda v: v[0], Held.INNER)
    grab(Slot(pl.DataFrame({"x": [1, 2]})), lambda v: [v], Held.VALUE)
    pa = pytest.importorskip("pyarrow")
    entry = Slot([pa.table({"x": [1, 2]}), [1]])
    table = entry.value[0]
    assert ask(entry) is Held.NO, "a table cannot change"
    del table


def load_mapped(value: Any, kept: list[memoryview] | None = None) -> Any:
    """As values are loaded from a mapped file: the buffers lie in it, the rest is unpickled."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, 5, buffer_callback=buffers.append)
    mapping = mmap.mmap(-1, sum(b.raw().nbytes for b in buffers) or 1)
    views, offset = [], 0
    for buffer in buffers:
        raw = buffer.raw()
        mapping[offset : offset + raw.nbytes] = raw
        views.append(memoryview(mapping)[offset : offset + raw.nbytes])
        offset += raw.nbytes
    if kept is not None:
        kept += views
    return pickle.loads(data, buffers=views)


@counts_references
def test_arrays_in_a_mapping_are_held_by_their_views_but_not_by_the_mapping() -> None:
    grab(Slot(load_mapped(np.arange(10.0))), lambda v: [v], Held.VALUE)
    grab(Slot(load_mapped(np.arange(12.0).reshape(3, 4))), lambda v: [v], Held.VALUE)
    entry = Slot(load_mapped({"a": np.arange(12.0).reshape(3, 4), "b": [np.ones(3), np.ones(4)]}))
    assert ask(entry) is Held.NO
    for way in (lambda v: v["a"], lambda v: v["a"][1:], lambda v: v["b"], lambda v: v["b"][1][::2]):
        something = way(entry.value)
        assert ask(entry) is Held.INNER
        del something
        assert ask(entry) is Held.NO


@counts_references
def test_who_holds_the_mapping_holds_no_value() -> None:
    kept: list[memoryview] = []
    entry = Slot(load_mapped({"a": np.arange(12.0), "b": [np.ones(3)]}, kept))
    assert ask(entry) is Held.NO
    assert len(kept) == 2


@counts_references
def test_objects_of_the_chest_itself_are_not_entered() -> None:
    cls = type("OfTheChest", (), {"__module__": "chest.core"})
    entry, shared = Slot([cls()]), [1]
    entry.value[0].entries = shared
    assert ask(entry) is Held.NO
    shared.append(2)


@counts_references
def test_a_view_of_an_array_in_a_mapping_is_a_holder_too() -> None:
    entry = Slot(load_mapped(np.arange(10.0)))
    view = entry.value[2:5]
    assert ask(entry) in (Held.INNER, Held.VALUE)
    del view
    assert ask(entry) is Held.NO


@counts_references
def test_an_interrupted_walk_leaves_no_references() -> None:
    class Meta(type):
        @property
        def __module__(cls) -> str:
            raise KeyboardInterrupt

    odd = Meta("Odd", (), {})
    entry = Slot([[1], {"a": odd()}])
    with pytest.raises(KeyboardInterrupt):
        ask(entry)
    entry.value[1].clear()
    assert ask(entry) is Held.NO


def under_trace(f: Callable[[], Any]) -> Any:
    old = sys.gettrace()
    sys.settrace(lambda *_: lambda *_: None)
    try:
        return f()
    finally:
        sys.settrace(old)


def under_locals_trace(f: Callable[[], Any]) -> Any:
    """As a debugger does that looks at the variables of the callers."""
    old = sys.gettrace()
    sys.settrace(lambda frame, *_: frame.f_locals and None)
    try:
        return f()
    finally:
        sys.settrace(old)


def under_profile(f: Callable[[], Any]) -> Any:
    old = sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        return f()
    finally:
        sys.setprofile(old)


def under_monitoring(f: Callable[[], Any]) -> Any:
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is None:
        pytest.skip("since Python 3.12")
    events = monitoring.events
    monitoring.use_tool_id(4, "test")
    for event in (events.CALL, events.LINE, events.PY_START, events.PY_RETURN):
        monitoring.register_callback(4, event, lambda *_: None)
    monitoring.set_events(4, events.CALL | events.LINE | events.PY_START | events.PY_RETURN)
    try:
        return f()
    finally:
        monitoring.set_events(4, 0)
        monitoring.free_tool_id(4)


def in_a_thread(f: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(f()))
    thread.start()
    thread.join()
    return results[0]


def deep_down(f: Callable[[], Any], depth: int = 500) -> Any:
    return deep_down(f, depth - 1) if depth else f()


def in_a_generator(f: Callable[[], Any]) -> Any:
    return next(f() for _ in "x")


def many_times(f: Callable[[], Any]) -> Any:
    """Often enough for the interpreter to specialise the calls."""
    (result,) = {f() for _ in range(500)}
    return result


@counts_references
@pytest.mark.parametrize(
    "around",
    [under_trace, under_locals_trace, under_profile, under_monitoring, in_a_thread, deep_down, in_a_generator, many_times],
)
def test_the_answer_does_not_depend_on_where_it_is_asked(around: Callable[[Callable[[], Any]], Any]) -> None:
    for make in (lambda: [[1], {"a": 2}], lambda: np.zeros(3), lambda: [1], lambda: WithDict([1])):
        entry = Slot(make())
        assert around(functools.partial(ask, entry)) is Held.NO
        holder = entry.value
        assert around(functools.partial(ask, entry)) is Held.VALUE
        assert around(functools.partial(ask_knowing_of_one, entry)) is Held.NO
        del holder


@counts_references
def test_a_holder_in_another_thread_is_seen() -> None:
    entry = Slot({"a": [1]})
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        inner = entry.value["a"]
        ready.set()
        done.wait(10)
        inner.append(2)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    answer = ask(entry)
    done.set()
    thread.join()
    assert answer is Held.INNER
    assert ask(entry) is Held.NO


def test_where_references_are_not_counted_all_that_can_change_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_changes, "REFCOUNTS", False)
    entry = Slot([1])
    assert ask(entry) is Held.VALUE
    entry = Slot(np.zeros(3))
    assert ask(entry) is Held.VALUE
    entry = Slot("text")
    assert ask(entry) is Held.NO


def test_asking_adds_no_garbage_and_keeps_no_classes_alive() -> None:
    cls = type("ShortLived", (), {})
    gone = weakref.ref(cls)
    ask(Slot([cls()]))
    is_immutable(cls())
    del cls
    gc.collect()
    assert gone() is None


atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
keys = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.text(max_size=2))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(inner, max_size=3)
    return st.one_of(
        few,
        st.dictionaries(keys, inner, max_size=3),
        few.map(tuple),
        few.map(collections.deque),
        few.map(lambda members: WithDict(*members)),
        few.map(lambda members: WithSlots(*members)),
        few.map(lambda members: WithBoth(*members)),
        few.map(lambda members: types.SimpleNamespace(**{f"a{i}": m for i, m in enumerate(members)})),
        few.map(lambda members: collections.OrderedDict(enumerate(members))),
        few.map(lambda members: Pair(members, tuple(members))),
        few.map(as_object_array),
        st.sets(st.integers(), max_size=3),
        st.integers(0, 5).map(lambda n: np.arange(12)[n:]),
        inner.map(lambda member: [member, member]),
        inner.map(looped),
    )


def as_object_array(members: list[Any]) -> Any:
    a = np.empty(len(members) + 1, dtype=object)
    for i, member in enumerate(members):
        a[i] = member
    return a[:-1] if len(members) % 2 else a


def looped(member: Any) -> list[Any]:
    a: list[Any] = [member]
    a.append((a, member))
    return a


def parts(value: Any) -> list[Any]:
    """Everything in a value that a user could get hold of and change, found without the garbage collector."""
    seen: dict[int, Any] = {}
    level = [value]
    while level:
        x = level.pop()
        if id(x) in seen or x is None or isinstance(x, (bool, int, float, str, bytes)):
            continue
        seen[id(x)] = x
        if isinstance(x, dict):
            level += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set, collections.deque)):
            level += x
        elif isinstance(x, np.ndarray):
            level += list(x.flat) if x.dtype.hasobject else []
        level += vars(x).values() if hasattr(x, "__dict__") else []
        level += [getattr(x, name, None) for name in ("members", "name")] if isinstance(x, WithSlots) else []
    return [x for x in seen.values() if not isinstance(x, tuple)]


@counts_references
@given(st.recursive(atoms, containers, max_leaves=12).map(Slot), st.data())
def test_any_value_is_held_exactly_while_something_in_it_is(drawn: Slot, data: st.DataObject) -> None:
    entry = Slot(copy.deepcopy(drawn.value))
    assert ask(entry) is Held.NO
    found = parts(entry.value)
    if not found:
        return
    number = data.draw(st.integers(0, len(found) - 1))
    holder = found[number]
    del found
    expected = Held.VALUE if holder is entry.value else Held.INNER
    assert ask(entry) is expected
    del holder
    assert ask(entry) is Held.NO


# --- which pages were written

PAGE = mmap.PAGESIZE
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which pages were written")


@pytest.fixture(params=["scan", "pagemap"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways to ask the kernel, by itself."""
    if request.param == "scan":
        if not _pagemap._works(_pagemap._scan):
            major, minor = re.findall(r"\d+", platform.release())[:2]
            assert (int(major), int(minor)) < (6, 7), "this kernel has PAGEMAP_SCAN"
            pytest.skip("no PAGEMAP_SCAN here")
        monkeypatch.setattr(_pagemap, "_read", refuse)
    else:
        monkeypatch.setattr(_pagemap, "USE_PAGEMAP_SCAN", False)
        if not _pagemap._works(_pagemap._read):
            pytest.skip("no page map here")
    return str(request.param)


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError("not to be asked")


class Mapped:
    """A file of random bytes, mapped copy-on-write."""

    def __init__(self, path: Path, n_pages: int) -> None:
        path.write_bytes(random.Random(n_pages).randbytes(n_pages * PAGE))
        with path.open("rb") as file:
            self.private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.stored = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.view = memoryview(self.private)
        self.address = address_of(self.private)


@linux_only
def test_what_was_only_read_is_not_written(way: str, tmp_path: Path) -> None:
    mapped = Mapped(tmp_path / "x", 64)
    assert written_pages(mapped.address, len(mapped.view)) == []
    bytes(mapped.view)
    assert written_pages(mapped.address, len(mapped.view)) == []


@linux_only
def test_written_pages_are_found_to_the_page_and_merged(way: str, tmp_path: Path) -> None:
    mapped = Mapped(tmp_path / "x", 64)
    for page in (0, 5, 6, 7, 20, 63):
        mapped.view[page * PAGE + 17] ^= 1
    expected = [(0, PAGE), (5 * PAGE, 8 * PAGE), (20 * PAGE, 21 * PAGE), (63 * PAGE, 64 * PAGE)]
    assert written_pages(mapped.address, 64 * PAGE) == expected


@linux_only
def test_the_range_asked_for_need_not_be_whole_pages(way: str, tmp_path: Path) -> None:
    mapped = Mapped(tmp_path / "x", 8)
    mapped.view[PAGE - 1] ^= 1
    mapped.view[3 * PAGE] ^= 1
    assert written_pages(mapped.address + 100, 3 * PAGE) == [(0, PAGE - 100), (3 * PAGE - 100, 3 * PAGE)]
    assert written_pages(mapped.address + PAGE, PAGE) == []
    assert written_pages(mapped.address + PAGE + 1, PAGE - 1) == []
    assert written_pages(mapped.address + 3 * PAGE, 1) == [(0, 1)]
    assert written_pages(mapped.address + 3 * PAGE, 0) == []
    assert written_pages(mapped.address + 3 * PAGE + 5, 0) == []


@linux_only
def test_more_ranges_than_fit_in_one_answer_are_all_found(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pagemap, "_REGIONS", 3)
    mapped = Mapped(tmp_path / "x", 64)
    for page in (*range(0, 40, 2), *range(41, 60)):
        mapped.view[page * PAGE] ^= 1
    expected = [(page * PAGE, (page + 1) * PAGE) for page in range(0, 40, 2)] + [(41 * PAGE, 60 * PAGE)]
    assert written_pages(mapped.address, 64 * PAGE) == expected


@linux_only
def test_pages_that_the_kernel_tells_of_apart_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for those that are in swap and those that are not."""
    import fcntl

    if not _pagemap._works(_pagemap._scan):
        pytest.skip("no PAGEMAP_SCAN here")
    mapped = Mapped(tmp_path / "x", 8)

    def ioctl(file: int, request: int, argument: bytearray, mutate: bool) -> int:
        words = (ctypes.c_uint64 * 12).from_buffer(argument)
        start, stop = words[2:4]
        told = array.array("Q", [start, start + PAGE, 8, start + PAGE, start + 2 * PAGE, 16])
        ctypes.memmove(words[5], told.buffer_info()[0], 48)
        words[4] = stop
        return 2

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert written_pages(mapped.address, 8 * PAGE) == [(0, 2 * PAGE)]


@linux_only
@given(pages=st.sets(st.integers(0, 31)), start=st.integers(0, 3 * PAGE), length=st.integers(0, 29 * PAGE))
def test_every_written_byte_lies_in_a_range_and_no_range_lies_in_an_unwritten_page(
    tmp_path_factory: pytest.TempPathFactory, pages: set[int], start: int, length: int
) -> None:
    mapped = Mapped(tmp_path_factory.mktemp("pages") / "x", 32)
    for page in pages:
        mapped.view[page * PAGE + page] ^= 1
    expected = {page for page in pages if page * PAGE < start + length and (page + 1) * PAGE > start and length}
    for use_scan in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_pagemap, "USE_PAGEMAP_SCAN", use_scan)
            ranges = written_pages(mapped.address + start, length)
        if ranges is None:
            pytest.skip("the kernel does not tell")
        assert all(0 <= a < b <= length for a, b in ranges)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(ranges))
        assert {page for a, b in ranges for page in range((start + a) // PAGE, -(-(start + b) // PAGE))} == expected


@linux_only
def test_a_forked_child_sees_its_own_pages(way: str, tmp_path: Path) -> None:
    mapped = Mapped(tmp_path / "x", 8)
    mapped.view[0] ^= 1
    assert written_pages(mapped.address, 8 * PAGE) == [(0, PAGE)]
    pid = os.fork()
    if pid == 0:
        try:
            mapped.view[4 * PAGE] ^= 1
            right = written_pages(mapped.address, 8 * PAGE) == [(0, PAGE), (4 * PAGE, 5 * PAGE)]
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert written_pages(mapped.address, 8 * PAGE) == [(0, PAGE)]


@pytest.fixture
def _tried_anew() -> Iterator[None]:
    """What was found out about the kernel is forgotten, before and after."""
    _pagemap._works.cache_clear()
    yield
    _pagemap._works.cache_clear()


@pytest.mark.usefixtures("_tried_anew")
@linux_only
def test_the_older_way_is_taken_where_there_is_no_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _pagemap._works(_pagemap._read):
        pytest.skip("no page map here")
    mapped = Mapped(tmp_path / "x", 4)
    mapped.view[PAGE] ^= 1
    monkeypatch.setattr(_pagemap, "_PAGEMAP_SCAN", 0xC0606611)  # an ioctl that no kernel knows
    assert not _pagemap._works(_pagemap._scan)
    assert written_pages(mapped.address, 4 * PAGE) == [(PAGE, 2 * PAGE)]


@pytest.mark.usefixtures("_tried_anew")
def test_a_kernel_that_answers_with_zeros_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pagemap.os, "pread", lambda file, n, offset: bytes(n))
    monkeypatch.setattr(_pagemap, "USE_PAGEMAP_SCAN", False)
    mapped = Mapped(tmp_path / "x", 4)
    assert written_pages(mapped.address, 4 * PAGE) is None


@pytest.mark.usefixtures("_tried_anew")
def test_where_proc_is_not_mounted_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = Mapped(tmp_path / "x", 4)
    monkeypatch.setattr(_pagemap.os, "open", refuse)
    assert written_pages(mapped.address, 4 * PAGE) is None


def test_the_switch_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = Mapped(tmp_path / "x", 4)
    monkeypatch.setattr(_pagemap, "USE_PAGEMAP", False)
    assert written_pages(mapped.address, 4 * PAGE) is None


# --- whether a payload is what is stored


def checksum(data: Any) -> int:
    return xxhash.xxh3_64_intdigest(data)


BIG = 128  # pages: above the size from which the kernel is asked


@pytest.mark.parametrize("use_pagemap", [True, False])
def test_a_payload_is_the_same_until_a_byte_of_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_pagemap: bool
) -> None:
    monkeypatch.setattr(_pagemap, "USE_PAGEMAP", use_pagemap and sys.platform == "linux")
    mapped = Mapped(tmp_path / "x", BIG)
    digest = checksum(mapped.stored)
    for stored in (mapped.stored, None):
        assert same_payload(mapped.view, digest, stored, private=True)
        assert same_payload(mapped.view, digest, stored)
    mapped.view[77] ^= 1
    mapped.view[PAGE * BIG - 1] ^= 1
    for stored in (mapped.stored, None):
        assert not same_payload(mapped.view, digest, stored, private=True)
        assert not same_payload(mapped.view, digest, stored)
    mapped.view[77] ^= 1
    assert not same_payload(mapped.view, digest, mapped.stored, private=True)
    mapped.view[PAGE * BIG - 1] ^= 1
    for stored in (mapped.stored, None):
        assert same_payload(mapped.view, digest, stored, private=True), "what was written is what was there"


@linux_only
def test_of_a_private_mapping_only_written_pages_are_looked_at(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = Mapped(tmp_path / "x", BIG)
    n_hashed = []
    digest = xxhash.xxh3_64_intdigest
    fake = types.SimpleNamespace(xxh3_64_intdigest=lambda data: n_hashed.append(len(data)) or digest(data))
    monkeypatch.setattr(_pagemap, "xxhash", fake)
    assert same_payload(mapped.view, 1, mapped.stored, private=True)
    assert same_payload(mapped.view, 1, None, private=True)
    assert same_payload(mapped.view.toreadonly(), 1, None, private=True)
    assert n_hashed == []
    mapped.view[PAGE] ^= 1
    assert not same_payload(mapped.view[100:], 1, mapped.stored[100:], private=True)
    assert n_hashed == [PAGE, PAGE]


def test_a_payload_of_another_length_differs() -> None:
    data = bytes(100)
    assert not same_payload(memoryview(data), checksum(data), memoryview(bytes(101)))


def test_payloads_of_any_format_and_shape_are_compared_by_their_bytes() -> None:
    a = np.arange(12, dtype="i4").reshape(3, 4)
    assert same_payload(memoryview(a), checksum(a.tobytes()))
    assert not same_payload(memoryview(a + 1), checksum(a.tobytes()))
    assert same_payload(memoryview(np.zeros((0, 3))), checksum(b""), memoryview(b""), private=True)
    assert not same_payload(memoryview(b""), checksum(b"") + 1)


def test_the_address_is_that_of_the_bytes() -> None:
    a = np.arange(10.0)
    assert address_of(memoryview(a)) == a.ctypes.data
    assert address_of(memoryview(a)[3:]) == a.ctypes.data + 24
    assert address_of(memoryview(a).toreadonly()) == a.ctypes.data
    data = bytearray(8)
    address_of(memoryview(data))
    data.append(1)  # would be a BufferError if the buffer were still exported
