"""A chest is a dictionary: CPython's own tests of mappings, and what they leave out, in memory, spilled and mixed."""

from __future__ import annotations

import collections
import gc
import inspect
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from chest import Chest, CorruptError

Make = Callable[..., Chest[Any, Any]]

LIMITS = {"all in memory": 1_000_000_000, "all spilled": 0, "mixed": 2_000}


@pytest.fixture(params=LIMITS, ids=lambda name: name.replace(" ", "-"))
def limit(request: pytest.FixtureRequest) -> int:
    return LIMITS[request.param]


@pytest.fixture
def make(limit: int) -> Iterator[Make]:
    made: list[Chest[Any, Any]] = []

    def make(*args: Any, **kwargs: Any) -> Chest[Any, Any]:
        kwargs.setdefault("available_memory", limit)
        made.append(Chest(*args, **kwargs))
        return made[-1]

    yield make
    for chest in made:
        chest.close()


SETTINGS = inspect.signature(Chest).parameters.keys()


class InMemory(Chest[Any, Any]):
    """Made as CPython's tests make it, and copies as chests make them."""

    limit = LIMITS["all in memory"]

    def __init__(self, data: Any = None, **items: Any) -> None:
        settings = {name: items.pop(name) for name in SETTINGS & items.keys()}
        super().__init__(data, **{"available_memory": self.limit} | settings)
        self.update(items)


class Spilled(InMemory):
    limit = LIMITS["all spilled"]


class Mixed(InMemory):
    limit = 300


try:  # some distributions leave CPython's own tests out
    from test import mapping_tests
except ImportError:
    mapping_tests = None

NAMES = [] if mapping_tests is None else [n for n in dir(mapping_tests.TestMappingProtocol) if n.startswith("test_")]


@pytest.mark.skipif(mapping_tests is None, reason="this Python comes without its test package")
@pytest.mark.parametrize("kind", [InMemory, Spilled, Mixed])
@pytest.mark.parametrize("name", NAMES)
def test_cpythons_mapping_protocol(kind: type[InMemory], name: str) -> None:
    case = mapping_tests.TestMappingProtocol(name)
    case.type2test = kind
    case.debug()  # raises what fails
    gc.collect()


def test_zict_check_mapping_passes(make: Make) -> None:
    utils = pytest.importorskip("zict.tests.utils_test")
    utils.check_mapping(make())


def test_values_really_are_spilled_where_the_limit_says_so() -> None:
    for limit, spilled in ((0, 50), (2_000, 1), (1_000_000, 0)):
        with Chest(available_memory=limit) as c:
            for i in range(50):
                c[i] = "x" * 100 + str(i)
            assert (c.stats().spills >= spilled) if spilled else (c.stats().spills == 0)
            assert [c[i] for i in range(50)] == ["x" * 100 + str(i) for i in range(50)]


def test_get_many_gives_what_each_key_gives_and_leaves_out_what_is_not_there(tmp_path: Path, limit: int) -> None:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=limit) as chest:
        for i in range(300):
            chest[i] = [i]
        for i in range(300, 310):
            chest[i] = str(i) * 50_000
        del chest[7]
        chest["unwritten"] = "x"
        keys = ["unwritten", 308, *range(290, -1, -3), "absent", 7, 1.0, True, "unwritten"]
        found = chest.get_many(iter(keys))
        assert list(found) == [key for key in dict.fromkeys(keys) if key in chest]
        assert all(found[key] == chest[key] for key in found)
        found[290].append("changed")
        assert chest[290] == [290, "changed"]
        del found
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert chest[290] == [290, "changed"]
        with chest.transaction():
            chest[0] = "inside"
            assert chest.get_many([0, 3, "absent"]) == {0: "inside", 3: [3]}
        with pytest.raises(TypeError):
            chest.get_many([[]])


