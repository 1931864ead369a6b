"""A chest from inside of a transaction: a keeper of its own on an index that holds everybody else's commits off.

What is set, spilled and deleted in it goes to that index, and takes place when the index's transaction ends. So spilling,
order, ``len`` and changes in place need no second implementation, and undoing means to drop it. Nothing here may wait for the
chest's lock: the index's lock for writers is held, and is the later one of the two.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ._dictionary import Dictionary
from ._hot import Entry
from ._records import Adopted, Loaded, Unwritten, Written
from ._store import Store
from .abc import Index
from .errors import ChestError, ClosedError

__all__ = ["Inside"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

INSIDE_BYTES = 16 << 20  # of values that a transaction holds in memory, beside the chest's (or a quarter of its limit)


class _Blobs:
    """The chest's blobs; what is written within the transaction is known, so that it can be removed."""

    def __init__(self, blobs: Any) -> None:
        self._blobs = blobs
        self.written: list[str] = []

    def write(self, dump: Callable[[Any], Any]) -> tuple[str, int]:
        blob, size = self._blobs.write(dump)
        self.written.append(blob)
        return blob, size

    def link(self, path: str) -> str:
        blob: str = self._blobs.link(path)
        self.written.append(blob)
        return blob

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


class _StoreInside(Store):
    """The chest's store as a transaction sees it. It remembers which keys it has written or deleted."""

    def __init__(self, store: Store, index: Index) -> None:
        super().__init__(
            store.path,
            index,
            _Blobs(store.blobs),
            store.codec,
            label=store._label,
            opener=store._opener,
            # Readable copies are not part of a transaction: they would show what may never be committed.
            loose=None if store._files_only else 0,
            verify=store._verify,
            folds=store._folds,
            envelope=store._envelope,
        )
        self.touched: set[Any] = set()

    def write(self, items: Sequence[Unwritten], deletes: Iterable[tuple[Any, bytes]] = (), *, durable: bool = True) -> Written:
        deletes = list(deletes)
        self.touched.update([item.key for item in items], [key for key, _ in deletes])
        return super().write(items, deletes, durable=durable)

    def write_base(self, item: Unwritten) -> Written:
        """Write what the key held before the transaction touched it."""
        return super().write([item])

    def adopt(self, items: Sequence[Adopted]) -> Written:
        self.touched.update([item.key for item in items])
        return super().adopt(items)

    def settle(self) -> int:
        return 0  # files get and lose their names when all of it is committed


class Inside(Dictionary[K, V]):
    """A chest from inside of a transaction."""

    _store: _StoreInside

    def __init__(self, outer: Dictionary[K, V], index: Index, refused: dict[Any, ChestError]) -> None:
        self._refused = refused  # keys whose values are in the chest's memory only, because they cannot be written
        super().__init__(_StoreInside(outer._store, index), min(outer._tier.limit // 4, INSIDE_BYTES))
        self._outer = outer
        self._owner = get_ident()
        self._on_miss = outer._on_miss
        self._on_overflow = outer._on_overflow
        self._looked: set[Any] = set()  # keys of which it is known whether the chest's value was changed in place
        self._based: dict[Any, tuple[Entry, Any]] = {}  # those that were, and their baseline as they were written here
        self.doomed: BaseException | None = None

    def _usable(self) -> None:
        if self._closed:
            path = self._store.path
            raise ClosedError(f"this iterator belongs to a transaction of the chest at {path}, which is over", path=path)

    def _moved_to(self, before: int, version: int) -> None:
        pass  # nobody else commits

    def _twin(self) -> Any:
        return self._outer._twin()

    def __missing__(self, key: K) -> V:
        missing = getattr(type(self._outer), "__missing__", None)
        if missing is None:
            raise KeyError(key)
        value: V = missing(self._outer, key)
        return value

    def _load(self, key: Hashable) -> Loaded | None:
        self._take_changes(key)
        return super()._load(key)

    def _load_each(self, keys: Sequence[Any]) -> Iterator[tuple[Any, Loaded | None, int]]:
        return ((key, self._load(key), self._epoch) for key in keys)  # each may have been changed in place before

    def _has(self, key: Any) -> bool:
        return key in self._refused or super()._has(key)

    def _set(self, key: Any, value: Any) -> None:
        super()._set(key, value)
        self._refused.pop(key, None)

    def _peek(self, key: Any) -> Any:
        return self._outer._dirty[key].value if key in self._refused else super()._peek(key)

    def _delete(self, key: Any) -> None:
        if self._refused.pop(key, None) is None:
            super()._delete(key)
            return
        self._store.touched.add(key)
        if super()._has(key):  # an older value is stored
            super()._delete(key)

    def _length(self) -> int:
        self._none_refused(self._refused)
        return super()._length()

    def _own_new(self, reverse: bool) -> list[Entry]:
        self._none_refused(self._refused)
        return super()._own_new(reverse)

    def _from_the_end(self) -> Iterator[Any]:
        self._none_refused(self._refused)
        return super()._from_the_end()

    def _clear(self) -> None:
        self._none_refused(self._refused)
        super()._clear()

    def _none_refused(self, keys: Iterable[Any]) -> None:
        """The transaction would be wrong about these keys if it could not see their values."""
        for key in keys:
            if key in self._refused:
                raise self._refused[key]

    def _take_all_changes(self) -> None:
        for key in list(self._outer._entries) + list(self._outer._lent):
            self._take_changes(key)

    def _take_changes(self, key: Hashable) -> None:
        """A value that was changed in place, in the chest, before this is what the transaction finds."""
        self._none_refused([key])
        if key in self._looked:
            return
        self._looked.add(key)
        outer = self._outer
        entry = outer._entries.get(key) or outer._lent.get(key)
        if entry is None or entry.dirty or entry.baseline is None or not (entry.hot or entry.lent):
            return
        if key in self._store.touched or not self._store.changed(key, entry.value, entry.version, entry.baseline):
            return
        record = self._store.index.get(self._store.name(key) or b"")
        if record is None or record.version != entry.version:
            return  # somebody else has written the key since
        written = self._store.write_base(entry)
        self._check(written)
        _, _, (baseline,) = written.commits[0]
        self._based[key] = entry, baseline
        outer._found[key] = entry, baseline, self._seen, self._store.touched

    def finish(self) -> None:
        """All is written, so that it can be committed."""
        if self.doomed is not None:
            path = self._store.path
            raise ChestError(
                f"the transaction of the chest at {path} is undone, because a block inside of it failed: {self.doomed!r}. "
                "Catch errors outside of the outermost block.",
                path=path,
            ) from self.doomed
        self._sync()

    def unfind(self) -> None:
        """What the chest was told of changes in place is done with: nothing of it is committed, or it has been merged."""
        found = self._outer._found
        for key, (entry, _) in self._based.items():
            if key in found and found[key][0] is entry:
                found.pop(key, None)

    def end(self) -> None:
        """Let go of everything."""
        self._closed = True
        for place in (self._dirty, self._unsure, self._tombs, self._lent, self._pinned):
            place.clear()
        for key in list(self._entries):
            self._tier.remove(key)
