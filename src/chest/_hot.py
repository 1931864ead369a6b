"""The hot paths: what a hit, a set, and values by the thousand pass through, compiled where there was a compiler.

The extension ``_native`` (its source is ``src/native``) has the same names and does the same as what stands here and in
``_memory``; it is used if it was built and ``CHEST_PURE`` is not set in the environment. Whoever changes one changes both:
the tests run on both.
"""

from __future__ import annotations

import functools
import os
import struct
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterator
from sys import getsizeof
from typing import TYPE_CHECKING, Any

from . import _changes, _entry, _memory, _size_plans
from ._keys import name_of
from ._size_plans import leaves
from ._sizing import nbytes, quick_builtins
from .abc import OrderItem, Put, Record, Row

__all__ = [
    "COMPILED",
    "ENTRY_BYTES",
    "Entry",
    "MemoryTier",
    "State",
    "baseline_bytes",
    "look_up",
    "may_be_reached",
    "order_pairs",
    "pack_rows",
    "picture",
    "read_key",
    "read_order",
    "read_places",
    "read_record",
    "read_records",
    "record_pairs",
    "settle_rows",
    "who_holds",
]  # fmt: skip

_HEAD = struct.Struct("<QQB")
_HEAD_SIZE = _HEAD.size
_LENGTH = struct.Struct("<H")
_PLACE = struct.Struct(">Q")


