"""Pools of processes that share a chest: as an argument, by inheritance, under every start method."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest

TIMEOUT_S = 120
METHODS = multiprocessing.get_all_start_methods()


inherited: Chest[Any, Any]


def _take_over(chest: Chest[Any, Any]) -> None:
    global inherited
    inherited = chest


def _read(chest: Chest[Any, Any], n: int) -> Any:
    return chest[n]["n"], chest["array"][n]


def _read_inherited(n: int) -> Any:
    return _read(inherited, n)


def _write(chest: Chest[Any, Any], n: int) -> int:
    chest["of", n] = np.full(1000, n)
    chest.sync()
    return os.getpid()


def _write_and_leave(n: int) -> None:
    inherited["of", n] = np.full(1000, n)


N = 12


@pytest.fixture(name="full")
def _full(chest: Chest[Any, Any]) -> Chest[Any, Any]:
    chest.update({n: {"n": n} for n in range(N)})
    chest["array"] = np.arange(20_000)
    return chest


def _check_written(chest: Chest[Any, Any]) -> None:
    assert {key for key in chest if isinstance(key, tuple)} == {("of", n) for n in range(N)}
    for n in range(N):
        assert np.array_equal(chest["of", n], np.full(1000, n))


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_gets_a_chest_as_an_argument(full: Chest[Any, Any], method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap_async(_read, [(full, n) for n in range(N)]).get(TIMEOUT_S)
        assert found == [(n, n) for n in range(N)]
        pids = pool.starmap_async(_write, [(full, n) for n in range(N)]).get(TIMEOUT_S)
        assert os.getpid() not in pids
        pool.close()
        pool.join()
    _check_written(full)


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_gets_a_chest_by_its_initializer(full: Chest[Any, Any], method: str) -> None:
    full.sync()
    with multiprocessing.get_context(method).Pool(2, _take_over, (full,)) as pool:
        assert pool.map_async(_read_inherited, range(N)).get(TIMEOUT_S) == [(n, n) for n in range(N)]
        pool.close()
        pool.join()


@pytest.mark.parametrize("method", METHODS)
def test_workers_that_end_by_themselves_write_what_they_left_unwritten(full: Chest[Any, Any], method: str) -> None:
    full.sync()
    with multiprocessing.get_context(method).Pool(2, _take_over, (full,)) as pool:
        pool.map_async(_write_and_leave, range(N), chunksize=1).get(TIMEOUT_S)
        pool.close()
        pool.join()
    _check_written(full)


@pytest.mark.parametrize("method", METHODS)
def test_an_executor_gets_a_chest(full: Chest[Any, Any], method: str) -> None:
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        found = list(executor.map(_read, [full] * N, range(N), timeout=TIMEOUT_S))
        assert found == [(n, n) for n in range(N)]
        list(executor.map(_write, [full] * N, range(N), timeout=TIMEOUT_S))
    _check_written(full)


def _sums(chest: Chest[Any, Any]) -> tuple[list[Any], int]:
    return list(chest), int(chest["array"].sum())


@pytest.mark.parametrize("method", METHODS)
def test_a_process_gets_a_chest_and_its_end_leaves_it_alone(full: Chest[Any, Any], method: str) -> None:
    before = _sums(full)
    process = multiprocessing.get_context(method).Process(target=_sums, args=(full,))
    full.sync()
    process.start()
    process.join(TIMEOUT_S)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()
    assert _sums(full) == before
    full["after"] = 1
    full.sync()


@pytest.fixture(name="joblib", scope="module")
def _joblib() -> Any:
    joblib = pytest.importorskip("joblib")
    from joblib.externals.loky.backend import resource_tracker

    resource_tracker.ensure_running()  # a helper process that is started once and kept: no leak of a test's
    return joblib


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib_gets_a_chest(joblib: Any, full: Chest[Any, Any], backend: str) -> None:
    try:
        with joblib.parallel_backend(backend), joblib.Parallel(n_jobs=2, timeout=TIMEOUT_S) as parallel:
            assert parallel(joblib.delayed(_read)(full, n) for n in range(N)) == [(n, n) for n in range(N)]
            parallel(joblib.delayed(_write)(full, n) for n in range(N))
    finally:
        if backend == "loky":
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True, kill_workers=True)
    _check_written(full)


def _make(n: int) -> Chest[str, int]:
    chest = Chest[str, int](path=os.path.join(tempfile.gettempdir(), f"made-{n}"))
    chest["n"] = n
    return chest


def test_a_worker_returns_a_chest_with_a_path(place: Path) -> None:
    with multiprocessing.get_context(METHODS[0]).Pool(2) as pool:
        for n, chest in enumerate(pool.map_async(_make, range(4)).get(TIMEOUT_S)):
            assert chest["n"] == n
            chest.drop()
        pool.close()
        pool.join()
    assert list(place.iterdir()) == []
