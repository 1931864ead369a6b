"""The libraries that are compared, each behind the same few functions, each as its own documentation opens it.

A contestant is a function of a folder and a memory budget; it opens what is in the folder and returns a ``Handle``.
Where a library stores bytes only, the pickling that its user would write is added, so that all do the same work.
Settings are the defaults but where they would lose data (a size limit that evicts) or where a budget can be given.
"""

from __future__ import annotations

import importlib
import os
import pickle
import shelve
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MEMORY = 8 << 20  # what those with a memory tier may keep: a small part of what is stored


class Handle(NamedTuple):
    """An opened store. ``close`` returns when everything is as durable as the library makes it by itself."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]
    items: Callable[[], Iterable[tuple[Any, Any]]]
    close: Callable[[], None]
    count: Callable[[], int] | None = None
    flush: Callable[[], None] = lambda: None  # after values were changed that `get` returned


class Contestant(NamedTuple):
    name: str
    open: Callable[[str, int], Handle]
    persists: bool  # can be opened again
    survives: str  # what its data survive once `close` has returned
    in_place: bool = False  # what was changed in place needs not be set again


CONTESTANTS: dict[str, Contestant] = {}


def contestant(name: str, survives: str, **traits: Any) -> Callable[[Callable[[str, int], Handle]], None]:
    def register(function: Callable[[str, int], Handle]) -> None:
        CONTESTANTS[name] = Contestant(name, function, traits.pop("persists", True), survives, **traits)

    return register


def dumps(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)


@contestant("chest", "power cut", in_place=True)
def _chest(folder: str, memory: int) -> Handle:
    from chest import Chest

    c: Any = Chest(path=folder, available_memory=memory)
    return Handle(c.__getitem__, c.__setitem__, c.items, c.close, c.__len__, c.sync)


@contestant("chest, scratch", "nothing", persists=False, in_place=True)
def _scratch(folder: str, memory: int) -> Handle:
    from chest import Chest

    c: Any = Chest(available_memory=memory)
    return Handle(c.__getitem__, c.__setitem__, c.items, c.flush, c.__len__, c.flush)


@contestant("LMDB, 1 transaction", "power cut")
def _lmdb(folder: str, memory: int) -> Handle:
    import lmdb

    env = lmdb.open(folder, map_size=1 << 36)
    writer: list[Any] = []
    reader: list[Any] = []

    def get(key: str) -> Any:
        if not reader:
            commit()
            reader.append(env.begin(buffers=True))
        return pickle.loads(reader[0].get(key.encode()))

    def put(key: str, value: Any) -> None:
        if not writer:
            stop_reading()
            writer.append(env.begin(write=True))
        writer[0].put(key.encode(), dumps(value))

    def stop_reading() -> None:
        if reader:
            reader.pop().abort()

    def commit() -> None:
        if writer:
            writer.pop().commit()

    def items() -> Iterable[tuple[str, Any]]:
        commit()
        with env.begin(buffers=True) as transaction:
            for key, data in transaction.cursor():
                yield bytes(key).decode(), pickle.loads(data)

    def close() -> None:
        stop_reading()
        commit()
        env.close()

    return Handle(get, put, items, close, lambda: env.stat()["entries"])


@contestant("rocksdict", "kill -9")
def _rocksdict(folder: str, memory: int) -> Handle:
    from rocksdict import Rdict

    db = Rdict(folder)
    return Handle(db.__getitem__, db.__setitem__, db.items, db.close)


@contestant("rocksdict, raw", "kill -9")
def _rocksdict_raw(folder: str, memory: int) -> Handle:
    from rocksdict import Options, Rdict

    db = Rdict(folder, Options(raw_mode=True))

    def get(key: str) -> Any:
        return pickle.loads(db[key.encode()])

    def put(key: str, value: Any) -> None:
        db[key.encode()] = dumps(value)

    def items() -> Iterable[tuple[str, Any]]:
        for key, data in db.items():
            yield key.decode(), pickle.loads(data)

    return Handle(get, put, items, db.close)


@contestant("diskcache.Cache", "kill -9")
def _cache(folder: str, memory: int) -> Handle:
    import diskcache

    cache = diskcache.Cache(folder, eviction_policy="none", size_limit=1 << 40)

    def items() -> Iterable[tuple[str, Any]]:
        for key in cache:
            yield key, cache[key]

    return Handle(cache.__getitem__, cache.__setitem__, items, cache.close, cache.__len__)


@contestant("diskcache.Index", "kill -9")
def _index(folder: str, memory: int) -> Handle:
    import diskcache

    index = diskcache.Index(folder)
    return Handle(index.__getitem__, index.__setitem__, index.items, index.cache.close, index.__len__)


def best_dbm() -> str:
    """The fastest dbm that this Python was built with."""
    for name in ("dbm.gnu", "dbm.ndbm", "dbm.sqlite3"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name
    return "dbm.dumb"


@contestant(f"shelve ({best_dbm()})", "closing")
def _shelve(folder: str, memory: int) -> Handle:
    os.makedirs(folder, exist_ok=True)
    shelf = shelve.Shelf(importlib.import_module(best_dbm()).open(os.path.join(folder, "shelf"), "c"), protocol=5)
    return Handle(shelf.__getitem__, shelf.__setitem__, shelf.items, shelf.close, shelf.__len__)


def _weight(key: Any, value: Any) -> float:
    data = value["data"] if isinstance(value, dict) else value
    return float(getattr(data, "nbytes", 0) or sys.getsizeof(data)) + 300


def _buffer(slow: Any, memory: int, close: Callable[[], None]) -> Handle:
    import zict

    buffer: Any = zict.Buffer({}, zict.Func(dumps, pickle.loads, slow), memory, _weight)

    def flush() -> None:
        buffer.fast.evict_until_below_target(0)

    def finish() -> None:
        flush()
        close()

    return Handle(buffer.__getitem__, buffer.__setitem__, buffer.items, finish, buffer.__len__, flush)


@contestant("zict.Buffer, File", "kill -9")
def _zict_file(folder: str, memory: int) -> Handle:
    import zict

    return _buffer(zict.File(folder), memory, lambda: None)


@contestant("zict.Buffer, LMDB", "kill -9")
def _zict_lmdb(folder: str, memory: int) -> Handle:
    import zict

    slow = zict.LMDB(folder)
    return _buffer(slow, memory, slow.close)


@contestant("sqlitedict", "kill -9")
def _sqlitedict(folder: str, memory: int) -> Handle:
    from sqlitedict import SqliteDict

    os.makedirs(folder, exist_ok=True)
    db = SqliteDict(os.path.join(folder, "db"))

    def close() -> None:
        db.commit()
        db.close()

    return Handle(db.__getitem__, db.__setitem__, db.items, close, db.__len__, db.commit)


@contestant("dict", "nothing", persists=False, in_place=True)
def _dict(folder: str, memory: int) -> Handle:
    d: dict[Any, Any] = {}
    return Handle(d.__getitem__, d.__setitem__, d.items, lambda: None, d.__len__)


# --- for arrays only


def _array_files(folder: str, synced: bool, mapped: bool) -> Handle:
    import numpy as np

    os.makedirs(folder, exist_ok=True)

    def put(key: str, value: Any) -> None:
        # A new file in the place of the old one: writing into a file that is mapped ends in SIGBUS.
        path = os.path.join(folder, key + ".npy")
        with open(path + ".new", "wb") as file:
            np.save(file, value)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(path + ".new", path)
        if synced:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def get(key: str) -> Any:
        return np.load(os.path.join(folder, key + ".npy"), mmap_mode="c" if mapped else None)

    def items() -> Iterable[tuple[str, Any]]:
        for name in os.listdir(folder):
            yield name[:-4], get(name[:-4])

    return Handle(get, put, items, lambda: None, lambda: len(os.listdir(folder)))


@contestant("np.save + fsync, mapped", "power cut")
def _mapped(folder: str, memory: int) -> Handle:
    return _array_files(folder, synced=True, mapped=True)


@contestant("np.save, np.load", "kill -9")
def _plain(folder: str, memory: int) -> Handle:
    return _array_files(folder, synced=False, mapped=False)


@contestant("np.save, mapped r+", "kill -9", in_place=True)
def _shared(folder: str, memory: int) -> Handle:
    """Written through a shared mapping: nothing is copied, and a crash in the middle leaves half of a change."""
    import numpy as np

    handle = _array_files(folder, synced=False, mapped=True)
    opened: list[Any] = []

    def get(key: str) -> Any:
        array = np.load(os.path.join(folder, key + ".npy"), mmap_mode="r+")
        opened.append(array)
        return array

    def flush() -> None:
        for array in opened:
            array.flush()
        opened.clear()

    return handle._replace(get=get, close=opened.clear, flush=flush)


@contestant("joblib, mapped", "kill -9")
def _joblib(folder: str, memory: int) -> Handle:
    import joblib

    os.makedirs(folder, exist_ok=True)

    def put(key: str, value: Any) -> None:
        path = os.path.join(folder, key)
        joblib.dump(value, path + ".new")
        os.replace(path + ".new", path)  # as above

    def get(key: str) -> Any:
        return joblib.load(os.path.join(folder, key), mmap_mode="c")

    def items() -> Iterable[tuple[str, Any]]:
        for key in os.listdir(folder):
            yield key, get(key)

    return Handle(get, put, items, lambda: None, lambda: len(os.listdir(folder)))


ARRAYS_ONLY = ["np.save + fsync, mapped", "np.save, np.load", "np.save, mapped r+", "joblib, mapped"]
SMALL = [name for name in CONTESTANTS if name not in ARRAYS_ONLY]
ARRAYS = ["chest", "chest, scratch", *ARRAYS_ONLY]
ARRAYS += ["LMDB, 1 transaction", "rocksdict", "diskcache.Cache", "zict.Buffer, File"]
OPENING = [name for name in SMALL if CONTESTANTS[name].persists]
