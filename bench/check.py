"""How fast a chest is checked, compacted and backed up, in keys and in bytes a second.

python bench/check.py [--keys 1000000] [--gb 1] [--path FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import chest
from chest import Chest


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def healthy(path: Path) -> None:
    problems = list(chest.check(path))
    assert not problems, problems[:5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--path", default=None, help="where; a temporary folder if not given")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="chest-check-", dir=given.path))
    try:
        with Chest[Any, Any](path=place / "small") as c:
            for key in range(given.keys):
                c[key] = [key, "value"]
        seconds = timed(lambda: healthy(place / "small"))
        print(f"check   {given.keys:>12,} small values   {seconds:8.2f} s   {given.keys / seconds:12,.0f} keys/s")
        with Chest[Any, Any](path=place / "large") as c:
            n = max(1, int(given.gb * 1e9 / 16e6))
            for key in range(n):
                c[key] = np.random.default_rng(key).random(2_000_000)
        n_bytes = n * 16e6
        for what in ("cold or warm", "warm"):
            seconds = timed(lambda: healthy(place / "large"))
            print(f"check   {n:>12,} of 16 MB        {seconds:8.2f} s   {n_bytes / seconds / 1e9:12.2f} GB/s   {what}")
        with Chest[Any, Any](path=place / "small") as c:
            for key in range(0, given.keys, 2):
                del c[key]
            c.sync()
            freed: list[int] = []
            seconds = timed(lambda: freed.append(c.compact()))
            print(f"compact {given.keys // 2:>12,} small values   {seconds:8.2f} s   {freed[0] / 1e6:12.1f} MB given back")
            seconds = timed(lambda: c.backup(place / "backup of small"))
            print(f"backup  {given.keys // 2:>12,} small values   {seconds:8.2f} s")
        with Chest[Any, Any](path=place / "large") as c:
            seconds = timed(lambda: c.backup(place / "backup of large"))
            print(f"backup  {n:>12,} of 16 MB        {seconds:8.2f} s   by hard links")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