def test_what_on_miss_sets_while_many_are_read_is_kept(tmp_path: Path) -> None:
    told = []

    def on_miss(key: str) -> None:
        told.append(key)
        if key == "a":
            chest["b"] = "set meanwhile"

    with Chest[str, Any](path=tmp_path / "c", on_miss=on_miss) as chest:
        chest.update(a=1, b=2, c=3)
        chest.flush()
        chest.get_many(["a", "b", "c", "absent"])
        assert told == ["a", "b", "c"]
        assert chest["b"] == "set meanwhile"
    with Chest[str, Any](path=tmp_path / "c") as chest:
        assert chest["b"] == "set meanwhile"


def test_what_on_miss_sets_of_the_key_that_is_read_is_kept(tmp_path: Path) -> None:
    with Chest[str, Any](path=tmp_path / "c", on_miss=lambda key: chest.__setitem__(key, "new")) as chest:
        chest["a"] = "old"
        chest.flush()
        assert chest["a"] in ("old", "new")
        assert chest["a"] == "new"


def test_get_many_passes_over_nothing_that_is_damaged(tmp_path: Path) -> None:
    with Chest[str, Any](path=tmp_path / "c") as chest:
        chest.update(a=[1], b=[2])
        chest.flush()
        index: Any = chest._store.index
        env = index._env
        with env.begin(env.index, write=True) as txn:
            txn.put(b"sb", txn.get(b"sb")[:-1] + b"?")
        assert chest.get_many(["a"]) == {"a": [1]}
        with pytest.raises(CorruptError):
            chest.get_many(["a", "b"])


def test_prefetch_brings_in_what_fits_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    with Chest[int, Any](path=tmp_path / "c", available_memory=10_000) as chest:
        for i in range(500):
            chest[i] = "x" * 100
        chest.flush()
        chest.prefetch(range(20))
        assert set(chest.inmem) == set(range(20))
        chest.prefetch(range(500))
        assert chest.memory_usage <= 10_000
        with pytest.raises(KeyError):
            chest.prefetch([1, 1000])


def test_order_is_insertion_order_and_kept_when_a_key_is_set_again(make: Make) -> None:
    c = make()
    keys = list(range(300))
    random.Random(1).shuffle(keys)
    for key in keys:
        c[key] = str(key) * 20
    for key in keys[::3]:
        c[key] = "again"
    assert list(c) == keys
    assert list(reversed(c)) == keys[::-1]
    assert list(c.keys()) == keys
    assert [k for k, _ in c.items()] == keys
    c.flush()
    assert list(c) == keys
    del c[keys[0]]
    c[keys[0]] = "moved"
    assert list(c) == [*keys[1:], keys[0]]
    c.flush()
    assert list(c) == [*keys[1:], keys[0]]
    assert next(reversed(c.items())) == (keys[0], "moved")


def test_order_survives_that_later_values_are_spilled_first() -> None:
    with Chest(available_memory=50_000) as c:
        expected = {}
        for i in range(200):  # large values leave first, so they are written before the small ones around them
            expected[i] = c[i] = "x" * (10_000 if i % 10 == 0 else 10)
        assert c.stats().spills > 0
        assert list(c) == list(expected)
        assert list(c.items()) == list(expected.items())


def test_popitem_takes_the_last_one(make: Make) -> None:
    c = make((i, "v" * 50 + str(i)) for i in range(100))
    c.flush()
    c["new"] = 1
    expected: list[Any] = [*range(100), "new"]
    while c:
        assert c.popitem()[0] == expected.pop()
    with pytest.raises(KeyError):
        c.popitem()


def test_equal_keys_are_one_key_and_the_first_gives_its_type(make: Make) -> None:
    c = make()
    c[1] = "one"
    c[(1, 2)] = "pair"
    c.flush()
    for same in (1.0, True, Decimal(1), Fraction(1), 1 + 0j):
        assert c[same] == "one"
        c[same] = "one"
    c[(1.0, 2.0)] = "pair again"
    assert list(c.items()) == [(1, "one"), ((1, 2), "pair again")]
    assert [type(k) for k in c] == [int, tuple]
    c[True] = "still"
    c.flush()
    assert list(map(type, c)) == [int, tuple]
    c[2.0] = "float first"
    c.flush()
    c[2] = "int later"
    assert repr(list(c)) == "[1, (1, 2), 2.0]"


