"""The compiled hot paths do what the Python beside them does."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from typing import Any, cast

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chest import Chest, _hot, _keys, nbytes
from chest._changes import is_immutable
from chest._entry import Entry as PythonEntry
from chest._memory import MemoryTier as PythonTier
from chest._pickled import dumps
from chest.abc import OrderItem, Record

if not _hot.COMPILED:
    pytest.skip("the extension was not built, or is switched off", allow_module_level=True)

CompiledEntry, CompiledTier = _hot.Entry, _hot.MemoryTier
DIGEST = xxhash.xxh3_64_digest
HASH = xxhash.xxh3_64_intdigest
THRESHOLD = gc.get_threshold()

KEYS = st.one_of(
    st.text(max_size=5),
    st.text(alphabet="aé\ud800\U0001f600", max_size=600),
    st.integers(),
    st.integers(-(2**64), 2**64),
    st.sampled_from([2**63 - 1, -(2**63), 2**63, -(2**63) + 1, True, 1.5, None, b"x", (1, "a"), "a" * 510, "a" * 511]),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.tuples(st.integers()),
    st.sampled_from(["x" * 3000, cast(Any, lambda: 0)]),
)


def items_of(make: Any, pairs: list[tuple[Any, Any]], sizes: list[int]) -> list[Any]:
    return [
        make(k, v, size, True, seq, fresh=bool(seq % 2)) for seq, ((k, v), size) in enumerate(zip(pairs, sizes, strict=True))
    ]


@given(pairs=st.lists(st.tuples(KEYS, VALUES), max_size=8), budget=st.integers(1, 200), data=st.data())
@settings(max_examples=300, deadline=None)
def test_rows_are_packed_alike(pairs: list[tuple[Any, Any]], budget: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 100), min_size=len(pairs), max_size=len(pairs)))
    results = []
    for make, pack in ((PythonEntry, _hot._pack_rows), (CompiledEntry, _hot.pack_rows)):
        rest = iter(items_of(make, pairs, sizes))
        done: list[Any] = []
        rows: list[Any] = []
        baselines: list[Any] = []
        refused: list[int] = []
        while True:
            item, size = pack(rest, dumps, dumps, is_immutable, HASH, 90, 2000, budget, done, rows, baselines)
            if item is None and size < budget:
                break
            if item is not None:  # what is simple for one need not be for the other: in the end it is the same
                item, size = _hot._pack_rows(iter([item]), dumps, dumps, is_immutable, HASH, 90, 2000, 1, done, rows, baselines)
                refused += [] if item is None else [item.seq]
        results.append(([e.seq for e in done], rows, baselines, refused))
    assert results[0] == results[1]


ROWS = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=20),
        st.integers(0, 2**64 - 1),
        st.integers(0, 255),
        st.binary(max_size=30),
        st.binary(max_size=9),
        st.booleans(),
    ),
    unique_by=lambda row: row[0],
    max_size=6,
)


@given(rows=ROWS, version=st.integers(0, 2**64 - 1), flip=st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_what_lies_in_the_index_is_written_and_read_alike(rows: list[Any], version: int, flip: int) -> None:
    seqs = {row[0]: row[1] for row in rows}
    places = [row[1] for row in rows]
    records = list(_hot._record_pairs(version, seqs, rows, DIGEST))
    order = list(_hot._order_pairs(rows, places, DIGEST))
    assert list(_hot.record_pairs(version, seqs, rows, DIGEST)) == records
    assert list(_hot.order_pairs(rows, places, DIGEST)) == order
    if records:
        at = flip % len(records)
        damaged = bytearray(records[at][1])
        damaged[flip % len(damaged)] ^= 1
        for data in (records[at][1], bytes(damaged), b"", bytes(24), bytes(25)):
            mine = _hot.read_record(Record, records[at][0], data, DIGEST)
            assert mine == _hot._read_record(Record, records[at][0], data, DIGEST)
            assert (mine is None) == (data != records[at][1])
            pairs = [*records, (records[at][0], data)]
            assert _hot.read_places(pairs, DIGEST) == _hot._read_places(pairs, DIGEST)
        cut = bytearray(order[at][1])
        cut[flip % len(cut)] ^= 1
        for data in (order[at][1], bytes(cut), b"", bytes(9)):
            pairs = [*order, (order[at][0], data)]
            assert _hot.read_order(OrderItem, pairs, DIGEST) == _hot._read_order(OrderItem, pairs, DIGEST)


def test_what_is_sealed_but_shorter_than_it_says_is_refused_by_both() -> None:
    place = bytes(8)
    data = b"\xff\xffname"
    pair = (place, data + DIGEST(place + data))
    assert _hot.read_order(OrderItem, [pair], DIGEST) == place
    assert _hot._read_order(OrderItem, [pair], DIGEST) == place


@given(key=KEYS)
def test_keys_are_read_back_alike(key: Any) -> None:
    encoded = _keys.encode(key)
    assert encoded is not None
    mine = _hot.read_key(*encoded, _keys.decode)
    theirs = _hot._read_key(*encoded, _keys.decode)
    assert (mine, type(mine)) == (theirs, type(theirs))


def test_what_is_no_key_is_refused_alike() -> None:
    for name in (b"", b"s\xff", b"i01", b"?"):
        with pytest.raises(Exception) as mine:  # noqa: PT011, PT012 - whatever the other one raises
            _hot.read_key(name, b"", _keys.decode)
            raise LookupError
        with pytest.raises(Exception) as theirs:  # noqa: PT011, PT012
            _hot._read_key(name, b"", _keys.decode)
            raise LookupError
        assert (mine.type, str(mine.value)) == (theirs.type, str(theirs.value))


def exact(value: Any, seen: set[int]) -> int:
    if id(value) in seen:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(exact(key, seen) + exact(member, seen) for key, member in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return size + sum(exact(member, seen) for member in value)
    return size


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers()),
    lambda members: st.one_of(
        st.lists(members),
        st.lists(members).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.tuples(st.text())), members),
        st.sets(st.integers(-(2**40), 2**40)),
        st.frozensets(st.text(max_size=3)),
        members.map(lambda member: [member, member, (member,)]),
    ),
    max_leaves=30,
)


@given(value=st.one_of(st.lists(PLAIN), st.dictionaries(st.text(), PLAIN), st.lists(PLAIN).map(tuple)))
@settings(max_examples=300, deadline=None)
def test_plain_containers_are_measured_to_the_byte(value: Any) -> None:
    assert nbytes(value) == exact(value, set())


def test_what_refers_to_itself_or_is_deep_or_is_long_is_measured_too() -> None:
    cycle: list[Any] = [1.5]
    cycle.append(cycle)
    assert nbytes(cycle) == exact(cycle, set())
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    assert nbytes(deep) > 5_000
    long = list(range(1000, 6000))
    assert abs(nbytes([long, 1]) / exact([long, 1], set()) - 1) < 0.1
    many = [[float(i), float(j)] for i in range(300) for j in range(100)]
    assert abs(nbytes(many) / exact(many, set()) - 1) < 0.1


def test_registered_types_are_asked_wherever_they_lie() -> None:
    program = """if True:
        from chest import nbytes
        assert nbytes([{"a": 1.5}]) < 1000
        nbytes.register(float, lambda value: 10_000)
        assert 10_000 <= nbytes([{"a": 1.5}]) < 11_000
        nbytes.register(dict, lambda value: 20_000)
        assert 20_000 <= nbytes([{"a": 1.5}]) < 21_000
    """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class Lockstep(RuleBasedStateMachine):
    """Whatever is done to both tiers, they answer alike. Bookkeeping is left out: compiled entries are smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers: tuple[Any, Any] = (PythonTier(10**6, 1 << 40), CompiledTier(10**6, 1 << 40))

    KEYS = st.integers(0, 12)
    SIZES = st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 10**7))

    @initialize(n=st.integers(0, 400))
    def use_soon(self, n: int) -> None:
        """Beyond 147 the tiers no longer count uses, at first."""
        for make, tier in zip((PythonEntry, CompiledEntry), self.tiers, strict=True):
            for i in range(n):
                tier.add(make(i, i, 1000))
                tier.entries[i].hot = True
            tier.victims(0)
            tier.clear()

    def entries(self, key: int) -> list[tuple[Any, Any]]:
        return [(tier, tier.entries[key]) for tier in self.tiers if key in tier.entries]

    @rule(key=KEYS, size=SIZES, dirty=st.booleans())
    def add(self, key: int, size: int, dirty: bool) -> None:
        for make, tier in zip((PythonEntry, CompiledEntry), self.tiers, strict=True):
            tier.add(make(key, key, size, dirty))

    @rule(key=KEYS)
    def hit(self, key: int) -> None:
        for _, entry in self.entries(key):
            entry.hot = True

    @rule(key=KEYS, size=SIZES)
    def resize(self, key: int, size: int) -> None:
        for tier, entry in self.entries(key):
            tier.resize(entry, size)

    @rule(key=KEYS, dirty=st.booleans())
    def mark(self, key: int, dirty: bool) -> None:
        for tier, entry in self.entries(key):
            tier.mark(entry, dirty)

    @rule(key=KEYS, stuck=st.booleans())
    def keep(self, key: int, stuck: bool) -> None:
        for tier, entry in self.entries(key):
            tier.keep(entry, stuck)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        found = [tier.remove(key) for tier in self.tiers]
        assert (found[0] is None) == (found[1] is None)

    @rule()
    def retry(self) -> None:
        for tier in self.tiers:
            tier.retry()

    @rule(limit=st.integers(0, 2 * 10**6), key=KEYS, finish=st.booleans())
    def evict(self, limit: int, key: int, finish: bool) -> None:
        picked = []
        for tier in self.tiers:
            batch = tier.victims(limit, tier.entries.get(key))
            picked.append([entry.key for entry in batch])
            if finish:
                picked[-1].append([entry.key for entry in tier.let_go(batch)])
        assert picked[0] == picked[1]

    @rule(largest=SIZES, room=SIZES)
    def queued(self, largest: int, room: int) -> None:
        found = [[entry.key for entry in tier.queued(tier.entries, largest, room)] for tier in self.tiers]
        assert found[0] == found[1]

    @invariant()
    def alike(self) -> None:
        states = []
        for tier in self.tiers:
            tier.check()
            entries = {k: (e.size, e.f, e.dirty, e.hot, e.lent, e.alive, bool(e.stuck)) for k, e in tier.entries.items()}
            states.append((len(tier), tier.usage, tier.stuck_bytes, entries))
        assert states[0] == states[1]


