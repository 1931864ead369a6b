"""The memory tier against the policy on paper, interrupts anywhere, hits by other threads, and a model in any order."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from itertools import count
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chest import _entry, _memory
from chest._hot import ENTRY_BYTES, Entry, MemoryTier
from chest._memory import FREE_BYTES


class Paper:
    """The policy as one writes it down, with a plain list for each queue."""

    def __init__(self) -> None:
        self.queues: list[list[tuple[str, float]]] = [[] for _ in range(16)]
        self.floor = 0.0
        self.state: dict[str, tuple[int, int, bool]] = {}  # size, uses, dirty
        self.hot: set[str] = set()
        self.share = 0  # of the fresh, that were hit; of 65536

    def insert(self, key: str, size: int, uses: int, dirty: bool) -> None:
        counted = 1 if self.share > 7 / 16 * 65536 else uses
        i = min(15, ((counted + dirty) * (20_000 + size) // size).bit_length())
        self.queues[i].append((key, self.floor))
        self.state[key] = size, uses, dirty

    def forget(self, key: str) -> None:
        self.queues = [[item for item in queue if item[0] != key] for queue in self.queues]
        del self.state[key]
        self.hot.discard(key)

    def set(self, key: str, size: int, dirty: bool) -> None:
        uses = 0
        if key in self.state:
            uses = self.state[key][1]
            self.forget(key)
        self.insert(key, size, uses, dirty)

    def evict(self) -> str:
        chances = 0
        while True:
            heads = [queue[0][1] + 0.75 * 2**i if queue else float("inf") for i, queue in enumerate(self.queues)]
            least = min(heads)
            key, _ = self.queues[heads.index(least)].pop(0)
            self.floor = max(self.floor, least)
            if self.state[key][1] == 0:
                self.share += (256 if key in self.hot else 0) - self.share // 256
            if key in self.hot and chances < 16:
                chances += 1
                self.hot.remove(key)
                size, uses, dirty = self.state[key]
                self.insert(key, size, min(uses + 1, 4), dirty)
            else:
                self.forget(key)
                return key


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 400))
def test_the_order_is_that_of_the_policy_on_paper(seed: int, n_keys: int, n_used_soon: int) -> None:
    rng = random.Random(seed)
    tier, paper = MemoryTier(0), Paper()
    for _ in range(n_used_soon):
        tier.add(Entry("soon", None, 1000, True))
        paper.set("soon", 1000, True)
        tier.entries["soon"].hot = True
        paper.hot.add("soon")
        tier.victims(-1)
        tier.remove("soon")
        paper.evict()
    for _ in range(400):
        key = f"k{rng.randrange(n_keys)}"
        what = rng.random()
        if what < 0.4:
            size, dirty = round(10 ** rng.uniform(0, 8)), rng.random() < 0.5
            tier.add(Entry(key, None, size, dirty))
            paper.set(key, size, dirty)
        elif what < 0.7 and key in tier.entries:
            tier.entries[key].hot = True
            paper.hot.add(key)
        elif what < 0.75 and key in tier.entries:
            tier.remove(key)
            paper.forget(key)
        elif tier.entries:
            (victim,) = tier.victims(tier.usage - 1)
            tier.remove(victim.key)
            assert victim.key == paper.evict()
        tier.check()


class _Interrupt(BaseException):
    pass


class _Interrupter:
    """Raises at the n-th point at which CPython might raise KeyboardInterrupt: a call begins, or a C call returns."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename == _memory.__file__:
            self.left -= 1
            if self.left < 0:
                raise _Interrupt


