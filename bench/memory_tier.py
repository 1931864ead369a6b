"""Time per operation of the memory tier at 10^6 entries, its worst stalls, and what an entry takes.

    python bench/memory_tier.py [--entries N] [--json FILE]

Processor time of this thread, so that what else the machine does is left out. The cycle collector is off: one full
collection of 10^6 entries takes a tenth of a second, whoever owns them. "A plain dict" is a control: with as many keys,
taking one out and putting one in makes it rebuild itself now and then, and ``entries`` of the tier is such a dict.
"Nothing at all" is the other one: what this machine adds to a call that does nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from chest._hot import ENTRY_BYTES, Entry, MemoryTier

clock_ns = time.thread_time_ns


class Report(dict[str, float]):
    def add(self, what: str, value: float, unit: str) -> None:
        self[f"{what}, {unit}"] = value
        print(f"{what:52}{value:12.3f} {unit}", flush=True)

    def mean(self, what: str, run: Callable[[], int]) -> None:
        """Of what ``run`` does as often as it says."""
        start = clock_ns()
        count = run()
        self.add(what, (clock_ns() - start) / count / 1e3, "us")

    def once(self, what: str, run: Callable[[], object]) -> None:
        start = clock_ns()
        run()
        self.add(what, (clock_ns() - start) / 1e6, "ms")

    def worst(self, what: str, run: Callable[[Any], object], items: Iterable[Any]) -> None:
        times = []
        for item in items:
            start = clock_ns()
            run(item)
            times.append(clock_ns() - start)
        times.sort()
        self.add(f"{what}: the 20th worst of {len(times):,}", times[-20] / 1e6, "ms")
        self.add(f"{what}: the worst", times[-1] / 1e6, "ms")


def measure(n: int) -> Report:
    rng = random.Random(0)
    sizes = rng.choices((100, 1000, 10_000, 100_000, 1_000_000), k=n)
    report = Report(entries=n)
    tier = MemoryTier(1 << 60)

    def entries(prefix: str, count: int) -> list[Entry]:
        return [Entry(f"{prefix}{i}", None, sizes[i], True) for i in range(count)]

    def each(do: Callable[[Entry], object], over: Iterable[Entry]) -> int:
        count = 0
        for entry in over:
            do(entry)
            count += 1
        return count

    def victims() -> list[Entry]:
        return tier.victims(tier.usage * 4 // 5)

    def evict_one(_: object = None) -> None:
        for entry in tier.victims(tier.usage - 1):
            tier.remove(entry.key)

    def replace_one(entry: Entry) -> None:
        evict_one()
        tier.add(entry)

    living = tier.entries
    new = entries("a", n)
    report.mean("add", lambda: each(tier.add, new))
    new = entries("a", n)
    report.mean("overwrite", lambda: each(tier.add, new))
    report.mean("mark clean", lambda: each(lambda entry: tier.mark(entry, False), new))
    report.mean("mark dirty", lambda: each(lambda entry: tier.mark(entry, True), new))
    report.mean("resize", lambda: each(lambda entry: tier.resize(entry, entry.size + 1), new))
    report.mean("pick and remove", lambda: each(lambda entry: tier.remove(entry.key), victims()))
    report.mean("pick and keep", lambda: each(tier.keep, victims()))
    report.once("retry of all those", tier.retry)
    new = entries("b", n - len(tier))
    each(tier.add, new)
    report.mean("evict one and add one", lambda: each(replace_one, entries("c", n // 2)))
    report.worst("evict one and add one", replace_one, entries("d", n // 2))
    control = dict.fromkeys(range(n))
    report.worst("a plain dict", lambda i: control.update({i + n: control.pop(i)}), range(n // 2))
    control.clear()
    report.worst("nothing at all", lambda i: i, range(n // 2))
    for entry in living.values():
        entry.hot = True
    report.worst("evict one, all hot", evict_one, range(n // 20))
    last_first = list(living)[::-1]
    report.worst("delete half, last in first out", tier.remove, last_first[: len(tier) // 2])
    report.worst("evict one after that", evict_one, range(n // 20))
    report.once("check", tier.check)
    new.clear()
    report.once(f"clear of {len(tier):,}", tier.clear)

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counts = (100_000, 120_000, 150_000, 175_000)  # a dict is now fuller, now emptier
    taken = 0.0
    for count in counts:
        for i in range(len(tier), count):
            entry = Entry(i + (1 << 40), None, i + (1 << 20), True)
            entry.seq = i + (1 << 20)
            tier.add(entry)
        taken += (tracemalloc.get_traced_memory()[0] - before) / count / len(counts)
    tracemalloc.stop()
    report.add("an entry takes, its key included", taken, "bytes")
    report.add("an entry is charged", ENTRY_BYTES + sys.getsizeof(1 << 40), "bytes")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE")
    args = parser.parse_args()
    gc.disable()
    report = measure(args.entries)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