TestLockstep = Lockstep.TestCase
TestLockstep.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


class _Loop:
    chest: Any


def test_a_chest_that_a_value_of_its_own_refers_to_is_collected() -> None:
    value = _Loop()
    value.chest = Chest[str, Any]()
    gone = weakref.ref(value)
    value.chest["me"] = value
    value.chest["text"] = "x"
    del value
    gc.collect()
    assert gone() is None


def test_entries_of_text_give_the_collector_nothing_to_look_at() -> None:
    assert not gc.is_tracked(CompiledEntry("key", "value", 1))
    assert gc.is_tracked(CompiledEntry("key", ["value"], 1))
    assert gc.is_tracked(CompiledEntry(("key", []), "value", 1))


def test_code_that_runs_when_a_value_is_freed_may_use_the_tier() -> None:
    tier = CompiledTier(0)

    class Meddles:
        def __del__(self) -> None:
            tier.remove("b")
            tier.add(CompiledEntry("c", 1, 1))
            tier.check()

    tier.add(CompiledEntry("a", Meddles(), 1))
    tier.add(CompiledEntry("b", Meddles(), 1))
    tier.add(CompiledEntry("a", 2, 1))
    tier.check()
    tier.add(CompiledEntry("d", Meddles(), 1))
    tier.clear()
    gc.collect()
    tier.check()
    assert set(tier.entries) <= {"c"}


