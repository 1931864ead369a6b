"""What several threads and processes do together: transactions, waiting for a key, following changes.

A transaction is a keeper of its own (``_inside``). From the chest's point of view it is one more process: other threads go on
with the chest as it was, and what was committed is noticed by the generation. The thread that began the transaction is led to
the inner keeper by ``Keeper._here``; for hits, which take no lock, the chest's generation is replaced meanwhile by one that
never fits, which sends them the long way round.

The order of locks: a chest's ``lock``, then the writers' lock of its index. Within a transaction the latter is held, so
nothing in ``Inside`` may wait for the chest's lock; only before and after is it taken.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar, cast

from . import _changes
from ._dictionary import Dictionary
from ._hot import Entry
from ._inside import Inside
from .errors import ChestError, FailedError

__all__ = ["Sharing"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_log = logging.getLogger("chest")

PAUSE_S = 0.002  # between two looks at whether a key is there: about a hundredth of a core
_NEVER = memoryview(bytes([255] * 8)).cast("Q")  # a generation that equals no version


class Sharing(Dictionary[K, V]):
    """The part of a chest that is about others."""

    @abstractmethod
    def _has_company(self) -> bool:
        """Whether another process or chest may use the folder."""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Within the block, several keys change together or not at all, for all threads and processes, whatever happens.

        The chest is used as ever, by the thread that began it. It sees the newest commit, and no other writer commits until
        it ends; readers, other threads of this chest among them, go on and see the state before. An exception undoes
        everything, in memory and on disk; get what is to be changed within the block, and let go of it if the block fails. A
        block inside of a block belongs to the outer one, which cannot be committed if an inner one has failed. Values of all
        sizes and numbers may be written, but very many small ones take up to 512 MiB of memory until they are committed.

        Durable on return (in a scratch chest: visible). If the process dies within, nothing has happened, and the next
        writer goes on. A process that is suspended within holds up all writers.

        Raises:
            ChestError: an inner block has failed; or this thread is in a transaction of another chest on the same folder.
            SerializeError, WriteError: a value of the block cannot be written, and it is undone. Values that were set before
                and cannot be written stay in memory; the error comes if the block needs them.
            DiskFullError, FailedError: nothing was written; the block did not run, or it is undone.
        """
        here = self._here()
        if isinstance(here, Inside):
            try:
                yield
            except BaseException as error:
                here.doomed = error
                raise
            return
        refused: dict[Any, ChestError] = {}
        inside: Inside[K, V] | None = None
        token = object()
        try:
            self._begin(token, refused)
            with self._store.index.transaction() as index:
                inside = self._transaction = Inside(self, index, refused.copy())
                try:
                    yield
                    inside.finish()
                except BaseException:
                    inside.unfind()  # while nobody else can commit
                    raise
                finally:
                    self._transaction = None
            self._merge(inside, refused)
        except BaseException as error:
            if inside is not None:
                self._undo(inside)
            else:
                self._remember(error)
            raise
        finally:
            self._transactions.discard(token)  # without the lock: nothing may interrupt this
            with self.lock:
                if not self._transactions:
                    self._generation = self._store.index.generation
                    self._tier.retry()
                    self._none_open.notify_all()

    def _begin(self, token: object, refused: dict[Any, ChestError]) -> None:
        """What was set and deleted before is committed, so that the transaction finds it; but for what is ``refused``."""
        with self.lock:
            self._writable()
            if self._dirty or self._tombs:
                error = self._write(list(self._dirty.values()), refused, durable=False)  # as the transaction is, or not
                if error is not None:
                    raise error
            self._transactions.add(token)
            self._generation = _NEVER

    def _undo(self, inside: Inside[K, V]) -> None:
        version, blobs = inside._seen, inside._store.blobs
        if inside._failed is not None:  # the disk did not fail the block alone
            self._remember(inside._failed)
        inside.end()
        with contextlib.suppress(ChestError, OSError):  # what stays is removed when the folder is next opened
            if self._store.index.version() < version:  # else it may have been committed: an interrupt came too late
                inside.unfind()
                self._store.blobs.remove(blobs.written)

    def _merge(self, inside: Inside[K, V], refused: dict[Any, ChestError]) -> None:
        """What the transaction committed counts from now on, and what it held in memory belongs to the chest."""
        version, store = inside._seen, inside._store
        entries, lent, pinned = list(inside._entries.values()), dict(inside._lent), dict(inside._pinned)
        inside.end()
        with self.lock:
            for key, (entry, baseline) in inside._based.items():
                if key not in store.touched and not entry.dirty:  # it was only looked at: whoever holds it may go on
                    entry.version, entry.baseline = version, baseline
            for key in store.touched:
                old = self._entries.get(key) or self._lent.get(key)
                base, _ = inside._based.get(key, (None, None))
                # What is unwritten was set by another thread meanwhile, and stays; but not what the transaction began with.
                if old is not None and old.version < version and (not old.dirty or old is base or key in refused):
                    self._forget(old)
                    self._dirty.pop(key, None)
            inside.unfind()
            newest = self._store.index.version() == version
            if newest:
                self._moved_to(-1 if refused or self._dirty or self._tombs else version - 1, version)
            else:
                self._look()
            self._next_seq = max(self._next_seq, inside._next_seq)
            for entry in [*lent.values(), *entries]:
                if not self._takes(entry):
                    continue
                entry.epoch = self._epoch if newest else -1  # -1: to be checked when it is next used
                entry.lent = entry.lent or entry.hot
                entry.hot = False
                if entry.key not in lent and entry.size <= self._tier.limit:
                    self._tier.add(entry)
                elif entry.baseline is not None:
                    self._lent[entry.key] = entry
                    if entry.key in pinned:
                        self._pinned[entry.key] = pinned[entry.key]
            try:
                if store.touched:
                    self._store.settle()
                    self._take_commits()
                error: Exception | None = self._shrink()
            except (ChestError, OSError) as problem:  # all is committed; the rest waits for the next time
                error = problem
            if isinstance(error, FailedError):  # the block is committed; it is said when the chest is used or closed next
                self._remember(error)
                self._untold = True
            if error is not None:
                _log.warning("chest at %s: %s", self._store.path, str(error))

    def _takes(self, entry: Entry) -> bool:
        """Whether a value from a transaction becomes the chest's: it has none, or nobody holds that one but this one."""
        if entry.dirty or entry.key in self._tombs:
            return False
        old = self._entries.get(entry.key) or self._lent.get(entry.key)
        if old is not None:
            if old.dirty or entry.baseline is None or _changes.held(old.value) or not _changes.held(entry.value):
                return False
            self._forget(old)
        return True

    @contextlib.contextmanager
    def _atomic(self) -> Iterator[Dictionary[K, V]]:
        here = self._here()
        if here is not self or not self._has_company():
            with here.lock:
                yield here
        else:
            with self.transaction():
                yield self._here()

    @contextlib.contextmanager
    def edit(self, key: K) -> Iterator[V]:
        """Within the block, a value that is changed in place; what it became is committed when the block ends.

        A transaction of one key: nobody else can write it meanwhile, and an exception undoes the change. A value that
        cannot be changed in place is set in a ``transaction()`` instead.

        Raises:
            KeyError: there is no such key.
        """
        with self.transaction():
            yield self[key]

    def wait(self, key: K, timeout: float | None = None) -> V:
        """The value of a key, as soon as there is one, whoever sets it.

        From other processes it is seen when it has been committed: by ``sync``, ``flush`` or a spill, in a transaction, or at
        once where the other chest was opened with ``write_through=True``. Looks every 2 ms.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: there was none in time.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            if key in self:
                with contextlib.suppress(KeyError):  # it has been deleted again
                    return self[key]
            if self._here() is not self:
                raise ChestError(
                    f"the chest at {self._store.path} has no key {key!r}, and nobody else can set it while this transaction "
                    "lasts: wait before it.",
                    key=key,
                    path=self._store.path,
                )
            left = PAUSE_S if end is None else end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nobody has set {key!r} in the chest at {self._store.path} within {timeout} seconds")
            time.sleep(min(left, PAUSE_S))

    def changes(self, timeout: float | None = None) -> Iterator[K]:
        """Keys that anybody sets or deletes from now on, as they are committed; waits for the next ones.

        Each commit is told once; a key that is changed faster than it is asked for may be told once for several. Of what was
        deleted long ago (256 commits), or by a commit of thousands, nothing is told. Looks every 2 ms; holds nothing up.

        Args:
            timeout: seconds to wait for the next change before the iterator ends; None waits for ever, 0 not at all.
        """
        with self.lock:
            self._usable()
            return self._follow(self._store.index.version(), timeout)

    def _follow(self, seen: int, timeout: float | None) -> Iterator[K]:
        waited_since = time.monotonic()
        while True:
            with self.lock:
                self._usable()
                index = self._store.index
                keys: list[K] = []
                if index.generation[0] != seen:
                    keys, seen = self._changed_since(seen)
            if keys:
                yield from keys
                waited_since = time.monotonic()
                continue
            left = PAUSE_S if timeout is None else timeout - (time.monotonic() - waited_since)
            if left <= 0:
                return
            time.sleep(min(left, PAUSE_S))

    def _changed_since(self, version: int) -> tuple[list[K], int]:
        store = self._store
        newest, changed = store.index.changed_since(version)
        if changed is not None:
            return [cast(K, self._store.codec.decode(name, typed)) for name, typed in dict(changed).items()], newest
        keys: list[K] = []
        after = None
        while page := store.index.page(after):
            after = page[-1].seq
            records = store.index.get_many([item.name for item in page])[1]
            keys += [
                store.key(item)
                for item, record in zip(page, records, strict=True)
                if record is not None and version < record.version
            ]
        return keys, newest
