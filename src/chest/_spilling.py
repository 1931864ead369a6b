"""How values leave memory, by way of the store: what is dirty is written, what is held is watched.

The state of a chest lives here, and ``_keeper`` tells what it means.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from . import _changes
from ._hot import Entry, MemoryTier, State, baseline_bytes, settle_rows, who_holds
from ._records import COMMIT_BYTES, SMALL, Baseline, Written
from ._sizing import nbytes
from ._store import Store
from .errors import ChestError, ClosedError, CorruptError, FailedError, ReadOnlyError, SerializeError, WriteError, short

__all__ = ["Spiller"]

_log = logging.getLogger("chest")

SLACK_BYTES = 4 << 20  # an eviction goes on this far below the limit (or a quarter of it), unless it takes many values
PINNED_BYTES = 4 << 20  # of values that are held by a part of them only, this much is watched (or a quarter of the limit)
LAST_PLACE = 2**64 - 2**40  # no clock tells a place beyond it for some decades
POLLED = 3  # lent values looked at with each operation: more than it can add


class Spiller(State):
    """The state of a chest, and how values leave memory. Everything runs under ``lock``."""

    _store: Store

    def __init__(self, store: Store, limit: int, lock: threading.RLock | None = None) -> None:
        self.lock = threading.RLock() if lock is None else lock
        self._store = store
        self._tier = MemoryTier(limit)
        self._entries: dict[Any, Entry] = self._tier.entries
        self._dirty: dict[Any, Entry] = {}
        self._tombs: dict[Any, bytes] = {}
        self._lent: OrderedDict[Any, Entry] = OrderedDict()
        self._pinned: dict[Any, int] = {}  # those of the lent that only a part of is held: key -> bytes
        self._unsure: dict[Any, Entry] = {}  # dirty entries of which nobody has looked whether they are stored
        self._n_new = 0  # dirty entries that are not stored
        self._generation = store.index.generation
        self._seen = store.index.version()
        self._epoch = 0
        self._next_seq = self._first_free()
        self._salt = int.from_bytes(os.urandom(2), "big") >> 4
        self._transaction: Any = None  # the keeper inside of it, while one is open
        self._write_through = False
        self._transactions: set[object] = set()  # those that are open, or wait for their turn
        self._found: dict[Any, tuple[Entry, Baseline, int, set[Any]]] = {}  # see `_catch_up`
        self._none_open = threading.Condition(self.lock)
        self._owner = 0  # the thread that a keeper inside of a transaction belongs to
        self._n_commits = 0  # of this keeper's own
        self._closed = False
        self._failed: FailedError | ReadOnlyError | None = None  # why nothing is written (any more)
        if store.read_only:
            self._failed = ReadOnlyError(
                f"the chest at {store.path} was opened with read_only=True: open it without to write to it", path=store.path
            )
        self._untold = False  # nobody has heard of that yet
        self._hits = self._misses = self._spills = self._writes = 0
        self._on_miss: Callable[[Any], Any] | None = None
        self._on_overflow: Callable[[Any], Any] | None = None
        measure_again = weakref.WeakMethod(self._measure_again)  # not a cycle: a chest goes with its last reference
        self._tier.on_second_chance = lambda entry: (found := measure_again()) and found(entry)

    # --- state

    def _usable(self) -> None:
        if self._closed:
            path = self._store.path
            raise ClosedError(f"the chest at {path} is closed: open it again with Chest(path=...)", path=path)

    def _writable(self) -> None:
        self._usable()
        if self._failed is not None:
            self._untold = False
            raise self._why_not() from self._failed

    def _why_not(self) -> ChestError:
        """The error for a chest that is not written to."""
        failed = self._failed
        assert failed is not None
        keys = ", ".join(short(key, 40) for key in islice(self._dirty, 10)) if self._store.read_only else ""
        changed = f". Changed in memory, and not on disk: {keys}{', ...' if len(self._dirty) > 10 else ''}" if keys else ""
        return type(failed)(failed.message + changed, key=next(iter(self._dirty)) if keys else None, path=failed.path)

    def _look(self) -> None:
        """Take note of what others have committed."""
        if self._generation[0] != self._seen:
            if not self._transactions:  # an interrupt may have kept the last one from saying that it is over
                self._generation = self._store.index.generation
            self._moved_to(-1, self._store.index.version())

    def _moved_to(self, before: int, version: int) -> None:
        """The index has moved on; if it was not this chest that moved it all the way, entries must be checked again."""
        if before != self._seen and version != self._seen:
            self._epoch += 1
            self._next_seq = max(self._next_seq, self._first_free())
            self._unsure = dict(self._dirty)
            self._n_new = 0
        self._seen = version

    def _first_free(self) -> int:
        """The first place in the order that is behind all others."""
        last = self._store.index.last_seq()
        if last >= LAST_PLACE:
            path = self._store.path
            raise CorruptError(
                f"the index of the chest at {path} is damaged: its order ends nowhere. Run check on it.", path=path
            )
        return last + 1

    def _new_place(self) -> int:
        """The place of a new key in the order: behind all known ones, and by the clock, which processes share.

        The last 12 bits are the chest's own, so that hardly ever two chests take the same place in the same microsecond.
        """
        place = (time.time_ns() // 1000) << 12 | self._salt
        if place < self._next_seq:
            place = ((self._next_seq >> 12) + 1) << 12 | self._salt
        self._next_seq = place + 1
        return place

    def _take_commits(self) -> int:
        """Take note of one's own commits. The version from which on nobody else has committed in between."""
        since = 0
        commits, self._store.commits = self._store.commits, []
        self._n_commits += len(commits)
        if not self._transactions:
            self._generation = self._store.index.generation  # a folder of chest 0.2 gets its index with the first commit
        for before, version in commits:
            if before != self._seen:
                since = version
            self._moved_to(before, version)
        return since

    # --- leaving memory

    def _measure_again(self, entry: Entry) -> None:
        """A value that was in use may have grown."""
        if entry.baseline is not None or entry.dirty:
            size = size_of(entry.value, entry.baseline)
            if size != entry.size:
                self._tier.resize(entry, size)

    def _find_change(self, entry: Entry) -> bool:
        """Mark a clean entry dirty if its value was changed in place."""
        if entry.dirty:
            return True
        if entry.baseline is None or not (entry.hot or entry.lent):
            return False
        if self._found:
            self._catch_up(entry)
        if not self._store.changed(entry.key, entry.value, entry.version, entry.baseline):
            return False
        self._tier.mark(entry, dirty=True)
        self._dirty[entry.key] = entry
        return True

    def _catch_up(self, entry: Entry) -> None:
        """A change in place that a transaction began with, and that it has committed, or something made of it, is no change.

        It says so itself when it is merged. But others may look before that, and an interrupt may prevent it.
        """
        found = self._found.get(entry.key)
        if found is None or found[0] is not entry or self._store.index.version() < found[2]:
            return
        _, baseline, version, touched = found
        entry.baseline = baseline
        if entry.key not in touched:
            entry.version = version
        self._found.pop(entry.key, None)

    def _shrink(self, needed: int = 0, spare: Entry | None = None) -> ChestError | None:
        """Make room for ``needed`` bytes. Errors are returned: the caller has something to finish first."""
        tier = self._tier
        if self._lent:
            self._poll()
        target = tier.limit - needed - (sum(self._pinned.values()) if self._pinned else 0)
        if tier.usage <= target:
            return None
        victims = tier.victims(max(0, target - min(tier.limit // 4, SLACK_BYTES)), spare, max(0, target))
        if self._transactions:
            return self._evict(self._not_in_question(victims))
        return self._evict(victims, COMMIT_BYTES, spare)

    def _not_in_question(self, victims: list[Entry]) -> list[Entry]:
        """Those that can leave while another thread's transaction is open.

        What was changed in place before it began belongs to what the transaction finds. Written now, it would be committed
        after the transaction, over what that one made of it.
        """
        sure = []
        for entry in victims:
            if not entry.dirty and entry.baseline is not None and (entry.hot or entry.lent):
                self._tier.keep(entry)
            else:
                sure.append(entry)
        return sure

    def _evict(self, victims: list[Entry], room: int = 0, spare: Entry | None = None) -> ChestError | None:
        """Let entries leave memory, the changed ones by way of the store. What cannot be written stays.

        If something is written, so are other small values that will have to be soon, up to ``room`` bytes of both. They stay,
        but are clean. A commit costs a sync and a copy of every page that it touches: the more share it, the less each pays.
        Not so ``spare``, which is being replaced.
        """
        others = self._let_go(victims)
        unwritten = [entry for entry in others if entry.dirty or self._has_changed(entry)]
        error = None
        failed: dict[Any, ChestError] = {}
        if unwritten:
            if self._on_overflow is not None:
                for entry in unwritten:
                    self._on_overflow(entry.key)
                unwritten = [entry for entry in unwritten if entry.alive]  # it may have deleted or replaced some
            room -= sum([entry.size for entry in unwritten])
            along = self._tier.queued(self._dirty, SMALL, room) if room > 0 else []
            if spare is not None and spare.dirty:
                along = [entry for entry in along if entry is not spare]
            error = self._write(unwritten + along, failed, durable=False)
            for entry in along:
                if entry.dirty and entry.key in failed:
                    self._tier.keep(entry)
        for entry in self._let_go(others):
            if entry.dirty:
                if entry.key in failed:  # the others come first next time
                    self._tier.keep(entry)
            elif entry.alive:
                self._leave(entry)
        for reason in failed.values():
            _log.warning("chest at %s: %s", self._store.path, str(reason))
        return error

    def _let_go(self, batch: list[Entry]) -> list[Entry]:
        """What cannot have changed has left memory; the others are returned."""
        others = self._tier.let_go(batch)
        self._spills += len(batch) - len(others)
        return others

    def _forget(self, entry: Entry) -> None:
        self._tier.remove(entry.key)
        self._lent.pop(entry.key, None)
        self._pinned.pop(entry.key, None)

    def _has_changed(self, entry: Entry) -> bool:
        """As `_find_change`, when a value is about to leave: if nobody holds it, and it has not, it is not lent any more."""
        entry.lent = entry.lent or entry.hot
        entry.hot = False  # who is handed it from here on will show
        held = who_holds(entry)
        if self._find_change(entry):
            return True
        entry.lent = held != _changes.Held.NO
        return False

    def _leave(self, entry: Entry) -> None:
        """A clean value leaves memory. If it was handed out, and may have changed since, it is watched."""
        self._tier.remove(entry.key)
        self._spills += 1
        if entry.baseline is not None and (entry.hot or entry.lent):
            entry.lent = True
            # Who held it a moment ago may have let go after changing it: the next look tells.
            self._watch(entry, who_holds(entry) or _changes.Held.VALUE)

    def _watch(self, entry: Entry, held: int) -> bool:
        """Keep a value that somebody holds: all of it, or a part of it as long as there is room for such."""
        if held == _changes.Held.INNER:
            size = entry.size or nbytes(entry.value)
            room = max(PINNED_BYTES, self._tier.limit // 4) - sum(self._pinned.values())
            if self._pinned.get(entry.key, size) > room + self._pinned.get(entry.key, 0):
                return False
            self._pinned[entry.key] = size
        else:
            self._pinned.pop(entry.key, None)
        self._lent[entry.key] = entry
        return True

    def _poll(self, everything: bool = False) -> ChestError | None:
        """Look at lent values: those that were let go are written if they have changed, and leave memory."""
        lent = self._lent
        if self._transactions:  # see `_not_in_question`
            return None
        changed: list[Entry] = []
        for _ in range(len(lent) if everything else min(len(lent), POLLED)):
            key, entry = lent.popitem(last=False)
            held = who_holds(entry)
            if held and self._watch(entry, held):
                continue
            self._pinned.pop(key, None)
            if key not in self._entries and self._find_change(entry):
                changed.append(entry)
        return self._take_back(changed)

    def _take_back(self, changed: list[Entry]) -> ChestError | None:
        """Values that changed while they were lent come back into the memory tier, unwritten."""
        if not changed:
            return None
        for entry in changed:
            entry.size = size_of(entry.value, entry.baseline)
            entry.hot = False
            self._tier.add(entry)
        if self._tier.usage <= self._tier.limit and not self._write_through:
            return None
        return self._evict(changed)

    def _write(
        self, entries: Iterable[Entry], failed: dict[Any, ChestError] | None = None, *, durable: bool = True
    ) -> ChestError | None:
        """Write entries and all deletions. The error, if nothing more can be written; ``failed`` takes what was refused."""
        if self._failed is not None:
            return self._why_not() if self._store.read_only else self._failed
        unwritten = list(entries)
        tombs = self._tombs
        written = self._store.write(unwritten, [(key, name) for key, name in tombs.items()], durable=durable)
        since = self._take_commits()
        if tombs and (written.error is None or written.commits):
            tombs.clear()
        elif tombs:  # on a full disk some of them may have been committed all the same
            are_stored = self._store.has_each(list(tombs.values()))
            for key in [key for key, stored in zip(tombs, are_stored, strict=True) if not stored]:
                del tombs[key]
        dirty, unsure, mark = self._dirty, self._unsure, self._tier.mark
        for version, done, baselines in written.commits:
            # What is written may have been overwritten already, before the files had their names.
            epoch = self._epoch if version >= since else self._epoch - 1
            n_new, stuck = settle_rows(done, baselines, dirty, unsure, version, epoch)
            self._n_new -= n_new
            for entry in stuck:
                mark(entry, False)
            self._writes += len(done)
        if failed is not None:
            failed.update(written.failed)
        if written.error is not None:
            self._remember(written.error)
        return written.error

    def _check(self, written: Written) -> None:
        """Raises why not all of it was written. A disk that has failed is remembered."""
        for error in [written.error, *written.failed.values()]:
            if error is not None:
                self._remember(error)
                raise error

    def _remember(self, error: BaseException) -> None:
        """A disk that has failed takes nothing more. Not the error itself, whose traceback would keep values alive."""
        if isinstance(error, FailedError):
            self._failed = FailedError(error.message, path=error.path)

    def _write_through_now(self, key: Any) -> None:
        """What has just happened to a key is committed."""
        entry = self._dirty.get(key)
        if entry is not None or self._tombs:
            self._write_now([] if entry is None else [entry])

    def _write_now(self, unwritten: list[Entry] | None = None) -> None:
        """What is unwritten (all of it) is committed, and durable. Raises why something is not; it stays in memory."""
        unwritten = list(self._dirty.values()) if unwritten is None else unwritten
        if not unwritten and not self._tombs:
            self._sync_index()
            return
        self._writable()
        self._tier.retry()
        failed: dict[Any, ChestError] = {}
        error = self._write(unwritten, failed)
        if error is not None:
            raise error
        if failed:
            raise _summary(failed, self._store.path)

    def _sync_index(self) -> None:
        """What was spilled survives a power cut, too."""
        if self._failed is None:
            try:
                self._store.index.sync()
            except FailedError as error:
                self._remember(error)
                raise

    def _sync(self, *, leaving: bool = False) -> None:
        """Write everything, before it leaves memory perhaps. Raises what could not be written; all else is written."""
        has_changed = self._has_changed if leaving else self._find_change
        self._writable() if not self._store.read_only else self._usable()
        for entry in list(self._lent.values()):
            if self._find_change(entry):
                self._forget(entry)
                entry.size = entry.size or nbytes(entry.value)
                self._tier.add(entry)
        for entry in list(self._entries.values()):
            if not entry.dirty and has_changed(entry):
                self._measure_again(entry)
        self._write_now()

    def _empty(self) -> None:
        """Let everything leave memory that is written."""
        for entry in self._let_go(list(self._entries.values())):
            if not entry.dirty and entry.alive:
                self._leave(entry)
        self._poll(everything=True)


def size_of(value: Any, baseline: Baseline) -> int:
    """Bytes that a value takes in memory, with what it is compared with."""
    return nbytes(value) + baseline_bytes(baseline)


def _summary(failed: dict[Any, ChestError], path: str) -> ChestError:
    """One error for all values that could not be written."""
    first = next(iter(failed.values()))
    if len(failed) == 1:
        return first
    keys = ", ".join(short(key, 40) for key in list(failed)[:10])
    more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
    kind = SerializeError if all(isinstance(e, SerializeError) for e in failed.values()) else WriteError
    error = kind(
        f"{len(failed)} values could not be written ({keys}{more}); they stay in memory. The first: {first}",
        key=next(iter(failed)),
        path=path,
    )
    error.__cause__ = first
    return error