def test_different_keys_never_meet(make: Make) -> None:
    keys: list[Any] = [
        1,
        "1",
        b"1",
        "X",
        "x",
        "_a",
        ("a", "b"),
        ("_a", "b"),
        ("a",),
        "a",
        (("a", "b"),),
        None,
        "None",
        "",
    ]
    keys += [
        "../../x",
        "a/b",
        ".keys",
        "CON",
        "\x00",
        "\ud800",
        "é",
        "e\u0301",
        "k" * 600,
        "k" * 601,
        frozenset({1}),
        (1,),
    ]
    c = make((key, [n, "x" * 70_000]) for n, key in enumerate(keys))
    c.flush()
    for n, key in enumerate(keys):
        assert c[key] == [n, "x" * 70_000]
    assert list(c) == keys


class Point:
    """Its equality is its own affair."""

    def __init__(self, x: float, y: float) -> None:
        self.x, self.y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and round(self.x) == round(other.x) and round(self.y) == round(other.y)

    def __hash__(self) -> int:
        return hash((round(self.x), round(self.y)))


def test_keys_with_an_equality_of_their_own(tmp_path: Path, limit: int) -> None:
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        c[Point(1, 2)] = "a"
        c[Point(3, 4)] = "b"
        c.flush()
        c[Point(1.1, 2.1)] = "c"
        assert Point(1.2, 2.2) in c
        assert len(c) == 2
    with Chest(path=tmp_path / "c", available_memory=limit) as c:
        assert c[Point(0.9, 1.9)] == "c"
        assert [p.x for p in c] == [1, 3]
        del c[Point(1, 2)]
        assert Point(1, 2) not in c
        assert len(c) == 1


def test_unions(make: Make) -> None:
    c = make({"a": 1, "b": 2})
    both = c | {"b": 3, "c": 4}
    assert both == {"a": 1, "b": 3, "c": 4}
    assert isinstance(both, Chest)
    assert c == {"a": 1, "b": 2}
    other = {"b": 3, "z": 0} | c
    assert list(other.items()) == [("b", 2), ("z", 0), ("a", 1)]
    c |= [("q", 5)]
    assert c == {"a": 1, "b": 2, "q": 5}
    with pytest.raises(TypeError):
        c | 5
    both.close()
    other.close()


def test_copy_and_fromkeys_are_scratch_chests_of_their_own(make: Make) -> None:
    c = make({"a": [1], "b": [2]})
    with c.copy() as d:
        d["a"].append(2)
        assert d.path != c.path
        assert c["a"] == [1]
        assert d == {"a": [1, 2], "b": [2]}
    with Chest.fromkeys("ab", 7) as e:
        assert e == {"a": 7, "b": 7}


def test_equality_and_hash(make: Make) -> None:
    c = make({"a": 1, "b": [2]})
    assert c == {"b": [2], "a": 1}
    assert c != {"a": 1, "b": [3]}
    assert c != {"a": 1}
    assert c != [("a", 1)]
    assert c == make({"a": 1, "b": [2]})
    with pytest.raises(TypeError):
        hash(c)


def test_update_takes_all_that_dict_takes(make: Make) -> None:
    class HasKeys:
        def keys(self) -> list[str]:
            return ["k"]

        def __getitem__(self, key: str) -> str:
            return key * 2

    c = make()
    c.update({"a": 1})
    c.update([("b", 2)], c=3)
    c.update(HasKeys())
    c.update(make({"d": 4}))
    c.update({"a": 9, "e": 5}, overwrite=False)
    c.update(collections.OrderedDict(a=8), False)
    assert list(c.items()) == [("a", 1), ("b", 2), ("c", 3), ("k", "kk"), ("d", 4), ("e", 5)]
    with pytest.raises(TypeError):
        c.update({}, True, 3)


