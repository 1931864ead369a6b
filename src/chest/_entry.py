"""One value in memory, as the memory tier queues it."""

from __future__ import annotations

from sys import getsizeof
from typing import Any, Final

__all__ = ["ENTRY_BYTES", "SLOT_BYTES", "Entry"]


class Entry:
    """One value in memory. The owner fills it, the tier queues it.

    Attributes:
        key: the user's key; when an entry replaces another, the key object of the first.
        value: the user's value.
        size: bytes of the value; to be changed by ``MemoryTier.resize`` only.
        dirty: it is not written yet. ``MemoryTier.mark`` changes it and the class; without it, the class follows when
            the entry is next queued.
        hot: it was hit since it was queued. Set by hits, without a lock; cleared by the tier.
        f: how often it was used, 0 to 4, counted in second chances.
        alive: it is in a tier.
        lent: it was handed out since its baseline was taken. The tier sets it when it clears ``hot``.
        seq, version, epoch, baseline, fresh, stored: the owner's, only kept here.
    """

    __slots__ = (
        "L", "alive", "baseline", "dirty", "epoch", "f", "fresh", "hot", "key", "key_bytes", "klass", "lent",
        "next", "prev", "seq", "size", "stored", "stuck", "value", "version",
    )  # fmt: skip

    L: int  # the floor when it was queued; it and the next four are unset until then
    klass: int  # 0..15, or _PICKED or _STUCK (also while it waits in FIRST)
    key_bytes: int  # kept, because the size of a key object can change (a str caches its UTF-8)
    prev: Entry
    next: Entry

    # fmt: off
    def __init__(
        self, key: Any, value: Any, size: int, dirty: bool = False, seq: int = 0, epoch: int = 0, lent: bool = False,
        baseline: Any = None, fresh: bool = False, stored: bool | None = None, version: int = 0,
    ) -> None:
        # fmt: on
        self.key = key
        self.value = value
        self.size = size
        self.dirty = dirty
        self.hot = False
        self.f = 0
        self.alive = False
        self.stuck = 0  # the round of `keep` it belongs to
        self.seq = seq
        self.epoch = epoch
        self.lent = lent
        self.baseline = baseline
        self.fresh = fresh
        self.stored = stored
        self.version = version

    def __repr__(self) -> str:
        flags = " ".join(name for name in ("alive", "dirty", "hot", "lent") if getattr(self, name))
        return f"<Entry {self.key!r}, {self.size} bytes, f={self.f} {flags}>"


def _slot_bytes() -> int:
    slots = [getsizeof(dict.fromkeys(range(n))) / n for n in (1365, 1366)]  # of a dict as full, and as empty, as can be
    return int(sum(slots) / 2)


SLOT_BYTES: Final = _slot_bytes()
"""What an entry's slot in the dict takes."""
ENTRY_BYTES: Final = getsizeof(Entry(None, None, 0)) + 3 * getsizeof(1 << 40) + SLOT_BYTES
"""What an entry takes beside its key and value: itself, the integers that it alone holds (size, seq, L), its slot."""
