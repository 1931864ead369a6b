"""The default index: five LMDB databases in the folder ``.keys``.

    index     name -> version u64 | seq u64 | kind u8 | body | checksum
    order     seq, big-endian -> length of the name u16 | name | typed | checksum
    pending   number, big-endian -> note | checksum
    meta      name -> setting | checksum
    changed   what the last commits were about (see ``_log``)

All other integers are little-endian. A checksum is the XXH3 (64 bits) of the entry's key and of what lies before it:
LMDB has none of its own, and would answer a damaged page with a wrong value. The version is the number of LMDB's
transaction, so a snapshot knows its own, and no counter can be lost.
"""

from __future__ import annotations

import contextlib
import os
from _thread import get_ident
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NoReturn, cast

from xxhash import xxh3_64_digest as _digest

from .. import _fs
from .._hot import look_up, order_pairs, read_order, read_places, read_record, read_records, record_pairs
from ..abc import Commit, Index, OrderItem, Put, Record
from ..errors import ClosedError
from . import _log, _reserve
from ._cursors import add as _add
from ._cursors import count as _count
from ._cursors import last as _last
from ._cursors import place as _place
from ._cursors import seek as _seek
from ._cursors import version as _version
from ._environment import Environment, damaged
from ._environments import ENVIRONMENTS
from ._exclusive import exclusive
from ._gate import GATE

__all__ = ["LmdbIndex"]

_PAGE_BYTES = 4 << 20  # a page of the order ends here, too: keys may be large