# Only what is written in Python can be interrupted.
OPERATIONS: dict[str, Callable[[_memory.MemoryTier], object]] = {
    "add": lambda tier: tier.add(_entry.Entry("new", None, 5)),
    "overwrite": lambda tier: tier.add(_entry.Entry("k3", None, 7, True)),
    "overwrite what is stuck": lambda tier: tier.add(_entry.Entry("stuck", None, 7, True)),
    "remove": lambda tier: tier.remove("k3"),
    "remove what is stuck": lambda tier: tier.remove("stuck"),
    "resize": lambda tier: tier.resize(tier.entries["k3"], 12_345),
    "mark": lambda tier: tier.mark(tier.entries["clean"], True),
    "victims": lambda tier: tier.victims(0, tier.entries["k4"]),
    "keep": lambda tier: tier.keep(tier.entries["k3"]),
    "keep unstuck": lambda tier: tier.keep(tier.entries["stuck"], stuck=False),
    "retry": lambda tier: tier.retry(),
    "clear": lambda tier: tier.clear(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_anywhere_in_an_operation_leaves_the_tier_whole(name: str) -> None:
    for n in count():
        tier = _memory.MemoryTier(0)
        for i in range(6):
            tier.add(_entry.Entry(f"k{i}", None, 10 ** (i + 1), True))
        tier.add(_entry.Entry("stuck", None, 9, True))
        tier.add(_entry.Entry("clean", None, 10_000))
        tier.entries["k2"].hot = True
        tier.keep(tier.entries["stuck"])
        tier.victims(tier.usage - 1)
        profile = sys.getprofile()
        sys.setprofile(_Interrupter(n))
        try:
            OPERATIONS[name](tier)
        except _Interrupt:
            tier.check()
            continue
        finally:
            sys.setprofile(profile)
        tier.check()
        break
    assert n > 0


def test_hits_from_other_threads_disturb_nothing() -> None:
    tier = MemoryTier(10**9)
    for i in range(200):
        tier.add(Entry(f"k{i}", None, 10_000, True))
    stop = threading.Event()

    def hit() -> None:
        rng = random.Random(0)
        while not stop.is_set():
            entry = tier.entries.get(f"k{rng.randrange(200)}")
            if entry is not None:
                entry.hot = True

    threads = [threading.Thread(target=hit) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(3000):
            for entry in tier.victims(150 * 10_000):
                tier.remove(entry.key)
            tier.add(Entry(f"k{i % 200}", None, 10_000, True))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    tier.check()


class Machine(RuleBasedStateMachine):
    """Against a model that knows sizes and who is stuck, and little of the policy."""

    KEYS = st.integers(0, 12)
    SIZES = st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 10**7))

    def __init__(self) -> None:
        super().__init__()
        self.tier = MemoryTier(10**6)
        self.sizes: dict[int, int] = {}
        self.stuck: set[int] = set()
        self.free = FREE_BYTES

    @initialize(free=st.sampled_from([0, 1000, FREE_BYTES]))
    def begin(self, free: int) -> None:
        self.free = free
        self.tier = MemoryTier(10**6, free)

    def entry(self, key: int) -> Entry | None:
        return self.tier.entries.get(key)

    @rule(key=KEYS, size=SIZES, dirty=st.booleans())
    def set_value(self, key: int, size: int, dirty: bool) -> None:
        self.tier.add(Entry(key, None, size, dirty))
        self.sizes[key] = size
        self.stuck.discard(key)

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        entry = self.tier.remove(key)
        assert (entry is None) == (key not in self.sizes)
        self.sizes.pop(key, None)
        self.stuck.discard(key)

    @rule(key=KEYS, size=SIZES)
    def resize(self, key: int, size: int) -> None:
        entry = self.entry(key)
        if entry is not None:
            self.tier.resize(entry, size)
            self.sizes[key] = size
            self.stuck.discard(key)

    @rule(key=KEYS, dirty=st.booleans(), by_hand=st.booleans())
    def mark(self, key: int, dirty: bool, by_hand: bool) -> None:
        entry = self.entry(key)
        if entry is not None:
            if by_hand:
                entry.dirty = dirty
                return
            if entry.dirty and not dirty:
                self.stuck.discard(key)
            self.tier.mark(entry, dirty)
            assert entry.dirty == dirty

    @rule(keys=st.sets(KEYS))
    def hit(self, keys: set[int]) -> None:
        for key in keys & self.sizes.keys():
            self.tier.entries[key].hot = True

    @rule(goal=SIZES, fates=st.lists(st.sampled_from(["remove", "keep", "stuck", "forget", "break"])), spared=KEYS)
    def evict(self, goal: int, fates: list[str], spared: int) -> None:
        tier, spare = self.tier, self.entry(spared)
        usage = tier.usage
        batch = tier.victims(goal, spare)
        tier.check()
        assert tier.usage == usage
        picked = {entry.key for entry in batch}
        assert len(picked) == len(batch)
        assert not picked & self.stuck
        assert spare not in batch
        costs = {entry.key: entry.size + entry.key_bytes + ENTRY_BYTES for entry in tier.entries.values()}

        def usage_without(keys: set[int]) -> int:
            left = tier.entries.keys() - keys
            bookkeeping = sum(costs[key] - self.sizes[key] for key in left)
            return sum(self.sizes[key] for key in left) + max(0, bookkeeping - self.free)

        assert usage_without(picked) <= goal or picked == self.sizes.keys() - self.stuck - {spared}
        if batch:
            assert usage_without(picked - {batch[-1].key}) > goal
        for entry, fate in zip(batch, fates, strict=False):
            key = entry.key
            if fate == "remove":
                tier.remove(key)
                del self.sizes[key]
                assert not entry.alive
            elif fate == "break":
                break
            elif fate != "forget":
                tier.keep(entry, stuck=fate == "stuck")
                if fate == "stuck":
                    self.stuck.add(key)

    @precondition(lambda self: self.stuck)
    @rule()
    def retry(self) -> None:
        self.tier.retry()
        self.stuck.clear()

    @rule(limit=SIZES)
    def set_limit(self, limit: int) -> None:
        self.tier.limit = limit
        for entry in self.tier.victims(limit):
            self.tier.remove(entry.key)
            del self.sizes[entry.key]
        assert self.tier.usage <= limit or self.sizes.keys() == self.stuck

    @rule()
    def clear(self) -> None:
        self.tier.clear()
        self.sizes.clear()
        self.stuck.clear()

    @invariant()
    def whole(self) -> None:
        tier = self.tier
        tier.check()
        assert {key: entry.size for key, entry in tier.entries.items()} == self.sizes
        assert tier.stuck_bytes == sum(self.sizes[key] for key in self.stuck)
        assert len(tier) == len(self.sizes)
        bookkeeping = sum(sys.getsizeof(key) + ENTRY_BYTES for key in self.sizes)
        assert tier.usage == sum(self.sizes.values()) + max(0, bookkeeping - self.free)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
