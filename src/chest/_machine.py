"""How much memory there is, and how much of it a chest is told to use.

In a container the machine's memory is not the process's: the kernel kills what outgrows its control group long before
the machine is full. So the limit of the group counts as well, and that of every group around it, in both versions of
the kernel's interface.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
from pathlib import Path
from typing import Any, cast

__all__ = ["DEFAULT_MEMORY", "machine_memory", "parse_memory"]

DEFAULT_MEMORY = 1_000_000_000
_UNKNOWN_MACHINE = 4 << 30  # where the system does not say

# Where the kernel tells of control groups: the group of this process; per version the mounts, and the limit's file.
_OWN_GROUPS = "/proc/self/cgroup"
_MOUNTS_V1: tuple[str, ...] = ("/sys/fs/cgroup/memory",)
_MOUNTS_V2: tuple[str, ...] = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
_LIMIT_V1 = "memory.limit_in_bytes"
_LIMIT_V2 = "memory.max"

_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtp", 1):
    _UNITS[_letter] = _UNITS[_letter + "b"] = 1000**_power
    _UNITS[_letter + "ib"] = _UNITS[_letter + "i"] = 1024**_power
_AMOUNT = re.compile(
    r"\s*\+?([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.I
)
_ACCEPTED = (
    'a number of bytes (500_000_000, 5e8, float("inf") for no limit), text with a unit ("500 MB", "2 GiB", "1.5GB"), '
    'a share of this machine\'s memory ("25%"), or None for the default of 1 GB'
)


def parse_memory(limit: object) -> int:
    """The bytes that ``limit`` stands for, between 0 and ``sys.maxsize``.

    kB, MB, GB ... are powers of 1000, KiB, MiB, GiB ... powers of 1024; case does not matter. A percentage is taken of
    ``machine_memory()`` at the time of the call.

    Raises:
        TypeError: ``limit`` is neither a number nor text nor None.
        ValueError: it is negative, not a number, or text that says no amount.
    """
    if limit is None:
        return DEFAULT_MEMORY
    if isinstance(limit, str):
        return _parse_text(limit)
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        raise TypeError(f"available_memory cannot be {limit!r}; it is {_ACCEPTED}")
    if math.isnan(limit) or limit < 0:
        raise ValueError(f"available_memory cannot be {limit!r}; it is {_ACCEPTED}")
    return sys.maxsize if math.isinf(limit) else min(int(cast(Any, limit)), sys.maxsize)


def _parse_text(text: str) -> int:
    if text.strip().lower() == "inf":
        return sys.maxsize
    match = _AMOUNT.fullmatch(text)
    unit = match[2].lower() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ValueError(f"available_memory cannot be {text!r}; it is {_ACCEPTED}")
    amount: int | float = int(match[1]) if match[1].replace("_", "").isdigit() else float(match[1])
    if unit == "%":
        if amount > 100:
            raise ValueError(f"available_memory cannot be {text!r}, more than there is; it is {_ACCEPTED}")
        return int(machine_memory() * amount / 100)
    n_bytes = amount * _UNITS[unit or ""]
    return sys.maxsize if math.isinf(n_bytes) else min(int(n_bytes), sys.maxsize)


def machine_memory() -> int:
    """The bytes of memory that this process may use: the machine's, or its control group's limit if that is less."""
    return min(_physical_memory(), *_group_limits(), sys.maxsize)


def _physical_memory() -> int:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, other systems not these names
        size = _windows_memory() if sys.platform == "win32" else 0
    return size if size > 0 else _UNKNOWN_MACHINE


def _windows_memory() -> int:
    import ctypes

    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "free", "page", "page_free", "virtual", "virtual_free", "ext")),
        ]

    status = Status(length=ctypes.sizeof(Status))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 absent elsewhere, where this is type-checked too
    return int(status.total) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else 0


def _group_limits() -> list[int]:
    try:
        lines = Path(_OWN_GROUPS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError):
        return []
    limits = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mounts, name = _MOUNTS_V2, _LIMIT_V2
        elif "memory" in controllers.split(","):
            mounts, name = _MOUNTS_V1, _LIMIT_V1
        else:
            continue
        # Each group around it binds as well. Inside a container the path may not exist below the mount, and the mount
        # itself is the container's group: it is the last that is looked at.
        inner = [part for part in group.split("/") if part not in ("", ".", "..")]
        for mount in mounts:
            for depth in range(len(inner), -1, -1):
                limits += _read_limit(Path(mount, *inner[:depth], name))
    return limits


def _read_limit(file: Path) -> list[int]:
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return []
    return [int(text)] if text.isdigit() and int(text) > 0 else []  # "max": no limit
