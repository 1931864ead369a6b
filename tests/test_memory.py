"""The memory tier: who leaves first, what an eviction leaves behind, what is counted."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from chest._hot import ENTRY_BYTES, Entry, MemoryTier
from chest._memory import FREE_BYTES

SMALL, MEDIUM, LARGE = 100, 10_000, 10_000_000


@pytest.fixture
def tier() -> Iterator[MemoryTier]:
    tier = MemoryTier(10**9)
    yield tier
    tier.check()


def fill(tier: MemoryTier, sizes: dict[str, int], dirty: bool = True) -> dict[str, Entry]:
    entries = {key: Entry(key, None, size, dirty) for key, size in sizes.items()}
    for entry in entries.values():
        tier.add(entry)
    return entries


def keys(batch: list[Entry]) -> list[Any]:
    return [entry.key for entry in batch]


def evict(tier: MemoryTier, target: int) -> list[Any]:
    return [entry.key for entry in tier.victims(target) if tier.remove(entry.key)]


# --- who leaves first


def test_large_values_leave_before_small_ones(tier: MemoryTier) -> None:
    fill(tier, {"small": SMALL, "large": LARGE, "medium": MEDIUM})
    assert evict(tier, 0) == ["large", "medium", "small"]


def test_values_of_one_class_leave_in_the_order_they_came(tier: MemoryTier) -> None:
    fill(tier, {"a": LARGE, "b": LARGE + 1, "c": LARGE})
    assert evict(tier, 0) == ["a", "b", "c"]


def test_no_more_leave_than_the_target_asks_for(tier: MemoryTier) -> None:
    fill(tier, {"a": LARGE, "b": LARGE, "c": LARGE})
    assert evict(tier, 2 * LARGE) == ["a"]
    assert evict(tier, 2 * LARGE) == []
    assert evict(tier, 2 * LARGE - 1) == ["b"]


def test_unwritten_values_stay_longer_than_written_ones(tier: MemoryTier) -> None:
    fill(tier, {"dirty": MEDIUM})
    fill(tier, {"clean": MEDIUM}, dirty=False)
    assert evict(tier, 0) == ["clean", "dirty"]


def test_a_hit_gives_a_second_chance(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": MEDIUM, "b": MEDIUM, "c": MEDIUM})
    entries["a"].hot = True
    assert evict(tier, 2 * MEDIUM) == ["b"]
    a = entries["a"]
    assert (a.hot, a.f, a.lent) == (False, 1, True)
    assert evict(tier, MEDIUM) == ["c"]
    assert evict(tier, 0) == ["a"]


def test_uses_are_counted_up_to_four(tier: MemoryTier) -> None:
    used = fill(tier, {"used": LARGE})["used"]
    for n in range(6):
        used.hot = True
        assert tier.victims(0) == [used]  # its second chance does not help it: there is no other
        assert used.f == min(n + 1, 4)


def test_a_valuable_entry_that_nobody_uses_leaves_in_the_end(tier: MemoryTier) -> None:
    fill(tier, {"old": MEDIUM})
    leaving: list[Any] = []
    for i in range(1000):
        fill(tier, {f"new{i}": LARGE})
        leaving += evict(tier, MEDIUM)
        if "old" in leaving:
            break
    assert 1 < len(leaving) < 10  # not at once, and not never


def test_an_overwritten_value_keeps_its_uses_and_its_first_key(tier: MemoryTier) -> None:
    old = fill(tier, {"a": MEDIUM})["a"]
    old.f = 3
    first_key, key = 1, 1.0
    tier.add(Entry(first_key, None, SMALL))
    new, same = Entry("a", None, SMALL), Entry(key, None, SMALL)
    tier.add(new)
    tier.add(same)
    assert (old.alive, new.alive, new.f) == (False, True, 3)
    assert type(same.key) is int
    assert len(tier) == 2


@pytest.mark.parametrize("batch", [False, True])
def test_a_tier_in_which_all_is_hot_still_evicts_after_at_most_16_second_chances(batch: bool) -> None:
    tier = MemoryTier(10**9)
    chances = 0

    def note(entry: Entry) -> None:
        nonlocal chances
        chances += 1

    tier.on_second_chance = note
    entries = fill(tier, {f"k{i}": MEDIUM for i in range(1000)})
    for _ in range(19):
        for entry in entries.values():
            entry.hot = True
        before = chances
        leaving = evict(tier, tier.usage - (10 * MEDIUM if batch else 1))
        assert len(leaving) == (10 if batch else 1)
        assert chances - before == 16 * len(leaving)
        tier.check()


def test_the_hook_may_resize_or_remove_the_entry_that_stays(tier: MemoryTier) -> None:
    entries = fill(tier, {"grown": MEDIUM, "gone": MEDIUM, "c": MEDIUM, "d": MEDIUM})
    entries["grown"].hot = entries["gone"].hot = True

    def hook(entry: Entry) -> None:
        tier.check()
        if entry.key == "grown":
            tier.resize(entry, 3 * MEDIUM)
        else:
            tier.remove(entry.key)

    tier.on_second_chance = hook
    # With the first grown and the second gone they take 50 kB instead of 40: for a goal of 35 two must leave.
    assert evict(tier, 35_000) == ["c", "d"]
    assert tier.usage == 3 * MEDIUM


def test_a_spared_entry_is_not_picked(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": LARGE, "b": LARGE})
    assert keys(tier.victims(0, spare=entries["a"])) == ["b"]
    tier.check()
    assert keys(tier.victims(0)) == ["b", "a"]
    assert keys(tier.victims(0, spare=entries["b"])) == ["a"]


def test_what_becomes_dirty_rises_and_what_becomes_clean_keeps_its_place(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": MEDIUM, "b": MEDIUM, "c": MEDIUM}, dirty=False)
    tier.mark(entries["a"], True)
    tier.mark(entries["c"], True)
    tier.mark(entries["a"], False)
    tier.mark(entries["b"], False)
    assert [entry.dirty for entry in entries.values()] == [False, False, True]
    assert evict(tier, 0) == ["b", "a", "c"]


def test_a_value_that_grew_leaves_earlier(tier: MemoryTier) -> None:
    entries = fill(tier, {"grown": SMALL, "a": MEDIUM})
    tier.resize(entries["grown"], LARGE)
    assert tier.usage == LARGE + MEDIUM
    assert evict(tier, 0) == ["grown", "a"]


# --- whether uses count


def use_soon(tier: MemoryTier, share: float, n: int = 1000) -> None:
    """This share of so many values is hit before their turn comes, the others are not; nothing of it stays."""
    for i in range(n):
        entry = fill(tier, {f"soon{i}": LARGE})[f"soon{i}"]
        entry.hot = int((i + 1) * share) > int(i * share)
        evict(tier, 0)


def order(tier: MemoryTier) -> list[Any]:
    """In which order one leaves that was used often, and one that came after it."""
    used = Entry("used", None, LARGE)
    used.f = 4
    tier.add(used)
    fill(tier, {"fresh": LARGE}, dirty=False)
    return evict(tier, 0)


COUNTED, NOT_COUNTED = ["fresh", "used"], ["used", "fresh"]


def test_uses_do_not_count_while_what_has_just_come_is_used_soon(tier: MemoryTier) -> None:
    assert order(tier) == COUNTED
    for _ in range(3):
        use_soon(tier, 1)
        assert order(tier) == NOT_COUNTED
        use_soon(tier, 0)
        assert order(tier) == COUNTED


@pytest.mark.parametrize(("share", "expected"), [(0.35, COUNTED), (0.4, COUNTED), (0.48, NOT_COUNTED), (0.6, NOT_COUNTED)])
def test_seven_of_sixteen_decide(tier: MemoryTier, share: float, expected: list[str]) -> None:
    for before in (0, 1):
        use_soon(tier, before)
        use_soon(tier, share, 2000)
        assert order(tier) == expected


def test_a_few_that_are_used_soon_decide_nothing(tier: MemoryTier) -> None:
    use_soon(tier, 1, 100)
    assert order(tier) == COUNTED
    use_soon(tier, 1, 100)
    assert order(tier) == NOT_COUNTED
    use_soon(tier, 0, 30)
    assert order(tier) == NOT_COUNTED
    use_soon(tier, 0, 70)
    assert order(tier) == COUNTED


def test_hits_of_what_was_used_before_say_nothing_about_the_fresh(tier: MemoryTier) -> None:
    used = fill(tier, {"again": LARGE})["again"]
    for _ in range(1000):
        used.hot = True
        evict(tier, LARGE - 1)
        tier.add(used)
    assert used.f == 4
    evict(tier, 0)
    assert order(tier) == COUNTED
    use_soon(tier, 1)
    tier.add(used)
    for _ in range(1000):
        evict(tier, LARGE - 1)
        tier.add(used)
    evict(tier, 0)
    assert order(tier) == NOT_COUNTED


def test_what_is_spared_is_not_taken_for_unused(tier: MemoryTier) -> None:
    use_soon(tier, 1)
    spared = fill(tier, {"spared": LARGE})["spared"]
    for _ in range(1000):
        assert tier.victims(0, spare=spared) == []
    tier.remove("spared")
    assert order(tier) == NOT_COUNTED


def test_size_and_what_is_unwritten_count_all_the_same(tier: MemoryTier) -> None:
    use_soon(tier, 1)
    fill(tier, {"dirty": LARGE, "small": SMALL, "medium": MEDIUM})
    fill(tier, {"clean": LARGE}, dirty=False)
    assert evict(tier, 0) == ["clean", "dirty", "medium", "small"]


# --- what an eviction leaves behind


def test_a_picked_entry_is_found_by_hits_until_it_is_removed(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": LARGE})
    assert tier.victims(0) == [entries["a"]]
    assert tier.entries["a"] is entries["a"]
    assert (entries["a"].alive, tier.usage) == (True, LARGE)
    assert tier.remove("a") is entries["a"]
    assert (entries["a"].alive, tier.usage, len(tier)) == (False, 0, 0)
    assert tier.remove("a") is None


def test_an_eviction_that_broke_off_is_taken_up_by_the_next_one(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": LARGE, "b": LARGE, "c": LARGE, "d": LARGE})
    assert keys(tier.victims(LARGE)) == ["a", "b", "c"]
    tier.check()
    tier.remove("a")
    entries["b"].hot = True
    assert keys(tier.victims(2 * LARGE)) == ["c"]
    assert keys(tier.victims(0)) == ["c", "d", "b"]


def test_a_stuck_entry_is_not_tried_again_without_a_reason(tier: MemoryTier) -> None:
    entries = fill(tier, dict.fromkeys("abcdef", LARGE))
    for entry in tier.victims(0):
        tier.keep(entry)
    assert tier.stuck_bytes == 6 * LARGE
    assert tier.victims(0) == []
    fill(tier, {"fresh": LARGE})
    assert evict(tier, 0) == ["fresh"]
    tier.resize(entries["b"], 2 * LARGE)
    tier.add(Entry("c", None, LARGE, True))
    tier.mark(entries["d"], False)
    tier.mark(entries["e"], True)  # was dirty already: no reason
    tier.remove("f")
    assert tier.stuck_bytes == 2 * LARGE
    assert sorted(evict(tier, 0)) == ["b", "c", "d"]
    tier.check()
    tier.retry()
    assert tier.stuck_bytes == 0
    assert keys(tier.victims(0)) == ["a", "e"]


def test_retried_entries_come_first_and_may_be_kept_again(tier: MemoryTier) -> None:
    fill(tier, {"stuck": SMALL})
    tier.keep(tier.victims(0)[0])
    fill(tier, {"a": LARGE})
    tier.retry()
    tier.retry()
    tier.check()
    (entry,) = tier.victims(LARGE)
    assert entry.key == "stuck"
    tier.keep(entry)
    assert (keys(tier.victims(0)), tier.stuck_bytes) == (["a"], SMALL)


def test_what_is_kept_but_not_stuck_is_queued_anew(tier: MemoryTier) -> None:
    entries = fill(tier, {"a": LARGE, "b": LARGE})
    tier.keep(tier.victims(LARGE)[0], stuck=False)
    assert keys(tier.victims(LARGE)) == ["b"]
    tier.remove("b")
    tier.keep(entries["b"])  # has left: nothing to keep
    assert (len(tier), tier.stuck_bytes) == (1, 0)


def test_a_hook_that_raises_loses_no_entry() -> None:
    tier = MemoryTier(0)
    entries = fill(tier, {f"k{i}": LARGE for i in range(10)})
    entries["k5"].hot = True

    def hook(entry: Entry) -> None:
        raise RuntimeError

    tier.on_second_chance = hook
    with pytest.raises(RuntimeError):
        tier.victims(0, spare=entries["k2"])
    tier.check()
    tier.on_second_chance = None
    assert sorted(keys(tier.victims(0))) == sorted(entries)


def test_a_batch_of_small_values_ends_when_there_is_enough(tier: MemoryTier) -> None:
    fill(tier, {f"k{n}": MEDIUM for n in range(3000)})
    usage = tier.usage
    assert len(tier.victims(0, None, usage - 1)) == 512
    assert len(tier.victims(usage - 10 * MEDIUM, None, usage - 1)) <= 10
    taken = len(tier.victims(0, None, usage // 2))
    assert taken == len(tier.victims(usage // 2)) > 512
    assert len(tier.victims(0)) == 3000


def test_a_batch_of_large_values_goes_on_to_the_target(tier: MemoryTier) -> None:
    fill(tier, {f"k{n}": LARGE for n in range(100)})
    assert len(tier.victims(60 * LARGE, None, tier.usage - 1)) == 40


# --- what is counted


def test_bookkeeping_counts_beyond_its_first_64_kib() -> None:
    tier = MemoryTier(10**9)
    for n in range(1, 1001):
        tier.add(Entry(n, None, 0))
        assert tier.usage == max(0, n * (ENTRY_BYTES + sys.getsizeof(n)) - FREE_BYTES)
    tier.check()
    usage = tier.usage
    assert len(tier.victims(usage - 1)) == 1
    assert len(evict(tier, usage // 2)) in (usage // 2 // (ENTRY_BYTES + 28), usage // 2 // (ENTRY_BYTES + 28) + 1)
    assert len(evict(tier, 0)) + len(tier) < 1000
    assert tier.usage == 0  # what is left is free
    assert len(tier) > 0


def test_an_entry_is_charged_what_it_takes() -> None:
    tier = MemoryTier(10**9)
    n = 20_000
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(n):
            entry = Entry(i + 2**40, None, i + 2**20, True)
            entry.seq = i + 2**20
            tier.add(entry)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    charged = tier.usage - sum(entry.size for entry in tier.entries.values())
    assert 0.75 < charged / taken < 1.25


def test_a_key_is_charged_alike_when_it_comes_and_when_it_leaves() -> None:
    class Key:
        bytes = 50

        def __sizeof__(self) -> int:
            return self.bytes

    class Broken:
        def __sizeof__(self) -> int:
            raise OSError

    tier = MemoryTier(10**9)
    key = Key()
    tier.add(Entry(key, None, SMALL))
    tier.add(Entry(Broken(), None, SMALL))
    key.bytes = 5000
    tier.check()
    for entry in list(tier.entries.values()):
        tier.remove(entry.key)
        tier.check()


def test_empty_values_leave_too(tier: MemoryTier) -> None:
    fill(tier, {"empty": 0, "one": 1, "large": LARGE})
    assert evict(tier, -1) == ["large", "empty", "one"]


def test_an_entry_is_in_one_tier_once(tier: MemoryTier) -> None:
    entry = fill(tier, {"a": SMALL})["a"]
    with pytest.raises(ValueError, match="'a'"):
        tier.add(entry)
    tier.remove("a")
    tier.add(entry)
    assert tier.usage == SMALL


def test_an_entry_that_has_left_can_be_resized_and_marked(tier: MemoryTier) -> None:
    entry = fill(tier, {"a": SMALL})["a"]
    tier.remove("a")
    tier.resize(entry, MEDIUM)
    tier.mark(entry, False)
    assert (entry.size, entry.dirty, tier.usage, len(tier)) == (MEDIUM, False, 0, 0)


def test_a_key_that_cannot_be_compared_changes_nothing(tier: MemoryTier) -> None:
    class Bad:
        def __hash__(self) -> int:
            return hash("a")

        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

    fill(tier, {"a": SMALL})
    with pytest.raises(ZeroDivisionError):
        tier.add(Entry(Bad(), None, SMALL))
    with pytest.raises(ZeroDivisionError):
        tier.remove(Bad())
    with pytest.raises(TypeError):
        tier.add(Entry([], None, SMALL))
    tier.check()
    assert tier.usage == SMALL


# --- the end


class _Value:
    pass


@pytest.mark.parametrize("how", ["clear", "drop"])
def test_values_are_freed_at_once_without_the_cycle_collector(how: str) -> None:
    tier = MemoryTier(10**9)
    values = []
    for i in range(5):
        value = _Value()
        values.append(weakref.ref(value))
        tier.add(Entry(i, value, SMALL))
        tier.add(Entry("same", value, SMALL))
    del value
    enabled = gc.isenabled()
    gc.disable()
    try:
        tier.remove(0)
        assert [ref() is None for ref in values] == [True, False, False, False, False]
        if how == "clear":
            tier.clear()
            tier.check()
        else:
            del tier
        assert [ref() for ref in values] == [None] * 5
    finally:
        if enabled:
            gc.enable()


@pytest.mark.parametrize("leave", ["overwritten", "removed", "cleared"])
def test_an_entry_that_has_left_holds_on_to_no_other(tier: MemoryTier, leave: str) -> None:
    value, dead = _Value(), Entry("dead", None, SMALL)
    freed = weakref.ref(value)
    tier.add(Entry("neighbour", value, SMALL))
    tier.add(dead)
    del value
    if leave == "overwritten":
        tier.add(Entry("dead", None, SMALL))
    if leave == "removed":
        tier.remove("dead")
    if leave == "cleared":
        tier.clear()
    tier.remove("neighbour")
    assert not dead.alive
    assert freed() is None


def test_clear_leaves_the_same_empty_dict_and_dead_entries(tier: MemoryTier) -> None:
    living = tier.entries
    entries = fill(tier, {"a": SMALL, "stuck": SMALL})
    tier.keep(entries["stuck"])
    tier.clear()
    assert tier.entries is living
    assert (len(tier), tier.usage, tier.stuck_bytes) == (0, 0, 0)
    assert not any(entry.alive for entry in entries.values())
    tier.add(entries["stuck"])
    assert keys(tier.victims(0)) == ["stuck"]


def test_a_value_that_uses_the_tier_when_it_is_freed_finds_it_whole(tier: MemoryTier) -> None:
    class Phoenix:
        def __del__(self) -> None:
            tier.check()
            tier.add(Entry("ashes", None, SMALL))

    tier.add(Entry("phoenix", Phoenix(), SMALL))
    tier.add(Entry("phoenix", Phoenix(), SMALL))
    tier.check()
    tier.clear()
    assert list(tier.entries) == ["ashes"]
