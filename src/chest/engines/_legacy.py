"""Folders of chest 0.2: a ``.keys`` *file*, a pickled or JSON list of ``(key, filename)`` pairs, beside value files.

They are opened as they are, and stay so until something is written. Then an LMDB index that refers to the value files where
they lie takes the place of ``.keys``. The steps, each of which a crash may follow:

    build ``.keys-upgrade``, a whole index          an interrupted one is thrown away
    rename ``.keys`` to ``.keys-0.2``               the next opener goes on with the next step
    rename ``.keys-upgrade`` to ``.keys``           the next opener goes on with the next step
    move ``.keys-0.2`` into ``.keys``               where it is kept: nothing of the old folder is ever deleted
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .. import _fs, _keys
from ..abc import Commit, Index, OrderItem, Put, Record
from ..errors import CorruptError, LoadError

__all__ = ["LegacyIndex", "finish_upgrade", "read_pairs"]

OLD, NEW = ".keys-0.2", ".keys-upgrade"


def finish_upgrade(root: str) -> None:
    """Bring an interrupted upgrade to its end, or back to its beginning."""
    keys, old, new = (os.path.join(root, name) for name in (".keys", OLD, NEW))
    if os.path.isfile(old):
        if not os.path.lexists(keys) and os.path.isdir(new):
            os.rename(new, keys)
            _fs.fsync_folder(root)
        if os.path.isdir(keys):
            os.rename(old, os.path.join(keys, OLD))
    elif os.path.isdir(new):
        shutil.rmtree(new)


def read_pairs(
    path: str,
    opener: Callable[..., Any] | None,
    load: Callable[[Any], Any] | None,
    text: bool,
    unpickle: Callable[[bytes], Any] = pickle.loads,
) -> tuple[list[tuple[Hashable, str]], str]:
    """The pairs of a ``.keys`` file, and which serializer reads it ("" for the caller's own).

    Raises:
        CorruptError: it is no such list.
    """
    try:
        with (opener or open)(path, mode="rt" if text else "rb") as file:
            if load is not None:
                pairs, name = load(file), ""
            else:
                data = file.read()
                pairs, name = (json.loads(data), "json") if data[:1] == b"[" else (unpickle(data), "pickle")
        return [(_hashable(key), os.fspath(filename)) for key, filename in pairs], name
    except (OSError, LoadError):
        raise
    except Exception as error:
        raise CorruptError(
            f"{path} is not the list of keys of a chest 0.2 ({type(error).__name__}: {error}). If it was written with another "
            "load= or open= than pickle's, give them; if it is damaged, put it back from a backup. Nothing was changed.",
            path=path,
        ) from error


def _hashable(key: Any) -> Hashable:
    """JSON gives lists for tuples."""
    return tuple(_hashable(member) for member in key) if isinstance(key, list) else key


class LegacyIndex(Index):
    """A folder of chest 0.2 as an index, which becomes an LMDB index with the first commit.

    Args:
        pairs: what its ``.keys`` holds.
        body: what a record says of a value file with this name; ``kind`` is its kind.
        create: makes a new LMDB index in a folder; ``settings`` are its first meta data.
    """

    def __init__(
        self,
        root: str,
        pairs: Iterable[tuple[Hashable, str]],
        body: Callable[[str], bytes],
        kind: int,
        create: Callable[[str], Index],
        settings: dict[bytes, bytes],
    ) -> None:
        self._root = root
        self._create = create
        self._settings = settings
        self._real: Index | None = None
        self._records: dict[bytes, Record] = {}
        self._order: list[OrderItem] = []
        for seq, (key, filename) in enumerate(pairs, 1):
            name, typed = _keys.encode(key) or (_keys.opaque_name(), _keys.pickled_key(key))
            if name in self._records:  # equal keys cannot both be in a dict
                continue
            self._records[name] = Record(0, seq, kind, body(filename.replace(os.sep, "/")))
            self._order.append(OrderItem(seq, name, typed))
        self.generation = memoryview(struct.pack("Q", 0)).cast("Q")

    def upgrade(self) -> Index:
        """The LMDB index that has taken the place of ``.keys``."""
        if self._real is None:
            new = os.path.join(self._root, NEW)
            index = self._create(new)
            try:
                index.commit(
                    [Put(i.name, i.seq, self._records[i.name].kind, self._records[i.name].body, i.typed) for i in self._order],
                    meta=self._settings,
                )
            finally:
                index.close()
            keys = os.path.join(self._root, ".keys")
            os.rename(keys, os.path.join(self._root, OLD))
            os.rename(new, keys)
            _fs.fsync_folder(self._root)
            os.rename(os.path.join(self._root, OLD), os.path.join(keys, OLD))
            self._real = self._create(keys)
            self.generation = self._real.generation
        return self._real

    def get(self, name: bytes) -> Record | None:
        return self._records.get(name) if self._real is None else self._real.get(name)

    def get_many(self, names: Sequence[bytes]) -> tuple[int, list[Record | None]]:
        if self._real is not None:
            return self._real.get_many(names)
        return 0, [self._records.get(name) for name in names]

    def commit(
        self,
        puts: Sequence[Put] = (),
        deletes: Sequence[bytes] = (),
        *,
        notes: Callable[[dict[bytes, Record]], Sequence[bytes]] | None = None,
        meta: dict[bytes, bytes] | None = None,
    ) -> Commit:
        commit = self.upgrade().commit(puts, deletes, notes=notes, meta=meta)
        return commit

    def sync(self) -> None:
        if self._real is not None:
            self._real.sync()

    def transaction(self) -> AbstractContextManager[Index]:
        return self.upgrade().transaction()

    def settle(
        self,
        finish: Callable[[bytes, Callable[[bytes], Record | None]], bool],
        *,
        ready: Callable[[], None] | None = None,
    ) -> tuple[Commit | None, int]:
        return (None, 0) if self._real is None else self._real.settle(finish, ready=ready)

    def notes(self) -> list[bytes]:
        return [] if self._real is None else self._real.notes()

    def page(self, after: int | None = None, limit: int = 1000, *, reverse: bool = False) -> list[OrderItem]:
        if self._real is not None:
            return self._real.page(after, limit, reverse=reverse)
        if reverse:
            end = len(self._order) if after is None else after - 1
            return self._order[max(0, end - limit) : end][::-1]
        start = after or 0
        return self._order[start : start + limit]

    def names(self, prefix: bytes) -> list[bytes]:
        if self._real is not None:
            return self._real.names(prefix)
        return sorted(name for name in self._records if name.startswith(prefix))

    def __len__(self) -> int:
        return len(self._records) if self._real is None else len(self._real)

    def version(self) -> int:
        return 0 if self._real is None else self._real.version()

    def last_seq(self) -> int:
        return len(self._order) if self._real is None else self._real.last_seq()

    def meta(self, name: bytes) -> bytes | None:
        return self._settings.get(name) if self._real is None else self._real.meta(name)

    def nbytes(self) -> int:
        if self._real is not None:
            return self._real.nbytes()
        return os.stat(os.path.join(self._root, ".keys")).st_size

    def busy(self) -> bool:
        return self._real is not None and self._real.busy()

    def close(self) -> None:
        if self._real is not None:
            self._real.close()
