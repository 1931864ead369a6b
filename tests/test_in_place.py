"""Changes in place survive spilling, flushing and reopening; what was only read is not written again."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from chest import Chest, _pagemap, _pickled, safe
from chest.serializers import _registry


@dataclass
class Thing:
    name: str = "thing"
    parts: list[int] = field(default_factory=list)
    table: dict[str, Any] = field(default_factory=dict)


BIG = 300_000  # items: well above what is kept in the index

CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    # name: (make, change in place, what to compare)
    "list": (lambda: [1, 2, 3], lambda v: v.append(4), list),
    "nested list": (lambda: {"a": [[1], [2]]}, lambda v: v["a"][1].append(3), lambda v: v["a"]),
    "dict": (lambda: {"a": 1}, lambda v: v.update(b=2), dict),
    "set": (lambda: {1, 2}, lambda v: v.add(3), set),
    "deque": (lambda: deque([1]), lambda v: v.append(2), list),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), list),
    "defaultdict": (lambda: defaultdict(list), lambda v: v["x"].append(1), dict),
    "bytearray": (lambda: bytearray(10), lambda v: v.__setitem__(0, 9), bytes),
    "object": (Thing, lambda v: setattr(v, "name", "other"), lambda v: v.name),
    "object's list": (Thing, lambda v: v.parts.append(1), lambda v: v.parts),
    "tuple's list": (lambda: (1, [2]), lambda v: v[1].append(3), lambda v: v),
    "big list": (lambda: list(range(BIG)), lambda v: v.__setitem__(BIG // 2, -1), lambda v: v[BIG // 2]),
    "big bytearray": (lambda: bytearray(BIG), lambda v: v.__setitem__(BIG // 2, 7), bytes),
    "small array": (lambda: np.zeros(10), lambda v: v.__setitem__(0, 1), lambda v: v.tolist()),
    "array": (lambda: np.zeros(BIG), lambda v: v.__setitem__(BIG // 2, 1), lambda v: (v.sum(), v[BIG // 2])),
    "fortran": (lambda: np.zeros((600, 600), order="F"), lambda v: v.__setitem__((5, 7), 1), lambda v: v[5].tolist()),
    "strided": (lambda: np.zeros(2 * BIG)[::2], lambda v: v.__setitem__(3, 1), lambda v: (v.sum(), v[3])),
    "structured": (
        lambda: np.zeros(BIG // 4, dtype=[("a", "i4"), ("b", "f8")]),
        lambda v: v["b"].__setitem__(9, 2.5),
        lambda v: v["b"].sum(),
    ),
    "objects": (lambda: np.array([[1], {"a": 2}], dtype=object), lambda v: v[0].append(5), lambda v: list(v)),
    "arrays in a dict": (
        lambda: {"x": np.zeros(BIG), "y": [np.ones(BIG), np.ones(3)]},
        lambda v: v["y"][0].__setitem__(BIG - 1, 5),
        lambda v: (v["x"].sum(), v["y"][0].sum()),
    ),
    "array grows": (lambda: {"a": np.zeros(BIG)}, lambda v: v.update(a=np.ones(BIG + 1)), lambda v: v["a"].sum()),
    "frame": (
        lambda: pd.DataFrame({"a": np.zeros(BIG), "b": np.zeros(BIG)}),
        lambda v: v.loc.__setitem__((7, "a"), 3.0),
        lambda v: (v["a"].sum(), v["b"].sum()),
    ),
    "frame with text": (
        lambda: pd.DataFrame({"a": np.arange(5_000), "s": ["x" * (i % 9) for i in range(5_000)]}),
        lambda v: v.loc.__setitem__((7, "s"), "changed"),
        lambda v: v["s"].tolist(),
    ),
    "frame's new column": (
        lambda: pd.DataFrame({"a": np.zeros(BIG)}),
        lambda v: v.__setitem__("b", 1.0),
        lambda v: (list(v.columns), v.sum().sum()),
    ),
    "series": (lambda: pd.Series(np.zeros(BIG)), lambda v: v.iloc.__setitem__(5, 2.0), lambda v: v.sum()),
}


UNSAFE = ("defaultdict", "objects")  # what the safe serializer refuses


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, serializer: str) -> Any:
    if serializer == "safe" and request.param in UNSAFE:
        pytest.skip("refused by the safe serializer")
    return CASES[request.param]


@pytest.fixture(params=["pickle", "safe"])
def serializer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "safe":
        pytest.importorskip("msgspec")
        for table in ("by_class", "by_name"):  # what is registered here, other tests expect to be refused
            monkeypatch.setattr(_registry, table, getattr(_registry, table).copy())
        safe.register(Thing)
        safe.register(deque, pack=list, unpack=deque)
        safe.register(OrderedDict, pack=lambda value: list(value.items()), unpack=OrderedDict)
    return str(request.param)


@pytest.fixture(params=["pagemap-scan", "pagemap", "hashes"])
def way(request: pytest.FixtureRequest, serializer: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """How written pages are found: by the kernel's newest means, its old one, or not at all."""
    if serializer == "safe" and request.param != "pagemap-scan":
        pytest.skip("the same for every serializer")
    if request.param == "pagemap":
        monkeypatch.setattr(_pagemap, "USE_PAGEMAP_SCAN", False)
    if request.param == "hashes":
        monkeypatch.setattr(_pagemap, "USE_PAGEMAP", False)
    return str(request.param)


