"""What a value looked like when it was loaded, against what it looks like now; and who holds it, at a glance.

The compiled part only: without it pickles are compared, and Python asks who holds a value.
"""

from __future__ import annotations

import copy
import datetime
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chest import Chest, _changes, _hot
from chest._hot import Entry, baseline_bytes, picture, who_holds

pytestmark = pytest.mark.skipif(not _hot.COMPILED, reason="the compiled part is not here")

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.dates()
    | st.tuples(st.integers(), st.text(max_size=2))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=12,
)


def loaded(value: Any) -> Any:
    """The value as it comes from the store: nobody holds a part of it."""
    return pickle.loads(pickle.dumps(value, 5))


def shown(value: Any) -> Any:
    """The value so that == tells what pickle tells: types, -0.0 and NaN, the order of a dict."""
    if isinstance(value, dict):
        return dict, [(shown(key), shown(member)) for key, member in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [shown(member) for member in value]
    return type(value), value.hex() if isinstance(value, float) else value


def containers(value: Any) -> list[Any]:
    """The lists and dicts in a value."""
    found = [value] if isinstance(value, (list, dict)) else []
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        found += containers(member)
    return found


def change(container: Any, leaf: Any, way: int) -> None:
    """Change something in a list or dict, or put there what was there."""
    if isinstance(container, list):
        if way == 0 or not container:
            container.append(leaf)
        elif way == 1:
            del container[0]
        elif way == 2:
            container[-1] = leaf
        else:
            container.reverse()
    elif way == 0 or not container:
        container["new"] = leaf
    elif way == 1:
        del container[next(iter(container))]
    elif way == 2:
        container[next(iter(container))] = leaf
    else:
        key = next(iter(container))
        container[key] = container.pop(key)  # comes last now


@given(value=VALUES, leaf=LEAVES, way=st.integers(0, 3), which=st.integers(0, 10))
def test_a_picture_matches_until_something_changes(value: Any, leaf: Any, way: int, which: int) -> None:
    value = loaded(value)
    taken = picture(value)
    if taken is None:
        return  # something in it occurs twice
    assert taken.matches(value)
    inside = containers(value)
    if not inside:
        return
    before = copy.deepcopy(value)
    change(inside[which % len(inside)], leaf, way)
    if taken.matches(value):
        assert shown(value) == shown(before)


@pytest.mark.parametrize("leaf", [1, 10**30, 0.5, "text", b"bytes", None, True])
def test_what_was_replaced_by_the_same_is_no_change(leaf: Any) -> None:
    value = loaded({"a": [leaf], leaf: 1})
    taken = picture(value)
    value["a"][0] = loaded(leaf)
    assert taken.matches(value)


@pytest.mark.parametrize(
    ("old", "new"), [(1, True), (1, 1.0), (0.0, -0.0), ("a", b"a"), (0.5, math.nan), ((1, 2), [1, 2]), (None, 0)], ids=repr
)
@pytest.mark.parametrize("place", [lambda v: [v], lambda v: {"k": v}, lambda v: ([v],), lambda v: {"k": [{"x": v}]}])
def test_what_is_equal_and_not_the_same_is_a_change(old: Any, new: Any, place: Callable[[Any], Any]) -> None:
    value = loaded(place(old))
    taken = picture(value)
    container = containers(value)[-1]
    container[0 if isinstance(container, list) else next(iter(container))] = new
    assert not taken.matches(value)


def test_nan_is_no_change() -> None:
    value = loaded([math.nan, {"x": math.nan}])
    taken = picture(value)
    value[0] = float("nan")
    assert taken.matches(value)


def test_what_comes_to_share_a_part_has_changed() -> None:
    value = loaded([[1], [1], {"a": [1]}])
    taken = picture(value)
    value[1] = value[0]
    assert not taken.matches(value)
    value = loaded([[1], [1], {"a": [1]}])
    taken = picture(value)
    value[2]["a"] = value[0]
    assert not taken.matches(value)


def test_a_part_that_was_replaced_by_an_equal_one_is_either_found_or_the_same() -> None:
    for _ in range(1000):  # the address of what was freed is given out again at once
        value = loaded([[1, 2], {"x": 1}])
        taken = picture(value)
        value[0] = None
        value[0] = [1, 3]
        assert not taken.matches(value)
        value[0] = [1, 2]
        value[1]["x"] = 2
        assert not taken.matches(value)


def test_a_key_that_was_replaced_by_an_equal_one_is_a_change() -> None:
    value = loaded({1: "a"})
    taken = picture(value)
    del value[1]
    value[True] = "a"
    assert not taken.matches(value)


class Plain:
    pass


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        [bytearray(b"x")],
        [Plain()],
        [frozenset({1})],
        (lambda part: [part, part])([1]),
        {"a": {frozenset({1}): 2}},
    ],
    ids=["set", "bytearray", "instance", "frozenset", "shared", "key"],
)
def test_there_is_no_picture_of_what_is_not_plain(value: Any) -> None:
    assert picture(loaded(value)) is None