def test_get_pop_setdefault_clear(make: Make) -> None:
    c = make({"a": 1})
    assert c.get("a") == 1
    assert c.get("z", 5) == 5
    assert c.setdefault("b", []) == []
    c["b"].append(1)
    assert c.setdefault("b", 9) == [1]
    assert c.pop("b") == [1]
    assert c.pop("b", None) is None
    with pytest.raises(KeyError, match="b"):
        c.pop("b")
    c.clear()
    assert len(c) == 0
    assert list(c) == []
    c["a"] = 2
    assert list(c.items()) == [("a", 2)]


def test_missing_is_asked_as_in_dict() -> None:
    class Counting(Chest[str, int]):
        def __missing__(self, key: str) -> int:
            return 0

    with Counting() as c:
        c["a"] += 1
        assert c["a"] == 1
        assert "b" not in c


def test_unhashable_keys_are_type_errors_as_in_dict(make: Make) -> None:
    c = make({"a": 1})
    for use in (lambda: c[[]], lambda: c.__setitem__([], 1), lambda: [] in c, lambda: c.get([]), lambda: c.pop([], 1)):
        with pytest.raises(TypeError, match="unhashable"):
            use()


def test_views_are_live_and_set_like(make: Make) -> None:
    c = make({"a": 1, "b": 2})
    keys, items, values = c.keys(), c.items(), c.values()
    c["c"] = 3
    assert list(keys) == ["a", "b", "c"]
    assert list(reversed(keys)) == ["c", "b", "a"]
    assert keys & {"a", "z"} == {"a"}
    assert ("c", 3) in items
    assert ("c", 4) not in items
    assert 3 in values
    assert list(reversed(values)) == [3, 2, 1]
    assert len(items) == 3


def test_iteration_survives_changes_made_meanwhile(make: Make) -> None:
    c = make((i, str(i)) for i in range(3000))
    c.flush()
    seen = []
    for key in c:
        seen.append(key)
        if key == 10:
            for gone in range(11, 2500):
                del c[gone]
            c["new"] = 1
    assert seen[:11] == list(range(11))
    assert seen[-500:] == list(range(2500, 3000)) or seen[-501:] == [*range(2500, 3000), "new"]
    assert len(c) == 512


def test_iteration_promotes_nothing() -> None:
    with Chest(available_memory=100_000) as c:
        for i in range(1000):
            c[i] = [str(i) * 100]
        c.flush()
        for i in range(50):
            c[i]
        before = list(c.inmem), c.memory_usage
        assert sum(len(v[0]) for v in c.values()) == sum(len(str(i)) * 100 for i in range(1000))
        assert len(list(c.items())) == 1000
        assert c == {i: [str(i) * 100] for i in range(1000)}
        assert (list(c.inmem), c.memory_usage) == before


def test_a_chest_goes_with_its_last_reference() -> None:
    gc.disable()
    try:
        c = Chest({"a": [1]}, available_memory=0)
        c["a"].append(2)
        path = c.path
        del c
        assert not Path(path).exists()
    finally:
        gc.enable()


@pytest.mark.parametrize("look", [lambda c: c, lambda c: c.items(), lambda c: reversed(c)], ids=["keys", "items", "reversed"])
def test_a_key_that_is_deleted_while_it_is_ahead_is_not_met_any_more(tmp_path: Path, look: Callable[[Any], Any]) -> None:
    with Chest[int, int](path=tmp_path / "ahead", loose=0) as chest:
        chest.update((n, n) for n in range(100))
        chest.flush()
        met = []
        for item in look(chest):
            key = item[0] if isinstance(item, tuple) else item
            met.append(key)
            if len(met) == 1:
                del chest[50]
        assert 50 not in met
        assert len(met) == 99