class _State:
    """What the quickest calls of a chest need, and these calls.

    ``_plain`` says that a set may take the short way: nobody has made it mean more than it does.
    """

    lock: Any
    _tier: MemoryTier
    _entries: dict[Any, Entry]
    _dirty: dict[Any, Entry]
    _unsure: dict[Any, Entry]
    _tombs: dict[Any, bytes]
    _lent: Any
    _transaction: Any
    _failed: Any
    _generation: memoryview
    _seen: int
    _next_seq: int
    _epoch: int
    _hits: int
    _misses: int
    _n_commits: int
    _store: Any
    _salt: int
    _closed = True  # until it is open
    _write_through = False
    _plain = False

    def __getitem__(self, key: Any) -> Any:
        entry = self._entries.get(key)
        if entry is not None and entry.epoch == self._epoch and self._generation[0] == self._seen:
            entry.hot = True
            self._hits += 1
            return entry.value
        return self._get_slowly(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._set_slowly(key, value)

    def __delitem__(self, key: Any) -> None:
        self._delete_slowly(key)

    def __contains__(self, key: object) -> bool:
        return self._contains_slowly(key)

    def _pass(self, key: Any, record: Any, n_commits: int, generation: int) -> tuple[Any, Any] | None:
        """The key and the value of a record that was read when there had been so many commits, and the generation was this.

        A value that can change is lent. None where it is not that simple, as it never is here.
        """
        return None

    def _give_back(self, key: Any) -> None:
        """A value that was passed on is not lent any more, if at a glance nobody holds it and it has not changed."""

    def _get_slowly(self, key: Any) -> Any:
        raise NotImplementedError

    def _set_slowly(self, key: Any, value: Any) -> None:
        raise NotImplementedError

    def _delete_slowly(self, key: Any) -> None:
        raise NotImplementedError

    def _contains_slowly(self, key: object) -> bool:
        raise NotImplementedError


def _pack_rows(
    items: Iterator[Any],
    dumps: Callable[[Any], bytes],
    dumps_plain: Callable[[Any], bytes],
    fixed: Callable[[Any], bool],
    hash: Callable[[bytes], int],
    limit: int,
    small: int,
    budget: int,
    done: list[Any],
    rows: list[Row],
    baselines: list[Any],
) -> tuple[Any, int]:
    """Serialize values with simple keys, one after another, until one is not that simple or ``budget`` bytes are reached.

    Args:
        items: what is to be written (``Unwritten``).
        dumps: serializes a value to bytes.
        dumps_plain: the same for text, numbers and the like, and containers of those; it may be quicker.
        fixed: tells whether a value cannot change.
        hash: of the bytes of one that can.
        limit: values that take more memory are not simple.
        small: neither are those that are serialized to this many bytes.
        done, rows, baselines: where what was serialized is added.

    Returns:
        The item that was not simple (None if there was none), and the number of bytes added.
    """
    size = 0
    for item in items:
        key = item.key
        if item.size >= limit or (type(key) is not str and type(key) is not int):
            return item, size
        try:
            name = name_of(key)
            if item.dirty:
                item.lent = may_be_reached(item)  # asked before: see `_changes`
            body = dumps(item.value)
            if name is None or name[0] == _HASHED or len(body) >= small:
                return item, size
            baseline = None if fixed(item.value) else hash(body)
        except Exception:  # it is tried again by those who can say what is wrong with it
            return item, size
        done.append(item)
        rows.append((name, item.seq, 0, body, b"", item.fresh))
        baselines.append(baseline)
        size += len(body)
        if size >= budget:
            break
    return None, size


def _record_pairs(
    version: int, seqs: dict[bytes, int], rows: list[Put], digest: Callable[[bytes], bytes]
) -> Iterator[tuple[bytes, bytes]]:
    """Names and records as they lie in the index; made one by one while LMDB takes them."""
    pack = _HEAD.pack
    return (
        (name, (data := pack(version, seqs[name], kind) + body) + digest(name + data)) for name, _, kind, body, _, _ in rows
    )


def _order_pairs(rows: list[Put], places: list[int], digest: Callable[[bytes], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Places and names as they lie in the order."""
    pack = _LENGTH.pack
    return (
        (place, (data := pack(len(name)) + name + typed) + digest(place + data))
        for (name, _, _, _, typed, _), place in zip(rows, map(_PLACE.pack, places), strict=True)
    )


def _read_record(kind: type[Record], name: bytes, data: bytes, digest: Callable[[bytes], bytes]) -> Record | None:
    """The record that lies in the index under this name, None if it is not what was written."""
    if len(data) < _HEAD_SIZE + 8 or digest(name + data[:-8]) != data[-8:]:
        return None
    return tuple.__new__(kind, (*_HEAD.unpack_from(data), data[_HEAD_SIZE:-8]))


def _read_records(
    kind: type[Record], pairs: list[tuple[bytes, bytes]], digest: Callable[[bytes], bytes]
) -> list[Record] | bytes:
    """The records that lie under these names; or the first name under which there is not what was written."""
    records = []
    for name, data in pairs:
        record = _read_record(kind, name, data, digest)
        if record is None:
            return name
        records.append(record)
    return records


def _look_up(
    kind: type[Record], environment: Any, digest: Callable[[bytes], bytes], inside: list[int], gate: Any, name: bytes
) -> Any:
    """The record of a name, looked up inside of the gate in a transaction of its own; None where there is none.

    ``NotImplemented`` where that is not all there is to it: the gate is shut, LMDB raises, the record is damaged.
    """
    ident = get_ident()
    try:
        inside.append(ident)
        if gate.shut:
            return NotImplemented
        txn = environment.begin(environment.index)
        try:
            data = txn.get(name)
        finally:
            txn.abort()
    except Exception:
        return NotImplemented
    finally:
        inside.remove(ident)
    return None if data is None else _read_record(kind, name, data, digest) or NotImplemented


def _read_order(
    kind: type[OrderItem], pairs: list[tuple[bytes, bytes]], digest: Callable[[bytes], bytes]
) -> list[OrderItem] | bytes:
    """A part of the order; or the first place in it where there is not what was written."""
    items = []
    for place, data in pairs:
        if len(place) != 8 or len(data) < 10 or digest(place + data[:-8]) != data[-8:]:
            return place
        end = 2 + data[0] + (data[1] << 8)
        if end > len(data) - 8:
            return place
        items.append(tuple.__new__(kind, (int.from_bytes(place, "big"), data[2:end], data[end:-8])))
    return items


def _read_places(
    pairs: list[tuple[bytes, bytes]], digest: Callable[[bytes], bytes]
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]], list[bytes]]:
    """Of names and records: the places; those records that have something outside of the index; the names of the damaged."""
    seqs: dict[bytes, int] = {}
    noted: list[tuple[bytes, bytes]] = []
    lost: list[bytes] = []
    for name, data in pairs:
        if len(data) < _HEAD_SIZE + 8 or digest(name + data[:-8]) != data[-8:]:
            lost.append(name)
            continue
        _, seqs[name], kind = _HEAD.unpack_from(data)
        if kind & 3:
            noted.append((name, data))
    return seqs, noted, lost


def _read_key(name: bytes, typed: bytes, decode: Callable[[bytes, bytes], Any]) -> Any:
    """The key that was encoded, by ``decode`` if it is not text."""
    return decode(name, typed)


def _settle_rows(
    done: list[Any], baselines: list[Any], dirty: dict[Any, Any], unsure: dict[Any, Any], version: int, epoch: int
) -> tuple[int, list[Any]]:
    """Entries are written: they are clean, and not in ``dirty`` and ``unsure`` any more.

    One that was replaced meanwhile, by code that ran when the values were serialized, leaves the newer one what it has found
    out: that the key is stored.

    Returns:
        How many of them had been known to be new, and those that were stuck, which are the memory tier's to mark.
    """
    n_new = 0
    stuck = []
    for entry, baseline in zip(done, baselines, strict=True):
        key = entry.key
        if unsure.pop(key, None) is None and not entry.stored:
            n_new += 1
        newer = dirty.get(key)
        if newer is entry:
            del dirty[key]
        elif newer is not None:
            newer.stored = True
            newer.fresh = False
        entry.version = version
        entry.baseline = baseline
        entry.epoch = epoch
        entry.stored = True
        entry.fresh = False
        entry.lent = entry.lent and baseline is not None
        if entry.stuck:
            stuck.append(entry)
        else:
            entry.dirty = False
    return n_new, stuck


def _who_holds(entry: Any) -> int:
    """Who but its entry holds a value, or something inside it that can change, as a ``Held``."""
    return _changes.held(entry.value)


def may_be_reached(entry: Any) -> bool:
    """Whether anybody may change a value that is written now: who holds it, or has a weak reference."""
    return _changes.held(entry.value) != _changes.Held.NO or weakref.getweakrefcount(entry.value) > 0


def _picture(value: object) -> Any:
    """What a value that was just loaded looks like, to be compared by ``matches``; None where its pickle has to do."""
    return None


def _baseline_bytes(baseline: object) -> int:
    """Bytes that a baseline takes beside the value."""
    return len(baseline) if type(baseline) is bytes else 0


_HASHED = ord("h")

if TYPE_CHECKING:
    from ._entry import Entry
    from ._memory import MemoryTier

    COMPILED: bool = False
    State = _State
    pack_rows, record_pairs, order_pairs, settle_rows = _pack_rows, _record_pairs, _order_pairs, _settle_rows
    read_record, read_order, read_places, read_key = _read_record, _read_order, _read_places, _read_key
    picture, who_holds, baseline_bytes = _picture, _who_holds, _baseline_bytes
    read_records, look_up = _read_records, _look_up
    setup_pictures: Callable[..., None]
    size_of_plain: Callable[..., int]
else:
    try:
        if os.environ.get("CHEST_PURE"):
            raise ImportError
        from ._native import (
            Entry,
            MemoryTier,
            State,
            baseline_bytes,
            look_up,
            order_pairs,
            pack_rows,
            picture,
            read_key,
            read_order,
            read_places,
            read_record,
            read_records,
            record_pairs,
            settle_rows,
            setup_pictures,
            size_of_plain,
            who_holds,
        )

        COMPILED = True
    except ImportError:
        Entry, MemoryTier, State = _entry.Entry, _memory.MemoryTier, _State
        pack_rows, record_pairs, order_pairs, settle_rows = _pack_rows, _record_pairs, _order_pairs, _settle_rows
        read_record, read_order, read_places, read_key = _read_record, _read_order, _read_places, _read_key
        picture, who_holds, baseline_bytes = _picture, _who_holds, _baseline_bytes
        read_records, look_up = _read_records, _look_up
        COMPILED = False

if COMPILED:
    ENTRY_BYTES: int = getsizeof(Entry(None, None, 0)) + _entry.SLOT_BYTES
    """What an entry takes beside its key and value."""
    _size_plans.offer_quick(
        {
            kind: functools.partial(size_of_plain, _size_plans.quick, leaves, otherwise)
            for kind, otherwise in quick_builtins.items()
        }
    )
    State._setup(nbytes, leaves, _size_plans.quick, _changes.is_immutable, ENTRY_BYTES)  # type: ignore[attr-defined]
    setup_pictures(_changes.IMMUTABLE, _changes.ATOMS, _changes.held)
else:
    ENTRY_BYTES = _entry.ENTRY_BYTES
