"""What can still be read of a damaged index, and the new one that takes its place.

Each entry carries a checksum, so it can be believed wherever it is found. What hangs together is read in order; if something
does not, every page that is neither in use nor free is looked at. Such a page may be an old one: of several records of a
key the newest counts, and a key that was deleted shortly before may come back.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import lmdb

from ..errors import ChestError
from ._environment import MAP_SIZE
from ._pages import DATABASES, Damage, Pages, Snapshot, Tree, renumber

__all__ = ["Draft", "salvaged"]

_EVERY = 20_000  # changes of one transaction


def salvaged(pages: Pages) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(database, key, value) of all that can be read; the database is empty where it cannot be told."""
    n_pages = pages.n_pages()
    known = bytearray(n_pages // 8 + 1)
    whole = True
    try:
        snapshot: Snapshot | None = pages.snapshot()
    except Damage:
        snapshot, whole = None, False
    for name in DATABASES if snapshot is not None else ():
        assert snapshot is not None
        try:
            tree = snapshot.tree(name)
        except (Damage, struct.error, IndexError):
            whole = False
            continue
        for number in _leaves(snapshot, tree, known):
            if number is None:
                whole = False
            else:
                for key, value in pages.leaf(number):
                    yield name, key, value
    if whole:
        return
    if snapshot is not None:
        try:
            for number in snapshot.free_pages():
                if number < n_pages:
                    known[number >> 3] |= 1 << (number & 7)
        except (Damage, struct.error, IndexError, RecursionError):
            pass
    for number in range(2, n_pages):
        if not known[number >> 3] >> (number & 7) & 1:
            for key, value in pages.leaf(number):
                yield b"", key, value


def _leaves(snapshot: Snapshot, tree: Tree, known: bytearray) -> Iterator[int | None]:
    """The leaf pages of a tree, from left to right; None for each page that is damaged."""
    todo = [] if tree.root is None else [tree.root]
    while todo:
        number = todo.pop()
        if number >> 3 >= len(known) or known[number >> 3] >> (number & 7) & 1:  # beyond the end, or met before
            yield None
            continue
        try:
            children = snapshot.children(number)
        except (Damage, struct.error, IndexError):
            yield None
            continue
        known[number >> 3] |= 1 << (number & 7)
        if children is None:
            yield number
        else:
            todo += reversed(children)


class Draft:
    """A new index, which nobody else knows yet, with room for notes of its maker's: the database ``extra``.

    Nothing of it is durable before ``finish``.
    """

    def __init__(self, path: str) -> None:
        self._env = lmdb.open(
            path, subdir=False, lock=False, sync=False, max_dbs=8, map_size=MAP_SIZE, mode=0o600, lib_version=0, create=True
        )
        try:
            self._dbs = {name: self._env.open_db(name) for name in (*DATABASES, b"extra")}
            self._txn = self._env.begin(write=True)
        except BaseException:
            self._env.close()
            raise
        self._n = 0

    def get(self, database: bytes, key: bytes) -> bytes | None:
        found: bytes | None = self._txn.get(key, db=self._dbs[database])
        return found

    def put(self, database: bytes, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._dbs[database])
        self._changed()

    def delete(self, database: bytes, key: bytes) -> None:
        self._txn.delete(key, db=self._dbs[database])
        self._changed()

    def _changed(self) -> None:
        self._n += 1
        if self._n % _EVERY == 0:
            self._txn.commit()
            self._txn = self._env.begin(write=True)

    def count(self, database: bytes) -> int:
        return int(self._txn.stat(self._dbs[database])["entries"])

    def pairs(self, database: bytes, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All pairs whose keys begin with the prefix; those that were passed may be changed meanwhile."""
        after, last = prefix, None
        while True:
            cursor: Any = self._txn.cursor(self._dbs[database])
            page: list[tuple[bytes, bytes]] = []
            if cursor.set_range(after) if after else cursor.first():
                for pair in cursor.iternext():
                    if not pair[0].startswith(prefix) or len(page) == 1000:
                        break
                    if pair[0] != last:
                        page.append(pair)
            cursor.close()
            if not page:
                return
            yield from page
            after = last = page[-1][0]

    def finish(self, fd: int, path: str, at_least: int) -> int:
        """The index alone is in this file, durably; the number of its commit, which is ``at_least`` this one."""
        self._txn.drop(self._dbs[b"extra"], delete=True)
        self._txn.commit()
        try:
            self._env.copyfd(fd, compact=True)
        except lmdb.Error as error:
            raise ChestError(
                f"the new index could not be written to {path}: {error}. Make room and try again.", path=path
            ) from error
        number = renumber(path, at_least)
        os.fsync(fd)
        return number

    def close(self) -> None:
        self._env.close()
