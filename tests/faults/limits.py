"""What the fixtures of ``conftest`` give to tests."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Disk(NamedTuple):
    """A mounted file system. ``grow`` gives it more room where that is possible."""

    path: Path
    grow: Callable[[], None] | None


class MemoryLimit(NamedTuple):
    """A limit for a subprocess: ``code`` is run by it first."""

    kind: str
    code: str


def held(mount: Path) -> list[str]:
    """What this process still has open or mapped below a folder."""
    gc.collect()  # a caught error refers to frames, and these to mapped values
    with open("/proc/self/maps") as file:
        found = {line.split(None, 5)[-1].strip() for line in file if f" {mount}/" in line}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith(f"{mount}/"))
