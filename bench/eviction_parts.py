"""The eviction policies as parts of the suite: simulated, and once more with files that are really read and written."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

from measuring import Row

FILE_BUDGET = 0.10
FILE_TRACES = [1, 4, 9, 12, 16, 17]  # of `eviction.TRACES`: reads, writes, a few large ones, scans, a loop, hot = large
FILE_BYTES = 2_000_000  # the largest file: the traces' sizes, cut


def simulated(name: str, folder: str, n: int) -> Iterator[Row]:
    """What a policy's misses and unwritten victims cost on every trace with every budget, in modelled seconds."""
    from eviction import BUDGETS, OVERHEAD, POLICIES, TRACES

    for seed, make in enumerate(TRACES):
        trace = make(random.Random(seed), n)
        footprint = sum(trace.sizes) + len(trace.sizes) * OVERHEAD
        for budget in BUDGETS:
            outcome = POLICIES[name](int(footprint * budget), trace.sizes).run(trace.requests)
            yield f"{trace.name} @ {budget:.0%}", outcome.cost_s
            yield f"hits: {trace.name} @ {budget:.0%}", 100 * outcome.n_hits / len(trace.requests)


def with_files(name: str, folder: str, n: int) -> Iterator[Row]:
    """Seconds that a trace takes, each miss a file read and each changed victim a file written, without syncing."""
    from eviction import OVERHEAD, POLICIES, TRACES, Policy

    content = random.Random(1).randbytes(FILE_BYTES)
    policy: type[Policy] = POLICIES[name]

    class WithFiles(policy):  # type: ignore[misc, valid-type]
        def read(self, key: int) -> float:
            with open(os.path.join(place, str(key)), "rb", buffering=0) as file:
                if len(file.read()) != self.sizes[key]:
                    raise AssertionError("a file of another size")
            return 0.0

        def write(self, key: int) -> float:
            with open(os.path.join(place, str(key)), "wb", buffering=0) as file:
                file.write(memoryview(content)[: self.sizes[key]])
            return 0.0

    for number in FILE_TRACES:
        made = TRACES[number](random.Random(number), n)
        trace = made._replace(sizes=[min(size, FILE_BYTES) for size in made.sizes])
        place = os.path.join(folder, str(number))
        os.makedirs(place)
        limit = int((sum(trace.sizes) + len(trace.sizes) * OVERHEAD) * FILE_BUDGET)
        cache = WithFiles(limit, trace.sizes)
        for key in range(len(trace.sizes)):
            cache.write(key)
        start = time.perf_counter()
        cache.run(trace.requests)
        yield trace.name, time.perf_counter() - start
