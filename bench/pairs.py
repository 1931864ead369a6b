"""Workloads of small values: all that a dictionary does, opening many keys, and how the cost grows with their number.

Times are microseconds per operation. Values are made outside the timed parts; what is read is checked inside them (a
comparison of two numbers), so that no contestant wins by answering wrong. The page cache is as it is: warm, since what is
read was written a moment before, but in `scaling` with a small one.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

from contestants import CONTESTANTS
from measuring import Calls, Row, disk_bytes, memory, records, small_page_cache, timed, timed_calls, timed_sets

N_HOT, HOT_ROUNDS = 1000, 20
LARGE_MEMORY = 1 << 30
N_READS = 100_000  # at most
MOST_SECONDS = 20.0  # of reads that may wait for the disk
CANNOT = "the library has no such operation"


def pairs(name: str, folder: str, n: int) -> Iterator[Row]:
    """All operations with little memory (a tenth of the values, 8 MiB at most), and hits with a lot."""
    who = CONTESTANTS[name]
    rng = random.Random(11)
    budget = min(n * 100, 8 << 20)

    def again(opened: Any, budget: int) -> Any:
        if not who.persists:
            return opened
        return who.open(folder, budget)

    handle = who.open(folder, budget)
    base = memory()
    fill = timed_sets(handle.set, records(n))
    grown = memory() - base
    fill += timed(handle.close)
    yield "fill", fill / n * 1e6
    yield "memory", grown / 1e6
    yield "disk", disk_bytes(folder) / n if who.persists else "it does not persist"

    handle = again(handle, budget)
    order = rng.sample(range(n), min(n, N_READS))

    def cold() -> None:
        get = handle.get
        for i in order:
            if get(f"record_{i}")["id"] != i:
                raise AssertionError(f"{name}: record {i} is another one")

    yield "cold read", timed(cold) / len(order) * 1e6

    def iterate() -> None:
        count = sum(1 for key, value in handle.items() if value["id"] >= 0)
        if count != n:
            raise AssertionError(f"{name}: {count} items instead of {n}")

    yield "items", timed(iterate) / n * 1e6
    keys, contains, count = handle.keys, handle.contains, handle.count
    if keys is None:
        yield "keys", CANNOT
    else:
        start = time.perf_counter()
        if sum(1 for _ in keys()) != n:
            raise AssertionError(f"{name}: not {n} keys")
        yield "keys", (time.perf_counter() - start) / n * 1e6
    if contains is None:
        yield "in", CANNOT
    else:
        asked = [f"record_{i}" for i in rng.sample(range(2 * n), min(2 * n, N_READS))]
        start = time.perf_counter()
        found = sum(1 for key in asked if contains(key))
        yield "in", (time.perf_counter() - start) / len(asked) * 1e6
        if found != sum(int(key[7:]) < n for key in asked):
            raise AssertionError(f"{name}: `in` is wrong")
    if count is None:
        yield "len", CANNOT
    else:
        start = time.perf_counter()
        if count() != n:
            raise AssertionError(f"{name}: {count()} keys instead of {n}")
        yield "len", (time.perf_counter() - start) * 1e6

    # nine reads for a write, of keys whose popularity is 1 / rank
    ranks = list(range(n))
    rng.shuffle(ranks)
    weights = list(accumulate(1 / (i + 1) for i in range(n)))
    visits = rng.choices(ranks, cum_weights=weights, k=min(n, N_READS))
    fresh = [value for _, value in records(len(visits) // 10 + 1, seed=9)]

    def mixed() -> None:
        get, put = handle.get, handle.set
        for turn, i in enumerate(visits):
            if turn % 10 == 9:
                value = dict(fresh[turn // 10], id=i)
                put(f"record_{i}", value)
            elif get(f"record_{i}")["id"] != i:
                raise AssertionError(f"{name}: record {i} is another one")

    yield "mixed", timed(mixed) / len(visits) * 1e6

    again_n = max(1, min(n // 5, 2 * N_READS))
    changed = records(again_n, seed=8)
    seconds = timed_sets(handle.set, changed) + timed(handle.close)
    yield "overwrite", seconds / again_n * 1e6

    handle = again(handle, LARGE_MEMORY)
    hot = [f"record_{i}" for i in rng.sample(range(n), min(n, N_HOT))]
    for key in hot:
        handle.get(key)
    hits = rng.choices(hot, k=len(hot) * HOT_ROUNDS)
    opened_large = who.persists or not who.bounded

    def read_hot() -> None:
        get = handle.get
        for key in hits:
            get(key)

    if opened_large:
        seconds = timed(read_hot)
        if seconds < 0.1:  # so short that anything else on the machine is felt
            seconds = min(seconds, timed(read_hot), timed(read_hot))
        yield "hot read", seconds / len(hits) * 1e6
    else:
        yield "hot read", "it cannot be opened again with more memory"

    delete = handle.delete
    if delete is None:
        yield "delete", CANNOT
        handle.close()
        return
    gone = [f"record_{i}" for i in rng.sample(range(n), max(1, min(n // 20, N_READS)))]

    def remove() -> None:
        for key in gone:
            delete(key)
        handle.close()

    yield "delete", timed(remove) / len(gone) * 1e6


def opening(name: str, folder: str, n: int) -> Iterator[Row]:
    """Open, count, get one value, close; the import of the library is not timed.

    The folder is filled by the first round and opened again by the others.
    """
    who = CONTESTANTS[name]
    if not os.path.exists(folder):
        handle = who.open(folder, 8 << 20)
        for i in range(n):
            handle.set(f"record_{i}", i)
        handle.close()
    who.open(folder + ".warm", 8 << 20).close()
    base = memory()
    start = time.perf_counter()
    handle = who.open(folder, 8 << 20)
    opened = time.perf_counter()
    if handle.get(f"record_{n // 2}") != n // 2:
        raise AssertionError(f"{name}: another value")
    read = time.perf_counter()
    if handle.count is not None and handle.count() != n:
        raise AssertionError(f"{name}: {handle.count()} keys instead of {n}")
    counted = time.perf_counter()
    grown = memory() - base
    handle.close()
    closed = time.perf_counter()
    yield "open", (opened - start) * 1e6
    yield "get", (read - opened) * 1e6
    yield "len", CANNOT if handle.count is None else (counted - read) * 1e6
    yield "open + get + len", CANNOT if handle.count is None else (counted - start) * 1e6
    yield "close", (closed - counted) * 1e6
    yield "memory", max(0, grown) / n
    yield "disk", disk_bytes(folder) / n


def scaling(name: str, folder: str, n: int, cache_mb: int = 0) -> Iterator[Row]:
    """Values of 100 bytes that do not compress, each call timed by itself: means, and the longest single call.

    Reads stop after a while: with a small page cache each may wait for the disk.
    """
    who = CONTESTANTS[name]
    rng = random.Random(3)
    block = rng.randbytes(1 << 20)

    def value_of(i: int, step: int) -> bytes:
        start = i * step % (len(block) - 92)
        return i.to_bytes(8, "little") + block[start : start + 92]

    def put_all(keys: Iterable[int], step: int) -> Calls:
        return timed_calls(partial(handle.set, f"record_{i}", value_of(i, step)) for i in keys)

    def get_one(i: int) -> None:
        if int.from_bytes(handle.get(f"record_{i}")[:8], "little") != i:
            raise AssertionError(f"{name}: record {i} is another one")

    with small_page_cache(cache_mb) if cache_mb else nullcontext():
        handle = who.open(folder, 8 << 20)
        fill = put_all(range(n), 7919)
        closing = timed(handle.close)
        yield "fill", (fill.seconds + closing) / n * 1e6
        yield "longest set", fill.longest * 1e3
        yield "closing", closing * 1e3
        yield "disk", disk_bytes(folder) / n
        handle = who.open(folder, 8 << 20)
        order = [rng.randrange(n) for _ in range(min(n, N_READS))]
        read = timed_calls((partial(get_one, i) for i in order), MOST_SECONDS)
        yield "read", read.seconds / read.n * 1e6
        yield "longest get", read.longest * 1e3
        again = put_all(order[: max(1, len(order) // 5)], 104_729)
        yield "overwrite", (again.seconds + timed(handle.close)) / again.n * 1e6
