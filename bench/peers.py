"""Chest and its peers side by side, in one run.

    python bench/peers.py [--quick] [--rounds N] [--only WORD] [--json FILE] [--dir FOLDER]

Each measurement is a process of its own on a fresh folder; in every round all contestants take their turn, in an order
that rotates, so that a machine that gets slower or faster favours none. Shown is the best of the rounds, and below it
how many times as long as chest the contestant took: by the best, and by the median. A cell where a peer was faster than
chest is marked with `<`. What the contestants promise differs: the column `survives` says what their data survive once
the store has been closed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from contestants import ARRAYS, CONTESTANTS, MEMORY, OPENING, SMALL
from workloads import WORKLOADS, Numbers

PACKAGES = ["chest", "lmdb", "rocksdict", "diskcache", "zict", "sqlitedict", "joblib", "numpy"]
TIMEOUT_S = 900
MEGABYTES = ("disk", "memory")  # columns that are no times


class Part(NamedTuple):
    name: str
    title: str
    workload: str
    sizes: dict[str, int]
    contestants: list[str]
    columns: list[str]
    setup: str | None = None


def parts(quick: bool) -> list[Part]:
    n_small, n_open = (20_000, 30_000) if quick else (100_000, 300_000)
    large, many = (2, 16) if quick else (8, 64)
    columns = ["write", "first touch", "full read", "change 1 page"]
    return [
        Part(
            "small",
            f"{n_small:,} small records, {MEMORY >> 20} MiB of memory (hot reads: 1 GiB); us per operation",
            "small",
            {"n": n_small},
            SMALL,
            ["fill", "cold read", "hot read", "overwrite", "items", "disk", "memory"],
        ),
        *(
            Part(
                f"arrays of {megabytes} MiB",
                f"{n} arrays of {megabytes} MiB, memory for a quarter of them; us per array",
                "arrays",
                {"n": n, "megabytes": megabytes},
                ARRAYS,
                columns,
            )
            for n, megabytes in ((large, 32), (many, 1))
        ),
        *(
            Part(
                f"opening {n} keys",
                f"opening {n:,} keys; us",
                "opening",
                {"n": n},
                OPENING if n <= 1000 else [name for name in OPENING if name != "zict.Buffer, File"],
                ["open + get", "len"],
                "fill_for_opening",
            )
            for n in (100, n_open)
        ),
    ]


# --- running


def run(workload: str, name: str, folder: str, sizes: dict[str, int]) -> Numbers | str:
    """What one process measured, or why it did not."""
    task = json.dumps([workload, name, folder, sizes])
    command = [sys.executable, os.path.abspath(__file__), "--worker", task]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"longer than {TIMEOUT_S} s"
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1]
    numbers: Numbers = json.loads(process.stdout.splitlines()[-1])
    return numbers


def work(task: str) -> None:
    workload, name, folder, sizes = json.loads(task)
    print(json.dumps(WORKLOADS[workload](name, folder, **sizes)))


class Results:
    """All rounds of one part, by contestant and column."""

    def __init__(self) -> None:
        self.rounds: dict[str, dict[str, list[float]]] = {}
        self.failures: dict[str, str] = {}

    def add(self, name: str, numbers: Numbers | str) -> None:
        if isinstance(numbers, str):
            self.failures[name] = numbers
            return
        columns = self.rounds.setdefault(name, {})
        for column, number in numbers.items():
            if number is not None:
                columns.setdefault(column, []).append(number)

    def best(self, name: str, column: str) -> float | None:
        values = self.rounds.get(name, {}).get(column)
        return min(values) if values else None

    def median(self, name: str, column: str) -> float | None:
        values = self.rounds.get(name, {}).get(column)
        return statistics.median(values) if values else None


def measure(part: Part, rounds: int, parent: str, only: str) -> Results:
    results = Results()
    names = [name for name in part.contestants if only in name or name == "chest"]
    base = tempfile.mkdtemp(prefix="chest-bench-", dir=parent)
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name in results.failures:
                    continue
                show(f"{part.name}: round {turn + 1} of {rounds}, {name}")
                folder = os.path.join(base, str(names.index(name)))
                if part.setup:
                    made = os.path.exists(folder)
                    numbers: Numbers | str = {} if made else run(part.setup, name, folder, part.sizes)
                    if isinstance(numbers, str):
                        results.add(name, numbers)
                        continue
                results.add(name, run(part.workload, name, folder, part.sizes))
                if not part.setup:
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        show("")
        shutil.rmtree(base, ignore_errors=True)
    return results


# --- showing


def show(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times_as_long(results: Results, name: str, column: str) -> str:
    best, median = results.best(name, column), results.median(name, column)
    ours, our_median = results.best("chest", column), results.median("chest", column)
    if best is None or median is None or not ours or not our_median:
        return "-"
    return f"{'<' if best < ours else ' '}{ratio(best / ours):>5} {ratio(median / our_median):>6}"


def faster_than_chest(part: Part, results: Results) -> list[str]:
    """The columns in which a peer that persists anything was ahead, with the one that was ahead most."""
    found = []
    peers = [name for name in results.rounds if name != "chest" and CONTESTANTS[name].persists]
    for column in part.columns:
        ours = results.best("chest", column)
        times = {name: results.best(name, column) for name in peers}
        ahead = {name: best for name, best in times.items() if best is not None and ours is not None and best < ours}
        if ahead and column not in MEGABYTES:
            found.append(f"{column} ({min(ahead, key=ahead.__getitem__)})")
    return found


def table(part: Part, results: Results) -> None:
    print(f"\n{part.title}\n{'-' * len(part.title)}")
    heads = {"disk": "disk MB", "memory": "mem MB", "first touch": "1st touch", "change 1 page": "1 page"}
    print(f"{'best':<24}{'survives':<10}" + "".join(f"{heads.get(c, c):>10}" for c in part.columns))
    for name in part.contestants:
        if name in results.failures:
            print(f"{name:<24}{results.failures[name][:76]}")
        elif name in results.rounds:
            bests = [results.best(name, column) for column in part.columns]
            cells = "".join(f"{'-' if best is None else number(best):>10}" for best in bests)
            print(f"{name:<24}{CONTESTANTS[name].survives:<10}{cells}")
    timed = [column for column in part.columns if column not in MEGABYTES]
    print(f"{'times chest: best median':<24}" + "".join(f"{heads.get(c, c):>15}" for c in timed))
    for name in part.contestants:
        if name in results.rounds and name != "chest":
            print(f"{name:<24}" + "".join(f"{times_as_long(results, name, column):>15}" for column in timed))
    print(f"a peer is faster in: {', '.join(faster_than_chest(part, results)) or 'nothing'}", flush=True)


def machine(parent: str) -> dict[str, Any]:
    """What the numbers depend upon."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": list(os.getloadavg()),
        "versions": {},
    }
    for name in PACKAGES:
        try:
            facts["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][name] = None
    try:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        facts["cpu"] = cpu[0].partition(": ")[2] if cpu else platform.machine()
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        inside = [fields for fields in mounts if Path(fields[1]) in (Path(parent), *Path(parent).parents)]
        facts["file_system"] = max(inside, key=lambda fields: len(fields[1]))[2]
    except OSError:
        facts["cpu"] = platform.processor()
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the keys, a quarter of the arrays, one round")
    parser.add_argument("--rounds", type=int, help="how often each contestant takes its turn (3; quick: 1)")
    parser.add_argument("--only", default="", metavar="WORD", help="contestants whose name contains WORD, and chest")
    parser.add_argument("--part", default="", metavar="WORD", help="parts whose name contains WORD")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the data go (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all rounds, the machine and the versions there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    facts = machine(os.path.abspath(args.dir))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(f"{facts['date']}, Python {facts['python']}, {facts['cores']} cores ({facts['cpu']})")
    print(f"{versions}; {facts.get('file_system', 'unknown file system')}; page cache warm")
    load = facts["load"][0]
    note = ": THE MACHINE IS BUSY, trust only ratios that are far from 1" if load > facts["cores"] / 2 else ""
    print(f"load before the run {load:.1f}{note}", flush=True)
    record: dict[str, Any] = {"machine": facts, "parts": {}}
    failed = False
    for part in parts(args.quick):
        if args.part not in part.name:
            continue
        results = measure(part, args.rounds or (1 if args.quick else 3), args.dir, args.only)
        table(part, results)
        failed |= bool(results.failures)
        record["parts"][part.name] = {"sizes": part.sizes, "rounds": results.rounds, "failures": results.failures}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
