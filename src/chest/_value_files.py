"""Value files by their own account: what each says of its key, and whether it is whole. They are read, not mapped.

A file on a bad sector is an error then, and not the end of the process; and nothing is unpickled. What is compressed or
sealed is opened in memory, one file at a time.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

from xxhash import xxh3_64

from . import _valuefile
from ._compression import FRAME, METHODS, by_number, private_memory
from ._envelope import open_file
from ._records import Ref, unpack_key_note
from ._sealing import Seal
from .engines._labels import below
from .errors import ChestError, CorruptError

__all__ = ["File", "ValueFile", "frames_of", "look_into", "open_to_read", "value_files", "walk"]

_MAGIC = b"CHESTv1\n"
_READ = 1 << 20
_START = 16  # bytes by which files are told apart
_FRAMES = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"\x1f\x8b": "gzip"}
_CHUNK = struct.Struct("<4xiii")  # the head of one of Blosc2's: length of the content, of a block, of the chunk


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

    def refuse_other(
        self, ref: Ref, kind: int = 0, name: bytes = b"", seal: Seal | None = None, *, locked: bool = False
    ) -> None:
        """Raises CorruptError unless the file is, to its last byte, the one that a record refers to.

        Args:
            ref, kind: what the record says.
            name: whose record it is, in the index.
            seal: of the chest. ``locked``: it has one, and the key is not at hand.

        Raises:
            MissingExtraError: a package is needed to decompress it.
            MemoryError: what is compressed or sealed has to fit into memory.
        """
        if not self.is_regular:
            raise CorruptError("it is no regular file")
        if not ref.digest:  # of chest 0.2, which knew no checksums
            return
        if self.size != ref.size:
            raise CorruptError(f"it has {self.size} bytes instead of {ref.size}")
        if seal is None and (locked or not ref.seal) and not kind >> 2:
            _refuse_other(self.size, self.part, ref.digest)
        elif not locked:
            view: Any = self.part(slice(0, self.size)) if self.size <= _READ else _Lazy(self)
            plain = open_file(seal, kind, name, cast(memoryview, view), ref.plain, ref.seal)
            _refuse_other(len(plain), plain.__getitem__, ref.digest)


class _Lazy:
    """The bytes of a file, read when they are asked for."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __len__(self) -> int:
        return self._file.size

    def __getitem__(self, where: slice) -> bytes:
        return self._file.part(where)


def _refuse_other(size: int, part: Callable[[slice], Any], digest: int) -> None:
    """Raises CorruptError unless content, as its serializer wrote it, is the one with this digest."""
    try:
        layout = _valuefile.footer_of(size, part)
    except CorruptError as error:  # another serializer's file may look like anything
        layout, problem = None, error
    else:
        problem = CorruptError("its content is not what was written")
    if layout is not None and layout.digest == digest:
        _valuefile.verify_file(layout, part)
        return
    hasher = xxh3_64()
    for at in range(0, size, _READ):
        hasher.update(part(slice(at, min(at + _READ, size))))
    if (hasher.intdigest() or 1) != digest:
        raise problem if layout is None else CorruptError("it is the file of another value, or an older one")


class ValueFile(NamedTuple):
    """A value file, by its own account. ``layout`` is that of its content, ``size`` that of the file."""

    label: str  # path below the folder
    name: bytes
    typed: bytes
    layout: _valuefile.Layout
    changed_ns: int
    identity: tuple[int, int]
    start: bytes  # of its content
    size: int
    method: int = 0  # by which it is compressed


def walk(path: str) -> Iterator[tuple[str, File]]:
    """All regular files below a folder, by label, each open until the next one is asked for. No link is followed.

    What lies in ``.keys`` is left out.
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
                        continue
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    with below(path, label) as (inner, last):
                        file = open_to_read(last, inner)
                except (OSError, ChestError):
                    continue
                with file:
                    if file.is_regular:
                        yield label, file


def value_files(
    path: str,
    broken: Callable[[str, CorruptError], None],
    owns: Callable[[bytes], bool],
    opens: Callable[[str], bool] = lambda label: False,
) -> Iterator[ValueFile]:
    """The value files below a folder that say whose they are, by the serializers that write footers.

    Args:
        path: the folder.
        broken: is told of files that were cut short.
        owns: whether content that begins so is this chest's.
        opens: whether to decompress a file that seems to be compressed.
    """
    for label, file in walk(path):
        try:
            found = look_into(file, label, broken, opens)
        except (OSError, ChestError):
            continue
        if found is not None and owns(found.start):
            yield found


def open_to_read(path: str, folder: int | None = None) -> File:
    """A file that is no link, and that nobody is waited for to open."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    return File(os.open(path, flags | getattr(os, "O_BINARY", 0), dir_fd=folder))


def look_into(
    file: File, label: str, broken: Callable[[str, CorruptError], None], opens: Callable[[str], bool] = lambda label: False
) -> ValueFile | None:
    """What a file says of itself, None if it has no footer. See ``value_files``."""
    if not file.is_regular:
        return None
    size, part, method = file.size, cast("Callable[[slice], Any]", file.part), 0
    if part(slice(max(0, size - 8), size)) != _MAGIC:
        method = frames_of(file)
        plain = _content(file, method) if method and opens(label) else None
        if plain is None:
            return None
        size, part = len(plain), plain.__getitem__
    try:
        layout = _valuefile.footer_of(size, part)
    except CorruptError as error:
        broken(label, error)
        return None
    found = None if layout is None else unpack_key_note(layout.note)
    if layout is None or found is None:
        return None
    start = bytes(part(slice(0, min(_START, size))))
    return ValueFile(label, *found, layout, file.changed_ns, file.identity, start, file.size, method)


def frames_of(file: File) -> int:
    """The number of the method by which a file seems to be compressed, 0 if by none."""
    start = file.part(slice(0, _START))
    for magic, name in _FRAMES.items():
        if start.startswith(magic):
            return METHODS[name].number
    return METHODS["blosc2"].number if _length_of_chunks(file) else 0


def _length_of_chunks(file: File) -> int:
    """Bytes of content in chunks of Blosc2, which have no magic number but say how long they are; 0 if a file is none."""
    at = total = 0
    while file.size - at >= _CHUNK.size:
        length, block, whole = _CHUNK.unpack(file.part(slice(at, at + _CHUNK.size)))
        if not (0 < length <= FRAME and 0 <= block <= FRAME and 16 <= whole <= length + 32):
            return 0
        at, total = at + whole, total + length
    return total if at == file.size else 0


def _content(file: File, method: int) -> memoryview | None:
    """What was compressed, None if that is no value file or cannot be had."""
    parts: Iterable[bytes] = (file.part(slice(at, at + _READ)) for at in range(0, file.size, _READ))
    try:
        by_number(method).check()
        if method == METHODS["blosc2"].number:
            plain = private_memory(_length_of_chunks(file))
            by_number(method).inflate(parts, plain)
            return plain
        target = _Content()
        by_number(method).inflate(parts, cast(memoryview, target))
        return memoryview(target.data)
    except MemoryError:
        raise
    except Exception:  # each library has its own
        return None


class _Content:
    """Takes whatever is decompressed, as long as it may be a value file."""

    def __init__(self) -> None:
        self.data = bytearray()

    def __len__(self) -> int:
        return sys.maxsize >> 1

    def __setitem__(self, where: slice, out: bytes) -> None:
        self.data += out
        if len(self.data) >= _START and not self.data.startswith(_valuefile.MARKS):
            raise CorruptError("it is no value file")