@pytest.mark.parametrize("limit", [10**9, 0, 3_000_000], ids=["memory", "spilled", "mixed"])
def test_changes_of_a_loaded_value_are_kept(case: Any, way: str, limit: int, serializer: str, tmp_path: Path) -> None:
    make, change, look = case
    expected = make()
    change(expected)
    with Chest(path=tmp_path / "c", serializer=serializer, available_memory=limit) as c:
        c["x"] = make()
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        change(c["x"])
        assert look(c["x"]) == look(expected)
        c.flush()
        assert look(c["x"]) == look(expected)
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        assert look(c["x"]) == look(expected)
        change(c["x"])
        change(expected)
    with Chest(path=tmp_path / "c") as c:
        assert look(c["x"]) == look(expected)


@pytest.mark.parametrize("limit", [10**9, 0, 3_000_000], ids=["memory", "spilled", "mixed"])
def test_changes_of_what_was_set_are_kept_after_a_flush(case: Any, limit: int, serializer: str, tmp_path: Path) -> None:
    make, change, look = case
    expected, mine = make(), make()
    change(expected)
    with Chest(path=tmp_path / "c", serializer=serializer, available_memory=limit) as c:
        c["x"] = mine
        c.flush()  # written and out of memory, but still held here
        change(mine)
        assert c["x"] is mine
        c.sync()
        change(mine)
        change(expected)
        del mine
    with Chest(path=tmp_path / "c") as c:
        assert look(c["x"]) == look(expected)


@pytest.mark.parametrize("limit", [10**9, 0, 3_000_000], ids=["memory", "spilled", "mixed"])
def test_what_was_only_read_is_not_written_again(case: Any, way: str, limit: int, serializer: str, tmp_path: Path) -> None:
    make, _, look = case
    with Chest(path=tmp_path / "c", serializer=serializer, available_memory=limit) as c:
        c["x"] = make()
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        for _ in range(3):
            look(c["x"])
            c.sync()
            c.flush()
        assert c.stats().writes == 0
    gc.collect()


