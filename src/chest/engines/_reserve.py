"""Room for deletions on a full disk: a file in ``.keys`` that is given up then, and made again by the next opener.

LMDB needs new pages for every commit, those that only delete too. Without this a disk that is full to the last block could
not be emptied from within the chest.
"""

from __future__ import annotations

import contextlib
import os
import shutil

__all__ = ["give_up", "keep"]

SIZE = 256 << 10
PLENTY = 16 * SIZE  # nobody's disk is filled for this


def keep(folder: str) -> None:
    """The file is there, if there is room for it. Never an error."""
    path = os.path.join(folder, "reserve")
    try:
        if os.path.lexists(path) or shutil.disk_usage(folder).free < PLENTY:
            return
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError:
        return
    try:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, SIZE)
            else:
                os.write(fd, bytes(SIZE))
        finally:
            os.close(fd)
    except OSError:
        give_up(folder)


def give_up(folder: str) -> bool:
    """The room is free; False if it was already."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, "reserve"))
        return True
    return False
