"""Which eviction policy costs the least I/O: seeded traces, the real memory tier, and the policies to measure it by.

A miss costs 20 us + size at 1 GB/s; so does writing a victim that was changed since it was last written; a clean victim
costs nothing. Budgets are 1, 10 and 30 % of what all values of a trace take together. All policies pay alike for
bookkeeping: what the memory tier charges for an entry, beyond the first 64 KiB of all. A value larger than the budget
never enters; what is still unwritten at the end of a trace is not charged.

A cell of the page is one trace with one budget, and shows the cost against LRU (below 1 is better). GDQ runs through
``MemoryTier`` itself. It evicts one by one as the others do; "GDQ batch" goes further each time (by 4 MiB or a tenth of
the budget), as a chest does so that an eviction pays for its commit.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from chest._hot import ENTRY_BYTES, Entry, MemoryTier
from chest._memory import BREAK_EVEN, FREE_BYTES

LATENCY_S = 20e-6
BYTES_PER_S = 1e9
BUDGETS = (0.01, 0.10, 0.30)
OVERHEAD = ENTRY_BYTES + sys.getsizeof(1 << 20)  # of an entry whose key is an int
KB, MB = 1000, 1000_000

# --- traces


class Trace(NamedTuple):
    name: str
    sizes: list[int]  # of each key
    requests: list[tuple[int, bool]]  # key, is it written?


def small_sizes(rng: random.Random, n: int) -> list[int]:
    return [round(math.exp(rng.uniform(math.log(50), math.log(1000)))) for _ in range(n)]


def mixed_sizes(rng: random.Random, n: int) -> list[int]:
    """From 100 bytes to 10 MB, every decade alike."""
    return [round(math.exp(rng.uniform(math.log(100), math.log(10 * MB)))) for _ in range(n)]


def table_sizes(rng: random.Random, n: int) -> list[int]:
    """95 % below 1 KB, 5 % of 1 to 8 MB."""
    return [rng.randint(1 * MB, 8 * MB) if rng.random() < 0.05 else rng.randint(50, 1000) for _ in range(n)]


def equal_sizes(rng: random.Random, n: int) -> list[int]:
    return [1 * MB] * n


def zipf(rng: random.Random, n_keys: int, alpha: float, n: int) -> list[int]:
    """Keys by popularity 1 / rank**alpha; the ranks are shuffled, so that size and popularity are independent."""
    ranks = list(range(n_keys))
    rng.shuffle(ranks)
    weights = list(accumulate((i + 1) ** -alpha for i in range(n_keys)))
    return rng.choices(ranks, cum_weights=weights, k=n)


def with_writes(rng: random.Random, keys: list[int], share: float) -> list[tuple[int, bool]]:
    return [(key, rng.random() < share) for key in keys]


Sizes = Callable[[random.Random, int], list[int]]


def zipf_trace(name: str, sizes: Sizes, alpha: float, writes: float) -> Callable[[random.Random, int], Trace]:
    def make(rng: random.Random, n: int) -> Trace:
        n_keys = n // 10
        return Trace(name, sizes(rng, n_keys), with_writes(rng, zipf(rng, n_keys, alpha, n), writes))

    return make


def scans(rng: random.Random, n: int) -> Trace:
    """Zipf 1.0, and every now and then somebody walks over a tenth of all keys."""
    n_keys = n // 10
    keys = zipf(rng, n_keys, 1.0, n * 2 // 3)
    requests: list[int] = []
    every = len(keys) // 33
    for at in range(0, len(keys), every):
        requests += keys[at : at + every]
        start = rng.randrange(n_keys)
        requests += [(start + i) % n_keys for i in range(n_keys // 10)]
    return Trace("Zipf 1.0, scans", mixed_sizes(rng, n_keys), with_writes(rng, requests, 0.0))


def scans_small(rng: random.Random, n: int) -> Trace:
    """Scans over keys that are never used again, values below 1 KB, 20 % writes in the Zipf part."""
    n_keys = n // 10
    keys = with_writes(rng, zipf(rng, n_keys, 1.0, n * 2 // 3), 0.2)
    requests: list[tuple[int, bool]] = []
    once = n_keys
    every = len(keys) // 33
    for at in range(0, len(keys), every):
        requests += keys[at : at + every]
        requests += [(once + i, False) for i in range(n // 100)]
        once += n // 100
    return Trace("Zipf 1.0, one-time scans, < 1 KB", small_sizes(rng, once), requests)


def loop(rng: random.Random, n: int) -> Trace:
    """The same keys in the same order, again and again."""
    n_keys = n // 20
    return Trace("loop", mixed_sizes(rng, n_keys), [(i % n_keys, False) for i in range(n)])


def loop_equal(rng: random.Random, n: int) -> Trace:
    """A loop over equal arrays, with a tenth of random accesses and writes."""
    n_keys = n // 20
    keys = [rng.randrange(n_keys) if rng.random() < 0.1 else i % n_keys for i in range(n)]
    return Trace("loop over 1 MB arrays, 10 % random", equal_sizes(rng, n_keys), with_writes(rng, keys, 0.1))


def hot_large(rng: random.Random, n: int) -> Trace:
    """The larger, the more popular: what favours small values must not lose here."""
    n_keys = n // 10
    sizes = sorted(mixed_sizes(rng, n_keys), reverse=True)
    weights = list(accumulate((i + 1) ** -0.9 for i in range(n_keys)))
    keys = rng.choices(range(n_keys), cum_weights=weights, k=n)
    return Trace("hot = large", sizes, with_writes(rng, keys, 0.1))


def soon(rng: random.Random, n: int) -> Trace:
    """Written once, read three times soon after, never again: counting uses keeps what is done with."""
    timeline: list[tuple[float, int, bool]] = []
    n_keys = n // 4
    for key in range(n_keys):
        timeline.append((float(key), key, True))
        timeline += [(key + rng.expovariate(1 / (0.03 * n_keys)), key, False) for _ in range(3)]
    timeline.sort()
    return Trace("written once, read soon", mixed_sizes(rng, n_keys), [(key, write) for _, key, write in timeline])


def drift(rng: random.Random, n: int) -> Trace:
    """What is popular changes: yesterday's favourites must leave."""
    n_keys = n // 10
    keys = zipf(rng, n_keys, 1.0, n)
    return Trace(
        "Zipf 1.0, drifting",
        mixed_sizes(rng, n_keys),
        with_writes(rng, [(key + i * n_keys // n * 3) % n_keys for i, key in enumerate(keys)], 0.2),
    )


TRACES: list[Callable[[random.Random, int], Trace]] = [
    zipf_trace("Zipf 0.8, 100 B - 10 MB, reads", mixed_sizes, 0.8, 0.0),
    zipf_trace("Zipf 1.0, 100 B - 10 MB, reads", mixed_sizes, 1.0, 0.0),
    zipf_trace("Zipf 1.2, 100 B - 10 MB, reads", mixed_sizes, 1.2, 0.0),
    zipf_trace("Zipf 0.8, 100 B - 10 MB, 30 % writes", mixed_sizes, 0.8, 0.3),
    zipf_trace("Zipf 1.0, 100 B - 10 MB, 30 % writes", mixed_sizes, 1.0, 0.3),
    zipf_trace("Zipf 1.2, 100 B - 10 MB, 30 % writes", mixed_sizes, 1.2, 0.3),
    zipf_trace("Zipf 0.8, < 1 KB, 30 % writes", small_sizes, 0.8, 0.3),
    zipf_trace("Zipf 1.0, < 1 KB, 30 % writes", small_sizes, 1.0, 0.3),
    zipf_trace("Zipf 0.9, 95 % < 1 KB, 5 % 1-8 MB, reads", table_sizes, 0.9, 0.0),
    zipf_trace("Zipf 0.9, 95 % < 1 KB, 5 % 1-8 MB, 30 % writes", table_sizes, 0.9, 0.3),
    zipf_trace("Zipf 0.8, 1 MB arrays, reads", equal_sizes, 0.8, 0.0),
    zipf_trace("Zipf 1.0, 1 MB arrays, 30 % writes", equal_sizes, 1.0, 0.3),
    scans,
    scans_small,
    drift,
    loop,
    loop_equal,
    hot_large,
    soon,
]


# --- policies


class Outcome(NamedTuple):
    cost_s: float
    n_hits: int


class Policy:
    """A cache that counts what its misses and its unwritten victims cost.

    A policy is ``find`` (a hit: take note), ``put`` (enter, or be overwritten) and ``pop`` (choose one to leave). What
    reading and writing cost is ``read`` and ``write``, in seconds: here as the model has it; in
    ``eviction_parts.with_files`` it is done.
    """

    def __init__(self, limit: int, sizes: list[int]) -> None:
        self.limit = limit
        self.sizes = sizes
        self.dirty: set[int] = set()
        self.values = 0
        self.n = 0

    def read(self, key: int) -> float:
        return LATENCY_S + self.sizes[key] / BYTES_PER_S

    def write(self, key: int) -> float:
        return LATENCY_S + self.sizes[key] / BYTES_PER_S

    find: Callable[[int], bool]
    put: Callable[[int], None]
    pop: Callable[[], int]

    def run(self, requests: list[tuple[int, bool]]) -> Outcome:
        sizes, dirty, limit = self.sizes, self.dirty, self.limit
        free = limit + FREE_BYTES
        cost = 0.0
        n_hits = 0
        for key, write in requests:
            size = sizes[key]
            if self.find(key):
                n_hits += 1
                if write:
                    dirty.add(key)
                    self.put(key)
                continue
            if not write or size > limit:
                cost += self.read(key)
            if size > limit:
                continue
            while self.n and (self.values + size > limit or self.values + size + (self.n + 1) * OVERHEAD > free):
                victim = self.pop()
                self.values -= sizes[victim]
                self.n -= 1
                if victim in dirty:
                    dirty.remove(victim)
                    cost += self.write(victim)
            self.values += size
            self.n += 1
            if write:
                dirty.add(key)
            self.put(key)
        return Outcome(cost, n_hits)


class LRU(Policy):
    def __init__(self, limit: int, sizes: list[int]) -> None:
        super().__init__(limit, sizes)
        self.order: OrderedDict[int, None] = OrderedDict()

    def find(self, key: int) -> bool:
        if key in self.order:
            self.order.move_to_end(key)
            return True
        return False

    def put(self, key: int) -> None:
        self.order[key] = None

    def pop(self) -> int:
        return self.order.popitem(last=False)[0]


class FIFO(LRU):
    def find(self, key: int) -> bool:
        return key in self.order


class Clock(Policy):
    """FIFO, but what was hit goes round once more."""

    def __init__(self, limit: int, sizes: list[int]) -> None:
        super().__init__(limit, sizes)
        self.hot: dict[int, bool] = {}
        self.queue: deque[int] = deque()

    def find(self, key: int) -> bool:
        if key in self.hot:
            self.hot[key] = True
            return True
        return False

    def put(self, key: int) -> None:
        if key not in self.hot:
            self.hot[key] = False
            self.queue.append(key)

    def pop(self) -> int:
        while True:
            key = self.queue.popleft()
            if not self.hot[key]:
                del self.hot[key]
                return key
            self.hot[key] = False
            self.queue.append(key)


class Sieve(Policy):
    """SIEVE (Zhang et al., 2024): as CLOCK, but what survives keeps its place, and the hand moves on."""

    def __init__(self, limit: int, sizes: list[int]) -> None:
        super().__init__(limit, sizes)
        self.hot: dict[int, bool] = {}
        self.newer: deque[int] = deque()  # what the hand has yet to see, oldest first
        self.passed: deque[int] = deque()  # what it has seen and left, older than all those

    find = Clock.find

    def put(self, key: int) -> None:
        if key not in self.hot:
            self.hot[key] = False
            self.newer.append(key)

    def pop(self) -> int:
        while True:
            if not self.newer:
                self.newer, self.passed = self.passed, deque()
            key = self.newer.popleft()
            if not self.hot[key]:
                del self.hot[key]
                return key
            self.hot[key] = False
            self.passed.append(key)


class GDSF(Policy):
    """GreedyDual-Size-Frequency, exact, with a heap: the floor + uses * cost / size."""

    def __init__(self, limit: int, sizes: list[int]) -> None:
        super().__init__(limit, sizes)
        self.floor = 0.0
        self.uses: dict[int, int] = {}
        self.rank: dict[int, float] = {}
        self.heap: list[tuple[float, int]] = []

    def find(self, key: int) -> bool:
        if key in self.uses:
            self.uses[key] += 1
            self.put(key)
            return True
        return False

    def put(self, key: int) -> None:
        uses = self.uses.setdefault(key, 1)
        size = self.sizes[key]
        rank = self.floor + (uses + (key in self.dirty)) * (BREAK_EVEN + size) / (size + OVERHEAD)
        self.rank[key] = rank
        heapq.heappush(self.heap, (rank, key))

    def pop(self) -> int:
        while True:
            rank, key = heapq.heappop(self.heap)
            if self.rank.get(key) == rank:
                self.floor = rank
                del self.rank[key], self.uses[key]
                return key


class GDQ(Policy):
    """What chest does: the memory tier itself."""

    slack_bytes = 0

    def run(self, requests: list[tuple[int, bool]]) -> Outcome:
        sizes, limit = self.sizes, self.limit
        tier = MemoryTier(limit)
        entries = tier.entries
        low = limit - min(limit // 10, self.slack_bytes)
        cost = 0.0
        n_hits = 0
        for key, write in requests:
            size = sizes[key]
            entry = entries.get(key)
            if entry is not None:
                n_hits += 1
                entry.hot = True
                if write:
                    tier.add(Entry(key, None, size, True))
                continue
            if not write or size > limit:
                cost += self.read(key)
            if size > limit:
                continue
            # The first 64 KiB of bookkeeping are free: what the new entry will add is known only near them.
            extra = OVERHEAD if (len(entries) + 1) * OVERHEAD > FREE_BYTES else 0
            if tier.usage > limit - size - extra:
                for victim in tier.victims(max(0, low - size - extra)):
                    tier.remove(victim.key)
                    if victim.dirty:
                        cost += self.write(victim.key)
            tier.add(Entry(key, None, size, write))
        return Outcome(cost, n_hits)


class GDQBatch(GDQ):
    slack_bytes = 4 << 20


POLICIES: dict[str, type[Policy]] = {
    "LRU": LRU,
    "FIFO": FIFO,
    "CLOCK": Clock,
    "SIEVE": Sieve,
    "GDSF (heap)": GDSF,
    "GDQ": GDQ,
    "GDQ batch": GDQBatch,
}