def test_there_is_no_picture_of_what_is_deep_or_held() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    assert picture(deep) is None
    value = loaded([[1]])
    inner = value[0]
    assert picture(value) is None  # the caller may put `inner` anywhere
    assert inner == [1]


def test_a_picture_takes_a_pointer_for_each_member() -> None:
    value = loaded({"a": [1, 2, 3], "b": datetime.date(2026, 1, 1)})
    assert 80 <= baseline_bytes(picture(value)) <= 140
    assert picture([]).__class__.__name__ == "Picture"
    assert baseline_bytes(b"12345") == 5
    assert baseline_bytes(1) == 0


HOLDS: list[Callable[[Any], Any]] = [
    lambda value: None,
    lambda value: value,
    lambda value: (
        next(iter(value.values() if isinstance(value, dict) else value), None) if not isinstance(value, str) else value
    ),
    lambda value: iter(value),
]


@given(value=VALUES.filter(lambda v: isinstance(v, (list, dict, tuple))), hold=st.sampled_from(HOLDS))
def test_who_holds_a_value_is_found_out_as_in_python(value: Any, hold: Callable[[Any], Any]) -> None:
    entry = Entry("key", loaded(value), 1)
    del value
    keeps = hold(entry.value)
    in_python = _changes.held(entry.value)  # not in the assertion, which holds what it has looked at
    assert bool(who_holds(entry)) == bool(in_python)
    del keeps
    in_python = _changes.held(entry.value)
    assert bool(who_holds(entry)) == bool(in_python)


@pytest.mark.parametrize("n", [0, 3])
def test_a_part_that_somebody_holds_who_holds(n: int) -> None:
    entry = Entry("key", loaded([[{"deep": [n]}], 1]), 1)
    assert not who_holds(entry)
    part = entry.value[0][0]["deep"]
    assert who_holds(entry)
    part.append(1)
    del part
    assert not who_holds(entry)


def test_what_was_read_is_neither_pickled_again_nor_kept_as_bytes(tmp_path: Path) -> None:
    with Chest[int, Any](path=tmp_path / "c", available_memory=1 << 20, loose=0) as chest:
        for i in range(3000):
            chest[i] = {"id": i, "data": b"x" * 500}
        chest.flush()
        dumped: list[Any] = []
        codec = chest._store.codec
        dumps = codec.dumps
        codec.dumps = lambda value: dumped.append(value) or dumps(value)  # type: ignore[func-returns-value]
        for i in range(3000):
            assert chest[i]["id"] == i
        assert chest.stats().spills > 3000
        assert dumped == []
        chest[5]["id"] = "changed"
        chest.flush()
        assert chest[5]["id"] == "changed"
        assert chest[6]["id"] == 6
        assert chest.memory_usage < 3000


def test_a_value_that_is_changed_after_it_was_written_along_is_written_again(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c", available_memory=200_000, loose=0) as chest:
        held = chest["held"] = [0]
        for i in range(1000):
            chest[i] = {"n": [i]}
            held.append(i)
            if i % 50 == 0:
                chest.setdefault("held", None)  # handed out again
        chest[10]["n"].append("late")
        del held
        for i in range(1000, 3000):
            chest[i] = {"n": [i]}
        chest.flush()
        assert chest["held"] == [0, *range(1000)]
        assert chest[10] == {"n": [10, "late"]}
        assert all(chest[i] == {"n": [i]} for i in range(3000) if i != 10)


class Interrupts:
    """A value of which Python is asked who holds it."""


def test_an_interrupt_while_python_is_asked_is_raised_and_other_errors_are_left_to_it() -> None:
    def pack(error: BaseException) -> Any:
        def raises(value: Any, extra: int) -> int:
            raise error

        _hot.setup_pictures(_changes.IMMUTABLE, _changes.ATOMS, raises)
        try:
            entry = Entry("key", Interrupts(), 1, True)
            return _hot.pack_rows(iter([entry]), pickle.dumps, pickle.dumps, bool, hash, 1000, 1000, 1000, [], [], [])
        finally:
            _hot.setup_pictures(_changes.IMMUTABLE, _changes.ATOMS, _changes.held)

    item, size = pack(ValueError())
    assert (item.key, size) == ("key", 0)
    with pytest.raises(KeyboardInterrupt):
        pack(KeyboardInterrupt())
