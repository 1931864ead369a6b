"""How much memory a value holds.

``nbytes`` is asked for every value that enters a chest, so it has to be cheap; its answers decide what is spilled, so
they have to be honest. ``sys.getsizeof`` is cheap and wrong by any factor; visiting every member is honest and slower
than writing the value to disk. What is done instead:

- **Few members are all visited, many are sampled.** Up to 1,024 members the type of each is looked at, so that ten
  large arrays among hundreds of small things are never missed; beyond that those of 128 members, spread evenly by the
  golden ratio (no period of the data can hide from it, and without random numbers equal values have equal sizes). A
  sample is enlarged until its mean is known well enough. A budget bounds the whole walk; siblings share it evenly.
- **What is shared counts once.** An array stands for the buffer that it keeps alive, so two views of one array, or one
  array in a thousand records, count once. Sampling needs care here, for what a sample meets is multiplied: an object
  that is met a second time is taken back out of the sample and counted as the one object it is. Reference counts tell
  how often a sampled object occurs among the members that were not looked at.
- **Nothing is ever raised**, and no depth of nesting exhausts the stack.

Known limits: nodes of a large graph that are sampled one by one, and reach each other, count too often (up to tenfold);
chains of hundreds of objects count up to the budget; clones of polars frames count as if they shared nothing.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from sys import getsizeof
from typing import Any, Protocol, TypeVar, cast, overload

from . import _size_plans
from ._machine import machine_memory, parse_memory
from ._size_plans import ALL, GOLDEN, HEADER, Groups, array_kinds, flat, leaves, own_bytes, parts, quick

__all__ = ["machine_memory", "nbytes", "parse_memory"]

_F = TypeVar("_F", bound=Callable[[Any], int])

_SMALL = 64  # objects that are all looked at without a walk
_TINY = 16  # members up to here are faster looked at one by one than with set and map
_FEW = 64  # members that hold others: up to here all are visited ...
_SAMPLE = 32  # ... and of more at least as many, until the standard error of their mean falls below ...
_ERROR = 0.07
_BUDGET = 300.0  # composite objects visited for one value; looking at a member costs a sixteenth of visiting one
_OVERDRAFT = -8.0  # levels below the point where it ran out that single paths are still followed
_DEPTH = 24  # levels walked by recursion; what lies deeper is put off
_TRUSTED_REFERENCES = 8  # up to here a reference count says nothing of repetitions: who knows who else holds the object

# CPython's means; with None an object that is met once in a sample is taken for unique.
_refcount: Callable[[Any], int] | None = getattr(sys, "getrefcount", None)

_Path = tuple[int, ...]
_TOP: _Path = (0,)  # as an object, too: compared by identity on the hot path
_ONES = repeat(1.0)


def _nbytes(value: object) -> int:
    """The bytes of memory that the value holds: deep, every shared part once, large containers by extrapolation.

    An array counts exactly the buffer that it keeps alive (a view: the whole of its base). Scalars take 0.1 us, small
    containers 1 us, and no value more than a few milliseconds, however large it is. Never raises: what cannot tell its
    size counts as if it held nothing.

    ``nbytes.register(SomeType)`` makes the decorated function the measure of a type and its subclasses.
    """
    kind = type(value)
    if kind in leaves:
        return getsizeof(value)
    try:
        short_way = quick.get(kind)
        if short_way is not None and (size := short_way(value)) >= 0:
            return size
    except Exception:  # changed under our hands by another thread, or broken: the walk copes
        pass
    for depth in (_DEPTH, 1):  # the caller may stand just below the recursion limit
        try:
            return _Walk().total(value, depth)
        except RecursionError:
            continue
        except Exception:
            break
    return own_bytes(value)


def _register(kind: Any, size: Any = None) -> Any:
    """``size(value)`` is from now on what ``nbytes`` takes values of this type and its subclasses to hold.

    Args:
        kind: a type, or its dotted name (``"polars.DataFrame"``): it need not be imported yet, nor ever.
        size: the function; left out, ``register`` is a decorator. Where it raises, or returns no size, the value is
            measured as if the type had not been registered.

    Returns:
        ``size`` itself.
    """
    if not isinstance(kind, type) and not (isinstance(kind, str) and "." in kind.strip(".")):
        raise TypeError(f"nbytes.register takes a type or its dotted name ('package.Type'), not {kind!r}")
    if size is None:
        return lambda size: _register(kind, size)
    if not callable(size):
        raise TypeError(f"nbytes.register takes a function from value to bytes, not {size!r}")
    _size_plans.register(kind, size)
    return size


class _NBytes(Protocol):
    __name__: str

    def __call__(self, value: object, /) -> int: ...

    @overload
    def register(self, kind: type | str) -> Callable[[_F], _F]: ...
    @overload
    def register(self, kind: type | str, size: _F) -> _F: ...


_nbytes.__name__ = _nbytes.__qualname__ = "nbytes"
_nbytes.register = _register  # type: ignore[attr-defined]
nbytes = cast(_NBytes, _nbytes)  # a plain function: calling an object costs twice as much


class _Walk:
    """One measurement.

    Members of a sampled group are visited as *units*, each under a path of its own: the path of the group and a number.
    ``seen`` holds for all that was met (by what identifies its bytes) the path under which it was counted. Met again at
    or below that path, it adds nothing. Met elsewhere, it is shared by units that were taken to be separate: it is
    taken back, and counted once for the innermost group that has both.
    """

    __slots__ = ("fixed", "later", "n_units", "path", "pending", "seen", "spent", "stop", "undo")

    def __init__(self) -> None:
        self.seen: dict[object, _Path] = {}
        self.spent = 0.0
        self.stop = math.inf  # what may be spent at most before the current subtree has to be extrapolated
        self.path: _Path = _TOP
        self.fixed: list[float] = []  # for each open sampled group: bytes that its units share
        self.n_units = 0
        self.pending: set[int] = set()  # members that a sample stands for
        self.undo: _Path = ()  # while taking back: the path under which to count instead
        self.later: list[tuple[Groups, float]] = []  # what lies too deep for recursion

    def total(self, value: object, depth: int) -> int:
        size = self.visit(value, _BUDGET, depth)
        while self.later:
            groups, budget = self.later.pop()
            for members, n in groups:
                size += self.group(members, n, budget, depth)
        if type(value) in array_kinds:
            size -= HEADER  # the value itself: exactly its buffer
        return max(int(size), 0)

    def visit(self, value: Any, budget: float, depth: int) -> float:
        """The bytes of ``value`` and below that have not been counted; negative where it takes some back."""
        seen, path = self.seen, self.path
        if id(value) in self.pending:
            return 0  # it has its own share in the sample
        self.spent += 1
        key, own, groups = parts(value)
        counted = seen.get(key)
        if counted is None and not self.undo:
            seen[key] = path
        elif self.undo:
            if counted is None or len(counted) <= len(self.undo):
                return 0
            seen[key] = self.undo
        elif counted is None or counted == path[: len(counted)]:
            return 0
        else:
            return self.take_back(value, counted, budget, depth)
        size: float = own
        if groups:
            if depth > 0:
                for members, n in groups:
                    size += self.group(members, n, budget - 1, depth - 1)
            elif budget >= 1 and not self.undo:
                self.later.append((groups, budget - 1))
        return size

    def take_back(self, value: Any, counted: _Path, budget: float, depth: int) -> float:
        self.undo = common = _common(counted, self.path)
        size = self.visit(value, budget, depth)
        self.undo = ()
        return self.share(size, counted, common)

    def leaf(self, key: int, member: Any, counted: _Path) -> float:
        """The same as ``visit`` for a leaf that was met before."""
        if self.undo:
            if len(counted) <= len(self.undo):
                return 0
            self.seen[key] = self.undo
            return getsizeof(member)
        if counted == self.path[: len(counted)]:
            return 0
        self.seen[key] = common = _common(counted, self.path)
        return self.share(getsizeof(member), counted, common)

    def share(self, size: float, counted: _Path, common: _Path) -> float:
        """Count ``size`` once for the group of path ``common``, and take it out at the level where it was counted."""
        self.fixed[len(common) - 1] += size
        if len(counted) >= len(self.path):
            return -size
        self.fixed[len(counted) - 1] -= size
        return 0

    def group(self, members: Sequence[Any], n: int, budget: float, depth: int) -> float:
        """The bytes of ``n`` members, of which ``members`` are at hand."""
        seen, undo, path = self.seen, self.undo, self.path
        m = len(members)
        limit = max(int(2 * budget), 0) + 16
        if m > 3 * limit:  # then no two of the spread are the same
            members = [members[int(f * m)] for f in islice(GOLDEN, limit)]
            m = len(members)
        self.spent += m / 16
        weights: Iterable[float] = _ONES
        items: Iterable[tuple[int, Any]]
        if m <= _TINY and m == n:
            items = zip(map(id, members), members)  # noqa: B905 one list
        else:
            distinct = dict(zip(map(id, members), members))  # noqa: B905 one list
            items = distinct.items()
            share = 1.0
            if m < n:
                found = _weights(distinct, members, n)
                weights, share = (repeat(found), found) if isinstance(found, float) else (found, 0.0)
            kinds = set(map(type, members))
            if share and not undo and kinds <= leaves and seen.keys().isdisjoint(distinct):
                seen.update(dict.fromkeys(distinct, path))
                return _sum_leaves(distinct.values(), kinds) * share
        size = 0.0
        rest: list[Any] = []
        rest_weights: list[float] = []
        for (key, member), weight in zip(items, weights):  # noqa: B905 weights may have no end
            kind = type(member)
            if kind in leaves:
                counted = seen.get(key)
                if counted is None:
                    if not undo:
                        seen[key] = path
                        size += getsizeof(member) * weight
                elif counted is not _TOP and counted is not path:
                    size += self.leaf(key, member, counted) * weight
            elif weight == 1 and kind in flat:
                size += self.visit(member, 1, depth)
            else:
                rest.append(member)
                rest_weights.append(weight)
        if rest:
            size += self.composites(rest, rest_weights, budget - m / 16, depth, m < n)
        return size

    def composites(self, members: list[Any], weights: list[float], budget: float, depth: int, sampled: bool) -> float:
        """The bytes of members that hold others, by a sample of them if they are many."""
        n = len(members)
        if budget < _OVERDRAFT:
            return sum(parts(member)[1] * weight for member, weight in zip(members[:4], weights)) * n / min(n, 4)  # noqa: B905
        k = min(n if n <= _FEW else _SAMPLE, max(1 if budget < -2 else 2, int(budget) // 2))  # two: one shows no sharing
        if k == n and not sampled:
            return self.units(members, weights, range(n), k, budget, depth, None)
        if k < n:
            if not self.pending.isdisjoint(map(id, members)):  # some have their share in a sample around this one
                apart = [i for i, member in enumerate(members) if id(member) not in self.pending]
                members, weights = [members[i] for i in apart], [weights[i] for i in apart]
                return self.composites(members, weights, budget, depth, sampled) if apart else 0
            self.pending.update(map(id, members))
        path = self.path
        self.fixed.append(0.0)
        size = self.units(members, weights, _order(n, k), k, budget, depth, path)
        self.path = path
        return size + self.fixed.pop()

    def units(
        self,
        members: list[Any],
        weights: list[float],
        order: Iterable[int],
        k: int,
        budget: float,
        depth: int,
        path: _Path | None,
    ) -> float:
        """Visit ``k`` members, and more if they differ; below ``path``, if there is one, each as a unit of its own."""
        share = budget / k if budget > 0 else budget
        stop = self.stop
        size = visited_weight = 0.0
        visited = settled = 0
        total = squares = 0.0  # of the last `settled` members
        for i in order:
            if visited and self.spent > stop:
                break
            if visited >= k and (budget < 1 or squares * settled <= total * total * (1 + settled * _ERROR**2)):
                break
            member, weight = members[i], weights[i]
            shared = 0.0
            if path is not None:
                self.pending.discard(id(member))
                self.n_units += 1
                self.path = (*path, self.n_units)
                shared = self.fixed[-1]
            before = self.spent
            # Who spends more than his share leaves the others theirs: else the last ones would seem to hold nothing.
            fair = max(budget / (k - visited), share) if visited < k else budget / 8
            self.stop = min(stop, before + max(4 * fair, 8))
            part = self.visit(member, fair, depth) * weight
            budget -= self.spent - before
            size += part
            visited += 1
            visited_weight += weight
            if path is not None and self.fixed[-1] > shared:  # what stood out may have been what turns out to be shared
                settled, total, squares = 0, 0.0, 0.0
            else:
                settled, total, squares = settled + 1, total + part, squares + part * part
        self.stop = stop
        return size if visited == len(members) else size * sum(weights) / visited_weight


def _order(n: int, k: int) -> Iterator[int]:
    """All of ``range(n)``, first ``k`` evenly spread ones."""
    first = dict.fromkeys([int(f * n) for f in GOLDEN[:k]])
    yield from first
    for i in range(n):
        j = i * 7919 % n  # a prime beyond every n that comes here
        if j not in first:
            yield j


def _common(one: _Path, other: _Path) -> _Path:
    n = 0
    for a, b in zip(one, other):  # noqa: B905 of different lengths
        if a != b:
            break
        n += 1
    return one[:n] if n > 1 else _TOP


def _sum_leaves(members: Iterable[Any], kinds: set[type]) -> int:
    if len(kinds) == 1:  # three times as fast; leaves have no header of the garbage collector, which getsizeof would add
        (kind,) = kinds
        size_of: Callable[[Any], int] = cast(Any, kind).__sizeof__
        return sum(map(size_of, members))
    return sum(map(getsizeof, members))


def _references(distinct: dict[int, Any]) -> list[int]:
    return list(map(_refcount or id, distinct.values()))


def _own_references() -> int:
    """What a walk adds to the reference count of a member that only its container holds."""
    if _refcount is None:
        return 0
    container = (object(),)
    sample = list(container)
    return _references(dict(zip(map(id, sample), sample, strict=True)))[0] - len(container)


_OWN_REFERENCES = _own_references()


def _weights(distinct: dict[int, Any], members: Sequence[Any], n: int) -> float | list[float]:
    """How many different objects each of the sampled ones stands for; one number where it is the same for all.

    An object that occurs r times among the n is met r times as often, so its ``count * n / m`` occurrences stand for
    ``count * n / m / r`` objects. Its reference count is an upper limit of r, as it counts references from elsewhere,
    too: small ones are not trusted, nor any if they foretell repetitions that the sample does not show.
    """
    m = len(members)
    share = n / m
    counts = Counter(map(id, members)) if len(distinct) < m else None
    if _refcount is None:
        return share if counts is None else [share if counts[key] == 1 else 1.0 for key in distinct]
    references = [r - _OWN_REFERENCES for r in _references(distinct)]
    if counts is None and (max(references) <= _TRUSTED_REFERENCES or sum(min(r, n) - 1 for r in references) * m / n / 2 > 3):
        return share
    weights = []
    for key, r in zip(distinct, references, strict=True):
        count = 1 if counts is None else counts[key]
        trusted = count > 1 or r > _TRUSTED_REFERENCES
        weights.append(max(1.0, count * share / max(r, count)) if trusted else share)
    return weights


# The short ways: small containers of scalars, by far the most frequent, need none of the above.


def _quick_members(value: Any) -> int:
    if len(value) > ALL:
        return -1
    kinds = set(map(type, value))
    if not kinds <= leaves:
        return _quick_tree(value)
    if len(set(map(id, value))) < len(value):
        return getsizeof(value) + _sum_leaves(dict(zip(map(id, value), value)).values(), kinds)  # noqa: B905 one list
    return getsizeof(value) + _sum_leaves(value, kinds)


def _quick_mapping(value: Any) -> int:
    if len(value) > ALL // 2:
        return -1
    kinds, values = set(map(type, value)), value.values()
    value_kinds = set(map(type, values))
    if not (kinds <= leaves and value_kinds <= leaves):
        return _quick_tree(value)
    if not kinds.isdisjoint(value_kinds) or len(set(map(id, values))) < len(value):
        members = {id(member): member for member in [*value, *values]}
        return getsizeof(value) + _sum_leaves(members.values(), kinds | value_kinds)
    return getsizeof(value) + _sum_leaves(value, kinds) + _sum_leaves(values, value_kinds)


def _quick_tree(value: Any) -> int:
    """A few builtin containers in one another, as records are made of: each object once. -1 where there is anything else."""
    found = {id(value): value}
    containers = [value]
    for container in containers:  # those inside are put behind it
        members = [*container, *container.values()] if type(container) is dict else container
        if len(found) + len(members) > _SMALL:
            return -1
        kinds = set(map(type, members)) - leaves
        if kinds:
            if not kinds <= _CONTAINERS or not kinds <= quick.keys():  # they are registered
                return -1
            containers += [member for member in members if type(member) in kinds and id(member) not in found]
        found.update(zip(map(id, members), members))  # noqa: B905 one list
    return sum(map(getsizeof, found.values()))


_CONTAINERS = frozenset({list, tuple, set, frozenset, dict})
quick_builtins: dict[type, Callable[[Any], int]] = {
    **dict.fromkeys((list, tuple, set, frozenset), _quick_members),
    dict: _quick_mapping,
}
_size_plans.offer_quick(quick_builtins)
