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
from counts import count

from chest import Chest

pytestmark = [pytest.mark.torture, pytest.mark.slow]

TRACED = 100_000  # bytes that tracemalloc may find more after a third of the lives; one leaked chest has some thousand
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


def stays_flat(life: Callable[[int], object], n_lives: int) -> None:
    """Many lives add nothing to what some lives have left: no descriptor, no thread, no memory.

    The memory is looked at three times. A leak adds to it each time; what does so once only is a table that has grown (that
    of CPython's interned text, for instance).
    """
    for n in range(30):
        life(n)
    gc.collect()
    before = (_n_descriptors(), threading.active_count())
    own = _own_bytes()
    tracemalloc.start()
    try:
        for n in range(40):
            life(n)
        grown = []
        for _ in range(3):
            gc.collect()
            start = tracemalloc.get_traced_memory()[0]
            for n in range(n_lives // 3):
                life(n)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - start)
    finally:
        tracemalloc.stop()
    assert (_n_descriptors(), threading.active_count()) == before
    assert min(grown) < TRACED, grown
    assert _own_bytes() - own < PAGES


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

    for n in range(10):
        life(n)
    files = _n_files(tmp_path)
    stays_flat(life, scale(180, 5000))
    assert abs(_n_files(tmp_path) - files) < 8  # of the seven unequal ones some are there
    if path is None:
        assert os.listdir(tmp_path) == []
    else:
        assert _n_readers(path) == 0
        with Chest(path=path) as chest:
            oracle.check_tidy(chest)
    count("lives of a chest that leave nothing behind", scale(180, 5000), scale(180, 5000))


@needs_proc
def test_one_long_life_stays_flat(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    path = tmp_path / "chest"
    with Chest[Any, Any](path=path, available_memory=300_000) as chest:
        for n in range(60):
            _use(chest, n)
        index_bytes = chest._store.index.nbytes()
        stays_flat(lambda n: _use(chest, n), scale(300, 10_000))
        assert chest._store.index.nbytes() < index_bytes + (1 << 20)  # freed pages are used again
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

    stays_flat(lives, scale(100, 3000))
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

    def fail(_: int) -> None:
        with pytest.raises(ValueError, match="serializer"):
            Chest(path=path, serializer="pickle")
        with pytest.raises(OSError, match="file"):
            Chest(path=tmp_path / "file")
        with pytest.raises(ValueError, match="nonsense"):
            Chest(path=path, available_memory="nonsense")

    stays_flat(fail, scale(100, 2000))
    with Chest(path=path) as chest:
        assert chest == {"a": 1}
    assert _n_readers(path) == 0
