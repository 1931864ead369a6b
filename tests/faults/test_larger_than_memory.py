"""Larger than memory, under a limit that the kernel enforces: nobody is killed, nothing is wrong, the promise is kept.

The promise is ``available_memory``. It is measured from outside as the growth of ``RssAnon``, polled between
operations: the pages that are the process's own. (Peak RSS would count mapped files, which the kernel takes back
whenever it likes.) The control shows that the limit is one: a plain ``dict`` dies of the same work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from counts import count
from limits import MemoryLimit

pytestmark = [pytest.mark.torture, pytest.mark.slow]

AVAILABLE = 50 << 20
SLACK = 40 << 20  # of the interpreter: the value in hand, pickle's buffers, what malloc does not give back

COMMON = """
import json, sys
from itertools import chain
import numpy as np
from counts import count

from chest import Chest
from chest.core import nbytes

kind, path, amount = sys.argv[1], sys.argv[2], int(sys.argv[3])

def own_bytes():
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

MB20 = 20 << 20
def make(n):
    if kind == "arrays":
        return np.full(MB20 // 8, n, dtype=np.int64)
    if kind == "small":
        return {"n": n, "text": str(n) * 5}
    return {"n": n, "list": [np.full(100_000, n + k) for k in range(5)], "inner": {"array": np.full((300, 300), n)}}

def right(found, n):
    if kind == "arrays":
        return found.dtype == np.int64 and len(found) == MB20 // 8 and bool((found == n).all())
    if kind == "small":
        return found == make(n)
    return (found["n"] == n and all(bool((a == n + k).all()) and len(a) == 100_000 for k, a in enumerate(found["list"]))
            and found["inner"]["array"].shape == (300, 300) and bool((found["inner"]["array"] == n).all()))

n_values = amount if kind == "small" else amount // nbytes(make(1))
"""

CHEST = """
warm = Chest(available_memory=1 << 20)  # what is imported and allocated once belongs to the baseline
warm["a"] = np.zeros(200_000); warm.flush(); warm["a"][0]; warm.close()
available = int(sys.argv[4])
base = own_bytes()
peak = 0
counted = 0
every = max(1, n_values // 2000)

def poll(n):
    global peak, counted
    if n % every == 0:
        peak = max(peak, own_bytes() - base)
        counted = max(counted, chest.memory_usage)

wrong = 0
with Chest(path=path, available_memory=available) as chest:
    for n in range(n_values):
        chest[n] = make(n)
        poll(n)
    for n in chain(range(0, n_values, 7), range(n_values - 1, -1, -1)):
        wrong += not right(chest[n], n)
        poll(n)
    for n in range(0, n_values, max(1, n_values // 50)):  # changed in place: a mapped value gets pages of its own
        found = chest[n]
        if kind == "arrays":
            found[:] = -n
        elif kind == "small":
            found["n"] = -n
        else:
            found["list"][0][:] = -n
        del found
        poll(0)
    for n, found in chest.items():
        changed = n % max(1, n_values // 50) == 0
        if kind == "arrays":
            wrong += not right(found, -n if changed else n)
        elif kind == "small":
            wrong += found["n"] != (-n if changed else n)
        else:
            wrong += bool((found["list"][0] != (-n if changed else n)).any())
        poll(n)
        del found
    wrong += len(chest) != n_values
    spills = chest.stats().spills
with Chest(path=path, available_memory=available) as chest:
    wrong += len(chest) != n_values
    for n in range(1, n_values, max(1, n_values // 100) + 1):
        changed = n % max(1, n_values // 50) == 0
        if not changed:
            wrong += not right(chest[n], n)
        poll(0)
print(json.dumps({"n": n_values, "wrong": wrong, "peak": peak, "counted": counted, "spills": spills}))
"""

DICT = """
plain = {}
for n in range(n_values):
    plain[n] = make(n)
print("survived")
"""


def _run(code: str, limit: MemoryLimit, kind: str, path: Path, amount: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", limit.code + COMMON + code, kind, str(path), str(amount), str(AVAILABLE)],
        env=oracle.environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=3600,
    )


@pytest.mark.parametrize(
    ("kind", "ci", "full"),
    [("arrays", 300 << 20, 1 << 30), ("small", 120_000, 1_000_000), ("containers", 250 << 20, 1 << 30)],
    ids=["20-MB-arrays", "small-values", "containers-of-arrays"],
)
def test_more_than_fits_into_memory_is_kept_right_and_within_the_promise(
    tmp_path: Path, memory_limit: MemoryLimit, scale: Callable[[int, int], int], kind: str, ci: int, full: int
) -> None:
    done = _run(CHEST, memory_limit, kind, tmp_path / "chest", scale(ci, full))
    assert done.returncode == 0, f"died under the {memory_limit.kind} ({done.returncode}): {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    print(kind, {name: f"{count / 2**20:.1f} MiB" if count > 1 << 20 else count for name, count in found.items()})
    assert found["wrong"] == 0
    assert found["counted"] <= AVAILABLE
    assert found["peak"] <= AVAILABLE + SLACK
    assert found["spills"] > 0
    count("more than fits into memory, under a limit of the kernel", 1, 1)


def test_a_plain_dict_dies_under_the_same_limit(tmp_path: Path, memory_limit: MemoryLimit) -> None:
    done = _run(DICT, memory_limit, "arrays", tmp_path, 300 << 20)
    assert done.returncode != 0
    assert "survived" not in done.stdout
    count("a dict under the same limit", 1, 0, control=True)
