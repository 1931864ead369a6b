"""A chest against ``dict``: random operations, equal after every step; in memory, spilled and mixed.

Larger runs: ``CHEST_TORTURE=1`` (1,000 runs of 30 steps for each limit).
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from chest import Chest

FULL = bool(os.environ.get("CHEST_TORTURE"))

keys = st.one_of(
    st.integers(-3, 12),
    st.sampled_from(["a", "b", "_a", "X", "x", ("a", "b"), ("a", 1), 1.0, 2.5, True, None, frozenset({1, 2}), "é", "k" * 600]),
)


def _values(n: int) -> Any:
    """The n-th value: something of each kind, small and large."""
    kinds = [
        lambda: n,
        lambda: "text" * (n % 7),
        lambda: [n, "x", [n]],
        lambda: {"n": n, "inner": {"list": [n] * 5}},
        lambda: {n, n + 1},
        lambda: np.arange(n % 50),
        lambda: np.full(20_000, n),  # 160 KB: a file, mapped
        lambda: [np.full(10_000, n), {"a": np.full(9_000, n)}],
        lambda: "y" * 100_000,
        lambda: (n, [n]),
        lambda: bytearray(b"z" * 70_000),
    ]
    return kinds[n % len(kinds)]()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


def mutate(value: Any, n: int) -> bool:
    """Change a value in place, somewhere; False where it cannot be."""
    if isinstance(value, list):
        if n % 3 == 0 and value and mutate(value[-1], n // 3):
            return True
        value.append(n) if n % 2 else value.insert(0, n)
    elif isinstance(value, tuple):
        return any(mutate(member, n) for member in value)
    elif isinstance(value, dict):
        if n % 2 and "inner" in value:
            value["inner"]["list"].append(n)
        else:
            value[f"k{n % 5}"] = n
    elif isinstance(value, set):
        value.add(n)
    elif isinstance(value, np.ndarray):
        if not len(value):
            return False
        value[n % len(value)] = n
    elif isinstance(value, bytearray):
        value[n % len(value)] = n % 256
    else:
        return False
    return True


class ChestMachine(RuleBasedStateMachine):
    limit = 0
    serializer = "pickle"
    spills = 0
    given: dict[str, Any] = {}  # noqa: RUF012 - settings of the chest, that subclasses replace
    written = Bundle("keys")

    @initialize(n=st.integers(0, 20), first=st.lists(keys, min_size=4, max_size=12))
    def start(self, n: int, first: list[Any]) -> None:
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "c")
        self.model: dict[Any, Any] = {}
        self.held: list[tuple[Any, Any]] = []  # values of the chest that "the user" holds, with their twins
        self.n = n
        self.open()
        for key in first:  # an example of a few steps, most of which set nothing, would have nothing to spill
            self.set(key, False)

    def open(self) -> None:
        self.c: Chest[Any, Any] = Chest(path=self.path, available_memory=self.limit, serializer=self.serializer, **self.given)

    def value(self) -> tuple[Any, Any]:
        self.n += 1
        return _values(self.n), _values(self.n)

    @rule(key=keys, keep=st.booleans())
    def set(self, key: Any, keep: bool) -> None:
        mine, twin = self.value()
        self.c[key] = mine
        self.model[key] = twin
        if keep:
            self.held.append((mine, twin))

    @rule(key=keys)
    def delete(self, key: Any) -> None:
        if key in self.model:
            del self.model[key]
            del self.c[key]
        else:
            with pytest.raises(KeyError):
                del self.c[key]

    @rule(key=keys)
    def pop(self, key: Any) -> None:
        assert same(self.c.pop(key, "absent"), self.model.pop(key, "absent"))

    @rule()
    def popitem(self) -> None:
        if self.model:
            key, value = self.model.popitem()
            mine, its = self.c.popitem()
            assert mine == key
            assert same(its, value)

    @rule(key=keys, n=st.integers(0, 1000), keep=st.booleans())
    def change_in_place(self, key: Any, n: int, keep: bool) -> None:
        if key in self.model:
            mine, twin = self.c[key], self.model[key]
            assert same(mine, twin)
            mutate(mine, n)
            mutate(twin, n)
            if keep:
                self.held.append((mine, twin))

    @rule(n=st.integers(0, 1000))
    def change_while_iterating(self, n: int) -> None:
        for key, value in self.c.items():
            mutate(value, n)
            mutate(self.model[key], n)

    @rule(n=st.integers(0, 1000), at=st.integers(0, 1000))
    def change_what_is_held(self, n: int, at: int) -> None:
        if self.held:
            mine, twin = self.held[at % len(self.held)]
            mutate(mine, n)
            mutate(twin, n)

    @rule(n=st.integers(0, 5))
    def let_go(self, n: int) -> None:
        del self.held[n:]

    @rule(key=keys, n=st.integers(0, 1000))
    def hold_an_inner_one(self, key: Any, n: int) -> None:
        mine, twin = self.c.get(key), self.model.get(key)
        if isinstance(mine, dict) and "inner" in mine:
            self.held.append((mine["inner"]["list"], twin["inner"]["list"]))
        elif isinstance(mine, list) and mine and isinstance(mine[0], np.ndarray):
            self.held.append((mine[0][3:], twin[0][3:]))

    @rule()
    def flush(self) -> None:
        self.c.flush()
        assert len(self.c.inmem) == 0

    @rule()
    def sync(self) -> None:
        self.c.sync()

    @rule(seed=st.integers(0, 99))
    def read_some(self, seed: int) -> None:
        for key in random.Random(seed).sample(list(self.model), len(self.model) // 2):
            assert same(self.c[key], self.model[key])

    @rule()
    def reopen(self) -> None:
        self.held.clear()  # what is held of a closed chest is nobody's any more
        self.c.close()
        self.open()

    @rule()
    def lose_what_is_in_memory(self) -> None:
        """As after a crash: what was synced is there, and the chest goes on from it."""
        self.held.clear()
        self.c.sync()
        self.model = copy.deepcopy(self.model)
        self.c._end()
        self.open()

    @rule(limit=st.sampled_from([0, 5_000, 300_000, 10_000_000]))
    def change_the_limit(self, limit: int) -> None:
        if self.limit:
            self.c.available_memory = limit

    @rule(
        steps=st.lists(st.tuples(st.sampled_from(["set", "delete", "change", "pop", "popitem", "look"]), keys, st.booleans())),
        fails=st.booleans(),
    )
    def transaction(self, steps: list[tuple[str, Any, bool]], fails: bool) -> None:
        self.held.clear()  # what was got before is nobody's if the transaction changes its key
        before = copy.deepcopy(self.model)
        held: list[tuple[Any, Any]] = []
        with contextlib.suppress(InterruptedError), self.c.transaction():
            for what, key, keep in steps:
                if what == "set":
                    self.c[key], self.model[key] = pair = self.value()
                    held += [pair] * keep
                elif what == "popitem":
                    self.popitem()
                elif what == "look":
                    self.equal()
                elif key not in self.model:
                    assert self.c.pop(key, None) is None
                    assert key not in self.c
                elif what == "change":
                    mutate(self.c[key], self.n)
                    mutate(self.model[key], self.n)
                    held += [(self.c[key], self.model[key])] * keep
                else:
                    self.delete(key) if what == "delete" else self.pop(key)
            self.equal()
            if fails:
                raise InterruptedError
        if fails:
            self.model = before
        else:
            self.held = held

    @rule(key=keys, n=st.integers(0, 1000))
    def edit(self, key: Any, n: int) -> None:
        self.held.clear()
        if key in self.model:
            with self.c.edit(key) as value:
                mutate(value, n)
            mutate(self.model[key], n)

    @rule()
    def clear(self) -> None:
        if self.n % 10 == 0:
            self.c.clear()
            self.model.clear()

    @rule(key=keys)
    def second_chest_reads_what_was_flushed(self, key: Any) -> None:
        self.c.sync()
        with Chest(path=self.path, **self.given) as other:
            assert len(other) == len(self.model)
            assert same(other.get(key), self.model.get(key))

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "c"):
            return
        assert len(self.c) == len(self.model)
        mine, twin = list(self.c), list(self.model)
        assert mine == twin
        assert [type(k) for k in mine] == [type(k) for k in twin]
        assert list(reversed(self.c)) == twin[::-1]
        for key, value in self.c.items():
            assert same(value, self.model[key]), key
        self.c._tier.check()
        type(self).spills += self.c.stats().spills

    def teardown(self) -> None:
        if hasattr(self, "c"):
            self.held.clear()
            self.c.close()
            with Chest(path=self.path, **self.given) as c:
                assert list(c) == list(self.model)
                assert all(same(v, self.model[k]) for k, v in c.items())
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("limit", [10**9, 0, 40_000], ids=["all-in-memory", "all-spilled", "mixed"])
@pytest.mark.parametrize("serializer", ["pickle", "safe"])
def test_a_chest_equals_a_dict_after_every_step(limit: int, serializer: str) -> None:
    if serializer == "safe":
        pytest.importorskip("msgspec")
    machine = type("Machine", (ChestMachine,), {"limit": limit, "serializer": serializer, "spills": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=1000 if FULL else 40 if serializer == "pickle" else 15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    if limit != 10**9:
        assert machine.spills > 0
