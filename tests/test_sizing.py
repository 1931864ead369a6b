"""nbytes is held against a slow sizer that visits everything, and against what the allocator says was taken."""

from __future__ import annotations

import array
import ctypes
import gc
import math
import mmap
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from datetime import date, datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chest._machine as machine_module
import chest._size_plans as plans_module
import chest._sizing as sizing_module
from chest._sizing import machine_memory, nbytes, parse_memory

np = pytest.importorskip("numpy")

MB = 1_000_000
R = random.Random(20)


def deep_bytes(value: object) -> int:
    """Everything that builtin containers and object arrays hold, each object once."""
    seen: set[int] = set()
    size, todo = 0, [value]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        size += sys.getsizeof(one)
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset, deque)):
            todo += one
        elif isinstance(one, np.ndarray) and one.dtype == object:
            todo += one.ravel().tolist()
    return size


def texts(n: int) -> list[str]:
    return [f"text number {i}" for i in range(n)]


def records(n: int) -> list[dict[str, Any]]:
    return [{"name": f"n{i}", "age": i + 1000, "score": i * 1.5, "tags": [f"a{i}", "b"]} for i in range(n)]


def long_tailed(n: int) -> list[list[float]]:
    r = random.Random(1)
    return [[float(j) for j in range(int(r.lognormvariate(3, 1)))] for _ in range(n)]


POOL = [f"member {i} of the pool" for i in range(1000)]


@pytest.fixture
def clean_registry() -> Iterator[None]:
    yield
    plans_module._registered.clear()
    plans_module._registered_names.clear()
    plans_module._forget_types()


