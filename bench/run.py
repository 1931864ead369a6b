"""Chest and its peers side by side: runs parts, merges what they found into one file, and draws the page from it.

    python bench/run.py                     everything at its usual size, about half an hour
    python bench/run.py --quick             minutes; the page goes to build/bench
    python bench/run.py --full              ten million keys and arrays of 1 GiB: hours, and 40 GB of disk
    python bench/run.py pairs "arrays 32"   only this part, or those whose names begin so
    python bench/run.py --list              the parts
    python bench/run.py --page              measures nothing, draws the page of what is there
    python bench/run.py --get-peers         fetches chest 0.2.3, which cannot be installed beside today's

Each measurement is a process of its own on a fresh folder; in every round all contestants take their turn, in an order that
rotates, so that a machine that gets slower or faster favours none. All rounds are kept. A part that is run again replaces
its numbers, and no others; with ``--only`` it replaces those of the contestants that ran. A contestant that is not installed,
fails, or takes too long is shown as such, and never ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, PEERS
from measuring import forget_cgroup
from parts import SCALES, Part, parts
from results import Cells, Results, machine

ROOT = Path(__file__).parent.parent
ROUNDS = {"quick": 1, "default": 3, "full": 3}
TIMEOUT_S = {"quick": 90, "default": 300, "full": 7200}
OLD_CHEST = ["--no-deps", "--target", str(PEERS / "chest02"), "chest==0.2.3", "heapdict"]

Rows = list[tuple[str, "float | str"]]


def measure_once(workload: str, name: str, folder: str, sizes: dict[str, Any], timeout_s: float) -> tuple[Rows, str]:
    """What one process measured, and why it failed, if it did."""
    command = [sys.executable, str(Path(__file__).with_name("workloads.py")), json.dumps([workload, name, folder, sizes])]
    who = CONTESTANTS.get(name)
    first = who.path if who is not None and who.path else str(ROOT / "src")  # the chest beside this file, whatever is installed
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [first, os.environ.get("PYTHONPATH")]))}
    failure = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # A group of its own, so that what it has started ends with it.
        with subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True) as process:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                failure = f"took longer than {timeout_s:g} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        forget_cgroup(process.pid)
        out.seek(0)
        rows: Rows = []
        for line in out.read().splitlines():
            if line.startswith("[") and line.endswith("]"):  # a library may print, too
                column, number = json.loads(line)
                if column is None:
                    failure = failure or number
                else:
                    rows.append((column, number))
        err.seek(0)
        said = [line for line in err.read().splitlines() if line.strip()]
    if process.returncode and not failure:
        failure = said[-1][:200] if said else f"exit code {process.returncode}"
        if process.returncode < 0:
            failure = f"killed by {signal.Signals(-process.returncode).name}"
            failure += ": out of memory" if process.returncode == -signal.SIGKILL else ""
    return rows, failure


def measure(part: Part, names: list[str], rounds: int, timeout_s: float, parent: str, run: str) -> dict[str, Cells]:
    """All rounds of one part. Who has failed once takes no further turn, and keeps what it had."""
    cells = {name: Cells(run) for name in names}
    base = tempfile.mkdtemp(prefix="chest-bench-", dir=parent)
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                who = CONTESTANTS.get(name)
                if who and who.most is not None and part.keys > who.most:
                    cells[name].failure = f"not measured with more than {who.most:,} keys: {who.why_most}"
                for i, (workload, sizes) in enumerate(part.runs):
                    if cells[name].failure:
                        break
                    show(f"{part.name}: round {turn + 1} of {rounds}, {name}")
                    folder = os.path.join(base, f"{names.index(name)}-{i}")
                    rows, failure = measure_once(workload, name, folder, sizes, timeout_s)
                    cells[name].add(rows, failure)
                    if not part.keeps_folder:
                        shutil.rmtree(folder, ignore_errors=True)
                        shutil.rmtree(folder + ".memory", ignore_errors=True)
    finally:
        show("")
        shutil.rmtree(base, ignore_errors=True)
    return cells


def show(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def get_peers() -> int:
    """Chest 0.2.3 into a folder of its own; without it the benchmark goes on without it."""
    if (PEERS / "chest02" / "chest").exists():
        return 0
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *OLD_CHEST]
    return subprocess.run(command, check=False).returncode


def chosen(known: list[Part], words: list[str]) -> list[Part]:
    """A word is the name of a part, or how the names of several begin."""
    exact = {part.name for part in known} & set(words)
    begins = tuple(word for word in words if word not in exact)
    return [part for part in known if not words or part.name in exact or part.name.startswith(begins)]


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", help="a part, or how the names of several begin (see --list); all if none is named")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick", default="default")
    parser.add_argument("--full", action="store_const", dest="scale", const="full")
    parser.add_argument("--only", metavar="WORD", action="append", help="contestants whose names contain WORD, and chest")
    parser.add_argument("--rounds", type=int, help="how often each contestant takes its turn (3; quick: 1)")
    parser.add_argument("--timeout", type=float, metavar="S", help="of one process (300; quick 90; full 7200)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the data go (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where performance.md and performance/ go (docs; quick: build/bench)")
    parser.add_argument("--list", action="store_true", help="list the parts, and measure nothing")
    parser.add_argument("--page", action="store_true", help="draw the page of the results that are there, and measure nothing")
    parser.add_argument("--get-peers", action="store_true", help="fetch chest 0.2.3 from the package index")
    args = parser.parse_args(arguments)
    if args.get_peers:
        return get_peers()
    wanted = chosen(parts(args.scale), args.parts)
    if args.list or not wanted:
        print("\n".join(f"{part.name:28}{part.title}" for part in parts(args.scale)))
        return 0 if args.list else 2
    out = args.out or ROOT / ("build/bench" if args.scale == "quick" else "docs")
    results = Results(out / "performance" / "results.json")
    if not args.page:
        run_parts(wanted, args, results)
    import page

    page.write(results, out)
    print(f"{out / 'performance.md'} is drawn", flush=True)
    return 0


def run_parts(wanted: list[Part], args: argparse.Namespace, results: Results) -> None:
    """Measures the parts one after the other, and stores each as soon as it is through."""
    given = [*args.parts, *(["--" + args.scale] if args.scale != SCALES[1] else [])]
    given += [f"--only={word}" for word in args.only or []] + ([f"--rounds={args.rounds}"] if args.rounds else [])
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # of others: later it is this run's own
    for part in wanted:
        facts = machine(args.dir)
        facts["command"] = shlex.join(["python", "bench/run.py", *given])
        facts["load_before"] = load
        facts["rounds"] = 1 if part.exact else args.rounds or ROUNDS[args.scale]
        run = facts["date"] + " " + part.name
        names = [name for name in part.contestants if not args.only or name == part.ours or any(w in name for w in args.only)]
        start = time.monotonic()
        cells = measure(part, names, facts["rounds"], args.timeout or TIMEOUT_S[args.scale], args.dir, run)
        results.runs[run] = facts
        results.replace(part.name, cells)
        results.save()
        failed = {name: found.failure for name, found in cells.items() if found.failure}
        print(
            f"{part.name}: {time.monotonic() - start:.0f} s" + "".join(f"\n    {n}: {why}" for n, why in failed.items()),
            flush=True,
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    sys.exit(main())
