"""Print the other interpreters that the test suite should run on, one `version path` a line.

A range of Pythons is supported, and what breaks, breaks at its ends. So of all CPythons from 3.10 on that this machine
has, the oldest and the newest are printed, less the one that runs this script (the suite runs there anyway). They are
looked for in PATH and in pyenv's folder; each is started, because a name may be a shim that leads nowhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
PROBE = (
    "import ensurepip, platform, sys, venv; assert platform.python_implementation() == 'CPython'; "
    "assert sys.version_info.releaselevel == 'final'; print(*sys.version_info[:2], sys.executable)"
)


def candidates() -> list[Path]:
    """Everything that is called python3.N, in PATH first."""
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += sorted(pyenv.glob("versions/*/bin"))
    found: list[Path] = []
    for folder in folders:
        try:
            found += sorted(file for file in folder.iterdir() if re.fullmatch(r"python3\.\d+", file.name))
        except OSError:
            continue  # PATH may name folders that do not exist
    return found


def probe(file: Path) -> tuple[tuple[int, int], str] | None:
    """Version and path of an interpreter that starts and can make a virtual environment, None for anything else."""
    minor = int(file.name.partition(".")[2])
    if (3, minor) < OLDEST:
        return None
    try:
        run = subprocess.run([str(file), "-c", PROBE], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run.returncode:
        return None
    major, minor_text, executable = run.stdout.strip().split(" ", 2)
    return (int(major), int(minor_text)), executable


def main() -> None:
    working: dict[tuple[int, int], str] = {}
    for file in candidates():
        answer = probe(file)
        if answer is not None:
            working.setdefault(*answer)
    ends = {min(working), max(working)} if working else set()
    for version in sorted(ends - {sys.version_info[:2]}):
        print(f"{version[0]}.{version[1]} {working[version]}")


if __name__ == "__main__":
    main()