class _Key:
    """All of them collide; looking one up runs what is `planned` when so many calls have been made."""

    planned: tuple[int, Any] | None = None

    def __init__(self, n: int) -> None:
        self.n = n

    def _called(self) -> None:
        if _Key.planned is not None:
            left, meddle = _Key.planned
            _Key.planned = (left - 1, meddle) if left else None
            if not left:
                meddle()

    def __hash__(self) -> int:
        self._called()
        return 7

    def __eq__(self, other: object) -> bool:
        self._called()
        return isinstance(other, _Key) and self.n == other.n


@pytest.mark.parametrize("calls", range(12))
@pytest.mark.parametrize("way", ["clear", "remove", "replace"])
@pytest.mark.parametrize("act", ["overwrite", "add", "remove", "let go"])
def test_keys_that_use_the_tier_while_they_are_looked_up_leave_it_whole(calls: int, way: str, act: str) -> None:
    tier = CompiledTier(10**6)
    keys = [_Key(n) for n in range(4)]
    for key in keys:
        tier.add(CompiledEntry(key, [1], 10))

    def meddle() -> None:
        if way == "clear":
            tier.clear()
        for key in keys if way != "clear" else []:
            tier.remove(key)
            if way == "replace":
                tier.add(CompiledEntry(_Key(key.n), [2], 10))

    batch = tier.victims(0) if act == "let go" else []
    _Key.planned = calls, meddle
    with contextlib.suppress(RuntimeError):  # what comes in between is refused, where it would be lost
        if act in ("overwrite", "add"):
            tier.add(CompiledEntry(_Key(3 if act == "overwrite" else 9), [3], 20))
        elif act == "remove":
            tier.remove(_Key(2))
        else:
            tier.let_go(batch)
    _Key.planned = None
    if way == "clear":  # CPython's own dict loses a key if it is cleared in the middle of setting one
        tier.clear()
    tier.check()


