"""Which keys the last commits wrote or deleted, for those who follow the changes.

    changed     version, big-endian -> (length of the name u16 | length of typed u32 | name | typed)... | checksum

One entry for a commit, empty where it would be long; the last 256 are kept. Whoever is further behind, or finds an empty
one, looks through the records for newer versions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from xxhash import xxh3_64_digest as _digest

from ._cursors import place as place_of

__all__ = ["MANY", "items_of", "remember", "since"]

KEPT = 256  # commits
MANY = 1_000  # changes of one commit that nobody is told one by one
MOST = 32 << 10  # bytes for one of them

_ITEM = struct.Struct("<HI")


def remember(txn: Any, db: Any, version: int, n_items: int, items: Iterable[tuple[bytes, bytes]]) -> None:
    """These ``(name, typed)`` were written or deleted by the commit with this version. 3 us, and 0.3 us an item."""
    cursor = txn.cursor(db)
    place = place_of(version)
    before = cursor.get(place)  # a transaction commits in several steps
    data = b""
    if n_items < MANY and (before is None or len(before) > 8):
        parts = [_ITEM.pack(len(name), len(typed)) + name + typed for name, typed in items]
        data = b"".join(parts) if before is None else b"".join([before[:-8], *parts])
        if len(data) > MOST:
            data = b""
    cursor.put(place, data + _digest(place + data))
    if before is None and txn.stat(db)["entries"] > KEPT and cursor.first():
        cursor.delete()


def since(txn: Any, db: Any, version: int) -> list[tuple[bytes, bytes]] | None:
    """What the commits after this version wrote and deleted, oldest first; None where that is not known any more."""
    cursor = txn.cursor(db)
    found: list[tuple[bytes, bytes]] = []
    if not cursor.first():
        return found
    oldest = int.from_bytes(cursor.key(), "big")
    if txn.stat(db)["entries"] >= KEPT and version < oldest - 1:
        return None
    if not cursor.set_range(place_of(version + 1)):
        return found
    for place, data in cursor:
        if len(data) <= 8 or _digest(place + data[:-8]) != data[-8:]:
            return None
        found += items_of(data[:-8])
    return found


def items_of(entry: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The ``(name, typed)`` of an entry without its checksum."""
    at = 0
    while at < len(entry):
        n, m = _ITEM.unpack_from(entry, at)
        at += _ITEM.size
        yield entry[at : at + n], entry[at + n : at + n + m]
        at += n + m
