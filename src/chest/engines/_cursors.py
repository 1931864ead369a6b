"""Small steps in LMDB's databases: places as keys, the ends of the order, notes behind the last one."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from xxhash import xxh3_64_digest as _digest

__all__ = ["add", "count", "last", "place", "seek", "version"]

place = struct.Struct(">Q").pack  # of a number, as a key that sorts as it does


def last(order: Any) -> int:
    return int.from_bytes(order.key(), "big") if order.last() else 0


def version(txn: Any) -> int:
    number: int = txn.id()
    return number


def count(txn: Any, db: Any) -> int:
    number: int = txn.stat(db)["entries"]
    return number


def seek(cursor: Any, after: int | None, reverse: bool) -> bool:
    """Whether the cursor stands on the first item beyond ``after``."""
    if after is None:
        return bool(cursor.last() if reverse else cursor.first())
    if reverse:
        if after <= 0:
            return False
        found = after < 2**64 and cursor.set_range(place(after))
        return bool(cursor.prev() if found else cursor.last())
    if after >= 2**64 - 1:
        return False
    return bool(cursor.set_range(place(max(0, after + 1))))


def add(txn: Any, pending: Any, notes: Iterable[bytes]) -> bool:
    cursor = txn.cursor(pending)
    added = False
    for number, note in enumerate(notes, last(cursor) + 1):
        key = place(number)
        cursor.put(key, note + _digest(key + note), append=True)
        added = True
    return added
