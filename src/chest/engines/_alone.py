"""Having an index to oneself: nobody else has it open, and whoever wants to open it waits.

LMDB itself tells: every process that has an environment open holds a shared lock on the first byte of ``lock.mdb``, and one
that opens it waits for whoever holds it exclusively. The kernel drops the lock when its process dies. (A chest that is only
read has none; it notices that the index was replaced.)
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from ..errors import InUseError
from ._datafile import prepare_lock

_fcntl: Any
try:
    import fcntl as _fcntl
except ImportError:  # Windows, where a file that somebody has open cannot be replaced
    _fcntl = None

__all__ = ["alone"]


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """Within the block nobody has the index open. This process must not have it open either: its locks would be lost.

    Raises:
        InUseError: another process has.
    """
    prepare_lock(folder)
    if _fcntl is None:
        yield
        return
    fd = os.open(os.path.join(folder, "lock.mdb"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            _fcntl.lockf(fd, _fcntl.LOCK_EX | _fcntl.LOCK_NB, 1, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            path = os.path.dirname(folder)
            raise InUseError(
                f"another process has the chest at {path} open: close it there (or end that process) and try again.", path=path
            ) from None
        yield
    finally:
        os.close(fd)
