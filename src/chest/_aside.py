"""Where a repair puts what nothing can be made of: ``.keys/aside-<date>``, with a log of what each thing was."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from . import _fs
from .engines._labels import below
from .errors import PathError

__all__ = ["Aside"]

_HEAD_SIZE = 17  # of a record


class Aside:
    """Where things go that nothing can be made of, and the log of what they were. Made when it is first needed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._folder: str | None = None
        self._log: Any = None
        self._n = 0

    def _made(self) -> str:
        if self._folder is None:
            keys = os.path.join(self._path, ".keys")
            root = keys if os.path.isdir(keys) and not os.path.islink(keys) else self._path
            base = os.path.join(root, f"{'' if root == keys else '.keys-'}aside-{time.strftime('%Y%m%d-%H%M%S')}")
            for number in range(1000):
                folder = f"{base}-{number}" if number else base
                try:
                    os.mkdir(folder, 0o700)
                    break
                except FileExistsError:
                    continue
            fd = os.open(os.path.join(folder, "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._log = os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")
            self._folder = folder
            self.note(f"what a repair of the chest at {self._path} has set aside")
        return self._folder

    def note(self, text: str) -> None:
        """A line of the log."""
        self._made()
        self._log.write(text.replace("\n", " ") + "\n")
        self._log.flush()

    def move(self, path: str, why: str) -> None:
        """A file (or a folder, or whatever it is) lies here from now on."""
        folder = self._made()
        self._n += 1
        name = f"{self._n}-{os.path.basename(path)[:100]}"
        self.note(f"{name}: was {path}: {why}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, os.path.join(folder, name))

    def move_label(self, root: str, label: str, why: str) -> None:
        """As ``move``, for a value file: no link on the way is followed."""
        folder = self._made()
        self._n += 1
        name = f"{self._n}-{label.rpartition('/')[2][:100]}"
        self.note(f"{name}: was {os.path.join(root, label)}: {why}")
        with contextlib.suppress(FileNotFoundError, PathError), below(root, label) as (inner, last):
            os.rename(last, os.path.join(folder, name), src_dir_fd=inner)

    def keep(self, name: bytes, data: bytes, why: str) -> None:
        """A record."""
        folder = self._made()
        self._n += 1
        file = f"{self._n}-record"
        self.note(
            f"{file}: the record of the key named {name!r}: {why}; its value begins at byte {_HEAD_SIZE}, 8 bytes follow it"
        )
        fd = os.open(os.path.join(folder, file), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _fs.write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)

    def link(self, path: str, name: str) -> None:
        """Another name for a file that is going to be replaced."""
        folder = self._made()
        with contextlib.suppress(OSError):
            os.link(path, os.path.join(folder, name))
            self.note(f"{name}: the index as it was before")

    def close(self) -> None:
        if self._log is not None:
            with self._log:
                self._log.flush()
                os.fsync(self._log.fileno())
            assert self._folder is not None
            _fs.fsync_folder(self._folder)
            _fs.fsync_folder(os.path.dirname(self._folder))
