"""Small disks that can be filled, and a memory limit that the kernel enforces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from limits import Disk, MemoryLimit

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()[-200:]}")


@pytest.fixture(name="disk")
def _disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own: ``tmpfs`` of 8 MB or ``ext4`` of 16 MB, by indirect parameter."""
    if sys.platform != "linux" or not IS_ROOT:
        pytest.skip("mounting a small file system takes root on Linux")
    mount = tmp_path / "disk"
    mount.mkdir()
    if request.param == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount)
        grow = lambda: _run("mount", "-o", "remount,size=64m", mount)  # noqa: E731
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        _run("mkfs.ext4", "-q", "-m", "0", image)
        _run("mount", "-o", "loop", image, mount)
        grow = None
    try:
        yield Disk(mount, grow)
    finally:
        # Lazily: after a failure its traceback keeps mapped values alive.
        subprocess.run(["umount", "--lazy", str(mount)], check=True, capture_output=True)


@pytest.fixture(name="memory_limit")
def _memory_limit(request: pytest.FixtureRequest) -> Iterator[MemoryLimit]:
    """A memory limit of 200 MB that the kernel enforces: by a cgroup where that is possible, else by RLIMIT_DATA."""
    limit = 200 << 20
    if sys.platform != "linux":
        pytest.skip("the kernel enforces no memory limit here that would leave mapped files alone")
    group = CGROUP_V1 / f"chest-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
        yield MemoryLimit("RLIMIT_DATA", code)
        return
    try:
        yield MemoryLimit("cgroup", f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n")
    finally:
        group.rmdir()
