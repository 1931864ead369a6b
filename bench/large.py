"""Workloads of values that are large or nested: arrays, data frames with strings, containers, and the memory they take."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from contestants import CONTESTANTS, Contestant, Handle
from measuring import NotMeasuredError, Row, memory, peak_memory, records, timed

ROUNDS = 2  # reads of the same files by a store that was opened anew: the first may find the disk still busy with writing


def _again(who: Contestant, folder: str, budget: int, old: Handle) -> Handle:
    if not who.persists:
        return old
    old.close()
    return who.open(folder, budget)


def arrays(name: str, folder: str, n: int, megabytes: int) -> Iterator[Row]:
    """Write, first touch, full read, a hundredth read, one page changed, of float64 arrays; memory for a quarter of them."""
    import numpy as np

    who = CONTESTANTS[name]
    size = megabytes << 17
    budget = n * (megabytes << 20) // 4
    pattern = np.random.default_rng(5).random(size)
    keys = [f"a{i}" for i in range(n)]
    handle = who.open(folder, budget)
    write = 0.0
    for i, key in enumerate(keys):
        value = pattern + i
        write += timed(lambda key=key, value=value: handle.set(key, value))
        del value
    write += timed(handle.close)
    yield "spill", write / n * 1e6

    def touch() -> None:
        for i, key in enumerate(keys):
            if handle.get(key)[0] != pattern[0] + i:
                raise AssertionError(f"{name}: {key} is another one")

    def best(run: Callable[[], object]) -> float:
        nonlocal handle
        times = []
        for _ in range(ROUNDS):
            handle = _again(who, folder, budget, handle)
            times.append(timed(run))
        return min(times) / n * 1e6

    part = slice(size // 2, size // 2 + size // 100)
    if who.persists:
        handle = who.open(folder, budget)
    yield "first touch", best(touch)
    yield "1 % read", best(lambda: [handle.get(key)[part].sum() for key in keys])
    yield "full read", best(lambda: [handle.get(key).sum() for key in keys])
    few = keys[: max(1, n // 4)]
    if handle.prefetch is None:
        yield "prefetch", "the library has no such operation"
    else:
        handle = _again(who, folder, budget, handle)
        yield "prefetch", timed(lambda: handle.prefetch(few)) / len(few) * 1e6
    handle = _again(who, folder, budget, handle)

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

    yield "change 1 page", timed(change) / n * 1e6
    if who.persists:
        handle = who.open(folder, budget)
    for i, key in enumerate(keys):
        array = handle.get(key)
        if array[size // 2] != -1.0 or array[-1] != pattern[-1] + i:
            raise AssertionError(f"{name}: a change of {key} was lost")
        del array
    handle.close()

    if who.persists:
        handle = who.open(folder + ".memory", 2 * size * 8)
    value = pattern + 1
    gc.collect()
    base = memory()
    try:
        with peak_memory() as peak:
            handle.set("a0", value)
            handle.close()
        yield "memory", (peak[0] - base) / 1e6
    except NotMeasuredError as reason:
        yield "memory", str(reason)


class Kind(NamedTuple):
    """Values of one kind: how the i-th is made, changed in place, and what is compared afterwards."""

    make: Callable[[int], Any]
    change: Callable[[Any], None]
    mark: Callable[[Any], Any]
    nbytes: int  # of one in memory, roughly


def _frames(n_rows: int = 20_000) -> Kind:
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(4)
    cities = np.array(["Aachen", "Bordeaux", "Cádiz", "Dubrovnik", "Espoo"], dtype=object)

    def make(i: int) -> Any:
        return pd.DataFrame(
            {
                "number": np.arange(n_rows) + i,
                "price": rng.random(n_rows),
                "city": cities[rng.integers(0, 5, n_rows)],
                "name": [f"customer {j + i}" for j in range(n_rows)],
            }
        )

    def change(frame: Any) -> None:
        frame.loc[7, "price"] = -1.0

    return Kind(make, change, lambda frame: (frame.loc[7, "price"], frame.loc[3, "name"]), n_rows * 140)


def _nested() -> Kind:
    def make(i: int) -> Any:
        rows = [{"id": j, "tags": [f"tag {j % 7}", f"tag {i}"], "at": (i, j / 3), "text": "x" * (j % 60)} for j in range(50)]
        return {"id": i, "rows": rows, "meta": {"state": "new", "owner": {"name": f"user {i}", "groups": ["a", "b"]}}}

    def change(value: Any) -> None:
        value["rows"][7]["tags"].append("changed")

    return Kind(make, change, lambda value: (value["rows"][7]["tags"][-1], value["id"]), 33_000)


def _kind(kind: str) -> Kind:
    return {"frames": _frames, "nested": _nested}[kind]()


def objects(name: str, folder: str, kind: str, n: int) -> Iterator[Row]:
    """Write, read, change in place inside (where a library does not notice: set again); memory for a quarter of them."""
    who = CONTESTANTS[name]
    of = _kind(kind)
    budget = n * of.nbytes // 4
    handle = who.open(folder, budget)
    write, marks = 0.0, []
    for i in range(n):
        value = of.make(i)
        marks.append(of.mark(value))
        write += timed(lambda i=i, value=value: handle.set(f"v{i}", value))
        del value
    yield "write", (write + timed(handle.close)) / n * 1e6
    order = random.Random(2).sample(range(n), n)
    if who.persists:
        handle = who.open(folder, budget)

    def read() -> None:
        for i in order:
            if of.mark(handle.get(f"v{i}")) != marks[i]:
                raise AssertionError(f"{name}: v{i} is another one")

    yield "read", timed(read) / n * 1e6
    handle = _again(who, folder, budget, handle)
    some = order[: max(1, n // 4)]

    def change() -> None:
        for i in some:
            value = handle.get(f"v{i}")
            of.change(value)
            if not who.in_place:
                handle.set(f"v{i}", value)
            del value
        handle.flush()
        handle.close()

    yield "change inside", timed(change) / len(some) * 1e6
    if who.persists:
        handle = who.open(folder, budget)
    for i in some:
        if of.mark(handle.get(f"v{i}")) == marks[i]:
            raise AssertionError(f"{name}: the change of v{i} was lost")
    handle.close()


def limit(name: str, folder: str, kind: str, megabytes: int) -> Iterator[Row]:
    """The highest private memory while four times the limit is filled in and then read and written by popularity.

    Subtracted is what the process had when the store was open and empty, and the limit: below 0 there was room left.
    """
    who = CONTESTANTS[name]
    budget = megabytes << 20
    rng = random.Random(6)
    if kind == "small":
        pairs: Any = records(budget * 4 // 1100)
        n = budget * 4 // 1100
    elif kind == "arrays":
        import numpy as np

        n = 32
        pairs = ((f"record_{i}", np.full(budget // 8 // 8, float(i))) for i in range(n))
    else:
        of = _kind(kind)
        n = max(4, budget * 4 // of.nbytes)
        pairs = ((f"record_{i}", of.make(i)) for i in range(n))
    weights = list(accumulate(1 / (i + 1) for i in range(n)))
    visits = rng.choices(range(n), cum_weights=weights, k=min(n, 50_000))
    handle = who.open(folder, budget)
    handle.set("first", 1)
    handle.get("first")
    gc.collect()
    base = memory()
    with peak_memory() as peak:
        for key, value in pairs:
            handle.set(key, value)
        for turn, i in enumerate(visits):
            value = handle.get(f"record_{i}")
            if turn % 10 == 9:
                handle.set(f"record_{i}", value)
            del value
        handle.close()
    yield kind, (peak[0] - base - budget) / 1e6
