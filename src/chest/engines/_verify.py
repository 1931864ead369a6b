"""The structure of an LMDB data file, looked at by a process of its own: whatever it meets, it takes nobody along.

LMDB's own verifier reads every page without LMDB. It says what is true of a file that nobody writes to; so where somebody
did in the meantime, it looks again while a transaction holds the pages back. That takes a place among LMDB's readers,
which is why it is not the first thing tried: a folder that nobody writes to is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

__all__ = ["structural_errors"]

_LEAK = "neither reachable nor in the freeDB"  # room that is lost, and nothing else: LMDB makes some itself


def structural_errors(folder: str) -> list[str]:
    """What is wrong with the pages of the index in a folder, in words. Reads all of it: 0.1 GB a second."""
    code = f"import runpy, sys; sys.path[:] = {sys.path!r}; runpy.run_path({__file__!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, os.path.abspath(folder)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines[-1:] == ["end"]:
        return lines[:-1]
    what = f"signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip()[-300:] or f"code {done.returncode}"
    return [*lines, f"the process that looked at its pages died ({what})"]


def _look(folder: str) -> list[str]:
    from lmdb import verify

    look: Any = verify.verify
    return [line for line in look(folder) if _LEAK not in line]


def _metas(folder: str) -> bytes:
    """What changes with every commit."""
    with open(os.path.join(folder, "data.mdb"), "rb", buffering=0) as file:
        first = file.read(256)
        size = int.from_bytes(first[40:44], sys.byteorder)
        file.seek(min(size, 65_536))
        return first + file.read(256)


def _main(folder: str) -> None:
    import lmdb

    try:
        before = _metas(folder)
        found = _look(folder)
        if _metas(folder) != before:
            with contextlib.ExitStack() as stack:
                env = lmdb.open(folder, readonly=True, create=False, max_readers=1024, lib_version=0)
                stack.callback(env.close)
                stack.enter_context(env.begin())
                found = _look(folder)
    except Exception as error:  # of the verifier: it cannot even begin
        found = [f"{error}"]
    for line in found:
        print(line.replace("\n", " "))
    print("end")


if __name__ == "__main__":
    _main(sys.argv[1])
