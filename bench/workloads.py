"""What is measured: each workload runs one contestant once, in a process of its own, and returns numbers.

Times are microseconds per operation. Values are made outside the timed parts, what is read is checked inside them (a
comparison of two numbers), so that no contestant wins by answering wrong. The page cache is as it is: warm, since what
is read was written a moment before.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, MEMORY, Handle

Numbers = dict[str, float | None]

N_HOT, HOT_ROUNDS = 1000, 20
LARGE_MEMORY = 1 << 30


def _memory() -> int:
    """The memory of this process without mapped files, 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _disk_bytes(folder: str) -> int:
    """Bytes that the files below a folder occupy, not what they claim: an index may be sparse."""
    total = 0
    for parent, _, files in os.walk(folder):
        total += sum(os.lstat(os.path.join(parent, name)).st_blocks * 512 for name in files)
    return total


def records(n: int, seed: int = 7) -> Iterator[tuple[str, dict[str, Any]]]:
    """Small values as programs have them: a number, a text and 100 B to 4 KB of bytes, even on a log scale."""
    rng = random.Random(seed)
    block = rng.randbytes(1 << 20)
    for i in range(n):
        length = int(100 * math.exp(rng.random() * math.log(41)))
        start = rng.randrange(len(block) - length)
        yield f"record {i}", {"id": i, "name": f"user {i}", "data": block[start : start + length]}


def _timed_sets(handle: Handle, pairs: Iterator[tuple[str, Any]]) -> float:
    """Seconds that setting took, without the making of the values."""
    seconds, put = 0.0, handle.set
    while chunk := [pair for _, pair in zip(range(1000), pairs, strict=False)]:
        chunk.reverse()
        start = time.perf_counter()
        while chunk:  # nothing holds a value but the store, as in a program that makes one after the other
            put(*chunk.pop())
        seconds += time.perf_counter() - start
    return seconds


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def small(name: str, folder: str, n: int) -> Numbers:
    """Fill, cold reads, overwrites, iteration with a small memory; hot reads with a large one."""
    who = CONTESTANTS[name]
    rng = random.Random(11)
    handle = who.open(folder, MEMORY)
    base = _memory()
    fill = _timed_sets(handle, records(n))
    memory = _memory() - base
    fill += _timed(handle.close)
    numbers: Numbers = {"fill": fill / n * 1e6, "memory": memory / 1e6}
    numbers["disk"] = _disk_bytes(folder) / 1e6 if who.persists else None

    if who.persists:
        handle = who.open(folder, MEMORY)
    order = rng.sample(range(n), n)

    def cold() -> None:
        get = handle.get
        for i in order:
            if get(f"record {i}")["id"] != i:
                raise AssertionError(f"{name}: record {i} is another one")

    numbers["cold read"] = _timed(cold) / n * 1e6

    def iterate() -> None:
        count = sum(1 for key, value in handle.items() if value["id"] >= 0)
        if count != n:
            raise AssertionError(f"{name}: {count} items instead of {n}")

    numbers["items"] = _timed(iterate) / n * 1e6
    again = set(rng.sample(range(n), n // 5))
    changed = ((key, value) for key, value in records(n, seed=8) if value["id"] in again)
    numbers["overwrite"] = (_timed_sets(handle, changed) + _timed(handle.close)) / len(again) * 1e6

    if who.persists:
        handle = who.open(folder, LARGE_MEMORY)
    keys = [f"record {i}" for i in rng.sample(range(n), N_HOT)]
    for key in keys:
        handle.get(key)
    visits = rng.choices(keys, k=N_HOT * HOT_ROUNDS)

    def hot() -> None:
        get = handle.get
        for key in visits:
            get(key)

    numbers["hot read"] = _timed(hot) / len(visits) * 1e6
    handle.close()
    return numbers


def arrays(name: str, folder: str, n: int, megabytes: int) -> Numbers:
    """Write, first touch, full read, one page changed, of float64 arrays."""
    import numpy as np

    who = CONTESTANTS[name]
    size = megabytes << 17
    memory = n * (megabytes << 20) // 4
    rng = np.random.default_rng(5)
    pattern = rng.random(size)
    keys = [f"a{i}" for i in range(n)]
    handle = who.open(folder, memory)
    write = 0.0
    for i, key in enumerate(keys):
        value = pattern + i
        start = time.perf_counter()
        handle.set(key, value)
        write += time.perf_counter() - start
        del value
    write += _timed(handle.close)
    numbers: Numbers = {"write": write / n * 1e6}

    def again() -> Handle:
        return who.open(folder, memory) if who.persists else handle

    handle = again()

    def touch() -> None:
        for i, key in enumerate(keys):
            if handle.get(key)[0] != pattern[0] + i:
                raise AssertionError(f"{name}: {key} is another one")

    numbers["first touch"] = _timed(touch) / n * 1e6
    handle.close()
    handle = again()
    numbers["full read"] = _timed(lambda: [handle.get(key).sum() for key in keys] and None) / n * 1e6
    handle.close()
    handle = again()

    def change() -> None:
        for key in keys:
            array = handle.get(key)
            if not array.flags.writeable:
                array = array.copy()
            array[size // 2] = -1.0
            if not who.in_place:
                handle.set(key, array)
            del array
        handle.flush()
        handle.close()

    numbers["change 1 page"] = _timed(change) / n * 1e6
    handle = again()
    for i, key in enumerate(keys):
        array = handle.get(key)
        if array[size // 2] != -1.0 or array[-1] != pattern[-1] + i:
            raise AssertionError(f"{name}: a change of {key} was lost")
        del array
    handle.close()
    return numbers


def fill_for_opening(name: str, folder: str, n: int) -> Numbers:
    """Not measured: the folder that ``opening`` opens."""
    handle = CONTESTANTS[name].open(folder, MEMORY)
    for i in range(n):
        handle.set(f"record {i}", i)
    handle.close()
    return {}


def opening(name: str, folder: str, n: int) -> Numbers:
    """Open, get one value, count the keys; the import of the library is not timed."""
    CONTESTANTS[name].open(folder + ".warm", MEMORY).close()
    start = time.perf_counter()
    handle = CONTESTANTS[name].open(folder, MEMORY)
    if handle.get(f"record {n // 2}") != n // 2:
        raise AssertionError(f"{name}: another value")
    numbers: Numbers = {"open + get": (time.perf_counter() - start) * 1e6}
    count = handle.count
    if count is None:
        numbers["len"] = None
    else:
        start = time.perf_counter()
        if count() != n:
            raise AssertionError(f"{name}: {count()} keys instead of {n}")
        numbers["len"] = (time.perf_counter() - start) * 1e6
    handle.close()
    return numbers


WORKLOADS: dict[str, Callable[..., Numbers]] = {
    "small": small,
    "arrays": arrays,
    "fill_for_opening": fill_for_opening,
    "opening": opening,
}
