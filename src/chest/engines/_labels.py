"""Labels: the path below a chest's folder that shows the key of a value.

A label comes from an index that others can write to, or from a function of the user's: no part of it may lead out of
the folder or into the index, and a link on the way is not followed. Each folder is opened below its parent, so that
nothing can be swapped in between; where the system cannot do that (Windows) each is looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from ..errors import CorruptError, PathError

__all__ = ["below", "parts_of"]

_HAS_DIR_FD = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def parts_of(label: str) -> list[str]:
    """The names that a label consists of.

    Raises:
        CorruptError: it leads out of the chest's folder, or into its index.
    """
    parts = label.split("/")
    bad = bool({"", ".", ".."}.intersection(parts)) or "\0" in label or parts[0].lower().startswith(".keys")
    if os.name == "nt":
        bad = bad or "\\" in label or ":" in label
    if not bad:
        try:
            os.fsencode(label)
        except UnicodeEncodeError:
            bad = True
    if bad:
        raise CorruptError(f"{label[:200]!r} is no name of a value file: it must stay below the chest's folder")
    return parts


@contextlib.contextmanager
def below(root: str, label: str, *, create: bool = False) -> Iterator[tuple[int | None, str]]:
    """The folder that a label lies in, as a descriptor, and its last name there; or None, and the whole path.

    Raises:
        CorruptError: the label is none.
        PathError: something that is no folder is in the way.
        FileNotFoundError: a folder is missing, and is not to be created.
    """
    parts = parts_of(label)
    with contextlib.ExitStack() as opened:
        fd: int | None = None
        for number in range(1, len(parts)):
            path = os.path.join(root, *parts[:number])
            step = path if fd is None else parts[number - 1]
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(step, 0o700, dir_fd=fd)
            try:
                if _HAS_DIR_FD:
                    fd = os.open(step, _FOLDER, dir_fd=fd)
                    opened.callback(os.close, fd)
                elif not stat.S_ISDIR(os.lstat(path).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise PathError(f"{path} is in the way: it is a link or a file, not a folder.", path=path) from error
                raise
        yield fd, os.path.join(root, *parts) if fd is None else parts[-1]
