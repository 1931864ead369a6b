"""Is there an order of all reads and writes of all processes that explains what each of them saw, and when?

Processes read and write a few keys through chests of their own and note when each operation began and ended, by a clock
that they share. Every value is written once. Then each key is a register, and whether its history is linearizable can be
decided exactly (Gibbons and Korach, "Testing shared memories", SIAM Journal on Computing 26, 1997): an operation and all
reads of what it wrote form a cluster; from the first end to the last begin of a cluster its value must have been the
current one without a break (a forward zone; if all of a cluster overlaps there is only some instant between the last begin
and the first end, a backward zone). A history is linearizable if no two forward zones overlap, no forward zone holds a
backward one, and nothing is read before it was written.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from counts import count

from chest import Chest

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(sys.platform == "win32", reason="no clock that processes share"),
]

N_KEYS = 8
WAIT_S = 600
FIRST = (-1, -1)  # the value that every key has at first


class Operation(NamedTuple):
    key: int
    value: tuple[int, int]  # who wrote it, and his how manieth
    is_write: bool
    begin: int
    end: int


def problem(history: Iterable[Operation]) -> str | None:
    """Why there is no order that explains the history of one key; None if there is one."""
    clusters: dict[Any, list[Operation]] = defaultdict(list)
    for operation in history:
        clusters[operation.value].append(operation)
    zones = []
    for value, cluster in clusters.items():
        writes = [o for o in cluster if o.is_write]
        if value == FIRST:
            writes = [Operation(cluster[0].key, FIRST, True, -2, -1)]
            cluster.append(writes[0])
        if len(writes) != 1:
            return f"{value} was read, and written {len(writes)} times"
        if any(o.end < writes[0].begin for o in cluster):
            return f"{value} was read before it was written"
        first_end, last_begin = min(o.end for o in cluster), max(o.begin for o in cluster)
        zones.append((min(first_end, last_begin), max(first_end, last_begin), first_end < last_begin, value))
    zones.sort()
    reach, owner = -3, None  # how far the forward zones seen so far go
    for begin, end, forward, value in zones:
        if forward:
            if begin <= reach:
                return f"{owner} and {value} were both current, again and again"
            reach, owner = end, value
        elif end < reach:
            return f"{value} was written and gone while {owner} was current"
    return None


def make(value: tuple[int, int]) -> Any:
    """Of each kind that takes a way of its own: a small value, a file, one that can be changed."""
    return [value, np.full(10_000, value[1]), {"is": value}][value[1] % 3 if value[1] % 10 == 0 else 0], value


def work(me: int, path: str, n: int, seed: int, memory: int, stale: bool, gate: Any, found: Any) -> None:
    rng = random.Random(f"{seed} {me}")
    history = []
    with Chest[Any, Any](path=path, available_memory=memory, write_through=True) as chest:
        for key in range(N_KEYS):
            chest[key]
        if stale:  # the control: whatever others commit, what is in memory is believed to be the newest
            chest._look = lambda: None  # type: ignore[method-assign]
            chest._generation = memoryview(chest._seen.to_bytes(8, "little")).cast("Q")
            chest._take_commits = lambda: chest._store.commits.clear() or 0  # type: ignore[func-returns-value,method-assign]
        gate.wait(WAIT_S)
        for number in range(n):
            key = rng.randrange(N_KEYS)
            is_write = rng.random() < 0.2
            value = (me, number)
            if is_write:
                new = make(value)
                begin = time.monotonic_ns()
                if rng.random() < 0.2:
                    with chest.transaction():
                        chest[key] = new
                else:
                    chest[key] = new
                end = time.monotonic_ns()
            else:
                begin = time.monotonic_ns()
                got = chest[key]
                end = time.monotonic_ns()
                value = tuple(got[1])  # type: ignore[assignment]
                assert value == FIRST or repr(got) == repr(make(value)), f"torn: {got}"
            history.append(Operation(key, value, is_write, begin, end))
    found.put(history)


def _next(found: Any, processes: list[Any]) -> list[Operation]:
    """The history of one process; an error, and no waiting, if one of them has died."""
    for _ in range(WAIT_S):
        try:
            history: list[Operation] = found.get(timeout=1)
            return history
        except queue.Empty:
            assert not any(process.exitcode for process in processes), "a process has failed"
    raise AssertionError("a process hangs")


def run(path: Path, n_processes: int, n: int, seed: int, *, stale: bool = False) -> list[str]:
    """What is wrong with the histories of the keys."""
    with Chest[Any, Any](path=path) as chest:
        chest.update(dict.fromkeys(range(N_KEYS), (FIRST, FIRST)))
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(n_processes), context.Queue()
    memories = [10**9, 0, 10**9, 100_000]
    processes = [
        context.Process(target=work, args=(i, str(path), n, seed, 10**9 if stale else memories[i % 4], stale, gate, found))
        for i in range(n_processes)
    ]
    for process in processes:
        process.start()
    try:
        history = [operation for _ in processes for operation in _next(found, processes)]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
            process.join()
            process.close()
        found.close()
        found.join_thread()
    assert len(history) == n * n_processes
    problems = [problem([o for o in history if o.key == key]) for key in range(N_KEYS)]
    return [p for p in problems if p is not None]


@pytest.mark.parametrize("n_processes", [2, 4, 8])
def test_reads_and_writes_of_many_processes_are_linearizable(
    tmp_path: Path, n_processes: int, scale: Callable[[int, int], int]
) -> None:
    n_histories = scale(1, 6)
    for seed in range(n_histories):
        assert run(tmp_path / str(seed), n_processes, scale(1200 // n_processes, 3000), seed) == []
        count(f"linearizable histories of {n_processes} processes", 1, 1)


def test_the_check_catches_a_chest_that_does_not_look_whether_others_have_committed(tmp_path: Path) -> None:
    assert run(tmp_path / "c", 2, 300, 0, stale=True)
    count("reads from memory without a look at the generation", 1, 0, control=True)


# --- the check


def op(value: int, begin: int, end: int, write: bool = False) -> Operation:
    return Operation(0, (0, value), write, begin, end)


def test_a_sequential_history_is_linearizable() -> None:
    assert problem([op(1, 0, 1, True), op(1, 2, 3), op(2, 4, 5, True), op(2, 6, 7)]) is None
    first = Operation(0, FIRST, False, 0, 1)
    assert problem([first, op(1, 2, 3, True), op(1, 4, 5)]) is None


def test_reads_beside_a_write_may_see_either() -> None:
    assert problem([op(1, 0, 1, True), op(2, 2, 9, True), op(1, 3, 4), op(2, 5, 6)]) is None
    assert problem([op(1, 0, 1, True), op(2, 2, 9, True), op(2, 3, 4), op(1, 5, 6)])


@pytest.mark.parametrize(
    "history",
    [
        [op(1, 0, 1, True), op(2, 2, 3, True), op(1, 4, 5)],  # stale
        [op(1, 5, 6, True), op(1, 0, 1)],  # from the future
        [op(1, 0, 1)],  # from nowhere
        [op(1, 0, 1, True), op(1, 8, 9), op(2, 3, 4, True)],  # a write that was never there
        [op(1, 0, 1, True), Operation(0, FIRST, False, 2, 3)],
    ],
)
def test_the_check_sees_what_is_wrong(history: list[Operation]) -> None:
    assert problem(history) is not None


def test_the_check_agrees_with_trying_all_orders() -> None:
    rng = random.Random(1)
    outcomes = set()
    for _ in range(400):
        operations = []
        for value in range(2):
            for is_write in (True, False, False)[: rng.randint(1, 3)]:
                begin = rng.randrange(12)
                operations.append(op(value, begin, begin + rng.randrange(1, 8), is_write))
        # Distinct times: whether two that touch overlap is a matter of taste.
        times = sorted(range(2 * len(operations)), key=lambda _: rng.random())
        ranks = sorted((t, times[i]) for i, t in enumerate(t for o in operations for t in (o.begin, o.end)))
        rank = {tie: place for place, (_, tie) in enumerate(ranks)}
        exact = [o._replace(begin=rank[times[2 * i]], end=rank[times[2 * i + 1]]) for i, o in enumerate(operations)]
        assert (problem(exact) is None) == _explained(exact, None), exact
        outcomes.add(problem(exact) is None)
    assert outcomes == {True, False}


def _explained(left: list[Operation], current: Any) -> bool:
    """Whether some order of the operations that are left explains them."""
    if not left:
        return True
    soonest = min(o.end for o in left)
    return any(
        _explained([other for other in left if other is not o], o.value)
        for o in left
        if o.begin <= soonest and (o.is_write or o.value == current)
    )
