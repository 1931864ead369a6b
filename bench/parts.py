"""What is measured: each part is a table of the page, with its sizes for `--quick`, by default and for `--full`."""

from __future__ import annotations

from typing import Any, NamedTuple

import files  # noqa: F401 - each registers its contestants
import stores  # noqa: F401
from contestants import CONTESTANTS

SCALES = ("quick", "default", "full")
MB, PER_KEY = "MB", "bytes a key"


class Column(NamedTuple):
    """What is measured; less is better."""

    name: str
    unit: str = "us"
    why: str = ""  # a peer may be ahead of chest; said where one is


class Part(NamedTuple):
    """``name`` holds all sizes, so that results of different sizes stand side by side."""

    name: str
    title: str
    runs: list[tuple[str, dict[str, Any]]]  # workloads with their sizes, each a process; the columns of all are the part's
    contestants: list[str]
    columns: list[Column]
    ours: str = "chest"
    keeps_folder: bool = False  # the first round fills it, the others use it
    exact: bool = False  # every round would give the same
    keys: int = 0  # how many; some contestants stop at fewer

    @property
    def family(self) -> str:
        return self.name.partition(" ")[0]


FAMILIES = {  # in the order of the page
    "pairs": (
        "Small values",
        "Records of 100 B to 4 KB (1.1 KB on average: a number, a text, bytes). Memory for a tenth of them, 8 MiB at "
        "most; hits are measured with 1 GiB. `fill` (new keys), `overwrite` and `delete` include closing the store. "
        "`cold read` is the first read of a key in random order after opening, `mixed` is nine reads for a write by "
        "popularity (Zipf 1.0). `memory` is what the process grew by while it filled.",
    ),
    "scaling": (
        "From ten thousand to ten million keys",
        "Values of 100 bytes, 8 MiB of memory, each call timed by itself: does the cost of one grow with the number of "
        "keys, and how long may a single one take? With a small page cache the store is several times as large as the "
        "memory that the kernel may use for it.",
    ),
    "opening": (
        "Opening",
        "Open, read one value, count the keys, close; the page cache is warm, the library imported.",
    ),
    "arrays": (
        "Arrays",
        "float64 arrays, memory for a quarter of them. `spill` includes closing the store. `first touch` reads one "
        "number of each array after opening, `1 % read` a slice in its middle, `change 1 page` changes one number and "
        "makes that durable as far as the contestant does. `memory` is the highest private memory while one array is "
        "written, without the array itself.",
    ),
    "frames": (
        "Data frames",
        "pandas frames of 20,000 rows: integers, floats and two columns of text. Memory for a quarter of them.",
    ),
    "nested": (
        "Nested containers",
        "A dictionary of a list of 50 dictionaries with texts, lists, tuples. Where a library does not notice changes "
        "in place, the value is set again.",
    ),
    "limit": (
        "Keeping to the memory limit",
        "Four times the limit is filled in, then read and written by popularity. Shown is the highest private memory "
        "above the limit and above what the process had with an empty store; below 0 there was room left. `dict` shows "
        "what everything takes.",
    ),
    "processes": (
        "Several processes",
        "1, 2 and 4 processes on one store; time by the clock for each operation of any of them. `count`: a shared "
        "counter is read and one more written, nothing may be lost. `write`: 100 bytes, each committed. `read`: 1,000 "
        "keys in turn. `mixed`: one process commits a write every hundred reads. rocksdict lets in one process, and the "
        "other peers lose updates.",
    ),
    "eviction": (
        "Which values leave memory: simulated",
        "What the misses and the unwritten victims of a policy cost on seeded traces (20 us + size at 1 GB/s each), "
        "against LRU. GDQ is chest's own code.",
    ),
    "files": (
        "Which values leave memory: real files",
        "The same policies, but each miss reads a file and each changed victim writes one. Seconds for the whole trace, "
        "memory for 10 % of the values.",
    ),
}

