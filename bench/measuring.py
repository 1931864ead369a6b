"""What all workloads measure with: memory, disk, time, and the values that are stored."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

Row = tuple[str, "float | str"]
"""A column and its number, or why this contestant has none there."""


class NotMeasuredError(Exception):
    """This machine does not allow it; the text says what is missing."""


def memory(pid: int | str = "self") -> int:
    """The private memory of a process, mapped files left out; 0 where the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


# Run in a process of its own, so that it sees what happens inside one call, and costs the measured one nothing.
_WATCH = """
import os, select, sys
pid, most = int(sys.argv[1]), 0
print("ready", flush=True)
while not select.select([0], [], [], 0.001)[0]:
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("RssAnon"):
            most = max(most, int(line.split()[1]) * 1024)
print(most)
"""


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends the highest private memory that this process had in the block, looked at every millisecond."""
    found: list[int] = []
    if not memory():
        raise NotMeasuredError("needs /proc")
    command = [sys.executable, "-S", "-E", "-c", _WATCH, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        yield found
        answer = watcher.communicate("\n")[0]
    found.append(max(int(answer), memory()))


def _cgroup(pid: int) -> tuple[Path, str]:
    """The folder of the cgroup of a process that measures with little page cache, and the name of its setting."""
    lines = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():  # version 2
        own = next(path for _, controllers, path in lines if not controllers)
        parent, setting = f"/sys/fs/cgroup/{own}", "memory.max"
    else:
        own = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), "/")
        parent, setting = f"/sys/fs/cgroup/memory/{own}", "memory.limit_in_bytes"
    return Path(parent) / f"chest-bench-{pid}", setting


@contextmanager
def small_page_cache(megabytes: int) -> Iterator[None]:
    """A memory cgroup of this size around this process: the page cache of what it reads and writes counts, too."""
    try:
        group, setting = _cgroup(os.getpid())
        group.mkdir()
        (group / setting).write_text(str(megabytes << 20))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        forget_cgroup(os.getpid())
        raise NotMeasuredError(f"needs the right to make a memory cgroup ({error.strerror}): run it as root") from error
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def forget_cgroup(pid: int) -> None:
    """Removes the cgroup that a process which was killed has left, if there is one."""
    with suppress(OSError):
        _cgroup(pid)[0].rmdir()


def disk_bytes(folder: str) -> int:
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
        yield f"record_{i}", {"id": i, "name": f"user {i}", "data": block[start : start + length]}


def timed_sets(put: Callable[[Any, Any], None], pairs: Iterable[tuple[str, Any]]) -> float:
    """Seconds that setting took, without the making of the values."""
    seconds, pairs = 0.0, iter(pairs)
    while chunk := list(islice(pairs, 1000)):
        chunk.reverse()
        start = time.perf_counter()
        while chunk:  # nothing holds a value but the store, as in a program that makes one after the other
            put(*chunk.pop())
        seconds += time.perf_counter() - start
    return seconds


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Calls(NamedTuple):
    n: int
    seconds: float
    longest: float


def timed_calls(calls: Iterable[Callable[[], object]], most_seconds: float = math.inf) -> Calls:
    """Each call by itself, what makes it not counted; no more of them once they have taken ``most_seconds``."""
    n, total, longest, clock = 0, 0.0, 0.0, time.perf_counter
    for call in calls:
        start = clock()
        call()
        took = clock() - start
        n += 1
        total += took
        if took > longest:
            longest = took
        if total > most_seconds:
            break
    return Calls(n, total, longest)
