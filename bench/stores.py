"""Chest and the key-value stores that it is compared with."""

from __future__ import annotations

import importlib
import os
import pickle
import shelve
import sys
from collections.abc import Callable, Iterable
from typing import Any

from contestants import A_FILE_EACH, PEERS, Handle, contestant, dumps, handle

KILL, POWER = "kill -9", "power cut"


@contestant("chest", "nothing", POWER, in_place=True, bounded=True)
def _chest(folder: str, memory: int) -> Handle:
    from chest import Chest

    c: Any = Chest(path=folder, available_memory=memory)
    return handle(c, c.close, flush=c.sync, prefetch=c.prefetch)


@contestant("chest, scratch", "nothing", "nothing", persists=False, in_place=True, bounded=True)
def _scratch(folder: str, memory: int) -> Handle:
    from chest import Chest

    c: Any = Chest(available_memory=memory)
    return handle(c, c.flush, flush=c.flush, prefetch=c.prefetch)


@contestant("chest 0.2.3", "nothing", KILL, bounded=True, path=str(PEERS / "chest02"), **A_FILE_EACH)
def _chest02(folder: str, memory: int) -> Handle:
    """As released in 2014, whose only change is the name that Python 3.10 took away from under it."""
    import collections
    import collections.abc
    import warnings

    collections.MutableMapping = collections.abc.MutableMapping  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an escape in a string that newer Pythons complain about
        import chest
    if not chest.__version__.startswith("0.2"):
        raise ImportError(f"this is chest {chest.__version__}: pip install --target {PEERS / 'chest02'} chest==0.2.3")
    c: Any = chest.Chest(path=folder, available_memory=memory)
    return handle(c, c.flush, flush=c.flush, prefetch=c.prefetch)


@contestant("rocksdict", KILL, POWER)
def _rocksdict(folder: str, memory: int) -> Handle:
    from rocksdict import Rdict

    db = Rdict(folder)
    return handle(db, db.close, keys=db.keys, count=None)


@contestant("rocksdict, raw", KILL, POWER)
def _rocksdict_raw(folder: str, memory: int) -> Handle:
    from rocksdict import Options, Rdict

    db = Rdict(folder, Options(raw_mode=True))

    def put(key: str, value: Any) -> None:
        db[key.encode()] = dumps(value)

    def delete(key: str) -> None:
        del db[key.encode()]

    return Handle(
        lambda key: pickle.loads(db[key.encode()]),
        put,
        lambda: ((key.decode(), pickle.loads(data)) for key, data in db.items()),
        db.close,
        delete,
        lambda: (key.decode() for key in db.keys()),  # noqa: SIM118 - it is no dictionary
        lambda key: key.encode() in db,
    )


def _each(mapping: Any) -> Callable[[], Iterable[tuple[Any, Any]]]:
    return lambda: ((key, mapping[key]) for key in mapping)


@contestant("diskcache.Cache", KILL, POWER, closed_large=KILL, most=1_000_000, why_most="time")
def _cache(folder: str, memory: int) -> Handle:
    import diskcache

    cache = diskcache.Cache(folder, eviction_policy="none", size_limit=1 << 40)
    return handle(cache, cache.close, items=_each(cache))


@contestant("diskcache.Index", KILL, POWER, closed_large=KILL, most=1_000_000, why_most="time")
def _index(folder: str, memory: int) -> Handle:
    import diskcache

    index = diskcache.Index(folder)
    return handle(index, index.cache.close)


@contestant("diskcache-rs", KILL, POWER, closed_large=KILL, most=1_000_000, why_most="time")
def _diskcache_rs(folder: str, memory: int) -> Handle:
    import diskcache_rs

    cache = diskcache_rs.Cache(folder, size_limit=1 << 40, count_limit=1 << 40)
    return handle(cache, cache.close, items=_each(cache))


