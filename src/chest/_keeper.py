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
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from ._hot import Entry
from ._keys import name_of
from ._records import Loaded
from ._sizing import nbytes
from ._spilling import Spiller, size_of
from .errors import CorruptError

__all__ = ["Keeper"]

_log = logging.getLogger("chest")

MAX_TOMBS = 10_000  # unwritten deletions
FEW = 30  # what may be passed over, unwritten, at the end of the order


class Keeper(Spiller):
    """The inner half of a chest; see the module's head. ``Chest`` is its public face."""

    def _take_all_changes(self) -> None:
        """Everything in this keeper's reach that was changed in place can be read from the store."""

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
            if self._found:
                self._catch_up(entry)
            name = self._store.name(entry.key)
            record = None if name is None else self._store.index.get(name)
            if (record is None or record.version != entry.version) and not self._find_change(entry):
                return False
        entry.epoch = self._epoch
        return True

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
            if self._closed:
                self._usable()
            if self._generation[0] != self._seen:
                self._look()
            if key in self._entries or key in self._lent:
                entry = self._in_memory(key)
                if entry is not None:
                    entry.lent = True
                    self._hits += 1
                    return entry.value
            loaded = self._load(key)
            if loaded is None:
                return self._absent(key)
            self._misses += 1
            self._admit(key, loaded, lent=True)
            if self._on_miss is not None:  # now that it is in: what is set by it must not be replaced by what was read
                self._on_miss(key)
            return loaded.value

    def _absent(self, key: Any) -> Any:
        """What there is instead of a key that is not there."""
        missing = getattr(type(self), "__missing__", None)
        if missing is None:
            raise KeyError(key)
        return missing(self, key)

    def _load(self, key: Hashable) -> Loaded | None:
        if key in self._tombs:
            return None
        name = name_of(key) or self._store.name(key)
        return None if name is None else self._store.load(key, name)

    def _load_each(self, keys: Sequence[Any]) -> Iterator[tuple[Any, Loaded | None, int]]:
        """What is stored of each of these keys, which are not in memory, and the epoch in which it was read: in one go."""
        store, epoch = self._store, self._epoch
        names = {key: store.name(key) for key in keys if key not in self._tombs}
        wanted = [name for name in names.values() if name is not None]
        try:
            records = dict(zip(wanted, store.index.get_many(wanted)[1], strict=True)) if wanted else {}
        except CorruptError:  # one of them: which one, it says itself
            for key in keys:
                yield key, self._load(key), epoch
            return
        for key in keys:
            name = names.get(key)
            record = None if name is None else records.get(name)
            loaded = None if name is None or record is None else store.decode_for(key, name, record)
            yield key, loaded, epoch
            del loaded

    def _bring(self, keys: Sequence[Any], *, lent: bool) -> dict[Any, Any]:
        """Values of these keys, which are in memory now as far as they fit; those that are not there are left out."""
        with self.lock:
            self._usable()
            found: dict[Any, Any] = {}
            missing: list[Any] = []
            for key in keys:
                entry = self._in_memory(key)
                if entry is None:
                    missing.append(key)
                elif lent:
                    entry.hot = entry.lent = True
                    self._hits += 1
                found[key] = entry.value if lent and entry is not None else None
            missing = list(dict.fromkeys(missing))
            for key, loaded, epoch in self._load_each(missing):
                if loaded is None:
                    del found[key]
                    continue
                self._misses += 1
                self._admit(key, loaded, lent=lent, epoch=epoch)
                if not lent:
                    self._store.read_ahead(loaded)
                found[key] = loaded.value if lent else None
            if lent and self._on_miss is not None:
                for key in missing:  # now that all are in: it may set those that would have come after
                    if key in found:
                        self._on_miss(key)
            return found

    def _admit(self, key: Any, loaded: Loaded, *, lent: bool, epoch: int | None = None) -> None:
        """A value from the store comes into the memory tier, and others leave for it."""
        tier, epoch = self._tier, self._epoch if epoch is None else epoch
        size = size_of(loaded.value, loaded.baseline)
        if size <= tier.limit:
            if self._lent or tier.usage + size > tier.limit:
                self._make_room(size)  # as in `_lend`
            entry = self._entry_of(key, loaded, size, epoch, lent)
            tier.add(entry)
            if tier.usage > tier.limit:  # the bookkeeping counts too
                self._shrink(0, entry)
        elif lent:
            self._lend(key, loaded, epoch)

    def _make_room(self, size: int) -> None:
        error = self._shrink(size)
        if error is not None:
            _log.warning("chest at %s: %s", self._store.path, str(error))  # the error itself would keep values alive

    def _entry_of(self, key: Any, loaded: Loaded, size: int, epoch: int, lent: bool) -> Entry:
        """An entry for what was read in this epoch: in the next one somebody else may have written the key."""
        value, record, baseline = loaded
        return Entry(key, value, size, False, record[1], epoch, lent, baseline, False, True, record[0])

    def _has(self, key: Any) -> bool:
        with self.lock:
            self._usable()
            if self._in_memory(key) is not None:
                return True
            if key in self._tombs:
                return False
            name = self._store.name(key)
            return name is not None and self._store.has(name)

    def _is_private(self, key: Any) -> bool:
        """Whether nobody else can know of the key yet: it is new here, and unwritten."""
        if key not in self._dirty:
            return False
        self._resolve()
        return not self._dirty[key].stored and not self._write_through

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

    def _lend(self, key: Any, loaded: Loaded, epoch: int | None = None) -> Any:
        """Hand out a value that is not in the memory tier, and watch it if it can be changed."""
        epoch = self._epoch if epoch is None else epoch
        self._poll()  # which may write, and so tell of what others have written since this was read
        if loaded.baseline is not None:
            self._lent[key] = self._entry_of(key, loaded, 0, epoch, True)
        return loaded.value

    # --- writing

    def _set(self, key: Any, value: Any) -> None:
        if self._closed or self._failed is not None:
            self._writable()
        tier, lent = self._tier, self._lent
        old = self._entries.get(key)
        if old is None and lent:
            old = lent.pop(key, None)
            self._pinned.pop(key, None)
        kind = type(key)
        if kind is not str and kind is not int:
            self._store.name(key, create=True)  # a key that cannot be written is refused now
        size = needed = nbytes(value)
        if old is not None:
            needed -= old.size
        if old is None or self._is_deleted(old):
            entry = Entry(key, value, size, True, self._new_place(), self._epoch)
            if self._tombs and self._tombs.pop(key, None) is not None:
                entry.stored = entry.fresh = True
        else:
            entry = Entry(old.key, value, size, True, old.seq, self._epoch, fresh=old.fresh, stored=old.stored)
        error = self._shrink(needed, old) if lent or tier.usage + needed > tier.limit else None
        if entry.stored is None or entry.key in self._unsure:
            self._unsure[entry.key] = entry
        self._dirty[entry.key] = entry
        tier.add(entry)
        if error is None and tier.usage > tier.limit:  # the bookkeeping counts too
            error = self._evict([entry]) if size > tier.limit else self._shrink(0, entry)
        if error is not None:
            raise error

    def _is_deleted(self, entry: Entry) -> bool:
        """Whether somebody else has deleted a key that is to be set: it comes last then."""
        if entry.dirty or (entry.epoch == self._epoch and self._generation[0] == self._seen):
            return False
        name = self._store.name(entry.key)
        return name is None or not self._store.has(name)

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
            if key in self._tombs or name is None or not self._store.has(name):
                raise KeyError(key)
            stored = True
        else:
            if entry.stored is None or key in self._unsure:
                self._unsure.pop(key, None)
                stored = name is not None and self._store.has(name)
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
                error = self._write([], durable=False)
                if error is not None:
                    raise error

    def _clear(self) -> None:
        self._writable()
        for place in (self._dirty, self._unsure, self._tombs, self._lent, self._pinned, self._found):
            place.clear()
        self._tier.clear()
        self._n_new = 0
        while items := self._store.index.page(None, 10_000):
            written = self._store.write([], [(self._store.key(item), item.name) for item in items])
            self._take_commits()
            self._check(written)

    def _resolve(self) -> None:
        """Find out which dirty entries are stored: ``len`` and the order need it, setting does not."""
        self._look()
        if not self._unsure:
            return
        unsure = self._unsure
        are_stored = self._store.has_each(self._names(unsure)) if len(self._store.index) else [False] * len(unsure)
        for entry, stored in zip(unsure.values(), are_stored, strict=True):
            entry.stored = stored
            self._n_new += not stored
        self._unsure = {}

    def _names(self, keys: Iterable[Any]) -> list[bytes]:
        names = [self._store.name(key, create=True) for key in keys]
        return [name for name in names if name is not None]

    def _length(self) -> int:
        self._usable()
        self._resolve()
        gone = len(self._tombs)
        if gone and self._epoch:  # somebody else may have deleted them too
            gone = sum(self._store.has_each(list(self._tombs.values())))
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
            self._write([], durable=False)
        own = None
        for passed, entry in enumerate(reversed(self._dirty.values())):
            if not entry.stored or entry.fresh:
                own = entry
                break
            if passed > FEW:
                self._write_now()
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
