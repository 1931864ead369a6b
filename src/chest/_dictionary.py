"""The dictionary: all that ``dict`` can do, on what ``_keeper`` keeps."""

from __future__ import annotations

import contextlib
from _thread import get_ident
from abc import abstractmethod
from collections.abc import Hashable, ItemsView, Iterable, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

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

    def _here(self) -> Dictionary[K, V]:
        """What this thread's calls go to: this chest, or what it is inside of the transaction that the thread is in."""
        inside: Dictionary[K, V] | None = self._transaction
        return self if inside is None or inside._owner != get_ident() else inside

    @contextlib.contextmanager
    def _atomic(self) -> Iterator[Dictionary[K, V]]:
        """Within the block, what several steps are one on, for everybody."""
        with self.lock:
            yield self

    if TYPE_CHECKING:  # these are `State`'s, which take the short way where there is one, and else call those below

        def __getitem__(self, key: K) -> V: ...
        def __setitem__(self, key: K, value: V) -> None: ...
        def __delitem__(self, key: K) -> None: ...
        def __contains__(self, key: object) -> bool: ...

    def _get_slowly(self, key: Any) -> Any:
        if self._transaction is not None:
            here = self._here()
            if here is not self:
                return here[key]
        entry = self._entries.get(key)
        return self._miss(key) if entry is None else self._hit_after_change(key, entry)

    def _set_slowly(self, key: Any, value: Any) -> None:
        keeper = self if self._transaction is None else self._here()
        with keeper.lock:
            keeper._set(key, value)
            if keeper._write_through:
                keeper._write_through_now(key)

    def _delete_slowly(self, key: Any) -> None:
        keeper = self._here()
        with keeper.lock:
            keeper._delete(key)
            if keeper._write_through:
                keeper._write_through_now(key)

    def _contains_slowly(self, key: object) -> bool:
        return self._here()._has(key)

    def __len__(self) -> int:
        """The number of keys. O(1), plus a look at each key set since the last time."""
        keeper = self._here()
        with keeper.lock:
            return keeper._length()

    def __iter__(self) -> Iterator[K]:
        """Keys in insertion order, a thousand at a time; others may write meanwhile."""
        return (key for key, _ in _views.walk(self._here()))

    def __reversed__(self) -> Iterator[K]:
        return (key for key, _ in _views.walk(self._here(), reverse=True))

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
                theirs = other._here()._peek(key) if isinstance(other, Dictionary) else other[key]
            except KeyError:
                return False
            if not (theirs is value or theirs == value):
                return False
        return True

    __hash__ = None  # type: ignore[assignment]

    def pop(self, key: K, default: Any = _MISSING) -> Any:
        """Remove a key and return its value, or the default where there is none. Of several processes one gets it."""
        if key in self:
            here = self._here()
            with here.lock:
                if here._is_private(key):
                    value = here._peek(key)
                    here._delete(key)
                    return value
            with self._atomic() as keeper:
                try:
                    value = keeper._peek(key)
                except KeyError:  # somebody else was faster
                    pass
                else:
                    keeper._delete(key)
                    return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[K, V]:
        """Remove the key that was inserted last, and return it with its value. Of several processes one gets it."""
        with self._atomic() as keeper:
            keeper._usable()
            for key in keeper._from_the_end():
                value = keeper._peek(key)
                keeper._delete(key)
                return key, value
        raise KeyError("popitem(): the chest is empty")

    def setdefault(self, key: K, default: Any = None) -> Any:
        """The value of a key, which is the default from now on if there was none. All processes get the same one."""
        if key in self:
            with contextlib.suppress(KeyError):  # deleted since
                return self[key]
        with self._atomic() as keeper:
            if keeper._has(key):
                return keeper[key]
            keeper._set(key, default)
            return default

    def clear(self) -> None:
        """Remove every key; written at once."""
        keeper = self._here()
        with keeper.lock:
            keeper._clear()

    @overload
    def update(self, *args: Any, overwrite: bool = ...) -> None: ...
    @overload
    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set the keys of a mapping, of an object with ``keys()``, of pairs, or of another chest, and keyword arguments.

        From a chest with the same serializer whose folder lies on the same file system, large values are hard-linked, not
        copied. ``overwrite=False`` (the second argument, or by name) leaves the keys alone that are there already.

        All or nothing, and committed on return, as a ``transaction`` is (in a scratch chest that nobody shares it stays in
        memory as far as it fits, and what came before an exception is kept).
        """
        if len(args) > 2:
            raise TypeError(f"update expected at most 2 arguments, got {len(args)}")
        overwrite = args[1] if len(args) == 2 else kwargs.pop("overwrite", True)
        other = args[0] if args else ()
        donor = self._donor(other) if isinstance(other, Dictionary) and other is not self else None
        with self._atomic():
            if donor is not None:
                self._adopt(donor, overwrite)
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

    def get_many(self, keys: Iterable[K]) -> dict[K, V]:
        """The values of those of the keys that are there, in this order; as ``c[key]`` for each, but read by the hundred.

        What it returns has to fit into memory, beside ``available_memory``.
        """
        keeper = self._here()
        rest = iter(keys)
        found: dict[K, V] = {}
        while batch := list(islice(rest, _views.BATCH)):
            found.update(keeper._bring(batch, lent=True))
        return found

    # --- another chest

    def _donor(self, other: Dictionary[Any, Any]) -> Dictionary[Any, Any] | None:
        """The keeper whose records can be taken as they are, all of it written; None if they cannot."""
        mine, theirs = self._store, other._store
        if theirs.read_only:  # what was changed in its memory could not be written first
            return None
        if not (mine.plain and theirs.plain):
            return None
        if (mine.codec.name, mine.codec.text) != (theirs.codec.name, theirs.codec.text):
            return None
        donor = other._here()
        with donor.lock:
            # What was changed in place before another thread's transaction must not be written over what that makes of it.
            while donor._transactions:
                if self._here() is not self:  # to wait within a transaction could be to wait for ever
                    return None
                donor._none_open.wait(1)
            donor._sync()
        return donor

    def _adopt(self, other: Dictionary[Any, Any], overwrite: bool) -> None:
        keeper = self._here()
        after = None
        while page := other._store.index.page(after, _views.BATCH):
            after = page[-1].seq
            with keeper.lock:
                keeper._write_now()
                keeper._writable()
                items = []
                records = other._store.index.get_many([item.name for item in page])[1]
                for item, record in zip(page, records, strict=True):
                    key = other._store.key(item)
                    if record is None or (not overwrite and keeper._has(key)):
                        continue
                    entry = keeper._in_memory(key)
                    if entry is not None:
                        keeper._forget(entry)
                    items.append(Adopted(key, keeper._new_place(), record, other._store.path_of(record)))
                written = keeper._store.adopt(items)
                keeper._take_commits()
                keeper._check(written)
