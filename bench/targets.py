"""What chest is meant to reach, and whether the results show it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import geometric_mean
from typing import NamedTuple

from parts import LIMIT_COLUMNS, Part, all_parts
from results import Results

ROCKS = ["rocksdict", "rocksdict, raw"]
LMDB = ["LMDB, 1 transaction"]
MAPPED = ["write + fsync, np.load mapped"]

Read = Callable[[str, str, str], "float | None"]  # part, contestant, column: the best of the rounds, or the median
Found = tuple[float, str]  # the number, and what it was measured on
Find = Callable[[Results, Read, list[Part]], "Found | None"]


class Target(NamedTuple):
    text: str
    bound: float
    unit: str  # "x" for a ratio
    find: Find


def _of(family: str, column: str, peers: list[str] | None = None, only: str = "") -> Find:
    """Chest's number, or how many times that of the best of the peers, in the largest part that has both."""

    def find(results: Results, read: Read, parts: list[Part]) -> Found | None:
        for part in reversed(parts):
            if part.family != family or not part.name.startswith(only):
                continue
            ours = read(part.name, "chest", column)
            theirs = [value for name in peers or [] if (value := read(part.name, name, column))]
            if ours is not None and (theirs or not peers):
                return (ours / min(theirs) if theirs else ours), part.title
        return None

    return find


def _opening(results: Results, read: Read, parts: list[Part]) -> Found | None:
    column = "open + get + len"
    few = read("opening 100", "chest", column)
    found = [(many, part) for part in parts if part.family == "opening" and (many := read(part.name, "chest", column))]
    if not few or len(found) < 2:
        return None
    return found[-1][0] / few, found[-1][1].title


def _limit(results: Results, read: Read, parts: list[Part]) -> Found | None:
    for part in reversed(parts):
        values = [
            value for c in LIMIT_COLUMNS if part.family == "limit" and (value := read(part.name, "chest", c.name)) is not None
        ]
        if values:
            return max(values), part.title
    return None


def against_lru(results: Results, part: str, policy: str, read: Read) -> dict[str, float]:
    """The cost of a policy against LRU, for all traces and budgets that both have."""
    cells = results.parts.get(part, {}).get("LRU")
    columns = [column for column in cells.rounds if not column.startswith("hits: ")] if cells else []
    both = [(column, read(part, policy, column), read(part, "LRU", column)) for column in columns]
    return {column: ours / lru for column, ours, lru in both if ours is not None and lru}


def _eviction(of: Callable[[list[float]], float]) -> Find:
    def find(results: Results, read: Read, parts: list[Part]) -> Found | None:
        for part in reversed(parts):
            if part.family == "eviction" and (found := against_lru(results, part.name, "GDQ", read)):
                return of(list(found.values())), part.title
        return None

    return find


TARGETS = [
    Target("a hit", 0.15, "us", _of("pairs", "hot read")),
    Target("a hit, against zict", 0.12, "x", _of("pairs", "hot read", ["zict.Buffer, LMDB", "zict.Buffer, File"])),
    Target("filling small values beyond memory, against rocksdict", 0.8, "x", _of("pairs", "fill", ROCKS)),
    Target("the same, against LMDB in one transaction", 1.6, "x", _of("pairs", "fill", LMDB)),
    Target("a cold small read, against rocksdict", 1.0, "x", _of("pairs", "cold read", ROCKS)),
    Target("the same, against LMDB in one transaction", 1.5, "x", _of("pairs", "cold read", LMDB)),
    Target("items(), against rocksdict", 1.0, "x", _of("pairs", "items", ROCKS)),
    Target("overwriting, against rocksdict", 0.8, "x", _of("pairs", "overwrite", ROCKS)),
    Target("spilling an array, against a raw write with fsync", 1.1, "x", _of("arrays", "spill", MAPPED, "arrays 32")),
    Target("memory beside the array meanwhile", 2.0, "MB", _of("arrays", "memory", None, "arrays 32")),
    Target("first touch of an array, against np.load mapped", 1.3, "x", _of("arrays", "first touch", MAPPED, "arrays 32")),
    Target(
        "first touch of an array, against diskcache", 0.01, "x", _of("arrays", "first touch", ["diskcache.Cache"], "arrays 32")
    ),
    Target("open, count and read one of ten million keys, against a hundred", 2.0, "x", _opening),
    Target("private memory above available_memory", 25.0, "MB", _limit),
    Target("I/O cost of the eviction policy against LRU, mean", 0.92, "x", _eviction(geometric_mean)),
    Target("the same, worst of all traces and budgets", 1.10, "x", _eviction(max)),
]


class Outcome(NamedTuple):
    target: Target
    best: float | None
    median: float | None
    where: str

    @property
    def met(self) -> bool | None:
        return None if self.best is None else self.best <= self.target.bound


def outcomes(results: Results) -> list[Outcome]:
    parts = list(all_parts().values())
    found = []
    for target in TARGETS:
        best, median = target.find(results, results.best, parts), target.find(results, results.median, parts)
        found.append(Outcome(target, best and best[0], median and median[0], best[1] if best else ""))
    return found
