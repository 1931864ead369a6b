"""The memory tier: which values are in memory, what they take, and which of them leave first.

A pure data structure. It does no I/O, takes no locks and knows nothing of chests: its owner holds one lock around
every call here, and only a *hit* comes without it (``entry = tier.entries[key]; entry.hot = True``), from any thread.

**The policy, GDQ,** is GreedyDual-Size-Frequency (Cherkasova, 1998) with the queues of CAMP (Ghandeharizadeh et al.,
2014), where each queue is a CLOCK. What a miss would cost (latency + size / bandwidth) per byte of memory, times how
often the value was used, rounded to a power of two, is an entry's *class*; each of the 16 classes is a
first-in-first-out queue. An entry enters at the tail of its queue with the floor ``L`` of that moment and stands for
``L + 2**class``. The one that leaves is the head with the least such number, and this number becomes the new floor: so
what stays unused is overtaken in the end, however valuable it once was. An entry that was hit since it was queued gets
a second chance: one more use is counted and it is queued again, at most 16 times before one victim is found. A hit
thus costs one attribute store, and no heap is needed (heaps stall for seconds at 10^6 entries).

**Where uses do not count.** Uses foretell uses where some values stay popular. Where each is used soon after it came and
then no more, counting them keeps what is done with and throws out what has just come. The *fresh* entries tell, those
without a use counted: which share of them had been hit when they came to a head? (A moving average over some 256.)
Beyond 7/16 whatever is queued is queued as if it had been used once. Zipf's traces stay below a third with memory for
30 % of the values; where values are used soon, and memory could hold them until then, it is nearly half or more.

**Why linked lists and not deques.** A deque cannot drop an entry from its middle, so overwritten and deleted entries
would stay as dead slots until somebody sweeps them: a stall of tens of milliseconds at 10^6 entries, or a sweep in
instalments with bookkeeping of its own. Here an entry carries the two links itself, being in a list is the only truth
about where it is, and everything but ``clear`` and ``check`` is O(1) per entry. The links are cycles, so ``clear``
cuts them (and runs when the tier is dropped): values are freed at once, not whenever the cycle collector comes by.

**An eviction** takes three steps, and may break off between any two of them without losing an entry::

    for entry in tier.victims(target):  # still in `entries`, where hits find them; queued in the list of the picked
        ...                             # written if dirty
        tier.remove(entry.key)          # it has left
        tier.keep(entry)                # or: it could not be written, and is not picked again until there is a reason

Those that were picked but neither removed nor kept come first in the next eviction (and have their second chance if
they were hit meanwhile).

**Interrupts.** CPython (3.11 and later) raises ``KeyboardInterrupt`` where a function begins, where a C function
returns and where a loop turns. So every method computes first and then changes everything in one stretch without
calls: whoever interrupts finds all of it done or nothing. That is why a few lines on links are written out where a
call would be shorter.

**Numbers.** ``L`` and the classes' values are integers and stay exact for ever. (The values are proportional to 0.75 *
2**class, the middle of a class; a common factor changes nothing. As floats, the smallest class would drown in rounding
once ``L`` has passed 2**53.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from sys import getsizeof
from typing import Any, Final

from ._entry import ENTRY_BYTES, Entry

__all__ = ["BREAK_EVEN", "FREE_BYTES", "MemoryTier"]

N_CLASSES: Final = 16
MAX_USES: Final = 4
SECOND_CHANCES: Final = 16
BATCH = 512  # victims after which a batch may end: they take less than a tenth of a millisecond
BREAK_EVEN: Final = 20_000  # bytes: 20 us * 1 GB/s, where half of a miss is latency. A factor of 4 off costs under 5 %
FREE_BYTES: Final = 64 * 1024
_ONE: Final = 1 << 16  # a share of 1
_SOON: Final = 7 * _ONE // 16  # 3/8 or 1/2 instead, or a window of 2**7 or 2**9: the mean of all traces moves by 0.001
_WINDOW: Final = 8

# The lists besides the queues. FIRST is a 17th queue, for those that were picked before: it always has the least head.
_FIRST: Final = N_CLASSES
_PICKED: Final = N_CLASSES + 1
_STUCK: Final = N_CLASSES + 2
_NEVER: Final = 1 << 200  # the head of an empty queue; beyond any L
_VALUES: Final = (*(1 << i for i in range(N_CLASSES)), -_NEVER)


def _end(klass: int) -> Entry:
    """The end of an empty circular list: its ``next`` is the head, its ``prev`` the tail."""
    end = Entry.__new__(Entry)  # a tier needs 19 of them, and a transaction a tier
    end.size, end.klass = -1, klass
    end.prev = end.next = end
    return end


_NOWHERE: Final = _end(_STUCK + 1)  # neighbour of entries that are in no list


class MemoryTier:
    """The entries in memory, at most ``limit`` bytes of them, and the order in which they leave.

    Attributes:
        entries: key -> entry. Always the same dict object; read it on a hit, never write to it.
        usage: bytes taken: the values' sizes, and what the bookkeeping takes beyond its first 64 KiB.
        limit: bytes that may be taken. Setting it evicts nothing by itself.
        stuck_bytes: bytes of the values that ``keep`` holds back from eviction.
        on_second_chance: called with an entry that stays because it was hit, after it has been queued again. It may
            ``resize``, ``mark`` or ``remove`` that entry, and no other.
    """

    __slots__ = (
        "_L", "_bookkeeping", "_ends", "_free", "_heads", "_hit_fresh", "_round", "_values", "entries", "limit",
        "on_second_chance", "stuck_bytes", "usage",
    )  # fmt: skip

    _L: int  # the floor
    _values: int  # bytes of the values
    _bookkeeping: int  # bytes of the entries and keys
    _hit_fresh: int  # of the fresh entries that came to a head, the share that had been hit, of 2**16
    _round: int  # counts calls of `retry`: an entry is stuck if it was kept in this round

    def __init__(self, limit: int, free_bytes: int = FREE_BYTES) -> None:
        self.entries: dict[Hashable, Entry] = {}
        self._free = free_bytes  # of the bookkeeping, which do not count
        self.limit = limit
        self.on_second_chance: Callable[[Entry], object] | None = None
        self._round = 1
        self._hit_fresh = 0
        self._reset()

    def __len__(self) -> int:
        return len(self.entries)

    def __del__(self) -> None:
        self.clear()

    def add(self, entry: Entry) -> None:
        """The entry is in memory; one with the same key is dead, and has left it its ``f`` and its key object.

        Nothing is evicted: make room first, so that the new value is not itself the victim. O(1).

        Raises:
            ValueError: the entry is in a tier already.
            Exception: what ``__hash__`` or ``__eq__`` of the key raise; nothing has changed then.
        """
        if entry.alive:
            raise ValueError(f"{entry!r} is in a tier already")
        key = entry.key
        old = self.entries.get(key)
        if old is None:
            try:
                key_bytes = getsizeof(key)
            except Exception:  # a __sizeof__ of the user's that fails is no reason to refuse the key
                key_bytes = getsizeof(object())
            size = entry.size
            i = self._class(entry, size)
            end = self._ends[i]
            self.entries[key] = entry
            entry.alive = True
            entry.key_bytes = key_bytes
            entry.klass = i
            floor = entry.L = self._L
            tail = end.prev
            if tail is end:
                self._heads[i] = floor + _VALUES[i]
            entry.prev = tail
            entry.next = end
            tail.next = end.prev = entry
            values = self._values = self._values + size
            total = self._bookkeeping = self._bookkeeping + key_bytes + ENTRY_BYTES
            self.usage = values + total - self._free if total > self._free else values
        else:
            # It takes the very place of the old one, and is queued anew from there.
            more = entry.size - old.size
            self.entries[key] = entry
            entry.alive = True
            entry.key = old.key
            entry.key_bytes = old.key_bytes
            entry.f = old.f
            entry.klass = old.klass
            entry.L = old.L
            before = entry.prev = old.prev
            after = entry.next = old.next
            before.next = after.prev = entry
            old.prev = old.next = _NOWHERE
            old.alive = False
            entry.stuck = old.stuck
            old.stuck = 0
            if entry.stuck == self._round:
                self.stuck_bytes += more
            self._values += more
            self.usage += more
            self._move(entry, self._class(entry, entry.size))

    def remove(self, key: Hashable) -> Entry | None:
        """The key is not in memory; its entry is returned (dead, but whole), None where there was none. O(1)."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        del self.entries[key]
        entry.alive = False
        before = entry.prev
        after = entry.next
        before.next = after
        after.prev = before
        entry.prev = entry.next = _NOWHERE
        if before.size < 0:  # an end: the entry was the head
            i = before.klass
            if i <= _FIRST:
                self._heads[i] = _NEVER if after is before else after.L + _VALUES[i]
        if entry.stuck:
            if entry.stuck == self._round:
                self.stuck_bytes -= entry.size
            entry.stuck = 0
        values = self._values = self._values - entry.size
        total = self._bookkeeping = self._bookkeeping - entry.key_bytes - ENTRY_BYTES
        self.usage = values + total - self._free if total > self._free else values
        return entry

    def let_go(self, batch: list[Entry]) -> list[Entry]:
        """Remove those of a batch that are clean and cannot have changed; the others are returned. O(1) for each.

        What cannot change by its type has no baseline. What can was not handed out since. (In C, what was is looked at too,
        if that takes no more than a glance.)
        """
        others = []
        for entry in batch:
            if entry.alive and not entry.dirty and (entry.baseline is None or not (entry.hot or entry.lent)):
                self.remove(entry.key)
            else:
                others.append(entry)
        return others

    def queued(self, entries: dict[Any, Entry], largest: int, room: int) -> list[Entry]:
        """Those of the entries, in this order, that are neither picked nor stuck and take at most ``largest`` bytes.

        As many as take ``room`` bytes together. O(1) for each that is looked at.
        """
        found = []
        for entry in entries.values():
            if entry.alive and entry.klass < N_CLASSES and entry.size <= largest:
                room -= entry.size
                if room < 0:
                    break
                found.append(entry)
        return found

    def resize(self, entry: Entry, size: int) -> None:
        """The value takes ``size`` bytes; its entry is queued anew and may be picked, even if it was kept before. O(1).

        An entry that is in no tier only gets its new size.
        """
        if entry.alive:
            self._move(entry, self._class(entry, size))
            more = size - entry.size
            self._values += more
            self.usage += more
        entry.size = size

    def mark(self, entry: Entry, dirty: bool) -> None:
        """The entry is dirty, or clean. O(1).

        What becomes dirty was used: it is queued anew in its higher class. What becomes clean was only written: it
        keeps its place, so that a flush neither costs nor counts as a use, and finds its class when it is next queued.
        If it was kept because it could not be written, it may now be picked.
        """
        if entry.dirty != dirty:
            entry.dirty = dirty
            if entry.alive and (entry.klass < N_CLASSES if dirty else entry.stuck == self._round):
                self._move(entry, self._class(entry, entry.size))

    def victims(self, target: int, spare: Entry | None = None, enough: int | None = None) -> list[Entry]:
        """Entries whose removal brings ``usage`` down to ``target`` bytes, or all there are; least valuable first.

        They stay in ``entries`` until they are removed. O(1) per entry, and per second chance, of which there are at
        most 16 before each victim.

        Args:
            target: bytes that may be taken afterwards.
            spare: an entry that is not to be picked (one that was just added, say).
            enough: bytes that will do once there are 512 victims: with small values a batch ends before it takes long.

        Raises:
            Exception: what ``on_second_chance`` raises; everything is still queued then.
        """
        batch: list[Entry] = []
        if self.usage <= target:
            return batch
        if enough is None:
            enough = target
        ends, heads, free = self._ends, self._heads, self._free
        picked = ends[_PICKED]
        if picked.next is not picked:
            self._splice_first(picked)
        picked_values = picked_bookkeeping = chances = i = least = 0  # no head is 0
        while True:
            left = self._values - picked_values
            bookkeeping = self._bookkeeping - picked_bookkeeping
            if bookkeeping > free:
                left += bookkeeping - free
            if left <= target or (left <= enough and len(batch) >= BATCH):
                break
            if heads[i] != least:  # else no other has become less: what is queued anew stands for more
                least = min(heads)
                if least == _NEVER:
                    break
                i = heads.index(least)
                self._L = max(self._L, least)
            entry = ends[i].next
            if entry is spare:
                self._move(entry, _PICKED)
                continue
            if not entry.f:
                share = self._hit_fresh
                self._hit_fresh = share - (share >> _WINDOW) + (_ONE >> _WINDOW if entry.hot else 0)
            if entry.hot and chances < SECOND_CHANCES:
                chances += 1
                # In this order: a hit that comes in between may go uncounted, but the loan is never forgotten.
                entry.lent = True
                entry.hot = False
                if entry.f < MAX_USES:
                    entry.f += 1
                self._move(entry, self._class(entry, entry.size))
                if self.on_second_chance is not None:
                    self.on_second_chance(entry)
            else:
                chances = 0
                self._move(entry, _PICKED)
                picked_values += entry.size
                picked_bookkeeping += entry.key_bytes + ENTRY_BYTES
                batch.append(entry)
        if spare is not None and spare.alive and spare.klass == _PICKED:
            self._move(spare, self._class(spare, spare.size))
        return batch

    def keep(self, entry: Entry, stuck: bool = True) -> None:
        """A victim that was not written stays. O(1).

        If it is ``stuck`` (refused for a reason of its own), no eviction picks it until it is replaced, resized or
        marked clean, or ``retry`` is called; otherwise it is queued anew.
        """
        if entry.alive and stuck:
            self._move(entry, _STUCK)
            entry.stuck = self._round
            self.stuck_bytes += entry.size
        elif entry.alive:
            self._move(entry, self._class(entry, entry.size))

    def retry(self) -> None:
        """What was kept may be picked again, and comes first. O(1), however many there are."""
        self._splice_first(self._ends[_STUCK])
        self._round += 1
        self.stuck_bytes = 0

    def clear(self) -> None:
        """Nothing is in memory; every entry is dead. O(n)."""
        if self.entries:
            self._reset()

    def _reset(self) -> None:
        entries = list(self.entries.values())
        ends = [_end(i) for i in range(_STUCK + 1)]
        heads = [_NEVER] * (_FIRST + 1)
        # Values may run code of their own when they are freed: by then the tier is empty and whole.
        self._ends = ends
        self._heads = heads
        self._L = self._values = self._bookkeeping = self.usage = self.stuck_bytes = 0
        self.entries.clear()
        for entry in entries:
            entry.alive = False
            entry.stuck = 0
            entry.prev = entry.next = _NOWHERE

    def _class(self, entry: Entry, size: int) -> int:
        """The queue for an entry: how many bits uses * cost / size has; the cost of a miss in bytes of transfer."""
        size = size or 1
        uses = (1 if self._hit_fresh > _SOON else entry.f) + entry.dirty
        i = (uses * (BREAK_EVEN + size) // size).bit_length()
        return i if i < N_CLASSES else N_CLASSES - 1

    def _move(self, entry: Entry, i: int) -> None:
        """Take an entry out of its list and put it at the tail of list ``i``."""
        before = entry.prev
        after = entry.next
        before.next = after
        after.prev = before
        heads = self._heads
        if before.size < 0:  # an end: the entry was the head
            was = before.klass
            if was <= _FIRST:
                heads[was] = _NEVER if after is before else after.L + _VALUES[was]
        if entry.stuck:
            if entry.stuck == self._round:
                self.stuck_bytes -= entry.size
            entry.stuck = 0
        end = self._ends[i]
        tail = end.prev
        if i < N_CLASSES:
            floor = entry.L = self._L
            if tail is end:
                heads[i] = floor + _VALUES[i]
        entry.klass = i
        entry.prev = tail
        entry.next = end
        tail.next = end.prev = entry

    def _splice_first(self, end: Entry) -> None:
        """Move a whole list behind what is in FIRST."""
        head = end.next
        if head is not end:
            first = self._ends[_FIRST]
            tail = first.prev
            tail.next = head
            head.prev = tail
            first.prev = end.prev
            end.prev.next = first
            end.prev = end.next = end
            self._heads[_FIRST] = first.next.L + _VALUES[_FIRST]

    def check(self) -> None:
        """Every invariant holds, or an ``AssertionError`` says which does not. O(n); for tests and diagnosis."""
        queued: dict[int, Entry] = {}
        stuck_bytes = 0
        for i, end in enumerate(self._ends):
            assert end.klass == i
            assert end.size == -1
            before, entry, floor = end, end.next, 0
            while entry is not end:
                assert id(entry) not in queued, f"{entry!r} is queued twice"
                queued[id(entry)] = entry
                assert entry.prev is before, f"the links at {entry!r} are torn"
                assert entry.alive, f"{entry!r} is dead and queued"
                if i < N_CLASSES:
                    assert entry.klass == i, f"{entry!r} is in queue {i}, not {entry.klass}"
                    assert floor <= entry.L <= self._L, f"the floors in queue {i} fall at {entry!r}"
                    floor = entry.L
                else:
                    assert entry.klass in ((_PICKED, _STUCK) if i == _FIRST else (i,))
                kept = entry.stuck == self._round
                assert kept == (i == _STUCK), f"{entry!r} is stuck in list {i}"
                stuck_bytes += entry.size if kept else 0
                before, entry = entry, entry.next
            assert end.prev is before, f"the tail of list {i} is wrong"
            if i <= _FIRST:
                head = _NEVER if end.next is end else end.next.L + _VALUES[i]
                assert self._heads[i] == head, f"the head of queue {i} is {self._heads[i]}, not {head}"
        assert queued.keys() == {id(entry) for entry in self.entries.values()}, "the queued are not those in memory"
        assert all(entry.key == key for key, entry in self.entries.items()), "an entry is under another's key"
        assert all(0 <= entry.f <= MAX_USES and entry.size >= 0 for entry in queued.values())
        assert stuck_bytes == self.stuck_bytes
        assert 0 <= self._hit_fresh <= _ONE
        assert self._values == sum(entry.size for entry in queued.values())
        assert self._bookkeeping == sum(entry.key_bytes + ENTRY_BYTES for entry in queued.values())
        assert self.usage == self._values + max(0, self._bookkeeping - self._free)
