"""What every test runs under: hypothesis profiles, the scale of the torture tests, and guards against leaks."""

from __future__ import annotations

import gc
import multiprocessing.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from chest import Chest

TORTURE = os.environ.get("CHEST_TORTURE", "") not in ("", "0")

# The machine decides how long an example takes, so there is no deadline, and none is too slow. In CI the examples are always
# the same ones, so that a red run is red for everybody. Torture looks for new ones.
at_any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", at_any_speed)
settings.register_profile("ci", at_any_speed, derandomize=True, print_blob=True)
settings.register_profile("torture", at_any_speed, max_examples=2000, print_blob=True)
settings.load_profile("torture" if TORTURE else "ci" if os.environ.get("CI") else "dev")

T = TypeVar("T")


def scale(ci: T, full: T) -> T:
    """``full`` under ``make torture``, ``ci`` otherwise."""
    return full if TORTURE else ci


@pytest.fixture(name="scale", scope="session")
def scale_fixture() -> Callable[[T, T], T]:
    """``scale`` for tests that cannot import from here."""
    return scale


FD_FOLDER = "/proc/self/fd"


def _descriptors() -> dict[str, str]:
    """What each descriptor of this process is open on, for files, pipes and sockets; empty where there is no /proc."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(FD_FOLDER)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{FD_FOLDER}/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
        # Devices and epoll handles are opened once by libraries (and by random number generators), and stay.
        if not target.startswith(("/dev/", "anon_inode:", "/proc/")):
            found[name] = target
    return found


def _kept_by_multiprocessing() -> set[str]:
    """Descriptors of the two helper processes that multiprocessing starts once and keeps."""
    names: set[str] = set()
    for module, instance in (("resource_tracker", "_resource_tracker"), ("forkserver", "_forkserver")):
        server = getattr(sys.modules.get(f"multiprocessing.{module}"), instance, None)
        for attribute in ("_fd", "_forkserver_alive_fd"):
            names.add(str(getattr(server, attribute, None)))
    return names


@pytest.fixture(name="place")
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, of child processes too."""
    multiprocessing.util.get_temp_dir()  # elsewhere: the sockets in it outlive the test, and may have no long names
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


@pytest.fixture(name="chest", params=["path", "scratch"])
def _chest(request: pytest.FixtureRequest, tmp_path: Path, place: Path) -> Iterator[Chest[Any, Any]]:
    """A chest with a path, and a scratch one. Modules that need another one have their own."""
    np = pytest.importorskip("numpy")
    with Chest[Any, Any](path=tmp_path / "c" if request.param == "path" else None) as chest:
        chest["small"], chest["large"] = [1], np.arange(20_000)
        yield chest
        if not chest._closed:
            problems = list(chest.check())
            assert not problems, problems


def pytest_collection_finish() -> None:
    """What stands by now stands to the end: a ``gc.collect()`` of a test, and CPython's own, need not go through it again.

    Modules and thousands of collected tests are most of what there is, and a collection took a quarter of a second.
    """
    gc.collect()
    gc.freeze()


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread and no open file outlives the test that started it.

    A file that is merely forgotten warns when it is collected, and warnings are errors; this guard finds what is held
    for ever: descriptors without an object, and registries that nobody empties. It is silent where the test has failed:
    the traceback holds what the test had open.
    """
    threads = set(threading.enumerate())
    before = _descriptors()
    yield
    if request.node.stash.get(_FAILED, False):
        return
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)  # one that is on its way out is no leak
        assert not thread.is_alive(), f"the test left a thread running: {thread}"
    if len(_descriptors()) > len(before):
        gc.collect()  # only then: a collection after each of thousands of tests would take longer than the tests
        after = _descriptors()
        kept = _kept_by_multiprocessing()
        leaked = {name: target for name, target in after.items() if name not in before and name not in kept}
        grown = len(after.keys() - kept) - len(before.keys() - kept)
        assert grown <= 0 or not leaked, f"the test left {len(leaked)} descriptors open: {leaked}"
