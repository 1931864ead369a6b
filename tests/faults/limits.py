"""What the fixtures of ``conftest`` give to tests."""

from __future__ import annotations

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
