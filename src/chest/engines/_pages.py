"""LMDB's data file read page by page, without LMDB: nothing is mapped, locked or written, and no damage can end the process.

This is how a chest is read where its folder must not change, how it is checked, and what can still be read is salvaged.
It is slower than LMDB (10 us for a key) and needs no place among its readers. Instead a snapshot *holds* only as long as
its meta page is as it was: LMDB reuses a page of snapshot n when n + 2 has been committed, at the earliest, and that commit
overwrites the meta page of n. So whoever has read something asks afterwards whether the snapshot still held.

The layout of pages stands in ``_datafile``.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CorruptError

__all__ = ["DATABASES", "Damage", "Pages", "Snapshot", "Tree", "renumber"]

DATABASES = (b"index", b"order", b"pending", b"meta", b"changed")

_HEAD = 16
_META = struct.Struct("=IIQQ IHHQQQQQ IHHQQQQQ QQ")  # magic, version, address, map size, two trees, last page, transaction
_META_END = _HEAD + _META.size
_TREE = struct.Struct("=IHHQQQQQ")
_TXN_AT = _META_END - 8
_PAGE = struct.Struct("=QHHHH")  # number, pad, flags, lower, upper
_NODE = struct.Struct("=HHHH")  # size of the data (or the child's number) low and high, flags, size of the key
_BRANCH, _LEAF, _OVERFLOW, _IS_META = 1, 2, 4, 8
_BIG, _SUB = 1, 2
_NONE = 2**64 - 1
_DEEPEST = 32
_CACHED = 512  # branch pages of a snapshot that are kept


class Damage(Exception):
    """A page is not what it should be, or not any more."""


class Tree(NamedTuple):
    """A database: the number of its root, None if it is empty, and of its entries."""

    root: int | None
    entries: int


class Pages:
    """An open data file.

    Raises:
        OSError: it cannot be read.
        CorruptError: it is no regular file.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self.path = path
        self.fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        found = os.fstat(self.fd)
        self.identity = found.st_dev, found.st_ino
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise CorruptError(f"{path} is no regular file: remove it, or put it back from a backup.", path=path)
        self._last: Snapshot | None = None

    def close(self) -> None:
        """A second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, at: int, size: int) -> bytes:
        data = _pread(self.fd, size, at)
        while len(data) < size:
            more = _pread(self.fd, size - len(data), at + len(data))
            if not more:
                raise Damage(f"the file ends at {at + len(data)}, in the middle of something")
            data += more
        return data

    def snapshot(self) -> Snapshot:
        """The newest one. Raises Damage where there is none."""
        first = self.read(0, _META_END)
        size = _page_size(first)
        second = self.read(size, _META_END)
        newest, number = max((_transaction(first), 0), (_transaction(second), 1))
        if newest < 0:
            raise Damage("neither of the first two pages is a meta page")
        meta = second if number else first
        if self._last is None or self._last.meta != meta:
            self._last = Snapshot(self, size, number, meta)
        return self._last

    def n_pages(self) -> int:
        return os.fstat(self.fd).st_size // self.page_size()

    def page_size(self) -> int:
        """4096, or what another machine had, as far as this can still be told."""
        try:
            return _page_size(self.read(0, _META_END))
        except Damage:
            return 4096

    def leaf(self, number: int) -> list[tuple[bytes, bytes]]:
        """All pairs of a leaf page that can be read, whatever the rest looks like. None of them may be believed."""
        size = self.page_size()
        found: list[tuple[bytes, bytes]] = []
        try:
            page = self.read(number * size, size)
            its_number, _, flags, lower, _ = _PAGE.unpack_from(page)
            if its_number != number or flags & 0x0F != _LEAF:
                return found
            for (at,) in struct.iter_unpack("=H", page[_HEAD : min(lower, size) & ~1]):
                try:
                    low, high, node_flags, key_size = _NODE.unpack_from(page, at)
                    start, length = at + 8 + key_size, low | high << 16
                    is_big = node_flags & _BIG
                    data = self._overflow(size, page, start, length) if is_big else page[start : start + length]
                    found.append((page[at + 8 : start], data))
                except (Damage, struct.error):
                    continue
        except (Damage, struct.error):
            pass
        return found

    def _overflow(self, size: int, page: bytes, at: int, length: int) -> bytes:
        (first,) = struct.unpack_from("=Q", page, at)
        if not 2 <= first < 2**48:
            raise Damage("a large value has no place")
        data = self.read(first * size, _HEAD + length)
        number, _, flags, _, _ = _PAGE.unpack_from(data)
        if number != first or not flags & _OVERFLOW:
            raise Damage(f"page {first} is not the large value that it should be")
        return data[_HEAD:]


class Snapshot:
    """The databases as one commit left them.

    Attributes:
        version: number of the transaction.
        meta: the meta page's bytes.
        last_page: the greatest number in use.
        free: the tree of free pages.
    """

    def __init__(self, pages: Pages, size: int, number: int, meta: bytes) -> None:
        self.pages = pages
        self.meta = meta
        self._size = size
        self._number = number
        fields = _META.unpack_from(meta, _HEAD)
        self.version: int = fields[-1]
        self.last_page: int = fields[-2]
        self.free = Tree(None if fields[11] == _NONE else fields[11], fields[10])
        self.main = Tree(None if fields[19] == _NONE else fields[19], fields[18])
        self._branches: dict[int, bytes] = {}
        self._trees: dict[bytes, Tree] = {}

    def holds(self) -> bool:
        """Whether everything that was read so far belongs to this snapshot."""
        try:
            return self.pages.read(self._number * self._size, _META_END) == self.meta
        except Damage:
            return False

    def tree(self, name: bytes) -> Tree:
        """A database, an empty one where there is none of this name."""
        tree = self._trees.get(name)
        if tree is None:
            tree = Tree(None, 0)
            data = self._find(self.main, name)
            if data is not None:
                if len(data) != _TREE.size:
                    raise Damage(f"there is no database {name!r}")
                fields = _TREE.unpack(data)
                tree = Tree(None if fields[7] == _NONE else fields[7], fields[6])
            self._trees[name] = tree
        return tree

    def get(self, name: bytes, key: bytes) -> bytes | None:
        """The value of a key in a database."""
        return self._find(self.tree(name), key)

    def items(self, name: bytes, after: bytes | None = None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of a database beyond a key, in the order of keys."""
        return self.walk(self.tree(name), after, reverse=reverse)

    def walk(self, tree: Tree, after: bytes | None = None, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        if tree.root is not None:
            yield from self._walk(tree.root, after, reverse, 0)

    def page(self, number: int) -> bytes:
        """A page of a tree."""
        page = self._branches.get(number)
        if page is None:
            if not 2 <= number <= self.last_page:
                raise Damage(f"there is no page {number}")
            page = self.pages.read(number * self._size, self._size)
            its_number, _, flags, lower, upper = _PAGE.unpack_from(page)
            if its_number != number or flags & 0x0F not in (_BRANCH, _LEAF) or not _HEAD <= lower <= upper <= self._size:
                raise Damage(f"page {number} is no page of a database")
            if flags & _BRANCH and len(self._branches) < _CACHED:
                self._branches[number] = page
        return page

    def _nodes(self, page: bytes) -> list[int]:
        (lower,) = struct.unpack_from("=H", page, 12)
        return list(struct.unpack_from(f"={(lower - _HEAD) // 2}H", page, _HEAD))

    def _key(self, page: bytes, at: int) -> bytes:
        if at + 8 > len(page):
            raise Damage("a page is not what it should be")
        size = page[at + 6] | page[at + 7] << 8
        if at + 8 + size > len(page):
            raise Damage("a page is not what it should be")
        return page[at + 8 : at + 8 + size]

    def _search(self, page: bytes, nodes: list[int], key: bytes, start: int) -> int:
        """The first node whose key is not less."""
        low, high = start, len(nodes)
        while low < high:
            middle = (low + high) // 2
            if self._key(page, nodes[middle]) < key:
                low = middle + 1
            else:
                high = middle
        return low

    def _child(self, page: bytes, at: int) -> int:
        low, high, flags, _ = _NODE.unpack_from(page, at)
        return int(low | high << 16 | flags << 32)

    def _data(self, page: bytes, at: int) -> bytes:
        low, high, flags, key_size = _NODE.unpack_from(page, at)
        start, length = at + 8 + key_size, low | high << 16
        if flags & _BIG:
            if start + 8 > len(page):
                raise Damage("a page is not what it should be")
            return self.pages._overflow(self._size, page, start, length)
        if start + length > len(page):
            raise Damage("a page is not what it should be")
        return page[start : start + length]

    def _find(self, tree: Tree, key: bytes) -> bytes | None:
        number = tree.root
        if number is None:
            return None
        for _ in range(_DEEPEST):
            page = self.page(number)
            nodes = self._nodes(page)
            if page[10] & _LEAF:
                at = self._search(page, nodes, key, 0)
                return self._data(page, nodes[at]) if at < len(nodes) and self._key(page, nodes[at]) == key else None
            at = self._branch(page, nodes, key)
            number = self._child(page, nodes[at])
        raise Damage("a database is deeper than it can be")

    def _branch(self, page: bytes, nodes: list[int], key: bytes) -> int:
        """The number of the child that a key would be in. The first one has no key of its own."""
        if not nodes:
            raise Damage("a page is empty that cannot be")
        at = self._search(page, nodes, key, 1)
        return at if at < len(nodes) and self._key(page, nodes[at]) == key else at - 1

    def _walk(self, number: int, after: bytes | None, reverse: bool, depth: int) -> Iterator[tuple[bytes, bytes]]:
        if depth > _DEEPEST:
            raise Damage("a database is deeper than it can be")
        page = self.page(number)
        nodes = self._nodes(page)
        if page[10] & _BRANCH:
            at = None if after is None else self._branch(page, nodes, after)
            children = range(at or 0, len(nodes)) if not reverse else range(len(nodes) - 1 if at is None else at, -1, -1)
            for child in children:
                yield from self._walk(self._child(page, nodes[child]), after if child == at else None, reverse, depth + 1)
            return
        if after is not None:
            at = self._search(page, nodes, after, 0)
            if reverse:
                nodes = nodes[:at]
            else:
                found = at < len(nodes) and self._key(page, nodes[at]) == after
                nodes = nodes[at + found :]
        for node in reversed(nodes) if reverse else nodes:
            yield self._key(page, node), self._data(page, node)

    def children(self, number: int) -> list[int] | None:
        """The pages below a branch page; None for a leaf. Raises Damage."""
        page = self.page(number)
        if page[10] & _LEAF:
            return None
        try:
            return [self._child(page, at) for at in self._nodes(page)]
        except struct.error as error:
            raise Damage("a page is not what it should be") from error

    def free_pages(self) -> Iterator[int]:
        """The pages that hold nothing any more."""
        for _, ids in self.walk(self.free):
            for (number,) in struct.iter_unpack("=Q", ids[8 : len(ids) & ~7]):
                yield number


def _page_size(first: bytes) -> int:
    magic, version = struct.unpack_from("=II", first, _HEAD)
    size = int(struct.unpack_from("=I", first, _HEAD + 24)[0])
    if magic != 0xBEEFC0DE or version != 1:
        raise Damage("it is no index, or one of a machine with other numbers")
    if not 256 <= size <= 65_536 or size & (size - 1):
        raise Damage("it has no page size")
    return size


def _transaction(meta: bytes) -> int:
    """The number of the transaction that wrote a meta page; -1 if it is none."""
    flags = struct.unpack_from("=H", meta, 10)[0]
    if not flags & _IS_META or struct.unpack_from("=II", meta, _HEAD) != (0xBEEFC0DE, 1):
        return -1
    return int(struct.unpack_from("=Q", meta, _TXN_AT)[0])


def _pread(fd: int, size: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, at)
    os.lseek(fd, at, os.SEEK_SET)  # Windows: within the GIL, and nobody else uses the descriptor
    return os.read(fd, size)


def renumber(path: str, at_least: int) -> int:
    """The newest commit of a data file has this number now, or the next one; returns it. Nobody has the file open.

    A compacted copy begins to count at 1 again, but records know the number of the commit that wrote them. Not durable.
    """
    pages = Pages(path)
    try:
        size = pages.page_size()
        newest, number = max((_transaction(pages.read(n * size, _META_END)), n) for n in (0, 1))
    finally:
        pages.close()
    if newest >= at_least:
        return newest
    wanted = at_least + ((at_least ^ number) & 1)  # commit n stands in meta page n & 1, where n + 2 overwrites it
    with open(path, "r+b", buffering=0) as file:
        file.seek(number * size + _TXN_AT)
        file.write(struct.pack("=Q", wanted))
    return wanted