STORES = [
    "chest",
    "chest, scratch",
    "chest 0.2.3",
    "rocksdict",
    "rocksdict, raw",
    "diskcache.Cache",
    "diskcache.Index",
    "diskcache-rs",
    "shelve, gnu",
    "shelve, ndbm",
    "shelve, sqlite3",
    "shelve, dumb",
    "zict.Buffer, LMDB",
    "zict.Buffer, File",
    "sqlitedict",
    "persidict",
    "joblib",
    "LMDB, 1 transaction",
    "dict",
]
MANY = [
    name for name in STORES if name not in ("diskcache.Index", "sqlitedict")
]  # these take longest, and have a relative there
FEW = ["chest", "rocksdict", "rocksdict, raw", "zict.Buffer, LMDB", "LMDB, 1 transaction"]  # for what takes long
ARRAYS = ["chest", "chest, scratch", "chest 0.2.3", "zict.Buffer, File", "zict.Buffer, LMDB", "diskcache.Cache", "diskcache-rs"]
ARRAYS += ["rocksdict", "joblib", "LMDB, 1 transaction"]
FILES = ["write + fsync, np.load mapped", "write, np.load", "write, np.load mapped r+"]
OBJECTS = ["chest", "chest 0.2.3", "zict.Buffer, File", "zict.Buffer, LMDB", "diskcache.Cache", "diskcache-rs", "rocksdict"]
OBJECTS += [
    "sqlitedict",
    "persidict",
    "shelve, gnu",
    "shelve, sqlite3",
    "shelve, dumb",
    "joblib",
    "LMDB, 1 transaction",
    "dict",
]
POLICIES = ["GDQ", "GDQ batch", "LRU", "FIFO", "CLOCK", "SIEVE", "GDSF (heap)"]
PROCESSES = ["chest, write_through", "diskcache.Cache", "sqlitedict", "Valkey, appendfsync always", "Valkey"]
PROCESSES += ["LMDB, 1 write a transaction"]

IN_PLACE = (
    "It appends, or changes pages and syncs them only at the end; chest syncs with every commit the page of its tree that each "
    "value lies on."
)
PAIRS = [
    Column("fill", why="It appends to a log that is not synced and sorts later; chest commits and syncs each batch to a tree."),
    Column("cold read", why="It does not look whether another process has written, and it keeps no value for the next read."),
    Column("hot read", why="A dictionary has neither a limit nor a disk behind it."),
    Column("mixed", why="Its writes wait in memory or in an unsynced log, or it has no memory to keep in order."),
    Column("overwrite", why=IN_PLACE),
    Column("delete", why=IN_PLACE),
    Column(
        "items",
        why="It walks over its own order; chest gives that of insertion, so looks each key up, and notices changes in place.",
    ),
    Column("keys", why="It walks over its own order; chest gives the order of insertion and rebuilds each key as it was."),
    Column("in", why="It asks a dictionary, or a filter, in memory; chest asks the index, and whether others have written."),
    Column("len", why="It counts in memory."),
    Column("disk", PER_KEY, "It packs or compresses its files; a tree of pages is never quite full."),
    Column("memory", MB, "It keeps nothing in memory but one small buffer; chest uses the memory that it was given."),
]
OPENING = [
    Column(
        "open",
        why="It opens one file, or leaves the work to the first read; chest takes locks and looks for what a crash left.",
    ),
    Column("get"),
    Column("len"),
    Column("open + get + len"),
    Column("close"),
    Column("memory", PER_KEY),
    Column("disk", PER_KEY, "It packs or compresses its files; a record of chest has a checksum and a place in the order."),
]
SCALING = [
    Column("fill", why=PAIRS[0].why),
    Column("longest set", "ms", "All its work is done at the commit: see `closing`, or on other threads."),
    Column("closing", "ms"),
    Column("read", why=PAIRS[1].why),
    Column("longest get", "ms"),
    Column("overwrite", why=IN_PLACE),
    Column("disk", PER_KEY, PAIRS[10].why),
]
ARRAY_COLUMNS = [
    Column("spill", why="It does not sync; chest does, and so waits for the disk."),
    Column("first touch", why="It maps a file whose name it was told; chest looks it up and checks it."),
    Column("1 % read", why="As the first touch."),
    Column("full read", why="As the first touch; the rest is how fast the kernel fills the pages of a mapping, or a buffer."),
    Column("prefetch"),
    Column(
        "change 1 page", why="It does not sync, or writes in place, unsafe in a crash; chest writes a new file and syncs it."
    ),
    Column("memory", MB, "It hands the buffer to the system as it is."),
]
OBJECT_COLUMNS = [
    Column("write", why="It pickles and does not sync; chest walks through the value to measure it, and hashes it."),
    Column("read", why="It unpickles and no more; chest walks through the value to measure it, and checks a checksum."),
    Column("change inside", why="It is told what has changed; chest looks through all that was handed out."),
]
LIMIT_COLUMNS = [
    Column("small", MB, "What chest keeps beside its values: the library's own buffers and the interpreter's free lists."),
    Column("arrays", MB, "Half its memory stays empty."),
    Column("nested", MB, "It counts more than its values take, and so keeps fewer."),
]
PROCESS_COLUMNS = [
    Column(
        f"{work}, {n}",
        why={
            "count": "It does not sync; or it has no dictionary to keep in order.",
            "write": "It does not sync; or it has no dictionary to keep in order.",
        }.get(work, "It answers from a snapshot, and looks for others' writes less often."),
    )
    for work in ("count", "write", "read", "mixed")
    for n in (1, 2, 4)
]


