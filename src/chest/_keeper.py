"""What is in memory, what is unwritten, what is lent: the order of work between the memory tier and the store.

A value is in one of these places:

    entries   the memory tier: counted against ``available_memory``; dirty (unwritten) or clean
    lent      it has left the memory tier and is written, but somebody still holds it and may change it in place:
              watched, and looked at once more when it has been let go
    store     written, and nowhere in memory

``dirty`` lists the unwritten entries in the order of their first set, ``tombs`` the unwritten deletions of stored keys.
Everything here runs under ``lock``, but for hits: ``Chest.__getitem__`` reads ``entries`` and sets ``entry.hot`` without it.
CPython switches threads only at calls and backward jumps, and a hit has none between the look-up and the return: a value
that was handed out is either on somebody's stack, where ``held`` sees it, or its entry is marked hot.

Others' commits are noticed by the *generation* (a mapped integer). ``seen`` is the version that the entries of the current
``epoch`` were checked against; when somebody else has committed, a new epoch begins and each entry is checked again when it
is next used.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from . import _changes
from ._memory import Entry, MemoryTier
from ._sizing import nbytes
from ._store import Item, Loaded, Store
from .errors import ChestError, ClosedError, FailedError, SerializeError, WriteError, short

__all__ = ["Keeper"]

_log = logging.getLogger("chest")

SLACK_BYTES = 4 << 20  # an eviction goes on this far below the limit (or a tenth of it), so that it pays for its commit
PINNED_BYTES = 4 << 20  # of values that are held by a part of them only, this much is watched (or a quarter of the limit)
POLLED = 8  # lent values looked at in one go
MAX_TOMBS = 10_000  # unwritten deletions
FEW = 30  # what may be passed over, unwritten, at the end of the order


class Keeper:
    """The inner half of a chest; see the module's head. ``Chest`` is its public face."""

    def __init__(self, store: Store, limit: int) -> None:
        self.lock = threading.RLock()
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
        self._next_seq = store.index.last_seq() + 1
        self._closed = False
        self._failed: FailedError | None = None
        self._hits = self._misses = self._spills = self._writes = 0
        self._on_miss: Callable[[Any], Any] | None = None
        self._on_overflow: Callable[[Any], Any] | None = None
        measure_again = weakref.WeakMethod(self._measure_again)  # not a cycle: a chest goes with its last reference
        self._tier.on_second_chance = lambda entry: (found := measure_again()) and found(entry)

    # --- state

    def _usable(self) -> None:
        if self._closed:
            raise ClosedError(f"the chest at {self._store.path} is closed: open it again with Chest(path=...)")

    def _writable(self) -> None:
        self._usable()
        if self._failed is not None:
            raise FailedError(self._failed.message, path=self._failed.path) from self._failed

    def _look(self) -> None:
        """Take note of what others have committed."""
        if self._generation[0] != self._seen:
            self._moved_to(-1, self._store.index.version())

    def _moved_to(self, before: int, version: int) -> None:
        """The index has moved on; if it was not this chest that moved it all the way, entries must be checked again."""
        if before != self._seen and version != self._seen:
            self._epoch += 1
            self._next_seq = max(self._next_seq, self._store.index.last_seq() + 1)
            self._unsure = dict(self._dirty)
            self._n_new = 0
        self._seen = version

    def _take_commits(self) -> None:
        commits, self._store.commits = self._store.commits, []
        self._generation = self._store.index.generation  # a folder of chest 0.2 gets its index with the first commit
        for before, version in commits:
            self._moved_to(before, version)

    # --- reading

    def _hit_after_change(self, key: Any, entry: Entry) -> Any:
        """A hit while, or after, somebody else commits: the value, if it is still the newest one."""
        with self.lock:
            self._look()
            if entry.epoch == self._epoch or self._is_current(entry):
                entry.hot = True
                self._hits += 1
                return entry.value
            self._forget(entry)
            return self._miss(key)

    def _is_current(self, entry: Entry) -> bool:
        """Whether what is in memory is still what counts: own unwritten changes do until they are written."""
        if entry.epoch == self._epoch:
            return True
        if not entry.dirty:
            name = self._store.name(entry.key)
            record = None if name is None else self._store.index.get(name)
            if (record is None or record.version != entry.version) and not self._find_change(entry):
                return False
        entry.epoch = self._epoch
        return True

    def _forget(self, entry: Entry) -> None:
        self._tier.remove(entry.key)
        self._lent.pop(entry.key, None)
        self._pinned.pop(entry.key, None)

    def _in_memory(self, key: Any) -> Entry | None:
        """The valid entry of a key, in the memory tier or lent."""
        self._look()
        entry = self._entries.get(key)
        if entry is None:
            entry = self._lent.get(key)
        if entry is not None and not self._is_current(entry):
            self._forget(entry)
            return None
        return entry

    def _miss(self, key: Any) -> Any:
        """The value of a key that a hit did not find."""
        with self.lock:
            self._usable()
            entry = self._in_memory(key)
            if entry is not None:
                entry.lent = True
                self._hits += 1
                return entry.value
            loaded = self._load(key)
            if loaded is None:
                missing = getattr(type(self), "__missing__", None)
                if missing is None:
                    raise KeyError(key)
                return missing(self, key)
            self._misses += 1
            if self._on_miss is not None:
                self._on_miss(key)
            self._admit(key, loaded, lent=True)
            return loaded.value

    def _load(self, key: Hashable) -> Loaded | None:
        if key in self._tombs:
            return None
        name = self._store.name(key)
        return None if name is None else self._store.load(key, name)

    def _admit(self, key: Any, loaded: Loaded, *, lent: bool) -> None:
        """A value from the store comes into the memory tier, and others leave for it."""
        entry = self._entry_of(key, loaded, nbytes(loaded.value))
        entry.lent = lent
        if self._tier.admits(entry.size):
            error = self._shrink(entry.size)
            if error is not None:
                _log.warning("chest at %s: %s", self._store.path, error)
            self._tier.add(entry)
        elif lent and loaded.baseline is not None:
            self._poll()
            self._lent[key] = entry

    def _entry_of(self, key: Any, loaded: Loaded, size: int) -> Entry:
        record = loaded.record
        entry = Entry(key, loaded.value, size, seq=record.seq, epoch=self._epoch, baseline=loaded.baseline, stored=True)
        entry.version = record.version
        return entry

    def _peek(self, key: Any) -> Any:
        """The value of a key, with the memory tier left as it is. Raises KeyError."""
        with self.lock:
            self._usable()
            entry = self._in_memory(key)
            if entry is not None:
                entry.lent = True
                return entry.value
            loaded = self._load(key)
            if loaded is None:
                raise KeyError(key)
            return self._lend(key, loaded)

    def _lend(self, key: Any, loaded: Loaded) -> Any:
        """Hand out a value that is not in the memory tier, and watch it if it can be changed."""
        self._poll()
        if loaded.baseline is not None:
            entry = self._lent[key] = self._entry_of(key, loaded, 0)
            entry.lent = True
        return loaded.value

    # --- writing

    def _set(self, key: Any, value: Any) -> None:
        self._writable()
        old = self._entries.get(key)
        if old is None:
            old = self._lent.pop(key, None)
            if self._pinned:
                self._pinned.pop(key, None)
        kind = type(key)
        if kind is not str and kind is not int:
            self._store.name(key, create=True)  # a key that cannot be written is refused now
        entry = Entry(key if old is None else old.key, value, nbytes(value), dirty=True, epoch=self._epoch)
        if old is not None:
            entry.seq, entry.stored, entry.fresh = old.seq, old.stored, old.fresh
        else:
            entry.seq = self._next_seq
            self._next_seq += 1
            if key in self._tombs:
                del self._tombs[key]
                entry.stored = entry.fresh = True
        error = self._shrink(entry.size - (0 if old is None else old.size))
        if entry.stored is None or entry.key in self._unsure:
            self._unsure[entry.key] = entry
        self._dirty[entry.key] = entry
        self._tier.add(entry)
        if error is None and not self._tier.admits(entry.size):
            error = self._evict([entry])
        if error is not None:
            raise error

    def _delete(self, key: Any) -> None:
        self._writable()
        self._look()
        entry = self._entries.get(key)
        if entry is None:
            entry = self._lent.get(key)
        if entry is not None and not entry.dirty and not self._is_current(entry):
            self._forget(entry)
            entry = None
        name = self._store.name(key)
        if entry is None:
            if key in self._tombs or name is None or self._store.index.get(name) is None:
                raise KeyError(key)
            stored = True
        else:
            if entry.stored is None or key in self._unsure:
                self._unsure.pop(key, None)
                stored = name is not None and self._store.index.get(name) is not None
            else:
                stored = bool(entry.stored)
                if entry.dirty and not stored:
                    self._n_new -= 1
            self._forget(entry)
            self._dirty.pop(key, None)
        if stored:
            assert name is not None
            self._tombs[key] = name
            if len(self._tombs) >= MAX_TOMBS:
                error = self._write([])
                if error is not None:
                    raise error

    def _resolve(self) -> None:
        """Find out which dirty entries are stored: ``len`` and the order need it, setting does not."""
        self._look()
        if not self._unsure:
            return
        unsure, self._unsure = self._unsure, {}
        index = self._store.index
        if not len(index):
            for entry in unsure.values():
                entry.stored = False
            self._n_new += len(unsure)
            return
        for entry, record in zip(unsure.values(), index.get_many(self._names(unsure))[1], strict=True):
            entry.stored = record is not None
            self._n_new += record is None

    def _names(self, keys: Iterable[Any]) -> list[bytes]:
        names = [self._store.name(key, create=True) for key in keys]
        return [name for name in names if name is not None]

    def _length(self) -> int:
        self._usable()
        self._resolve()
        gone = len(self._tombs)
        if gone and self._epoch:  # somebody else may have deleted them too
            names = list(self._tombs.values())
            gone = sum(record is not None for record in self._store.index.get_many(names)[1])
        return len(self._store.index) + self._n_new - gone

    def _own_new(self, reverse: bool) -> list[Entry]:
        """Entries that the order of the index does not show, or not in their place, in insertion order."""
        self._resolve()
        own = [e for e in self._dirty.values() if not e.stored or e.fresh]
        own.sort(key=lambda e: e.seq, reverse=reverse)
        return own

    def _from_the_end(self) -> Iterator[Any]:
        """The last key, for ``popitem``: as ``reversed``, but quick to begin with, and however often it is called."""
        self._resolve()
        if len(self._tombs) > FEW:  # they would have to be passed over each time
            self._write([])
        own = None
        for passed, entry in enumerate(reversed(self._dirty.values())):
            if not entry.stored or entry.fresh:
                own = entry
                break
            if passed > FEW:
                self._sync()
                break
        after = None
        while items := self._store.index.page(after, FEW, reverse=True):
            for item in items:
                if own is not None and own.seq > item.seq:
                    yield own.key
                key = self._store.key(item)
                if not self._hidden(key):
                    yield key
            after = items[-1].seq
        if own is not None:
            yield own.key

    def _hidden(self, key: Any) -> bool:
        """Whether a key that the index shows at this place is deleted or has moved, unwritten."""
        if key in self._tombs:
            return True
        entry = self._dirty.get(key)
        return entry is not None and entry.fresh

    # --- leaving memory

    def _measure_again(self, entry: Entry) -> None:
        """A value that was in use may have grown."""
        if entry.baseline is not None or entry.dirty:
            size = nbytes(entry.value)
            if size != entry.size:
                self._tier.resize(entry, size)

    def _find_change(self, entry: Entry) -> bool:
        """Mark a clean entry dirty if its value was changed in place."""
        if entry.dirty:
            return True
        if entry.baseline is None or not (entry.hot or entry.lent):
            return False
        if not self._store.changed(entry.key, entry.value, entry.version, entry.baseline):
            return False
        self._tier.mark(entry, dirty=True)
        self._dirty[entry.key] = entry
        return True

    def _shrink(self, needed: int = 0) -> ChestError | None:
        """Make room for ``needed`` bytes. Errors are returned: the caller has something to finish first."""
        tier = self._tier
        if self._lent:
            self._poll()
        target = tier.limit - needed - (sum(self._pinned.values()) if self._pinned else 0)
        if tier.usage <= target:
            return None
        return self._evict(list(tier.victims(max(0, target - min(tier.limit // 10, SLACK_BYTES)))))

    def _evict(self, victims: list[Entry]) -> ChestError | None:
        """Let entries leave memory, the changed ones by way of the store. What cannot be written stays."""
        unwritten = [entry for entry in victims if self._find_change(entry)]
        error = None
        failed: dict[Any, ChestError] = {}
        if unwritten:
            if self._on_overflow is not None:
                for entry in unwritten:
                    self._on_overflow(entry.key)
            error = self._write(unwritten, failed)
        for entry in victims:
            if entry.dirty:
                if entry.key in failed:  # the others come first next time
                    self._tier.keep(entry)
            elif self._entries.get(entry.key) is entry:
                self._leave(entry)
        for reason in failed.values():
            _log.warning("chest at %s: %s", self._store.path, reason)
        return error

    def _leave(self, entry: Entry) -> None:
        self._tier.remove(entry.key)
        self._spills += 1
        if entry.baseline is not None:
            held = _changes.held(entry.value)
            if held:
                entry.lent = True
                self._watch(entry, held)

    def _watch(self, entry: Entry, held: _changes.Held) -> bool:
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
        changed: list[Entry] = []
        for _ in range(len(lent) if everything else min(len(lent), POLLED)):
            key, entry = lent.popitem(last=False)
            held = _changes.held(entry.value)
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
            entry.size = nbytes(entry.value)
            entry.hot = False
            self._tier.add(entry)
        if self._tier.usage <= self._tier.limit:
            return None
        return self._evict(changed)

    def _write(self, entries: Iterable[Entry], failed: dict[Any, ChestError] | None = None) -> ChestError | None:
        """Write entries and all deletions. The error, if nothing more can be written; ``failed`` takes what was refused."""
        if self._failed is not None:
            return self._failed
        unwritten = list(entries)
        tombs = self._tombs
        items = [Item(e.key, e.value, e.size, e.seq, e.fresh) for e in unwritten]
        written = self._store.write(items, [(key, name) for key, name in tombs.items()])
        del items
        self._take_commits()
        if written.error is None or written.done:
            tombs.clear()
        for entry in unwritten:
            result = written.done.get(entry.key)
            if result is not None:
                self._is_written(entry, *result)
        if failed is not None:
            failed.update(written.failed)
        if isinstance(written.error, FailedError):
            self._failed = written.error
        return written.error

    def _is_written(self, entry: Entry, version: int, baseline: Any) -> None:
        self._writes += 1
        if self._unsure.pop(entry.key, None) is None and not entry.stored:
            self._n_new -= 1
        self._dirty.pop(entry.key, None)
        entry.version, entry.baseline, entry.epoch = version, baseline, self._epoch
        entry.stored, entry.fresh = True, False
        self._tier.mark(entry, dirty=False)

    def _sync(self) -> None:
        """Write everything. Raises what could not be written; all else is written all the same."""
        self._writable()
        for entry in list(self._lent.values()):
            if self._find_change(entry):
                self._forget(entry)
                entry.size = entry.size or nbytes(entry.value)
                self._tier.add(entry)
        for entry in list(self._entries.values()):
            if not entry.dirty and (entry.hot or entry.lent) and entry.baseline is not None:
                if self._find_change(entry):
                    self._measure_again(entry)
        failed: dict[Any, ChestError] = {}
        unwritten = list(self._dirty.values())
        error = self._write(unwritten, failed) if unwritten or self._tombs else None
        for entry in unwritten:  # whoever set it, or got it, may still hold it
            if not entry.dirty and entry.baseline is not None:
                entry.lent = bool(_changes.held(entry.value))
        if error is not None:
            raise error
        if failed:
            raise _summary(failed, self._store.path)

    def _empty(self) -> None:
        """Let everything leave memory that is written."""
        for entry in list(self._entries.values()):
            if not entry.dirty:
                self._leave(entry)
        self._poll(everything=True)


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