def test_a_mapped_array_is_lent_out_and_the_same_object_comes_back(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", available_memory=0) as c:
        c["a"] = np.zeros(BIG)
        a = c["a"]
        assert c["a"] is a
        assert c.memory_usage == 0
        a[0] = 1
        c.flush()
        assert c["a"] is a
        a[1] = 2
        view = a[1:3]
        del a
        c["b"] = 1
        view[1] = 3
        del view
        c["b"] = 2
        assert c["a"][:4].tolist() == [1, 2, 3, 0]
    with Chest(path=tmp_path / "c") as c:
        assert c["a"][:4].tolist() == [1, 2, 3, 0]


def test_a_part_that_is_held_keeps_its_value_watched(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", available_memory=50_000) as c:
        c["d"] = {"rows": [1]}
        rows = c["d"]["rows"]
        c.move_to_disk("d")
        for i in range(100):
            c[i] = "x" * 5_000
        assert "d" not in c.inmem
        rows.append(2)
        assert c["d"]["rows"] is rows
        del rows
    with Chest(path=tmp_path / "c") as c:
        assert c["d"] == {"rows": [1, 2]}


def test_changes_of_what_was_written_along_with_others_are_kept(tmp_path: Path) -> None:
    with Chest[str, Any](path=tmp_path / "c", available_memory=200_000) as c:
        for i in range(100):
            c[f"first{i}"] = "x" * 1_000
        held = {f"held{i}": [i] for i in range(50)}
        for key, value in held.items():
            c[key] = value
        dirty = set(c._dirty)
        for i in range(120):
            c[f"last{i}"] = "x" * 1_000
        along = [key for key in held if key in dirty and key not in c._dirty and key in c._entries]
        assert along  # written, and still in memory
        for value in held.values():
            value.append("changed")
        del value
    with Chest[str, Any](path=tmp_path / "c") as c:
        assert {key: c[key] for key in held} == held


def test_changes_in_a_loop_over_values_and_items_are_kept(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c", available_memory=0) as c:
        for i in range(300):
            c[i] = [i]
        for value in c.values():
            value.append("v")
        for key, value in c.items():
            value.append(key)
    with Chest(path=tmp_path / "c") as c:
        assert dict(c) == {i: [i, "v", i] for i in range(300)}


def test_many_lent_values_do_not_stay_in_memory_for_ever() -> None:
    with Chest(available_memory=0) as c:
        for i in range(1_000):
            c[i] = [i]
        kept = [c[i] for i in range(1_000)]
        for i, value in enumerate(kept):
            value.append(i)
        del kept, value
        c.flush()
        assert len(c._lent) == 0
        assert all(c[i] == [i, i] for i in range(1_000))


def test_a_shared_part_of_many_values_does_not_pin_them_all() -> None:
    columns = ["a", "b"]
    with Chest(available_memory=100_000) as c:
        for i in range(2_000):
            c[i] = {"columns": columns, "data": "x" * 10_000}
        assert sum(c._pinned.values()) <= 4 << 20
        assert c[5] == {"columns": ["a", "b"], "data": "x" * 10_000}


def test_sizes_are_taken_again_when_a_value_grew() -> None:
    with Chest(available_memory=10_000_000) as c:
        c["x"] = []
        c.sync()
        before = c.memory_usage
        c["x"].extend(range(100_000))
        c.sync()
        assert c.memory_usage > before + 400_000


WRITES: dict[str, Callable[[Chest[Any, Any]], Any]] = {
    "sync": lambda c: c.sync(),
    "a transaction": lambda c: c.update(other=1),
    "setdefault": lambda c: c.setdefault("other", 1),
    "popitem": lambda c: c.popitem(),
    "a file": lambda c: c.key_to_filename("k"),
    "others that spill": lambda c: c.update((i, bytes(50_000)) for i in range(20)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_value_that_is_held_by_whoever_set_it_may_be_changed_after_it_was_written(
    write: Callable[[Chest[Any, Any]], Any], tmp_path: Path
) -> None:
    value = [1]
    with Chest[Any, Any](path=tmp_path / "c", available_memory=500_000) as chest:
        chest["k"] = value
        chest["last"] = 1
        write(chest)
        value.append(2)
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert chest["k"] == [1, 2]


RESHAPED = {
    "shape": lambda v: setattr(v, "shape", (BIG // 2, 2)),
    "dtype": lambda v: setattr(v, "dtype", np.dtype("i8")),
    "byte order": lambda v: setattr(v, "dtype", v.dtype.newbyteorder()),
    "metadata": lambda v: setattr(v, "dtype", np.dtype("f8", metadata={"unit": "m"})),
    "read-only": lambda v: v.setflags(write=False),
}


@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")  # numpy 2.4 would rather have new views
@pytest.mark.parametrize("limit", [10**9, 0], ids=["memory", "spilled"])
@pytest.mark.parametrize("what", RESHAPED)
def test_what_changes_of_a_mapped_array_beside_its_elements_is_kept(what: str, limit: int, tmp_path: Path) -> None:
    def look(value: Any) -> Any:
        return value.shape, value.dtype.str, value.dtype.metadata, value.flags.writeable, value.tobytes()

    expected = np.arange(float(BIG))
    with Chest(path=tmp_path / "c") as c:
        c["x"] = expected.copy()
    RESHAPED[what](expected)
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        RESHAPED[what](c["x"])
    with Chest(path=tmp_path / "c") as c:
        assert look(c["x"]) == look(expected)


def test_an_array_that_was_only_read_is_neither_pickled_nor_mapped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Chest(path=tmp_path / "c") as c:
        c["x"], c["y"] = np.arange(float(BIG)), [np.arange(float(BIG)), np.zeros((3, BIG), order="F")]
    if _pagemap.written_pages(0, 0) is None:
        pytest.skip("the kernel does not tell which pages were written")
    probed: list[Any] = []
    with Chest[str, Any](path=tmp_path / "c") as c:
        store: Any = c._store

        def probe(value: Any) -> Any:
            probed.append(value)
            return _pickled.probe(value)

        monkeypatch.setattr(store, "_files", store._files._replace(probe=probe))
        monkeypatch.setattr(store, "_load_again", lambda *_: pytest.fail("it was mapped again"))
        assert c["x"][5] == c["y"][0][5] == 5
        c.flush()
        assert [type(value) for value in probed] == [list]
        assert c.stats().writes == 0


class Referable:
    """Something that a weak reference leads back to."""

    def __init__(self) -> None:
        self.items: list[int] = []


def test_a_value_that_a_weak_reference_leads_back_to_is_looked_at_again(tmp_path: Path) -> None:
    for filler in ("x" * 1000, {"a": ["x" * 1000]}):
        with Chest[Any, Any](path=tmp_path / "c", available_memory=1_000_000, loose=0) as chest:
            chest["k"] = Referable()
            back = weakref.ref(chest["k"])
            chest["k"] = value = Referable()
            back = weakref.ref(value)
            del value
            for i in range(2000):  # with which it is written along
                chest[i] = filler
            value = back()
            assert value is not None
            value.items.append(1)
            del value
            chest.flush()
            assert back() is None
            assert chest["k"].items == [1]
            chest.clear()
