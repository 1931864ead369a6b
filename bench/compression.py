"""What compression, signing and encryption cost, and from which disk on compression is a gain.

    python bench/compression.py [--mib N] [--rounds N] [--folder FOLDER] [--json FILE]

Values of 64 MiB are written into a chest and read by another one (loading, and the sum of all that is in them, so that what is
mapped is read, too). The folder is one in memory where there is one (/dev/shm), so that no disk takes part, and what is
measured is the processor's time, the best of three.

The disk is a model: a byte takes 1/speed, and writing does not overlap with compressing, as it does not in chest, which waits
for its file. So a method that makes P bytes into C and takes the processor T seconds longer than plain pays on disks below

    (P - C) / T    bytes a second

for writing and, if the file is not in the page cache, for reading. In the page cache plain always wins.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chest import Chest
from chest.errors import MissingExtraError

METHODS: list[Any] = [None, "lz4", "zstd", ("zstd", 3), "blosc2", "gzip"]
KEY = b"a key for this benchmark only..."
SEALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "signed": {"key": KEY},
    "aes-gcm": {"key": KEY, "encrypt": "aes-gcm"},
    "chacha20-poly1305": {"key": KEY, "encrypt": "chacha20-poly1305"},
    "aes-gcm, blosc2": {"key": KEY, "encrypt": "aes-gcm", "compression": "blosc2"},
}
DISKS = {"hard disk, 150 MB/s": 150e6, "SATA, 500 MB/s": 500e6, "NVMe, 3 GB/s": 3e9}


def contents(n_bytes: int) -> dict[str, Any]:
    """Values of about that size."""
    rng = np.random.default_rng(0)
    n = n_bytes // 8
    words = np.array(["the", "of", "chest", "value", "memory", "disk", "a", "writes", "never", "because", "index", "key"])
    sensor = np.round(20 + np.cumsum(rng.normal(0, 0.01, n)), 2)
    return {
        "counter, int64": np.arange(n),
        "sensor, float64 with 2 digits": sensor,
        "smooth, float64": np.sin(np.linspace(0, 1000, n)),
        "noise, float64": rng.random(n),
        "small numbers, int64": rng.integers(0, 100, n),
        "text": " ".join(rng.choice(words, n_bytes // 6)),
        "records": [{"n": i, "name": f"name {i % 1000}", "ok": i % 3 == 0} for i in range(n_bytes // 40)],
    }


def touched(value: Any) -> Any:
    """All of it was read."""
    return value.sum() if isinstance(value, np.ndarray) else len(value)


def best(run: Callable[[], Any], rounds: int, prepare: Callable[[], Any] = lambda: None) -> float:
    """Seconds of the processor."""
    times = []
    for _ in range(rounds):
        prepare()
        gc.collect()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def measure(value: Any, rounds: int, **given: Any) -> tuple[float, float, int]:
    """Seconds to write and to read a value, and bytes that it takes."""
    path = tempfile.mkdtemp()
    # Read by another chest: the one that wrote it would give back what is still held here.
    with Chest[str, Any](path=path, **given) as writer, Chest[str, Any](path=path, **given) as reader:
        writer["first"] = np.zeros(10_000)  # what is imported and made once
        writer.flush()
        reader["first"]

        def write() -> None:
            writer["x"] = value
            writer.sync()

        writing = best(write, rounds)
        reading = best(lambda: touched(reader["x"]), rounds, reader.flush)
        size = os.stat(writer.key_to_filename("x")).st_size
    shutil.rmtree(path)
    return writing, reading, size


def measure_small(n: int, rounds: int, **given: Any) -> tuple[float, float]:
    """Microseconds to set and write a small value, one of many, and to read one that is not in memory."""
    path = tempfile.mkdtemp()
    with Chest[int, Any](path=path, loose=0, **given) as chest:

        def write() -> None:
            for i in range(n):
                chest[i] = [i]
            chest.flush()

        def read() -> None:
            for i in range(n):
                chest[i]

        setting, getting = best(write, rounds), best(read, rounds, chest.flush)
    shutil.rmtree(path)
    return setting / n * 1e6, getting / n * 1e6


def name_of(method: Any) -> str:
    return "plain" if method is None else method if isinstance(method, str) else f"{method[0]} {method[1]}"


def speed(n: float, seconds: float) -> str:
    return f"{n / seconds / 1e6:,.0f}" if seconds > 0 else "-"


def compare_methods(n_bytes: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for what, value in contents(n_bytes).items():
        print(
            f"\n{what}\n{'':12}{'size':>7}{'write MB/s':>12}{'read MB/s':>11}  pays below, MB/s: {'writing':>9}{'reading':>9}",
            end="",
        )
        print("".join(f"{disk:>22}" for disk in DISKS), "(write + read, seconds)")
        base: tuple[float, float, int] | None = None
        for method in METHODS:
            try:
                found = measure(value, rounds, compression=method)
            except MissingExtraError as error:
                print(f"{name_of(method):12}{error}")
                continue
            writing, reading, size = found
            base = base or found
            saved = base[2] - size
            limits = [speed(saved, longer) if saved else "-" for longer in (writing - base[0], reading - base[1])]
            totals = [writing + reading + 2 * size / disk for disk in DISKS.values()]
            shown = f"{name_of(method):12}{size / base[2]:>7.1%}{speed(base[2], writing):>12}{speed(base[2], reading):>11}"
            print(f"{shown}{'':20}{limits[0]:>9}{limits[1]:>9}" + "".join(f"{total:>22.2f}" for total in totals), flush=True)
            rows.append({"content": what, "method": name_of(method), "write_s": writing, "read_s": reading, "bytes": size})
    return rows


def compare_seals(n_bytes: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    value = np.arange(n_bytes // 8)
    print(f"\n{'':22}{'write MB/s':>12}{'read MB/s':>11}{'set, us':>10}{'get, us':>10}   (large array; small values, spilled)")
    for name, given in SEALS.items():
        if given.get("encrypt") and importlib.util.find_spec("cryptography") is None:
            continue
        writing, reading, _ = measure(value, rounds, **given)
        setting, getting = measure_small(20_000, rounds, **given)
        shown = f"{name:22}{speed(n_bytes, writing):>12}{speed(n_bytes, reading):>11}"
        print(f"{shown}{setting:>10.1f}{getting:>10.1f}", flush=True)
        rows.append({"seal": name, "write_s": writing, "read_s": reading, "set_us": setting, "get_us": getting})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of a value")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the chests lie; by default in memory, if there is such a folder")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to FILE")
    args = parser.parse_args()
    folder = args.folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    tempfile.tempdir = tempfile.mkdtemp(dir=folder)
    try:
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, values of {args.mib} MiB in {tempfile.tempdir}")
        found = {
            "methods": compare_methods(args.mib << 20, args.rounds),
            "seals": compare_seals(args.mib << 20, args.rounds),
        }
    finally:
        shutil.rmtree(tempfile.tempdir)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