def _count(n: int) -> str:
    return f"{n:,}"


def _small(n: int) -> Part:
    names = FEW if n >= 5_000_000 else MANY if n > 20_000 else STORES
    return Part(f"pairs {n}", f"{_count(n)} small values", [("pairs", {"n": n})], names, PAIRS, keys=n)


def _opening(n: int) -> Part:
    names = [name for name in (FEW if n >= 5_000_000 else STORES) if CONTESTANTS[name].persists]
    title = f"{_count(n)} keys"
    return Part(f"opening {n}", title, [("opening", {"n": n})], names, OPENING, keeps_folder=True, keys=n)


def _scaling(n: int, cache_mb: int = 0) -> Part:
    name, title = f"scaling {n}", f"{_count(n)} values of 100 bytes"
    sizes = {"n": n}
    if cache_mb:
        name, title = f"{name} cache {cache_mb}", f"{title}, page cache limited to {cache_mb} MiB"
        sizes["cache_mb"] = cache_mb
    return Part(name, title, [("scaling", sizes)], ["chest", "rocksdict", "LMDB, 1 transaction"], SCALING, keys=n)


def _arrays(n: int, megabytes: int) -> Part:
    title = f"{n} arrays of {megabytes} MiB"
    run = ("arrays", {"n": n, "megabytes": megabytes})
    return Part(f"arrays {megabytes}", title, [run], ARRAYS + FILES, ARRAY_COLUMNS)


def _objects(kind: str, n: int) -> Part:
    run = ("objects", {"kind": kind, "n": n})
    title = f"{_count(n)} {'frames' if kind == 'frames' else 'containers'}"
    return Part(f"{kind} {n}", title, [run], OBJECTS, OBJECT_COLUMNS)


def _limit(megabytes: int) -> Part:
    runs = [("limit", {"kind": column.name, "megabytes": megabytes}) for column in LIMIT_COLUMNS]
    names = [name for name in STORES if CONTESTANTS[name].bounded] + ["dict"]
    return Part(f"limit {megabytes}", f"a limit of {megabytes} MiB", runs, names, LIMIT_COLUMNS)


def _processes(divisor: int) -> Part:
    counts = {"count": 300, "write": 500, "read": 20_000, "mixed": 10_000}
    runs = [
        ("processes", {"work": work, "n_processes": n, "n": max(10, count // divisor), "n_keys": 1000 // divisor})
        for work, count in counts.items()
        for n in (1, 2, 4)
    ]
    title = "1, 2 and 4 processes" if divisor == 1 else f"1, 2 and 4 processes, a {divisor}th of the operations"
    return Part(f"processes {divisor}", title, runs, PROCESSES, PROCESS_COLUMNS, ours="chest, write_through")


def _eviction(n: int) -> Part:
    return Part(
        f"eviction {n}", f"{_count(n)} requests a trace", [("simulated", {"n": n})], POLICIES, [], ours="GDQ", exact=True
    )


def _files(n: int) -> Part:
    names = [name for name in POLICIES if name != "SIEVE"]
    return Part(f"files {n}", f"{_count(n)} requests a trace", [("with_files", {"n": n})], names, [], ours="GDQ batch")


def parts(scale: str) -> list[Part]:
    """What a run of this scale measures; the same part may belong to several."""
    default, full = scale != "quick", scale == "full"
    found = [_small(1_000), _small(10_000)]
    if default:
        found += [_small(100_000)]
    if full:
        found += [_small(1_000_000), _small(10_000_000)]
    found += [_scaling(10_000)]
    if default:
        found += [_scaling(100_000), _scaling(1_000_000), _scaling(1_000_000, 128)]
    if full:
        found += [_scaling(10_000_000), _scaling(10_000_000, 512)]
    found += [_opening(100), _opening(10_000)]
    if default:
        found += [_opening(300_000)]
    if full:
        found += [_opening(1_000_000), _opening(10_000_000)]
    found += [_arrays(16, 1)]
    found += [_arrays(8, 32)] if default else [_arrays(4, 8)]
    if full:
        found += [_arrays(4, 1024)]
    found += [_objects("frames", 32 if default else 8), _objects("nested", 2_000 if default else 300)]
    found += [_limit(32 if default else 16), _processes(1 if default else 10)]
    found += [_eviction(100_000 if default else 10_000), _files(10_000 if default else 2_000)]
    return found


def all_parts() -> dict[str, Part]:
    """Of all scales, in the order of the page."""
    found: dict[str, Part] = {}
    for scale in SCALES:
        found |= {part.name: part for part in parts(scale)}
    order = list(FAMILIES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].family)))
