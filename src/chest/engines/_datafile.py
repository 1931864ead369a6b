"""The files of an LMDB environment before LMDB maps them: what is not there then is a SIGBUS, which nobody can catch.

A healthy ``data.mdb`` may be shorter than its meta pages say: LMDB does not write pages which the transaction that
allocated them freed again. Those stand in the list of free pages, a B-tree of its own, which is read here only if the
file is short.

    page    pgno u64 | pad u16 | flags u16 | lower u16 | upper u16 | offsets of the nodes, u16 each
    node    lo u16 | hi u16 | flags u16 | key size u16 | key | data        lo + hi: size of the data
    branch  the same, lo + hi + flags: the child's pgno
    meta    magic u32 | version u32 | address u64 | map size u64 | two trees, 48 bytes each | last pgno u64 | txn u64
    tree    pad u32 (of the first one: the page size) | flags u16 | depth u16 | four counts u64 | root pgno u64
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import sys
import time
from typing import BinaryIO

from .. import _fs
from ..errors import CorruptError

__all__ = ["forget_stump", "prepare_lock", "refuse_damaged"]

_HEAD = 16
_MAGIC = 0xBEEFC0DE
_BRANCH, _LEAF, _META = 1, 2, 8
_BIG = 1
_NO_ROOT = 2**64 - 1
_TRIES = 10
_LOCK_BYTES = 69_632  # of lock.mdb: room for 1,024 readers and more


def refuse_damaged(folder: str) -> bool:
    """Whether there is no index in a folder yet. Never to be called while this process has it open.

    Raises:
        CorruptError: it is not safe to map it, or it is lost.
    """
    data = os.path.join(folder, "data.mdb")
    for name in ("data.mdb", "lock.mdb", "generation"):
        path = os.path.join(folder, name)
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not stat.S_ISREG(mode):
            raise CorruptError(f"{path} is no regular file: remove it, or put it back from a backup.", path=path)
    try:
        with open(data, "rb", buffering=0) as file:
            for _ in range(_TRIES if os.fstat(file.fileno()).st_size else 0):
                file.seek(0)
                if _is_whole(file):
                    return False
                time.sleep(0.001)  # another process may be committing, and what was read be half old
            if os.fstat(file.fileno()).st_size:
                raise CorruptError(
                    f"{data} is no index of a chest, or has lost its end. Put the folder back from a backup; the value "
                    "files beside it are unharmed.",
                    path=data,
                )
    except (FileNotFoundError, NotADirectoryError):
        pass
    if os.path.lexists(os.path.join(folder, "generation")):  # made after data.mdb
        raise CorruptError(
            f"{data} is gone, or empty. Put it back from a backup; or remove {folder} to begin anew: the value files stay.",
            path=data,
        )
    return True


def _is_whole(file: BinaryIO) -> bool:
    if sys.maxsize < 2**32:
        return True  # other widths
    first = file.read(_HEAD + 136)
    if len(first) < _HEAD + 136:
        return False
    page_size = struct.unpack_from("=I", first, _HEAD + 24)[0]
    if not 256 <= page_size <= 65_536 or page_size & (page_size - 1):
        return False
    file.seek(page_size)
    metas = [first, file.read(_HEAD + 136)]
    if len(metas[1]) < _HEAD + 136 or not all(_is_meta(page) for page in metas):
        return False
    meta = max(metas, key=lambda m: int(struct.unpack_from("=Q", m, _HEAD + 128)[0]))
    root, last = (int(struct.unpack_from("=Q", meta, _HEAD + at)[0]) for at in (64, 120))
    n_pages = os.fstat(file.fileno()).st_size // page_size  # after the meta pages: files only grow
    if n_pages > last:
        return True
    try:
        return root != _NO_ROOT and _n_free_beyond(file, page_size, n_pages, last, root) == last + 1 - n_pages
    except (struct.error, ValueError):
        return False


def _is_meta(page: bytes) -> bool:
    flags = struct.unpack_from("=H", page, 10)[0]
    return bool(flags & _META) and struct.unpack_from("=II", page, _HEAD) == (_MAGIC, 1)


def _n_free_beyond(file: BinaryIO, page_size: int, n_pages: int, last: int, root: int) -> int:
    """How many of the pages that the file lacks are free."""
    free: set[int] = set()
    todo = [(root, 0)]
    while todo:
        number, depth = todo.pop()
        page = _page(file, page_size, n_pages, number, 1)
        flags, lower = struct.unpack_from("=HH", page, 10)
        if depth > 64 or not flags & (_BRANCH | _LEAF):
            raise ValueError
        for (at,) in struct.iter_unpack("=H", page[_HEAD:lower]):
            low, high, node_flags, key_size = struct.unpack_from("=HHHH", page, at)
            start = at + 8 + key_size
            if flags & _BRANCH:
                todo.append((low | high << 16 | node_flags << 32, depth + 1))
                continue
            length = low | high << 16
            if node_flags & _BIG:
                first = struct.unpack_from("=Q", page, start)[0]
                ids = _page(file, page_size, n_pages, first, -(-(length + _HEAD) // page_size))[_HEAD : _HEAD + length]
            else:
                ids = page[start : start + length]
            count = struct.unpack_from("=Q", ids)[0]
            free.update(n for n in struct.unpack_from(f"={count}Q", ids, 8) if n_pages <= n <= last)
    return len(free)


def _page(file: BinaryIO, page_size: int, n_pages: int, number: int, count: int) -> bytes:
    if number + count > n_pages:
        raise ValueError
    file.seek(number * page_size)
    return file.read(count * page_size)


def prepare_lock(folder: str) -> None:
    """``lock.mdb`` is there with all its blocks: LMDB would leave holes, and to fill one on a full disk is a SIGBUS.

    It is made under another name and linked, since LMDB may be filling in one that another process has just made.
    """
    path = os.path.join(folder, "lock.mdb")
    if os.path.lexists(path) or not hasattr(os, "link"):
        return
    temporary = f"{path}-{os.urandom(8).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        try:
            _fs.write_all(fd, bytes(_LOCK_BYTES))
        finally:
            os.close(fd)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            # There already, or no hard links here: LMDB makes it.
    finally:
        os.unlink(temporary)


def forget_stump(data: str) -> None:
    """A ``data.mdb`` too short to hold anything, which a full disk has left, is empty: new to the next opener."""
    with contextlib.suppress(OSError):
        if os.lstat(data).st_size < 2 * mmap.PAGESIZE:
            os.truncate(data, 0)
