"""Iteration: in pages, beside whoever writes, and without a trace in the memory tier.

The index is read a page at a time, each page in a short snapshot of its own, so that a paused iterator holds nothing up and
a key that somebody deletes or adds meanwhile is simply seen or not seen. Keys that are unwritten and new are merged in by
their place in insertion order. Values that are passed over are not admitted to memory; those that can be changed are
watched while the caller holds them, so ``for v in c.values(): v.append(1)`` is kept.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ._keeper import Keeper
    from .abc import Record

__all__ = ["Items", "Keys", "Values", "walk"]

K = TypeVar("K")
V = TypeVar("V")

PAGE = 1000  # keys read at a time
BATCH = 64  # records read at a time, to begin with: at 64 KiB each they are 4 MiB
BATCH_BYTES = 1 << 20  # of small ones as many as make this, or a page


def walk(keeper: Keeper, *, reverse: bool = False) -> Iterator[tuple[Any, bytes | None]]:
    """Keys in insertion order, with their name in the index if that is where they come from."""
    with keeper.lock:
        keeper._usable()
        own = keeper._own_new(reverse)
    own.reverse()  # the next one last
    after = None
    while True:
        with keeper.lock:
            keeper._usable()
            store = keeper._store  # another one in a process that was forked meanwhile
            page = store.index.page(after, PAGE, reverse=reverse)
        if not page:
            break
        for item in page:
            while own and (own[-1].seq > item.seq if reverse else own[-1].seq < item.seq):
                key = own.pop().key
                if key in keeper:  # it may have been deleted since
                    yield key, None
            if own and own[-1].seq == item.seq:
                own.pop()  # it has been written since, and this is it
            key = store.key(item)
            if (keeper._tombs or keeper._dirty) and keeper._hidden(key):
                continue
            yield key, item[1]
        after = page[-1].seq
    for entry in reversed(own):
        if entry.key in keeper:
            yield entry.key, None


def walk_items(keeper: Keeper, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
    """Keys and values in insertion order; the records of a batch are read in one go."""
    keeper._usable()
    keeper._take_all_changes()
    pairs = walk(keeper, reverse=reverse)
    entries, lent, tombs, store = keeper._entries, keeper._lent, keeper._tombs, keeper._store
    size, before, passed = BATCH, None, None
    while batch := list(islice(pairs, size)):
        wanted = [n for k, n in batch if n is not None and k not in entries and k not in lent]
        with keeper.lock:
            keeper._usable()
            state = n_commits, generation = _state(keeper)
            found = store.index.get_many(wanted)[1] if wanted else []
        records = dict(zip(wanted, found, strict=True))
        size = _next_size(found)
        for key, name in batch:
            record = None if name is None else records.pop(name, None)
            item = None if record is None else keeper._pass(key, record, n_commits, generation)
            if item is not None:
                keeper._give_back(before)  # a loop still holds the last one
                before, passed = passed, key
                yield item
                continue
            loaded = None
            if (
                record is not None
                and name is not None
                and n_commits == keeper._n_commits  # else it may be an older one by now
                and generation == store.index.generation[0]
                and key not in entries
                and key not in lent
                and key not in tombs
            ):
                loaded = store.decode_for(key, name, record)
                if loaded is not None and loaded[2] is None:  # it cannot be changed, so nobody needs to watch it
                    yield key, loaded[0]
                    continue
            with keeper.lock:
                keeper._usable()
                if loaded is None or state != _state(keeper) or key in entries or key in lent or key in tombs:
                    try:
                        value = keeper._peek(key)
                    except KeyError:
                        continue  # deleted since
                else:
                    value = keeper._lend(key, loaded)
                loaded = None
            yield key, value
            del value


def _next_size(records: list[Record | None]) -> int:
    """How many records to read next: a few MiB of them, if they are as large as these."""
    n_bytes = sum([len(record[3]) for record in records if record is not None])
    return max(BATCH, min(PAGE, BATCH_BYTES * len(records) // (n_bytes + 1)))


def _state(keeper: Keeper) -> tuple[int, int]:
    """Changes with every commit: of this chest (inside of a transaction the generation stays the same) and of others."""
    return keeper._n_commits, keeper._store.index.generation[0]


class Keys(KeysView[K]):
    """The keys of a chest, in insertion order."""

    _mapping: Any

    def __reversed__(self) -> Iterator[K]:
        return iter(reversed(self._mapping))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"


class Items(ItemsView[K, V]):
    """The items of a chest, in insertion order; reading them leaves the memory tier as it is."""

    _mapping: Any

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return walk_items(self._mapping._here())

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return walk_items(self._mapping._here(), reverse=True)

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        key, value = item
        try:
            found = self._mapping._here()._peek(key)
        except KeyError:
            return False
        return found is value or bool(found == value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"


class Values(ValuesView[V]):
    """The values of a chest, in insertion order; reading them leaves the memory tier as it is."""

    _mapping: Any

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in walk_items(self._mapping._here()))

    def __reversed__(self) -> Iterator[V]:
        return (value for _, value in walk_items(self._mapping._here(), reverse=True))

    def __contains__(self, value: object) -> bool:
        return any(found is value or found == value for found in self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mapping!r})"
