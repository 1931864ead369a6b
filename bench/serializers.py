"""What the safe serializer costs beside pickle: small values, containers, arrays and frames.

    python bench/serializers.py [--json FILE]

Times are the least of seven runs, in microseconds, of one value dumped and loaded again, and, for large values, written as a
file of a chest and mapped. Ratios above 1 are what safety costs. Both run in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from chest import _pickled
from chest.serializers import _safe

N = 1_000_000


def record(i: int) -> dict[str, Any]:
    return {"name": f"name {i}", "number": i, "share": i / 7, "tags": ["a", f"b{i}"], "on": True, "none": None}


SMALL: dict[str, Any] = {
    "number": 5,
    "text": "a short text",
    "list of 3 numbers": [1, 2, 3],
    "dict of 2": {"a": 1, "b": 2},
    "record of 6": record(1),
    "nested lists and dicts": {"a": {"b": {"c": [1, [2, [3]]]}}},
    "tuple of 2": (1, "a"),
    "set of 3": {1, 2, 3},
    "date and time": datetime.datetime(2020, 1, 1),
    "array of 100": np.arange(100.0),
}
CONTAINERS: dict[str, Any] = {
    "10,000 numbers": list(range(10_000)),
    "10,000 texts": [f"text {i}" for i in range(10_000)],
    "1,000 records": [record(i) for i in range(1_000)],
    "10,000 rows (tuples)": [(i, f"text {i}") for i in range(10_000)],
    "1,000 tuples of lists": [(i, [i]) for i in range(1_000)],
    "10,000 numbers as a set": set(range(10_000)),
}
FILES: dict[str, Callable[[], Any]] = {
    "array of 8 MB": lambda: np.arange(float(N)),
    "frame of numbers, 40 MB": lambda: pd.DataFrame(np.zeros((N, 5))),
    "frame with text, 100,000 rows": lambda: pd.DataFrame({"a": np.arange(10**5), "s": [f"text {i}" for i in range(10**5)]}),
    "Arrow table, 16 MB": lambda: pa.table({"a": np.arange(N), "b": np.arange(float(N))}),
    "list of 300,000 texts": lambda: [f"text {i}" for i in range(300_000)],
}


def best(*runs: Callable[[], Any]) -> list[float]:
    """Microseconds of each, in turn."""
    counts = []
    for run in runs:
        start = time.perf_counter()
        run()
        counts.append(max(1, int(0.02 / (time.perf_counter() - start + 1e-9))))
    found = [float("inf")] * len(runs)
    for _ in range(7):
        for number, (run, count) in enumerate(zip(runs, counts, strict=True)):
            start = time.perf_counter()
            for _ in range(count):
                run()
            found[number] = min(found[number], (time.perf_counter() - start) / count * 1e6)
    return found


def in_memory(value: Any) -> list[float]:
    safe, plain = _safe.dumps(value), _pickled.dumps(value)
    return best(
        lambda: _safe.dumps(value), lambda: _pickled.dumps(value), lambda: _safe.loads(safe), lambda: pickle.loads(plain)
    )


def in_files(value: Any) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("safe", "pickle")]

        def write(path: Path, dump: Callable[..., Any]) -> None:
            with open(path, "wb", buffering=0) as file:
                dump(value, file)

        def read(path: Path, load: Callable[..., Any]) -> Any:
            with open(path, "rb") as file:
                return load(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))

        write(paths[0], _safe.dump)
        write(paths[1], _pickled.dump)
        return best(
            lambda: write(paths[0], _safe.dump),
            lambda: write(paths[1], _pickled.dump),
            lambda: read(paths[0], _safe.load_file),
            lambda: read(paths[1], _pickled.load),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    arguments = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    print(f"{'us':34}{'dump safe':>12}{'pickle':>12}{'ratio':>8}{'load safe':>12}{'pickle':>12}{'ratio':>8}")
    rows = [(name, in_memory, value) for name, value in {**SMALL, **CONTAINERS}.items()]
    rows += [(f"file: {name}", in_files, make()) for name, make in FILES.items()]
    for name, measure, value in rows:
        a, b, c, d = measure(value)
        report[name] = {"dump safe": a, "dump pickle": b, "load safe": c, "load pickle": d}
        print(f"{name:34}{a:12.2f}{b:12.2f}{a / b:8.2f}{c:12.2f}{d:12.2f}{c / d:8.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
