"""The dictionary: all that ``dict`` can do, on what ``_keeper`` keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, ItemsView, Iterable, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from typing import Any, Generic, TypeVar, cast, overload

from . import _views
from ._keeper import Keeper
from ._records import Adopted

__all__ = ["Dictionary"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Self = TypeVar("Self", bound="Dictionary[Any, Any]")

_MISSING: Any = object()


class Dictionary(Keeper, MutableMapping[K, V], Generic[K, V]):
    """A mutable mapping with everything a user of ``dict`` types."""

    def __getitem__(self, key: K) -> V:
        entry = self._entries.get(key)
        if entry is not None:
            if self._generation[0] == self._seen and entry.epoch == self._epoch:
                entry.hot = True
                self._hits += 1
                value: V = entry.value
                return value
            value = self._hit_after_change(key, entry)
            return value
        value = self._miss(key)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        with self.lock:
            self._set(key, value)

    def __delitem__(self, key: K) -> None:
        with self.lock:
            self._delete(key)

    def __contains__(self, key: object) -> bool:
        with self.lock:
            self._usable()
            if self._in_memory(key) is not None:
                return True
            if key in self._tombs:
                return False
            name = self._store.name(key)
            return name is not None and self._store.has(name)

    def __len__(self) -> int:
        """The number of keys. O(1), plus a look at each key set since the last time."""
        with self.lock:
            return self._length()

    def __iter__(self) -> Iterator[K]:
        """Keys in insertion order, a thousand at a time; others may write meanwhile."""
        return (key for key, _ in _views.walk(self))

    def __reversed__(self) -> Iterator[K]:
        return (key for key, _ in _views.walk(self, reverse=True))

    def keys(self) -> KeysView[K]:
        return _views.Keys(self)

    def items(self) -> ItemsView[K, V]:
        return _views.Items(self)

    def values(self) -> ValuesView[V]:
        return _views.Values(self)

    def __eq__(self, other: object) -> bool:
        """Equal to any mapping with the same keys and values, in whatever order."""
        if self is other:
            return True
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        for key, value in self.items():
            try:
                theirs = other._peek(key) if isinstance(other, Dictionary) else other[key]
            except KeyError:
                return False
            if not (theirs is value or theirs == value):
                return False
        return True

    __hash__ = None  # type: ignore[assignment]

    def pop(self, key: K, default: Any = _MISSING) -> Any:
        """Remove a key and return its value, or the default where there is none."""
        with self.lock:
            try:
                value = self._peek(key)
            except KeyError:
                if default is _MISSING:
                    raise
                return default
            self._delete(key)
            return value

    def popitem(self) -> tuple[K, V]:
        """Remove the key that was inserted last, and return it with its value."""
        with self.lock:
            self._usable()
            for key in self._from_the_end():
                return key, self.pop(key)
        raise KeyError("popitem(): the chest is empty")

    def setdefault(self, key: K, default: Any = None) -> Any:
        with self.lock:
            try:
                return self[key]
            except KeyError:
                self._set(key, default)
                return default

    def clear(self) -> None:
        """Remove every key; written at once."""
        with self.lock:
            self._writable()
            for place in (self._dirty, self._unsure, self._tombs, self._lent, self._pinned):
                place.clear()
            self._tier.clear()
            self._n_new = 0
            while items := self._store.index.page(None, 10_000):
                written = self._store.write([], [(self._store.key(item), item.name) for item in items])
                self._take_commits()
                if written.error is not None:
                    raise written.error

    @overload
    def update(self, *args: Any, overwrite: bool = ...) -> None: ...
    @overload
    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set the keys of a mapping, of an object with ``keys()``, of pairs, or of another chest, and keyword arguments.

        From a chest with the same serializer whose folder lies on the same file system, large values are hard-linked, not
        copied. ``overwrite=False`` (the second argument, or by name) leaves the keys alone that are there already.
        """
        if len(args) > 2:
            raise TypeError(f"update expected at most 2 arguments, got {len(args)}")
        overwrite = args[1] if len(args) == 2 else kwargs.pop("overwrite", True)
        other = args[0] if args else ()
        if isinstance(other, Dictionary) and other is not self and self._links(other):
            self._adopt(other, overwrite)
        elif other is not self:
            if isinstance(other, Mapping):
                pairs: Iterable[tuple[Any, Any]] = other.items()
            elif hasattr(other, "keys"):
                pairs = ((key, other[key]) for key in other.keys())  # noqa: SIM118 - it need not be a mapping
            else:
                pairs = other
            for key, value in pairs:
                if overwrite or key not in self:
                    self[key] = value
        for name, value in kwargs.items():
            if overwrite or name not in self:
                self[cast(K, name)] = value

    def copy(self: Self) -> Self:
        """A scratch chest with the same content and settings; large values are hard-linked where that is possible."""
        twin = self._twin()
        twin.update(self)
        return twin

    @abstractmethod
    def _twin(self: Self) -> Self:
        """An empty scratch chest with the same settings."""

    __copy__ = copy

    @classmethod
    def fromkeys(cls: type[Self], keys: Iterable[Any], value: Any = None) -> Self:
        """A scratch chest with these keys, each with the same value."""
        chest = cls()  # type: ignore[call-arg]  # the constructor is Chest's
        for key in keys:
            chest[key] = value
        return chest

    def __or__(self: Self, other: Any) -> Self:
        if not isinstance(other, Mapping):
            return NotImplemented
        both = self.copy()
        both.update(other)
        return both

    def __ror__(self: Self, other: Any) -> Self:
        if not isinstance(other, Mapping):
            return NotImplemented
        both = self._twin()
        both.update(other)
        both.update(self)
        return both

    def __ior__(self: Self, other: Any) -> Self:
        self.update(other)
        return self

    # --- another chest

    def _links(self, other: Dictionary[Any, Any]) -> bool:
        """Whether records of the other chest can be taken as they are."""
        mine, theirs = self._store, other._store
        return mine.plain and theirs.plain and (mine.codec.name, mine.codec.text) == (theirs.codec.name, theirs.codec.text)

    def _adopt(self, other: Dictionary[Any, Any], overwrite: bool) -> None:
        with other.lock:
            other._sync()
        after = None
        while page := other._store.index.page(after, _views.BATCH):
            after = page[-1].seq
            with self.lock:
                self._writable()
                self._sync()
                items = []
                records = other._store.index.get_many([item.name for item in page])[1]
                for item, record in zip(page, records, strict=True):
                    key = other._store.key(item)
                    if record is None or (not overwrite and key in self):
                        continue
                    entry = self._in_memory(key)
                    if entry is not None:
                        self._forget(entry)
                    items.append(Adopted(key, self._next_seq, record, other._store.path_of(record)))
                    self._next_seq += 1
                written = self._store.adopt(items)
                self._take_commits()
                for error in [written.error, *written.failed.values()]:
                    if error is not None:
                        raise error