class LmdbIndex(Index):
    """An index in LMDB. Any number of processes and threads of one machine; ``get`` in 2 us, a batch in 2 us a put."""

    def __init__(self, folder: str, env: Environment, *, sync: bool) -> None:
        """Use ``open``."""
        self._folder = folder
        self._env = env
        self._sync = sync
        self.generation = env.generation
        self.look_up = partial(look_up, Record, env, _digest, GATE.inside, GATE)  # type: ignore[method-assign]

    @classmethod
    def open(
        cls, folder: str, *, sync: bool = True, create: bool = True, network: bool = True, map_size: int | None = None
    ) -> LmdbIndex:
        """The index in a folder, which is created if there is none.

        Args:
            folder: its own, with nothing else in it that LMDB could mistake.
            sync: commits are durable when they return. Without, they survive the death of the process only.
            create: False: a folder without an index is a ``PathError``.
            network: False: a network file system is a ``NetworkPathError``.
            map_size: bytes of address space to begin with; it grows as needed.

        Raises:
            PathError: the folder cannot hold an index.
            CorruptError: what lies there is damaged.
            DiskFullError: there is no room.
        """
        if not network:
            _fs.refuse_network(folder)
        folder = os.path.abspath(folder)
        return cls(folder, ENVIRONMENTS.open(folder, sync=sync, create=create, map_size=map_size), sync=sync)

    # --- reading

    def get(self, name: bytes) -> Record | None:
        """The newest record of a key, None where there is none."""
        record: Record | None = self.look_up(name)
        if record is NotImplemented:
            env = self._env
            data = env.read(lambda txn: txn.get(name, db=env.index))
            return None if data is None else self._record(name, data)
        return record

    def get_many(self, names: Sequence[bytes]) -> tuple[int, list[Record | None]]:
        """The version of one snapshot, and the records in it, in the order of ``names``."""
        env = self._env

        def work(txn: Any) -> tuple[int, list[tuple[bytes, bytes]]]:
            return txn.id(), txn.cursor(env.index).getmulti(names)

        version, found = env.read(work)
        records = read_records(Record, found, _digest)
        if isinstance(records, bytes):
            self._refuse("a record", records)
        if len(found) == len(names):
            return version, cast("list[Record | None]", records)
        by_name = {name: record for (name, _), record in zip(found, records, strict=True)}
        return version, [by_name.get(name) for name in names]

    def notes(self) -> list[bytes]:
        """The notes that have not been dealt with, oldest first."""
        env = self._env
        items = env.read(lambda txn: list(txn.cursor(env.pending).iternext()) if _count(txn, env.pending) else [])
        return [self._plain("a note", number, data) for number, data in items]

    def page(self, after: int | None = None, limit: int = 1000, *, reverse: bool = False) -> list[OrderItem]:
        """Up to ``limit`` keys in insertion order, beyond ``after``; fewer where the keys are large."""
        env = self._env

        def work(txn: Any) -> list[tuple[bytes, bytes]]:
            cursor = txn.cursor(env.order)
            if not _seek(cursor, after, reverse):
                return []
            found: list[tuple[bytes, bytes]] = []
            room = _PAGE_BYTES
            for item in cursor.iterprev() if reverse else cursor.iternext():
                if len(found) >= limit or room < 0:
                    break
                found.append(item)
                room -= len(item[1])
            return found

        items = read_order(OrderItem, env.read(work), _digest)
        if isinstance(items, bytes):
            self._refuse("the order", items)
        if items and after is not None and (items[-1].seq >= after if reverse else items[-1].seq <= after):
            self._refuse("the order", _place(items[-1].seq))  # else whoever asks for the next page would go on for ever
        return items

    def names(self, prefix: bytes) -> list[bytes]:
        """All names with this prefix, sorted."""
        env = self._env

        def work(txn: Any) -> list[bytes]:
            cursor = txn.cursor(env.index)
            found: list[bytes] = []
            if cursor.set_range(prefix) if prefix else cursor.first():
                for name in cursor.iternext(values=False):
                    if not name.startswith(prefix):
                        break
                    found.append(name)
            return found

        return env.read(work)

    def __len__(self) -> int:
        """The number of keys. O(1)."""
        env = self._env
        return env.read(lambda txn: _count(txn, env.order))

    def version(self) -> int:
        """The version of the newest commit."""
        return self._env.read(_version)

    def last_seq(self) -> int:
        """The greatest place in use, 0 where the index is empty. O(1)."""
        env = self._env
        return env.read(lambda txn: _last(txn.cursor(env.order)))

    def meta(self, name: bytes) -> bytes | None:
        """A setting of the chest."""
        env = self._env
        data = env.read(lambda txn: txn.get(name, db=env.meta))
        return None if data is None else self._plain("a setting", name, data)

    def changed_since(self, version: int) -> tuple[int, list[tuple[bytes, bytes]] | None]:
        """The version of the newest commit, and what those after ``version`` wrote and deleted, if that is still known."""
        env = self._env
        return env.read(lambda txn: (txn.id(), _log.since(txn, env.changed, version)))

    def nbytes(self) -> int:
        """The size of the index's file."""
        return os.stat(self._env.data).st_size

    # --- writing

    def commit(
        self,
        puts: Sequence[Put] = (),
        deletes: Sequence[bytes] = (),
        *,
        notes: Callable[[dict[bytes, Record]], Sequence[bytes]] | None = None,
        meta: dict[bytes, bytes] | None = None,
    ) -> Commit:
        """Write all of it or nothing; durable after ``sync``, and with notes or settings at once.

        A new key whose place is taken (two processes have counted alike) moves behind the last one, and so do the new
        keys after it, which keep their order.

        Raises:
            DiskFullError: nothing was written, and nothing lost.
            FailedError: the disk failed, or the folder was moved away.
            CorruptError: the index is damaged where it was to be changed.
        """
        if not puts and not deletes and not meta and notes is None:
            version = self.version()
            return Commit(version, version)
        batch = sorted(puts, key=itemgetter(0))  # neighbours share pages
        names = [put[0] for put in batch]
        if deletes:
            names = sorted([*names, *deletes])
        if len(set(names)) != len(names):
            raise ValueError("a name occurs twice in one commit")

        noted = False

        def work(txn: Any) -> tuple[Commit, bool]:
            nonlocal noted
            commit, wrote, noted = self._write(txn, puts, batch, deletes, names, notes, meta or {})
            return commit, wrote

        commit: Commit = self._env.write(self._folder, work)
        self._settled(durable=noted or bool(meta))
        return commit

    def sync(self) -> None:
        """What was committed survives a power cut, if the index was opened with ``sync``; at no cost where it does already."""
        env = self._env
        if self._sync and (env.durable < env.newest or not env.sync):
            env.sync_to_disk()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Index]:
        """Within the block, an index whose commits take place together when the block ends, or never if it raises.

        LMDB keeps the pages that it has written in memory until then, up to 512 MiB of them.

        Raises:
            ChestError: this thread is in one already, of another index on the same folder.
            DiskFullError, FailedError: nothing was written.
        """
        with exclusive(self._env, self._folder) as held:
            yield LmdbIndex(self._folder, cast(Environment, held), sync=False)
        self._settled(durable=True)

    def _settled(self, *, durable: bool) -> None:
        """After a commit. One that was not synced at all (by an environment that was opened without) is made durable always."""
        env = self._env
        if self._sync:
            if durable or not env.sync:
                self.sync()
            env.reader_check()

    def _write(
        self,
        txn: Any,
        puts: Sequence[Put],
        batch: list[Put],
        deletes: Sequence[bytes],
        names: list[bytes],
        notes: Callable[[dict[bytes, Record]], Sequence[bytes]] | None,
        meta: dict[bytes, bytes],
    ) -> tuple[Commit, bool, bool]:
        env = self._env
        version = txn.id()
        order = txn.cursor(env.order)
        was_empty = _count(txn, env.order) == 0
        seqs, noted = ({}, {}) if was_empty else self._old(txn, order, names)
        deleted = [name for name in deletes if name in seqs]
        changed = [(put[0], put[4]) for put in puts] if len(puts) < _log.MANY else []
        for name in deleted:
            txn.delete(name, db=env.index)
            place = txn.pop(_place(seqs[name]), db=env.order)
            changed.append((name, b"" if place is None else place[2 + len(name) : -8]))
        moved = [put for put in puts if put[5] and put[0] in seqs] if seqs else []
        for put in moved:
            txn.delete(_place(seqs.pop(put[0])), db=env.order)
        newcomers = [put for put in puts if put[0] not in seqs] if seqs else list(puts)
        if newcomers:
            self._give_places(order, newcomers, seqs)
        if batch:
            records = record_pairs(version, seqs, batch, _digest)
            _, added = txn.cursor(env.index).putmulti(records, append=was_empty)
            if added != len(batch):
                raise damaged(self._folder, "there are records without a place in the order")

        if batch or deleted:
            _log.remember(txn, env.changed, version, len(puts) + len(deleted), changed)

        is_noted = notes is not None and _add(txn, env.pending, notes(noted))
        wrote = is_noted or bool(batch or meta or deleted)
        for name, setting in meta.items():
            txn.put(name, setting + _digest(name + setting), db=env.meta)
        return Commit(version if wrote else version - 1, version - 1), wrote, is_noted

    def _old(self, txn: Any, order: Any, names: list[bytes]) -> tuple[dict[bytes, int], dict[bytes, Record]]:
        """The places of those that are there already, and the records of theirs that notes are about.

        A damaged record does not keep its key from being written or deleted.
        """
        seqs, pairs, lost = read_places(txn.cursor(self._env.index).getmulti(names), _digest)
        noted = {name: self._record(name, data) for name, data in pairs}
        if lost and order.first():  # their places stand in the order only
            for place, data in order.iternext():
                name = data[2 : 2 + data[0] + (data[1] << 8)]
                if name in lost:
                    seqs[name] = int.from_bytes(place, "big")
        return seqs, noted

    def _give_places(self, order: Any, newcomers: list[Put], seqs: dict[bytes, int]) -> None:
        """Enter new keys into the order, behind its end where their own places are taken."""
        newcomers.sort(key=itemgetter(1))
        last = _last(order)
        free = last + 1
        places = [put[1] for put in newcomers]
        appends = places[0] > last and len(set(places)) == len(places)
        if not appends:
            taken = {int.from_bytes(place, "big") for place in order.getmulti(map(_place, places), values=False)}
            bumped = False
            for number, seq in enumerate(places):
                bumped = bumped or seq in taken
                if bumped:
                    seq = places[number] = max(free, seq)
                taken.add(seq)
                free = max(free, seq + 1)
        seqs.update(zip([put[0] for put in newcomers], places, strict=True))
        items = order_pairs(newcomers, places, _digest)
        _, added = order.putmulti(items, overwrite=False, append=appends)
        if added != len(newcomers):
            raise damaged(self._folder, "two keys have one place in the order")

    def settle(
        self,
        finish: Callable[[bytes, Callable[[bytes], Record | None]], bool],
        *,
        ready: Callable[[], None] | None = None,
    ) -> tuple[Commit | None, int]:
        """Call ``finish(note, get)`` for every note, oldest first, while no one else can commit; forget those done.

        If it raises, none is forgotten: it must be able to do a thing twice. ``ready`` is called after the last one and
        before they are forgotten: what they did must be durable then.
        """
        env = self._env
        if not env.read(lambda txn: _count(txn, env.pending)):
            return None, 0

        def work(txn: Any) -> tuple[tuple[Commit | None, int], bool]:
            def get(name: bytes) -> Record | None:
                data = txn.get(name, db=env.index)
                return None if data is None else self._record(name, data)

            items = list(txn.cursor(env.pending).iternext())
            done = [number for number, data in items if finish(self._plain("a note", number, data), get)]
            if done and ready is not None:
                ready()
            for number in done:
                txn.delete(number, db=env.pending)
            version = txn.id()
            return (Commit(version, version - 1) if done else None, len(items) - len(done)), bool(done)

        result = env.write(self._folder, work)
        self._settled(durable=False)  # what was done twice is done all the same
        return result

    # --- the rest

    def compact(self, fd: int, path: str) -> None:
        """Give free pages back to the disk; the copy is made in this file. See ``Environments.compact``."""
        ENVIRONMENTS.compact(self._env, fd, path)

    def copy_to(self, fd: int) -> None:
        """The newest commit stands in this file, as an index that counts its commits from 1 on. Not durable."""
        self._env.copy_to(fd)

    def give_way(self) -> bool:
        """A few pages are free on a full disk; False if they were already."""
        return self._sync and _reserve.give_up(self._folder)

    def busy(self) -> bool:
        """Whether this thread is in the middle of a transaction (for finalizers, which run anywhere)."""
        return get_ident() in GATE.inside or self._env.is_held()

    def close(self) -> None:
        """Let go of everything; a second call does nothing."""
        env = self._env
        if not isinstance(env, _Closed):
            self.look_up = lambda name: NotImplemented  # type: ignore[method-assign]
            self._env = _Closed()  # type: ignore[assignment]
            self.generation = memoryview(bytes(8)).cast("Q")
            ENVIRONMENTS.release(env)

    def _record(self, name: bytes, data: bytes) -> Record:
        record = read_record(Record, name, data, _digest)
        return self._refuse("a record", name) if record is None else record

    def _plain(self, what: str, key: bytes, data: bytes) -> bytes:
        if _digest(key + data[:-8]) != data[-8:]:
            self._refuse(what, key)
        return data[:-8]

    def _refuse(self, what: str, key: bytes) -> NoReturn:
        raise damaged(self._folder, f"{what} ({key[:40]!r}) is not what was written")


class _Closed:
    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedError("the index is closed")
