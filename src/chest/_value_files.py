"""Value files by their own account: what each says of its key, and whether it is whole. They are read, not mapped.

A file on a bad sector is an error then, and not the end of the process; and nothing is unpickled.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from xxhash import xxh3_64

from . import _valuefile
from ._records import Ref, unpack_key_note
from .engines._labels import below
from .errors import ChestError, CorruptError

__all__ = ["File", "ValueFile", "look_into", "open_to_read", "value_files"]

_MAGIC = b"CHESTv1\n"
_READ = 1 << 20


class File:
    """An open file, to be read in parts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        found = os.fstat(fd)
        self.size = found.st_size
        self.identity = found.st_dev, found.st_ino
        self.changed_ns = found.st_mtime_ns
        self.is_regular = stat.S_ISREG(found.st_mode)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def part(self, where: slice) -> bytes:
        start, stop, _ = where.indices(self.size)
        os.lseek(self._fd, start, os.SEEK_SET)
        parts = []
        while start < stop:
            data = os.read(self._fd, stop - start)
            if not data:
                raise CorruptError("the file became shorter while it was read")
            parts.append(data)
            start += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def layout(self) -> _valuefile.Layout | None:
        """What its footer says, None where it has none. Raises CorruptError."""
        return _valuefile.footer_of(self.size, self.part)

    def refuse_other(self, ref: Ref) -> None:
        """Raises CorruptError unless the file is, to its last byte, the one that a record refers to."""
        if not self.is_regular:
            raise CorruptError("it is no regular file")
        if not ref.digest:  # of chest 0.2, which knew no checksums
            return
        if self.size != ref.size:
            raise CorruptError(f"it has {self.size} bytes instead of {ref.size}")
        try:
            layout = self.layout()
        except CorruptError as error:  # another serializer's file may look like anything
            layout, problem = None, error
        else:
            problem = CorruptError("its content is not what was written")
        if layout is not None and layout.digest == ref.digest:
            _valuefile.verify_file(layout, self.part)
        elif self.hash() != ref.digest:
            raise problem if layout is None else CorruptError("it is the file of another value, or an older one")

    def hash(self) -> int:
        hasher = xxh3_64()
        for at in range(0, self.size, _READ):
            hasher.update(self.part(slice(at, at + _READ)))
        return int(hasher.intdigest())


class ValueFile(NamedTuple):
    """A value file, by its own account."""

    label: str  # path below the folder
    name: bytes
    typed: bytes
    layout: _valuefile.Layout
    changed_ns: int
    identity: tuple[int, int]


def value_files(path: str, broken: Callable[[str, CorruptError], None]) -> Iterator[ValueFile]:
    """The value files below a folder that say whose they are, by the default serializer. No link is followed.

    What lies in ``.keys`` is left out; ``broken`` is told of files that were cut short.
    """
    todo = [""]
    while todo:
        folder = todo.pop()
        try:
            entries = os.scandir(os.path.join(path, folder))
        except OSError:
            continue
        with entries:
            for entry in entries:
                label = f"{folder}/{entry.name}" if folder else entry.name
                if not folder and entry.name.lower().startswith(".keys"):
                    continue
                try:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(label)
                    elif entry.is_file(follow_symlinks=False):
                        with below(path, label) as (inner, last), open_to_read(last, inner) as file:
                            found = look_into(file, label, broken)
                        if found is not None:
                            yield found
                except (OSError, ChestError):
                    continue


def open_to_read(path: str, folder: int | None = None) -> File:
    """A file that is no link, and that nobody is waited for to open."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    return File(os.open(path, flags | getattr(os, "O_BINARY", 0), dir_fd=folder))


def look_into(file: File, label: str, broken: Callable[[str, CorruptError], None]) -> ValueFile | None:
    """What a file says of itself, None if it is no value file of the default serializer."""
    if not file.is_regular or file.part(slice(max(0, file.size - 8), file.size)) != _MAGIC:
        return None
    try:
        layout = file.layout()
    except CorruptError as error:
        broken(label, error)
        return None
    found = None if layout is None else unpack_key_note(layout.note)
    if layout is None or found is None:
        return None
    return ValueFile(label, *found, layout, file.changed_ns, file.identity)