@pytest.fixture(params=["cpython", "portable"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(plans_module, "_referents", None)
        monkeypatch.setattr(sizing_module, "_refcount", None)


# --- Arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array_of", "size"),
    [
        (lambda: np.ones(1000, dtype="i4"), 4000),
        (lambda: np.empty((3, 4, 5)), 480),
        (lambda: np.array(5.0), 8),
        (lambda: np.empty(0), 0),
        (lambda: np.zeros(10, dtype=[("a", "i8"), ("b", "S4")]), 120),
        (lambda: np.zeros((4, 6), order="F").T, 192),
        (lambda: np.rec.array(np.zeros(10, dtype=[("a", "i8")])), 80),
    ],
)
def test_an_array_is_exactly_its_buffer(array_of: Callable[[], Any], size: int) -> None:
    one = array_of()
    assert nbytes(one) == size
    assert nbytes(one) == size


def test_a_view_counts_the_buffer_that_it_keeps_alive() -> None:
    base = np.ones(MB)
    assert nbytes(base[:10]) == nbytes(base[5:][::2].reshape(-1, 2)) == 8 * MB
    assert nbytes(np.lib.stride_tricks.sliding_window_view(base, 100)) == 8 * MB


def test_a_broadcast_array_counts_its_small_buffer() -> None:
    row = np.ones(10)
    assert nbytes(np.broadcast_to(row, (MB, 10))) == 80


def test_an_array_on_foreign_memory_counts_itself(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, 80_000)
    assert nbytes(np.frombuffer(memoryview(memory)[:800])) == 800
    assert nbytes(np.frombuffer(b"x" * 640)) == 640
    mapped = np.memmap(tmp_path / "a", dtype="f8", mode="w+", shape=1000)
    assert nbytes(mapped) == 8000


@pytest.mark.parametrize("n", [2, 5, 40, 200, 5000])
def test_two_views_of_one_array_count_once(n: int, means: None) -> None:
    base = np.ones(MB)
    assert 8 * MB <= nbytes([base[i:] for i in range(n)]) < 8 * MB + 250 * n


def test_a_masked_array_counts_data_and_mask() -> None:
    one = np.ma.array(np.ones(10_000), mask=np.zeros(10_000, bool))
    assert 90_000 <= nbytes(one) < 92_000


def test_an_array_of_objects_counts_its_members() -> None:
    for n in (100, 100_000):
        one = np.array(texts(n), dtype=object)
        assert nbytes(one) == pytest.approx(deep_bytes(one) - sys.getsizeof(np.empty(0)), rel=0.05)
    shared = np.array(["x" * 1000] * 10, dtype=object)
    assert nbytes(shared) == 80 + sys.getsizeof("x" * 1000)


def test_a_structured_array_counts_the_objects_in_its_fields() -> None:
    one = np.zeros(500, dtype=[("a", "i8"), ("o", object)])
    one["o"] = texts(500)
    assert nbytes(one) == 500 * 16 + sum(map(sys.getsizeof, one["o"].tolist()))


def test_an_array_subclass_counts_what_it_carries() -> None:
    class Named(np.ndarray):  # type: ignore[misc, name-defined]
        pass

    one = np.ones(1000).view(Named)
    assert nbytes(one) == pytest.approx(8000, abs=200)
    one.label = "x" * 100_000
    assert nbytes(one) == pytest.approx(108_000, abs=1000)


# --- Containers -------------------------------------------------------------------------------------------------------

SMALL = {
    "none": None,
    "int": 12345678901234567890,
    "text": "äöü",
    "tuple": (1000, 2000, 3000),
    "mapping": {"a": 1000, "b": 2.5, "c": None, "d": b"xyz"},
    "nested": {"a": [1000, [2000, (3000.5, {"x": {4000, 5000}})]], "b": frozenset({"q"})},
    "same twice": [POOL[1] * 50, POOL[1]] * 3,
    "sixty": [(float(i), str(i) * 3) for i in range(60)],
    "empty": [[], (), {}, set()],
    "records": records(60),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_values_are_exact(name: str, means: None) -> None:
    assert nbytes(SMALL[name]) == deep_bytes(SMALL[name])


LARGE: dict[str, Callable[[], object]] = {
    "texts": lambda: texts(100_000),
    "a thousand texts": lambda: texts(1000),
    "numbers": lambda: [i * 1.5 for i in range(50_000)],
    "none": lambda: [None] * 100_000,
    "small numbers": lambda: [i % 10 for i in range(100_000)],
    "tuple": lambda: tuple(texts(5000)),
    "set": lambda: set(texts(30_000)),
    "deque": lambda: deque(texts(30_000)),
    "ordered": lambda: OrderedDict.fromkeys(texts(3000), 1.5),
    "mapping": lambda: {t: float(i) for i, t in enumerate(texts(40_000))},
    "mapping of lists": lambda: {i + 1000: [i + 5000, i + 6000] for i in range(3000)},
    "records": lambda: records(3000),
    "hundred records": lambda: records(100),
    "alternating": lambda: [x for i in range(5000) for x in (i + 1000, "t" * 50 + str(i))],
    "lists in lists": lambda: [[[float(i + j + k) for k in range(20)] for j in range(20)] for i in range(30)],
    "long tail": lambda: long_tailed(900),
    "few rows, many columns": lambda: [[float(i + j) for j in range(3000)] for i in range(10)],
    "object array": lambda: np.array(texts(50_000), dtype=object),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_homogeneous_values_are_estimated_within_a_quarter(name: str, means: None) -> None:
    value = LARGE[name]()
    assert nbytes(value) == pytest.approx(deep_bytes(value), rel=0.25)


SHARED: dict[str, Callable[[], object]] = {
    "few distinct texts": lambda: [R.choice(POOL[:5]) for _ in range(100_000)],
    "many distinct texts": lambda: [R.choice(POOL) for _ in range(100_000)],
    "runs of one text": lambda: [POOL[i // 500 % 1000] for i in range(200_000)],
    "half empty": lambda: ["" if i % 2 else f"text number {i}" for i in range(50_000)],
    "lists of pooled texts": lambda: [[R.choice(POOL[:50]) for _ in range(500)] for _ in range(100)],
}


@pytest.mark.parametrize("name", SHARED)
def test_repeated_members_count_once_where_only_a_sample_is_looked_at(name: str) -> None:
    value = SHARED[name]()
    assert nbytes(value) == pytest.approx(deep_bytes(value), rel=0.25)


def test_a_million_texts_are_estimated_within_a_quarter() -> None:
    value = texts(1_000_000)
    assert nbytes(value) == pytest.approx(sys.getsizeof(value) + sum(map(sys.getsizeof, value)), rel=0.25)


def test_references_from_elsewhere_do_not_make_members_cheaper() -> None:
    value = texts(20_000)
    elsewhere = [list(value) for _ in range(20)]
    assert nbytes(value) == pytest.approx(deep_bytes(value), rel=0.25)
    assert len(elsewhere) == 20


def test_references_from_elsewhere_do_not_make_members_cheaper_where_others_repeat() -> None:
    value = ["" if i % 2 else f"text number {i}" for i in range(50_000)]
    elsewhere = [list(value) for _ in range(4)]
    assert nbytes(value) == pytest.approx(deep_bytes(value), rel=0.25)
    assert len(elsewhere) == 4


def test_alternating_values_of_a_mapping_are_all_met() -> None:
    for n in (1300, 2560, 5120, 10_240):
        value = {i: (i + 1000.5 if i % 2 else f"{i}" * 100) for i in range(n)}
        assert nbytes(value) == pytest.approx(deep_bytes(value), rel=0.25)


def test_equal_values_have_equal_sizes() -> None:
    assert nbytes(records(5000)) == nbytes(records(5000))


leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
nested = st.recursive(
    leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner), max_leaves=40
)


@given(nested)
def test_any_small_nested_value_is_exact(value: object) -> None:
    assert nbytes(value) == deep_bytes(value)


def array_in(place: str, one: Any, i: int) -> object:
    return {
        "member": one,
        "record": {"i": i + 1000, "cfg": {"data": one}},
        "twice in a record": (one, {"view": one[:5]}),
        "below": [[one[5:]] for _ in range(100)],
    }[place]


PLACES = ["member", "record", "twice in a record", "below"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [3, 300, 3000])
def test_an_array_shared_by_all_members_counts_once(place: str, n: int) -> None:
    one = np.empty(10 * MB)
    value = [array_in(place, one, i) for i in range(n)]
    assert nbytes(value) == pytest.approx(80 * MB, rel=0.35)  # some 100 bytes a list around it, too


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [3, 300, 3000])
def test_arrays_of_their_own_in_all_members_all_count(place: str, n: int) -> None:
    value = [array_in(place, np.empty(20_000), i) for i in range(n)]
    assert nbytes(value) == pytest.approx(n * 160_000, rel=0.25)


@pytest.mark.parametrize(("n", "k"), [(65, 1), (200, 10), (1000, 3), (1000, 1)])
def test_a_few_large_arrays_among_small_members_are_not_missed(n: int, k: int) -> None:
    value: list[Any] = [i + 1000 for i in range(n)]
    for i in random.Random(3).sample(range(n), k):
        value[i] = np.empty(20 * MB // 8)
    assert k * 20 * MB <= nbytes(value) <= k * 20 * MB + 100 * n
    assert k * 20 * MB <= nbytes({"in": [value]}) <= k * 20 * MB + 100 * n
    assert k * 20 * MB <= nbytes(dict(enumerate(value))) <= k * 20 * MB + 300 * n


def test_a_few_large_arrays_among_many_containers_are_not_missed() -> None:
    value: list[Any] = [(i + 1000, i + 2000) for i in range(1000)]
    value[333] = value[778] = np.empty(20 * MB // 8)
    value[901] = value[333][:5]
    value[902] = np.empty(20 * MB // 8)
    assert nbytes(value) == pytest.approx(40 * MB, rel=0.05)


def test_what_lies_in_a_shared_object_and_beside_it_counts_once() -> None:
    one = np.empty(10 * MB)
    shared = {"data": one}
    assert nbytes([(i + 1000, [one], shared) for i in range(3000)]) == pytest.approx(80 * MB, rel=0.05)
    assert nbytes([(i + 1000, shared, [one]) for i in range(3000)]) == pytest.approx(80 * MB, rel=0.05)


def test_members_that_lead_to_each_other_count_once() -> None:
    nodes = [SimpleNamespace(data=f"{i}" * 100, others=[]) for i in range(500)]
    for i, node in enumerate(nodes):
        node.others += nodes[i + 1 : i + 4]
    apart = [SimpleNamespace(data=f"{i}" * 100, others=[None] * 3) for i in range(500)]
    assert nbytes(nodes) == pytest.approx(nbytes(apart), rel=0.25)


def test_a_large_text_among_small_ones_is_not_missed() -> None:
    assert nbytes([*texts(900), "x" * 10 * MB]) == pytest.approx(10 * MB, rel=0.05)


def test_large_arrays_in_some_records_are_found() -> None:
    value = [{"i": i + 1000, "data": np.empty(250_000) if i % 20 == 7 else None} for i in range(200)]
    assert nbytes(value) == pytest.approx(20 * MB, rel=0.25)


def test_objects_that_refer_to_each_other_terminate(means: None) -> None:
    one: list[Any] = []
    one.append(one)
    assert nbytes(one) == sys.getsizeof(one)
    mapping: dict[str, Any] = {}
    mapping["self"] = [mapping, {"again": mapping}]
    assert nbytes(mapping) == deep_bytes(mapping)
    parent = SimpleNamespace(name="parent", children=[])
    parent.children += [SimpleNamespace(parent=parent, name=f"c{i}") for i in range(3000)]
    assert 3000 * 60 < nbytes(parent) < 3000 * 1000


def test_members_that_are_equal_but_not_the_same_all_count() -> None:
    assert nbytes([float("1.5") for _ in range(5)]) == deep_bytes([float(x) for x in range(5)])


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_deep_nesting_does_not_exhaust_the_stack(kind: type) -> None:
    value: Any = "x" * MB
    for _ in range(100):
        value = {"a": value} if kind is dict else kind([value])
    assert nbytes(value) == deep_bytes(value)
    for _ in range(100_000):
        value = {"a": value} if kind is dict else kind([value])
    assert nbytes(value) > 0
    while value and not isinstance(value, str):  # freed level by level: some versions recurse
        value = value["a"] if kind is dict else value[0]


@pytest.mark.parametrize("n_frames", [30, 45, 60])
def test_a_caller_just_below_the_recursion_limit_gets_the_whole_answer(n_frames: int) -> None:
    value: Any = [1000.5]
    for _ in range(15):
        value = {"a": [value]}

    def fall(depth: int) -> int:
        return fall(depth - 1) if depth else nbytes(value)

    depth = 0
    frame = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    nbytes(value)
    assert fall(sys.getrecursionlimit() - depth - n_frames) == deep_bytes(value)


def tree(depth: int, width: int) -> Any:
    return [tree(depth - 1, width) for _ in range(width)] if depth else 1.5


WIDE: dict[str, Callable[[], object]] = {
    "levels": lambda: [[[[[float(a + b)] for b in range(5)] for a in range(10)] for _ in range(40)] for _ in range(70)],
    "binary tree": lambda: tree(14, 2),
    "bushy tree": lambda: tree(5, 9),
    "trees": lambda: [tree(5, 3) for _ in range(100)],
    "matrix": lambda: [[float(i + j) for j in range(1000)] for i in range(64)],
    "long tail": lambda: long_tailed(1000),
}


@pytest.mark.parametrize("name", WIDE)
def test_the_walk_is_bounded_and_right_all_the_same(name: str) -> None:
    value = WIDE[name]()
    walk = sizing_module._Walk()
    assert walk.total(value, sizing_module._DEPTH) == pytest.approx(deep_bytes(value), rel=0.25)
    assert walk.spent < 1500


def test_subclasses_of_containers_count_members_and_attributes(means: None) -> None:
    class Tagged(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise AssertionError("the user's code is not run")

        __len__ = __getitem__ = __iter__

    one = Tagged(texts(3000))
    assert nbytes(one) == pytest.approx(deep_bytes(list.copy(one)), rel=0.1)
    one.note = "x" * MB
    assert nbytes(one) == pytest.approx(deep_bytes(list.copy(one)) + MB, rel=0.1)

    class Slotted(dict):  # type: ignore[type-arg]
        __slots__ = ("extra",)

    two = Slotted(a=1.5)
    two.extra = "x" * MB
    assert MB < nbytes(two) < MB + 1000
    point = namedtuple("point", "x y")
    assert nbytes(point("x" * 1000, 2.5)) == deep_bytes(point("x" * 1000, 2.5))
    for mapping in (defaultdict(list, a=texts(5)), Counter(texts(5)), OrderedDict(a=texts(5))):
        assert nbytes(mapping) == deep_bytes(mapping)


# --- Objects ----------------------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, i: int) -> None:
        self.number = i + 1000
        self.text = f"text number {i}"


class Wide:
    def __init__(self, i: int) -> None:
        self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h = map(float, range(i, i + 8))


class Slots:
    __slots__ = ("__hidden", "empty", "number")

    def __init__(self, i: int) -> None:
        self.number = i + 1000
        self.__hidden = f"text number {i}"


@pytest.mark.parametrize("make", [Plain, Wide, Slots, lambda i: SimpleNamespace(a=i + 1000, b=float(i))])
def test_objects_count_what_the_allocator_gave_them(make: Callable[[int], object]) -> None:
    gc.collect()
    make(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        value = [make(i) for i in range(2000)]
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert nbytes(value) == pytest.approx(taken, rel=0.25)


@pytest.mark.parametrize("make", [Plain, Slots])
def test_attributes_are_found_without_the_garbage_collector(make: Callable[[int], Any], means: None) -> None:
    one = make(1)
    one.number = "x" * MB
    assert MB < nbytes(one) < MB + 1000
    assert MB < nbytes([one]) < MB + 1000


def test_measuring_an_object_makes_no_dict_for_it() -> None:
    one = Plain(1)
    gc.collect()
    tracemalloc.start()
    try:
        nbytes(one)
        grown = []
        for _ in range(5):  # other threads (of whoever runs the tests) may need some in between
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(100):
                nbytes(one)
            grown.append(tracemalloc.get_traced_memory()[0] - before)
        assert min(grown) < 100
    finally:
        tracemalloc.stop()


def test_what_the_program_holds_is_not_counted() -> None:
    one = SimpleNamespace(kind=Plain, module=np, function=texts, builtin=len)
    assert nbytes(one) < 1500
    value = [Plain, np, texts]
    assert nbytes(value) == sys.getsizeof(value)


def test_an_object_is_taken_at_its_word() -> None:
    class Property:
        @property
        def nbytes(self) -> int:
            return 12_345_678

    class Instance:
        def __init__(self) -> None:
            self.nbytes = np.int64(7_654_321)

    assert nbytes(Property()) == 12_345_678 + sys.getsizeof(Property())
    assert nbytes(Instance()) == 7_654_321 + sys.getsizeof(Instance())
    assert nbytes([Property() for _ in range(500)]) == pytest.approx(500 * 12_345_678, rel=0.01)


class BrokenProperty:
    def __init__(self) -> None:
        self.data = "x" * MB

    @property
    def nbytes(self) -> int:
        raise RuntimeError("broken")


class Method(BrokenProperty):
    def nbytes(self) -> int:  # type: ignore[override]
        return -1


class Negative(BrokenProperty):
    nbytes = -5  # type: ignore[assignment]


class BrokenSizeof(BrokenProperty):
    def __sizeof__(self) -> int:
        raise RuntimeError("broken")


class Hooked:
    def __init__(self) -> None:
        self.__dict__["data"] = "x" * MB

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize("kind", [BrokenProperty, Method, Negative, BrokenSizeof, Hooked])
def test_a_broken_object_is_measured_all_the_same(kind: Callable[[], object], means: None) -> None:
    assert MB < nbytes(kind()) < MB + 2000
    assert MB < nbytes([kind(), {"a": 1.5}]) < MB + 2500


def test_a_broken_leaf_is_measured_all_the_same() -> None:
    class Leaf:
        __slots__ = ()

        def __sizeof__(self) -> int:
            raise RuntimeError("broken")

    value = [Leaf() for _ in range(100)]
    assert sys.getsizeof(value) < nbytes(value) < 20_000
    assert nbytes(value) == nbytes(value)


def test_buffers_are_exact() -> None:
    assert nbytes(bytearray(5000)) == sys.getsizeof(bytearray(5000))
    numbers = array.array("d", bytes(8000))
    assert 8000 < nbytes(numbers) < 9000
    assert nbytes(mmap.mmap(-1, 8192)) == 8192
    assert nbytes((ctypes.c_char * MB)()) == pytest.approx(MB, abs=200)
    text = b"x" * 10_000
    assert nbytes(memoryview(text)) == nbytes(memoryview(text)[:10]) == 10_000
    assert nbytes(memoryview(np.ones(1000))[:5]) == pytest.approx(8000, abs=200)
    assert 10_000 <= nbytes([text, memoryview(text), memoryview(text)[5:]]) < 10_300
    assert nbytes(memoryview(mmap.mmap(-1, 8192))[:100]) == 100  # what was not read of a mapped file is not in memory
    released = memoryview(text)
    released.release()
    assert nbytes(released) < 1000


@pytest.mark.parametrize(
    "value",
    [
        date(2020, 1, 1),
        datetime(2020, 1, 1, tzinfo=timezone.utc),
        Decimal("1.5"),
        Fraction(1, 3),
        1 + 2j,
        range(5),
        ...,
    ],
)
def test_other_scalars_count_themselves(value: object) -> None:
    assert sys.getsizeof(value) <= nbytes(value) <= sys.getsizeof(value) + 150
    assert nbytes(np.float64(1.5)) == sys.getsizeof(np.float64(1.5))


def test_values_that_other_threads_change_are_measured() -> None:
    value: dict[int, Any] = {}
    stop = threading.Event()

    def change() -> None:
        i = 0
        while not stop.is_set():
            value[i % 5000] = [i]
            value.pop((i * 7) % 5000, None)
            i += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            assert nbytes(value) >= 64
    finally:
        stop.set()
        thread.join()


def test_types_made_on_the_fly_are_not_kept_for_ever() -> None:
    for _ in range(5000):
        nbytes(type("Short", (), {})())
    assert len(plans_module._plans) <= 4100
    assert nbytes(5) == sys.getsizeof(5)


# --- Frames and tensors -----------------------------------------------------------------------------------------------


def test_a_numeric_frame_counts_its_columns() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({f"c{i}": np.arange(10_000) * 1.5 for i in range(10)})
    assert 800_000 <= nbytes(frame) < 805_000
    assert 80_000 <= nbytes(frame["c1"].copy()) < 84_000
    assert 80_000 <= nbytes(pd.Index(np.arange(10_000))) < 81_500
    assert nbytes([frame, frame["c1"], frame]) == pytest.approx(nbytes(frame), abs=5000)


def test_a_part_of_a_series_counts_what_it_keeps_alive() -> None:
    pd = pytest.importorskip("pandas")
    assert nbytes(pd.Series(np.ones(100_000))[:10]) == pytest.approx(800_000, abs=3000)


def test_columns_of_objects_count_their_members() -> None:
    pd = pytest.importorskip("pandas")
    n = 50_000
    frame = pd.DataFrame({"number": np.arange(n)})
    frame["own"] = pd.Series(texts(n), dtype=object)
    frame["shared"] = pd.Series([R.choice(POOL[:10]) for _ in range(n)], dtype=object)
    frame["none"] = pd.Series([None] * n, dtype=object)
    exact = n * 8 * 4 + sum(map(sys.getsizeof, frame["own"].tolist()))
    assert nbytes(frame) == pytest.approx(exact, rel=0.1)
    assert nbytes(frame[["own"]].copy()) == pytest.approx(exact - 24 * n, rel=0.1)
    assert nbytes({"a": [frame]}) == pytest.approx(exact, rel=0.1)


def test_extension_columns_count_their_buffers() -> None:
    pd = pytest.importorskip("pandas")
    n = 20_000
    frame = pd.DataFrame(
        {
            "category": pd.Categorical([POOL[i % 100] for i in range(n)]),
            "time": pd.date_range("2020", periods=n, freq="s", tz="UTC"),
            "masked": pd.array(range(n), dtype="Int64"),
        }
    )
    assert nbytes(frame) == pytest.approx(int(frame.memory_usage(deep=True).sum()), rel=0.1)
    index = pd.MultiIndex.from_product([range(1000), range(50)])
    assert nbytes(index) == pytest.approx(int(index.memory_usage(deep=True)), rel=0.1)


def test_the_hash_table_of_an_index_counts() -> None:
    pd = pytest.importorskip("pandas")
    index = pd.Index(np.random.default_rng(1).permutation(10_000))
    before = nbytes(index)
    assert index.get_loc(5000) >= 0
    assert nbytes(index) == pytest.approx(int(index.memory_usage()), abs=2000)
    assert nbytes(index) > before + 80_000


def test_arrow_backed_columns_count_their_buffers() -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    series = pd.Series(texts(20_000), dtype="string[pyarrow]")
    assert nbytes(series) == pytest.approx(int(series.memory_usage(deep=True)), rel=0.1)


def test_a_frame_with_arrow_columns_is_measured_without_walking_through_what_pandas_keeps_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({f"c{i}": pd.Series(texts(1_000), dtype="string[pyarrow]") for i in range(10)})
    visited: list[object] = []
    visit = sizing_module._Walk.visit
    monkeypatch.setattr(
        sizing_module._Walk, "visit", lambda self, value, *rest: visited.append(value) or visit(self, value, *rest)
    )
    assert nbytes(frame) == pytest.approx(int(frame.memory_usage(deep=True).sum()), rel=0.15)
    assert len(visited) <= 10 * 5 + 20  # an array, what it wraps, its buffers


def test_a_view_of_a_mapped_file_counts_the_file_once(tmp_path: Path) -> None:
    from chest.engines._mapping import map_privately, use_libc

    if not use_libc:
        pytest.skip("views of Python's own mmap count what they show")
    (tmp_path / "x").write_bytes(bytes(300_000))
    with (tmp_path / "x").open("rb") as file:
        view = map_privately(file.fileno(), 300_000)
    assert 300_000 <= nbytes(view[5:]) < 301_000
    assert 300_000 <= nbytes([view[5:7], view]) < 301_000


def test_a_frame_subclass_is_a_frame() -> None:
    pd = pytest.importorskip("pandas")

    class Mine(pd.DataFrame):  # type: ignore[misc, name-defined]
        pass

    assert 80_000 <= nbytes(Mine({"a": np.arange(10_000)})) < 84_000


def test_arrow_counts_each_buffer_once() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": np.arange(10_000), "s": texts(10_000)})
    exact = table.get_total_buffer_size()
    assert exact <= nbytes(table) < exact + 200
    assert exact <= nbytes([table, table.slice(10, 20), table.column(0), table.column(1).chunk(0)]) < exact + 1000
    many = pa.chunked_array([pa.array([i, i]) for i in range(200)])
    assert nbytes(many) >= many.nbytes
    encoded = pa.array(texts(1000)).dictionary_encode()
    assert nbytes(encoded) == pytest.approx(encoded.get_total_buffer_size(), abs=200)
    assert nbytes(pa.py_buffer(b"x" * 5000)) == 5000


def test_polars_is_asked() -> None:
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": np.arange(10_000), "s": texts(10_000)})
    assert frame.estimated_size() <= nbytes(frame) < frame.estimated_size() + 200
    assert 80_000 <= nbytes(frame["a"]) < 80_200


def test_tensors_count_their_storage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Storage:
        def __init__(self, size: int) -> None:
            self.size = size

        def data_ptr(self) -> int:
            return id(self)

        def nbytes(self) -> int:
            return self.size

    class Tensor:
        is_leaf = True
        nbytes = 17  # of the view, not of the storage

        def __init__(self, storage: Storage | None, grad: Any = None) -> None:
            self.storage, self.grad = storage, grad

        def untyped_storage(self) -> Storage:
            if self.storage is None:
                raise NotImplementedError("sparse")
            return self.storage

        def element_size(self) -> int:
            return 4

        def nelement(self) -> int:
            return 250

    fake = ModuleType("torch")
    fake.Tensor = Tensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    storage = Storage(MB)
    assert nbytes(Tensor(storage)) == MB
    assert MB <= nbytes([Tensor(storage) for _ in range(200)]) < MB + 5000
    assert nbytes(Tensor(storage, grad=Tensor(Storage(MB)))) == 2 * MB
    assert nbytes(Tensor(None)) == 1000


# --- Registering ------------------------------------------------------------------------------------------------------


def test_a_registered_function_measures_the_type_and_its_subclasses(clean_registry: None) -> None:
    class Child(Plain):
        pass

    assert nbytes(Plain(1)) < 1000

    @nbytes.register(Plain)
    def size(value: Plain) -> int:
        return value.number * 1000

    assert nbytes(Plain(1)) == nbytes(Child(1)) == 1_001_000
    value = [Plain(i) for i in range(10)]
    assert nbytes(value) == sys.getsizeof(value) + 10_045_000
    assert nbytes.register(Child, lambda value: 5)(None) == 5
    assert (nbytes(Plain(1)), nbytes(Child(1))) == (1_001_000, 5)


def test_a_type_can_be_registered_by_name_before_it_exists(clean_registry: None) -> None:
    nbytes.register("not_yet.deep.Thing", lambda value: 77)
    nbytes.register("not_yet.Exported", lambda value: 88)
    package = ModuleType("not_yet")
    thing = type("Thing", (), {"__module__": "not_yet.deep"})
    exported = type("Hidden", (), {"__module__": "not_yet._inner"})
    package.Exported = exported  # type: ignore[attr-defined]
    sys.modules["not_yet"] = package
    try:
        assert nbytes(thing()) == 77
        assert nbytes(type("Child", (thing,), {})()) == 77
        assert nbytes(exported()) == 88
    finally:
        del sys.modules["not_yet"]


@pytest.mark.parametrize("kind", [str, list, dict, np.ndarray, "numpy.ndarray"])
def test_registering_overrules_what_is_built_in(kind: Any, clean_registry: None) -> None:
    value = {str: "abc", list: [1, 2], dict: {"a": 1}}.get(kind, np.ones(5))
    assert nbytes(value) != 123_456
    nbytes.register(kind, lambda value: 123_456)
    assert nbytes(value) == 123_456
    assert nbytes((value, 1.5)) == 123_456 + sys.getsizeof((1, 2)) + sys.getsizeof(1.5)


@pytest.mark.parametrize("answer", [lambda value: 1 / 0, lambda value: -1, lambda value: "many", lambda value: None])
def test_a_registered_function_that_fails_is_passed_over(answer: Any, clean_registry: None) -> None:
    before = nbytes(Plain(1))
    nbytes.register(Plain, answer)
    assert nbytes(Plain(1)) == before


@pytest.mark.parametrize("arguments", [(5,), ("Thing",), ("",), (".",), (Plain, 5), (None, len)])
def test_registering_nonsense_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"nbytes\.register takes"):
        nbytes.register(*arguments)


def test_nothing_is_imported_to_measure() -> None:
    code = (
        "import sys; from chest._sizing import nbytes; nbytes([{'a': 1.5}, object()]);"
        "assert not {'numpy', 'pandas', 'pyarrow', 'polars', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


# --- Memory limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 1_000_000_000),
        (0, 0),
        (12345, 12345),
        (1e9, 1_000_000_000),
        (1.9, 1),
        (math.inf, sys.maxsize),
        (1 << 80, sys.maxsize),
        (np.int64(5000), 5000),
        (np.float32(4096), 4096),
        (Fraction(7, 2), 3),
        ("0", 0),
        ("500 MB", 500_000_000),
        ("500MB", 500_000_000),
        (" 500 mb ", 500_000_000),
        ("2 GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("1.5GB", 1_500_000_000),
        (".5 kB", 500),
        ("1 KiB", 1024),
        ("3 T", 3_000_000_000_000),
        ("64 K", 64_000),
        ("1 PiB", 1 << 50),
        ("10 bytes", 10),
        ("10B", 10),
        ("1e6", 1_000_000),
        ("1e3 kB", 1_000_000),
        ("1_000", 1000),
        ("9007199254740993", 9007199254740993),
        ("1e400", sys.maxsize),
        ("inf", sys.maxsize),
    ],
)
def test_amounts_of_memory_are_understood(limit: object, expected: int) -> None:
    assert parse_memory(limit) == expected


@pytest.mark.parametrize("limit", ["25%", "25 %", "25.0%"])
def test_a_share_is_taken_of_the_machine_s_memory(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "machine_memory", lambda: 8_000)
    assert parse_memory(limit) == 2_000
    assert parse_memory("0%") == 0
    assert parse_memory("100%") == 8_000


@pytest.mark.parametrize(
    "limit",
    [
        "lots",
        "",
        " ",
        "-1",
        "-5 MB",
        "500 XB",
        "5 MB MB",
        "1__000",
        "1 000",
        "5%%",
        "101%",
        "0x10",
        "nan",
        "1.2.3",
        "MB",
        -1,
        -0.5,
        math.nan,
        -math.inf,
    ],
)
def test_nonsense_amounts_are_refused_with_what_is_accepted(limit: object) -> None:
    with pytest.raises(ValueError, match="it is a number of bytes") as caught:
        parse_memory(limit)
    assert repr(limit) in str(caught.value)
    assert "500 MB" in str(caught.value)
    assert "25%" in str(caught.value)


@pytest.mark.parametrize("limit", [True, False, b"500 MB", [1], 1j, object])
def test_amounts_of_a_wrong_type_are_refused_with_what_is_accepted(limit: object) -> None:
    with pytest.raises(TypeError, match="it is a number of bytes") as caught:
        parse_memory(limit)
    assert repr(limit) in str(caught.value)


class Groups:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def own(self, *lines: str) -> None:
        (self.root / "cgroup").write_text("".join(line + "\n" for line in lines))

    def limit(self, file: str, text: str) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(machine_module, "_OWN_GROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(machine_module, "_MOUNTS_V1", (str(tmp_path / "v1"),))
    monkeypatch.setattr(machine_module, "_MOUNTS_V2", (str(tmp_path / "v2"),))
    monkeypatch.setattr(machine_module, "_physical_memory", lambda: 16_000)
    return Groups(tmp_path)


def test_without_groups_the_machine_s_memory_counts(groups: Groups) -> None:
    assert machine_memory() == 16_000


@pytest.mark.parametrize(
    ("own", "name", "unlimited"),
    [("0::/a/b", "v2/{}memory.max", "max"), ("4:cpu,memory:/a/b", "v1/{}memory.limit_in_bytes", "9223372036854771712")],
)
def test_the_smallest_limit_of_the_groups_counts(groups: Groups, own: str, name: str, unlimited: str) -> None:
    groups.own("9:name=systemd:/x", own)
    groups.limit(name.format("a/b/"), unlimited)
    assert machine_memory() == 16_000
    groups.limit(name.format("a/b/"), "5000")
    assert machine_memory() == 5000
    groups.limit(name.format("a/"), "4000")
    assert machine_memory() == 4000
    groups.limit(name.format(""), "6000")
    assert machine_memory() == 4000


@pytest.mark.parametrize("own", ["0::/docker/123", "0::/../../x", "0::/", "7:memory:/docker/123"])
def test_in_a_container_the_mount_is_the_group(groups: Groups, own: str) -> None:
    groups.own(own)
    groups.limit("v2/memory.max", "3000")
    groups.limit("v1/memory.limit_in_bytes", "3000")
    assert machine_memory() == 3000


def test_other_controllers_do_not_limit_memory(groups: Groups) -> None:
    groups.own("3:cpu:/", "nonsense", "")
    groups.limit("v1/memory.limit_in_bytes", "3000")
    assert machine_memory() == 16_000


@pytest.mark.parametrize("text", ["", "max", "many", "-5", "0", "äö"])
def test_a_limit_that_is_no_number_is_none(groups: Groups, text: str) -> None:
    groups.own("0::/")
    groups.limit("v2/memory.max", text)
    assert machine_memory() == 16_000


def test_a_system_that_does_not_tell_its_memory_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", sysconf, raising=False)
    assert machine_module._physical_memory() > 0


def test_this_machine_has_memory() -> None:
    assert 64 * MB < machine_memory() < 1 << 50
    assert parse_memory("50%") == pytest.approx(machine_memory() / 2, abs=2)


def test_small_records_count_each_object_once_and_end_in_a_cycle() -> None:
    text, inner = "a shared text", [1.5, 2.5]
    record = {"text": text, "inner": inner, "again": [inner, text]}
    members = [record, record["again"], inner, *inner, text, "inner", "again"]
    assert nbytes(record) == sum(map(sys.getsizeof, [*members, "text"]))
    record["self"] = record
    assert nbytes(record) == sum(map(sys.getsizeof, [*members, "text", "self"]))
