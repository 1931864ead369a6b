"""Forks under load: threads of the parent write, read and iterate while it forks, and children are killed in the middle.

Each value says which key it belongs to and carries a checksum, so that a wrong one is noticed wherever it is read.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # now: a module that a thread is importing while the process forks is locked in the child for ever
import pytest
from counts import count

from chest import Chest
from forking import DEADLINE_S, Forked, needs_fork

pytestmark = [needs_fork, pytest.mark.torture]

N_KEYS = 40  # of each thread
SIZES = (10, 200, 3000, 40_000)


def _value(thread: Any, key: int, n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    data = rng.integers(0, 255, SIZES[(key + n) % len(SIZES)], dtype=np.uint8)
    return {"key": (thread, key), "n": n, "data": data, "sum": int(data.sum())}


def _wrong(key: Any, value: dict[str, Any]) -> bool:
    return bool(value["key"] != key or int(value["data"].sum()) != value["sum"])


class Load:
    """Three threads that write, and one that reads and iterates, until ``end``; what they have written last is in ``last``."""

    def __init__(self, chest: Chest[Any, Any]) -> None:
        self.chest = chest
        self.last: dict[Any, int] = {}
        self.wrong: list[Any] = []
        self.n = 0
        self._end = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(self._write, thread)) for thread in range(3)]
        self.threads.append(threading.Thread(target=self._run, args=(self._read, 3)))

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a thread of the parent hangs"

    def _run(self, work: Callable[[int, random.Random], None], number: int) -> None:
        rng = random.Random(number)
        try:
            while not self._end.is_set():
                work(number, rng)
                self.n += 1
        except BaseException as error:
            self.wrong.append(error)

    def _write(self, thread: int, rng: random.Random) -> None:
        key, n = (thread, rng.randrange(N_KEYS)), rng.randrange(1 << 30)
        kind = rng.random()
        if kind < 0.8:
            self.chest[key] = _value(thread, key[1], n)
            self.last[key] = n
        elif kind < 0.85:
            self.chest.pop(key, None)
            self.last.pop(key, None)
        elif kind < 0.95:
            self.chest.sync()
        else:
            with self.chest.transaction():
                self.chest[key] = _value(thread, key[1], n)
            self.last[key] = n

    def _read(self, _: int, rng: random.Random) -> None:
        if rng.random() < 0.1:
            items = [(key, value) for key, value in self.chest.items() if key[0] != "child"]
        else:
            key = (rng.randrange(3), rng.randrange(N_KEYS))
            value = self.chest.get(key)
            items = [] if value is None else [(key, value)]
        self.wrong += [key for key, value in items if _wrong(key, value)]


def _child(chest: Chest[Any, Any], number: int) -> tuple[int, list[Any]]:
    wrong = [key for key, value in chest.items() if _wrong(key, value)]
    wrong += [key for key in list(chest)[:20] if (value := chest.get(key)) is not None and _wrong(key, value)]
    chest["child", number] = _value("child", number, number)
    if number % 2:
        chest.sync()
    else:
        with chest.transaction():
            chest["child", -number] = _value("child", -number, number)
    if number % 3 == 0:
        chest.close()
    return len(wrong), wrong[:5]


@pytest.mark.parametrize("kind", ["path", "scratch"])
def test_forks_under_writing_threads(tmp_path: Path, kind: str, scale: Callable[[int, int], int]) -> None:
    n_forks = scale(20, 200)
    rng = random.Random(n_forks)
    chest = Chest[Any, Any](path=tmp_path / "c" if kind == "path" else None, available_memory=300_000)
    answered: set[int] = set()
    slowest = 0.0
    with Load(chest) as load:
        for start in range(1, n_forks + 1, 4):
            children = []
            for number in range(start, min(start + 4, n_forks + 1)):
                begun = time.monotonic()
                children.append((number, Forked(lambda number=number: _child(chest, number))))
                slowest = max(slowest, time.monotonic() - begun)
            for number, child in children:
                with child:
                    if rng.random() < 0.25:  # in whatever it is doing
                        time.sleep(rng.random() * 0.02)
                        os.kill(child.pid, signal.SIGKILL)
                        child.wait()
                    else:
                        assert child.result() == (0, [])
                        answered.add(number)
            assert not load.wrong, load.wrong
    assert load.n > n_forks
    chest.sync()
    found = {key: value["n"] for key, value in chest.items() if key[0] != "child"}
    assert found == load.last, set(found.items()) ^ set(load.last.items())
    assert not [key for key, value in chest.items() if _wrong(key, value)]
    assert {number for _, number in (key for key in chest if key[0] == "child") if number > 0} >= answered
    assert all(("child", -number) in chest for number in answered if number % 2 == 0)
    env = chest._store.index._env._env  # type: ignore[attr-defined]
    env.reader_check()
    assert env.readers().startswith("(no"), env.readers()
    with Chest[Any, Any](path=chest.path) as other:
        assert len(other) == len(chest)
    keys = os.path.join(chest.path, ".keys")
    done = subprocess.run([sys.executable, "-m", "lmdb", "verify", "-e", keys], capture_output=True, text=True)
    assert done.returncode == 0, done
    chest.close()
    assert kind == "path" or not os.path.exists(chest.path)
    assert slowest < DEADLINE_S
    count("forks under writing threads, a quarter of the children killed", n_forks, n_forks)