def test_a_collection_in_the_middle_of_a_set_may_use_the_chest() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            del chest["k"]

    with Chest[str, Any]() as chest:
        chest["k"] = "old"
        chest.flush()
        assert chest["k"] == "old"
        gc.collect()
        gc.disable()
        try:
            Cycle()
            gc.set_threshold(1)
            gc.enable()
            chest["k"] = "new"  # the first that the collector counts since then is made in here
        finally:
            gc.set_threshold(*THRESHOLD)
            gc.enable()
        gc.collect()  # since 3.12 it does not come in the middle of a call
        chest._tier.check()
        chest.flush()
        assert dict(chest) in ({"k": "new"}, {})


@pytest.mark.parametrize("size", [10**30, -(10**30), 2**63, True])
def test_sizes_beyond_all_measure_are_cut_and_nothing_overflows(size: int) -> None:
    tier = CompiledTier(10**30)
    for i in range(30):
        tier.add(CompiledEntry(i, None, abs(size)))
    assert tier.usage > 0
    tier.victims(-size)
    tier.limit = size
    tier.check()


def test_nonsense_is_refused() -> None:
    tier = CompiledTier(0)
    for call in (lambda: tier.add(1), lambda: tier.victims("x"), lambda: tier.let_go([1]), lambda: tier.victims(-1, 3)):
        tier.add(CompiledEntry("a", 1, 1)) if "a" not in tier.entries else None
        with pytest.raises(TypeError):
            call()  # type: ignore[arg-type]
    entry = tier.entries["a"]
    with pytest.raises(ValueError, match="already"):
        tier.add(entry)
    with pytest.raises(TypeError):
        tier.add(CompiledEntry([], 1, 1))
    tier.check()
    assert len(tier) == 1


def test_an_entry_that_somebody_took_out_of_the_dict_harms_nothing() -> None:
    tier = CompiledTier(0)
    tier.add(CompiledEntry("a", [1], 1))
    tier.entries.clear()
    assert [entry.key for entry in tier.victims(0)] == ["a"]
    with pytest.raises(AssertionError):
        tier.check()
    del tier
    gc.collect()


def test_the_package_works_without_the_extension() -> None:
    program = """if True:
        from chest import Chest, _hot
        assert not _hot.COMPILED
        with Chest(available_memory=10_000) as c:
            for i in range(1000):
                c[i] = [i] * 10
            assert all(c[i] == [i] * 10 for i in range(1000)) and c.stats().spills > 500
    """
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"CHEST_PURE": "1"}, timeout=60)