def _shelves() -> None:
    """One for each dbm: what this Python was not built with is "not here"."""
    for module, traits in (
        ("gnu", {}),
        ("ndbm", {}),
        ("sqlite3", {"most": 1_000_000, "why_most": "time"}),
        ("dumb", {"most": 20_000, "why_most": "each deletion writes the whole index again"}),
    ):

        def open_shelf(folder: str, memory: int, name: str = f"dbm.{module}") -> Handle:
            dbm: Any = importlib.import_module(name)
            os.makedirs(folder, exist_ok=True)
            shelf = shelve.Shelf(dbm.open(os.path.join(folder, "shelf"), "c"), protocol=5)
            return handle(shelf, shelf.close)

        contestant(f"shelve, {module}", KILL if module == "sqlite3" else "nothing", KILL, **traits)(open_shelf)


_shelves()


def weight(value: Any) -> int:
    """Of a value in memory, as a careful user of zict would write it."""
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(map(weight, value)) + sum(map(weight, value.values()))
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(map(weight, value))
    if hasattr(value, "memory_usage"):
        return int(value.memory_usage(deep=True).sum())
    return int(getattr(value, "nbytes", 0)) or sys.getsizeof(value)


def _buffer(slow: Any, memory: int, close: Callable[[], None]) -> Handle:
    import zict

    buffer: Any = zict.Buffer({}, zict.Func(dumps, pickle.loads, slow), memory, lambda key, value: weight(value))

    def flush() -> None:
        buffer.fast.evict_until_below_target(0)

    def finish() -> None:
        flush()
        close()

    return handle(buffer, finish, flush=flush)


@contestant("zict.Buffer, File", "nothing", KILL, bounded=True, **A_FILE_EACH)
def _zict_file(folder: str, memory: int) -> Handle:
    import zict

    return _buffer(zict.File(folder), memory, lambda: None)


@contestant("zict.Buffer, LMDB", "nothing", KILL, bounded=True, most=1_000_000, why_most="time")
def _zict_lmdb(folder: str, memory: int) -> Handle:
    import zict

    slow = zict.LMDB(folder)
    return _buffer(slow, memory, slow.close)


@contestant("sqlitedict", "nothing", KILL, most=1_000_000, why_most="time")
def _sqlitedict(folder: str, memory: int) -> Handle:
    from sqlitedict import SqliteDict

    os.makedirs(folder, exist_ok=True)
    db = SqliteDict(os.path.join(folder, "db"))

    def close() -> None:
        db.commit()
        db.close()

    return handle(db, close, flush=db.commit)


@contestant("persidict", POWER, POWER, most=2_000, why_most="it makes a file for each key, and syncs it")
def _persidict(folder: str, memory: int) -> Handle:
    from persidict import FileDirDict

    d = FileDirDict(base_dir=folder)
    return handle(d, lambda: None)


# --- the limits


@contestant("LMDB, 1 transaction", "nothing", POWER, limit=True)
def _lmdb(folder: str, memory: int) -> Handle:
    """All writes one after the other are one transaction, and so are all reads."""
    import lmdb

    env = lmdb.open(folder, map_size=1 << 38)
    writer: list[Any] = []
    reader: list[Any] = []

    def reading() -> Any:
        if not reader:
            if writer:
                writer.pop().commit()
            reader.append(env.begin(buffers=True))
        return reader[0]

    def writing() -> Any:
        if not writer:
            if reader:
                reader.pop().abort()
            writer.append(env.begin(write=True))
        return writer[0]

    def close() -> None:
        if reader:
            reader.pop().abort()
        if writer:
            writer.pop().commit()
        env.close()

    return Handle(
        lambda key: pickle.loads(reading().get(key.encode())),
        lambda key, value: writing().put(key.encode(), dumps(value)),
        lambda: ((bytes(key).decode(), pickle.loads(data)) for key, data in reading().cursor()),
        close,
        lambda key: writing().delete(key.encode()),
        lambda: (bytes(key).decode() for key in reading().cursor().iternext(values=False)),
        lambda key: reading().get(key.encode()) is not None,
        lambda: reading().stat()["entries"],
    )


@contestant("dict", "nothing", "nothing", persists=False, in_place=True, limit=True)
def _dict(folder: str, memory: int) -> Handle:
    d: dict[Any, Any] = {}
    return handle(d, lambda: None)
