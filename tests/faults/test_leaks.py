"""Opening, writing and closing, over and over: descriptors, threads, files, reader slots and memory stay flat."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import oracle
import pytest

from chest import Chest

pytestmark = [pytest.mark.torture, pytest.mark.slow]

LIKE_NEW = 200_000  # bytes that tracemalloc may find more after many rounds than after a few
PAGES = 24 << 20  # bytes that RssAnon may: malloc keeps freed memory


def _n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _own_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def _n_readers(path: Path) -> int:
    """Reader slots in use, asked after every chest on the folder is closed (a process may open it only once)."""
    with lmdb.open(str(path / ".keys"), max_dbs=10, lib_version=0, readonly=True) as env:
        return sum(1 for line in env.readers().splitlines() if line.split()[:1] and line.split()[0].isdigit())


def _n_files(path: Path) -> int:
    return sum(len(files) + len(folders) for _, folders, files in os.walk(path))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")


class Flat:
    """Descriptors, threads and memory after a warm-up, to be found again at the end."""

    def __init__(self) -> None:
        gc.collect()
        self.before = (_n_descriptors(), threading.active_count())
        self.own = _own_bytes()
        tracemalloc.start()
        self.traced = 0

    def mark(self) -> None:
        """Some rounds have been made under tracemalloc: from here on nothing may be added."""
        gc.collect()
        self.traced = tracemalloc.get_traced_memory()[0]

    def check(self) -> None:
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - self.traced
        tracemalloc.stop()
        assert (_n_descriptors(), threading.active_count()) == self.before
        assert grown < LIKE_NEW
        assert _own_bytes() - self.own < PAGES


def _use(chest: Chest[Any, Any], n: int) -> None:
    """What a short life does: small and large values, a read of each, a change in place, a deletion, an iteration."""
    chest["small"] = [n]
    chest["large"] = np.full(10_000, n)
    chest["unequal", n % 7] = {"n": n, "a": np.full(9_000, n)}
    chest.flush()
    assert chest["small"] == [n]
    assert chest["large"][-1] == n
    chest["large"][0] = -n
    chest["small"].append(n)
    chest.pop(("unequal", (n + 3) % 7), None)
    assert len(list(chest)) == len(chest)
    if n % 3 == 0:
        chest.sync()


@needs_proc
@pytest.mark.parametrize("kind", ["path", "scratch"])
def test_many_lives_of_a_chest_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scale: Callable[[int, int], int]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "chest" if kind == "path" else None

    def life(n: int) -> None:
        with Chest[Any, Any](path=path) as chest:
            _use(chest, n)

    for n in range(30):
        life(n)
    files = _n_files(tmp_path)
    flat = Flat()
    for n in range(40):
        life(n)
    flat.mark()
    for n in range(scale(180, 5000)):
        life(n)
    flat.check()
    assert abs(_n_files(tmp_path) - files) < 8  # of the seven unequal ones some are there
    if path is None:
        assert os.listdir(tmp_path) == []
    else:
        assert _n_readers(path) == 0
        with Chest(path=path) as chest:
            oracle.check_tidy(chest)


@needs_proc
def test_one_long_life_stays_flat(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    path = tmp_path / "chest"
    with Chest[Any, Any](path=path, available_memory=300_000) as chest:
        for n in range(60):
            _use(chest, n)
        flat = Flat()
        for n in range(40):
            _use(chest, n)
        flat.mark()
        index_bytes = chest._store.index.nbytes()
        for n in range(scale(300, 10_000)):
            _use(chest, n)
        assert chest._store.index.nbytes() < index_bytes + (1 << 20)  # freed pages are used again
        flat.check()
        assert len(chest) <= 9
        chest.flush()
        assert len(oracle.files(path)) <= 9
    assert _n_readers(path) == 0


@needs_proc
def test_two_chests_on_one_folder_opened_and_closed_in_turn_stay_flat(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    path = tmp_path / "chest"

    def lives(n: int) -> None:
        first = Chest[Any, Any](path=path)
        second = Chest[Any, Any](path=path)
        first["a"] = np.full(9_000, n)
        first.flush()
        assert second["a"][-1] == n
        first.close()
        second["b"] = n
        second.close()

    for n in range(30):
        lives(n)
    flat = Flat()
    for n in range(40):
        lives(n)
    flat.mark()
    for n in range(scale(100, 3000)):
        lives(n)
    flat.check()
    assert _n_readers(path) == 0


@needs_proc
def test_paused_iterations_and_views_hold_nothing(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    with Chest[int, Any](path=tmp_path / "chest") as chest:
        for n in range(3000):
            chest[n] = n
        chest.flush()
        paused = [iter(chest) for _ in range(50)]
        for iterator in paused:
            next(iterator)
        chest["x"] = 0  # type: ignore[index]
        chest.sync()
        before = chest._store.index.nbytes()
        for n in range(scale(300, 3000)):
            chest[n % 50] = n
            chest.sync()
        assert chest._store.index.nbytes() - before < 1 << 20
        assert sum(1 for _ in paused[0]) == 3000


@needs_proc
def test_threads_that_come_and_go_leave_no_reader_slot(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    path = tmp_path / "chest"
    with Chest[Any, Any](path=path, available_memory=0) as chest:
        for n in range(20):
            chest[n] = [n]
            chest["large", n] = np.full(9_000, n)
        chest.flush()
        wrong: list[Any] = []

        def work(seed: int) -> None:
            try:
                for n in range(20):
                    assert chest[n] == [n]
                    assert chest["large", (n + seed) % 20][0] == (n + seed) % 20
            except BaseException as error:
                wrong.append(error)

        for round_ in range(scale(60, 1000)):  # more threads in all than LMDB has reader slots (1,024)
            threads = [threading.Thread(target=work, args=(round_ + k,)) for k in range(8 if round_ % 10 else 40)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong, wrong[:5]
    assert _n_readers(path) == 0


@needs_proc
def test_failed_opens_leak_nothing(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    path = tmp_path / "chest"
    with Chest(path=path, serializer="json") as chest:
        chest["a"] = 1
    (tmp_path / "file").write_bytes(b"")

    def fail() -> None:
        with pytest.raises(ValueError, match="serializer"):
            Chest(path=path, serializer="pickle")
        with pytest.raises(OSError, match="file"):
            Chest(path=tmp_path / "file")
        with pytest.raises(ValueError, match="nonsense"):
            Chest(path=path, available_memory="nonsense")

    for _ in range(10):
        fail()
    flat = Flat()
    for _ in range(20):
        fail()
    flat.mark()
    for _ in range(scale(100, 2000)):
        fail()
    flat.check()
    with Chest(path=path) as chest:
        assert chest == {"a": 1}
    assert _n_readers(path) == 0
