"""A full disk: an ``OSError`` with ENOSPC, everything stays readable, nothing is lost, work goes on once there is room.

Every case fills a disk of 8 or 16 MB in one of the ways that a chest writes, looks at every value, makes room, goes on.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from counts import count
from limits import Disk, held

from chest import Chest
from chest.errors import ChestError, DiskFullError

pytestmark = pytest.mark.torture

Model = dict[Any, tuple[int, int]]  # key -> what its value derives from: a number, and its size

WHAT = ("small", "large", "both")
HOW = ("spill", "flush", "close", "write again")
ROOM = ("delete keys", "remove another file", "enlarge the disk")
CASES = [
    pytest.param(kind, what, how, room, id=f"{kind}-{what}-{how}-{room}".replace(" ", "_"))
    for kind, what, how, room in itertools.product(("tmpfs", "ext4"), WHAT, HOW, ROOM)
    if not (kind == "ext4" and room == "enlarge the disk")
]
assert len(CASES) == 60
SHARE = 5  # in CI, every fifth


def _value(n: int, size: int) -> Any:
    if size < 50_000:
        return random.Random(n).randbytes(size)
    return np.random.default_rng(n).integers(0, 255, size, dtype=np.uint8)


def _sizes(what: str, seed: int) -> Callable[[], int]:
    rng = random.Random(seed)
    large = {"small": 0.0, "large": 1.0, "both": 0.2}[what]
    return lambda: rng.randint(70_000, 400_000) if rng.random() < large else rng.randint(500, 20_000)


def _check(chest: Chest[Any, Any], model: Model) -> None:
    assert len(chest) == len(model)
    assert list(chest) == list(model)
    for key, (n, size) in model.items():
        assert oracle.same(chest[key], _value(n, size)), f"{key!r} is not what was set"


def _fill(path: Path, how: str, chest: Chest[Any, Any], model: Model, size: Callable[[], int]) -> DiskFullError:
    """Set values until the disk is full; every value that was set is in the model, the one whose set has failed too."""
    keys = itertools.count() if how != "write again" else itertools.cycle(range(40))
    for n in range(100_000):
        key = next(keys)
        model[key] = (n, size())
        try:
            chest[key] = _value(*model[key])
            if how == "spill":
                continue
            if how == "write again":
                chest.sync()
                (path.parent / f"ballast{n}").write_bytes(bytes(150_000))
            elif n % 25 == 24:
                if how == "flush":
                    chest.flush()
                elif sum(size for _, size in model.values()) > 20 << 20:
                    chest.close()
        except DiskFullError as error:
            return error
        except OSError as error:
            if error.errno != errno.ENOSPC:  # else the ballast found no room
                raise
    raise AssertionError("the disk never got full")


@contextmanager
def _opened(path: Path, memory: int = 10**9) -> Iterator[Chest[Any, Any]]:
    """An open chest, which a failing test lets go of unwritten, so that its disk can be unmounted."""
    chest = Chest[Any, Any](path=path, available_memory=memory)
    try:
        yield chest
    finally:
        if not chest._closed:
            chest._end()


@pytest.fixture(autouse=True)
def _no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured records would keep errors, their frames, and the values in them mapped."""
    monkeypatch.setattr(logging.getLogger("chest"), "disabled", True)


@pytest.mark.parametrize(("disk", "what", "how", "room"), CASES, indirect=["disk"])
def test_a_full_disk_loses_nothing_and_work_goes_on(
    request: pytest.FixtureRequest, disk: Disk, what: str, how: str, room: str, scale: Callable[[int, int], int]
) -> None:
    case = [str(param.id) for param in CASES].index(request.node.callspec.id)
    if case % scale(SHARE, 1):
        pytest.skip(f"one case of {SHARE} runs, all of them under `make torture`")
    with _opened(disk.path / "chest", 500_000 if how == "spill" else 10**9) as chest:
        _case(disk, chest, what, how, room, seed=case)
    assert not held(disk.path)
    count("full disks, and work that goes on", 1, 1)


def _case(disk: Disk, chest: Chest[Any, Any], what: str, how: str, room: str, seed: int) -> None:
    path = disk.path / "chest"
    ballast = disk.path / "ballast"
    ballast.write_bytes(bytes(3 << 20))
    model: Model = {}
    size = _sizes(what, seed)

    error = _fill(path, how, chest, model, size)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert "full" in str(error)
    _check(chest, model)

    with pytest.raises(DiskFullError):  # noqa: PT012 - and again: it stays an error, and stays without harm
        for n in range(100):
            model["more", n] = (n, 300_000)
            chest["more", n] = _value(*model["more", n])
            chest.sync()
    _check(chest, model)

    if room == "delete keys":
        # Small values leave free pages to the index, but no room to files: those that wait in memory must go too.
        for key in [*list(model)[: len(model) * 9 // 10], *(key for key in model if isinstance(key, tuple))]:
            if model.pop(key, None) is not None:
                del chest[key]
        for file in disk.path.glob("ballast?*"):
            file.unlink()
    elif room == "enlarge the disk":
        assert disk.grow is not None
        disk.grow()
    else:
        for file in disk.path.glob("ballast*"):
            file.unlink()
        while sum(size for _, size in model.values()) > 2 << 20:  # what was kept in memory may be more than fits now
            key = next(reversed(model))
            del chest[key], model[key]
    chest.flush()
    _check(chest, model)
    chest["afterwards"] = [1]
    chest.close()

    with Chest[Any, Any](path=path) as again:
        assert again.pop("afterwards") == [1]
        _check(again, model)
        again.flush()
        oracle.check_tidy(again)
    with Chest[Any, Any](path=path) as again:
        oracle.check_tidy(again)
        _check(again, model)


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_close_on_a_full_disk_raises_and_leaves_the_chest_open(disk: Disk) -> None:
    with _opened(disk.path / "chest") as chest:
        for n in range(30):
            chest[n] = _value(n, 400_000)
        with pytest.raises(DiskFullError, match="full"):
            chest.close()
        assert oracle.same(chest[29], _value(29, 400_000))
        assert disk.grow is not None
        disk.grow()
        chest.close()
    with Chest[int, Any](path=disk.path / "chest") as again:
        assert all(oracle.same(again[n], _value(n, 400_000)) for n in range(30))


@pytest.mark.parametrize("disk", ["tmpfs", "ext4"], indirect=True)
@pytest.mark.parametrize("memory", [10**9, 500_000], ids=["in memory", "spilled"])
def test_deleting_keys_makes_the_room_that_unwritten_values_need(disk: Disk, memory: int) -> None:
    with _opened(disk.path / "chest", memory) as chest:
        written = []
        with pytest.raises(DiskFullError):  # noqa: PT012
            for n in range(100):
                chest[n] = _value(n, 300_000)
                chest.sync()
                written.append(n)
        assert len(chest) == len(written) + 1
        for n in written[:10]:
            del chest[n]
        chest.flush()
        kept = [*written[10:], len(written)]
        assert list(chest) == kept
        chest.close()
    with Chest[int, Any](path=disk.path / "chest") as again:
        assert list(again) == kept
        assert all(oracle.same(again[n], _value(n, 300_000)) for n in kept)


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_disk_that_is_full_from_the_start_is_said_so(disk: Disk) -> None:
    fd = os.open(disk.path / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="space"):  # noqa: PT012
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is looked at below
        Chest(path=disk.path / "chest")
    assert isinstance(caught.value, ChestError)
    assert caught.value.errno == errno.ENOSPC
    (disk.path / "ballast").unlink()
    with Chest(path=disk.path / "chest") as chest:
        chest["a"] = 1
    with Chest(path=disk.path / "chest") as chest:
        assert chest == {"a": 1}


LIMITED = """
import os, resource, signal, sys
import numpy as np
from chest import Chest
from chest.errors import ChestError

path, large = sys.argv[1], sys.argv[2] == "large"
make = (lambda n: np.full(60_000, n)) if large else (lambda n: [n] * 1000)
chest = Chest(path=path)
limit = 300_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
model = {}
failed = 0
for n in range(400):
    value = make(n)
    try:
        chest[n] = value
        model[n] = n
        if n % 20 == 19:
            chest.sync()
    except ChestError as error:
        assert str(error), error
        failed += 1
        if failed == 3:
            break
for n in model:
    assert (chest[n] == make(n)).all() if large else chest[n] == make(n)
print("failed", failed)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    chest.close()
    print("closed")
except ChestError as error:
    print("not closed", type(error).__name__)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit for the size of files here")
@pytest.mark.parametrize("what", ["small", "large"])
def test_a_file_that_may_not_grow_is_an_error_of_chest_and_everything_stays_readable(tmp_path: Path, what: str) -> None:
    """Works without root. The limit stops the write with EFBIG, which is no full disk but fails as hard."""
    script = LIMITED if what == "small" else LIMITED.replace("limit = 300_000", "limit = 200_000")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "chest"), what],
        env=oracle.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "failed 3" in done.stdout
    with Chest[int, Any](path=tmp_path / "chest") as chest:
        if "not closed" not in done.stdout:
            assert len(chest) >= 20
        for n, found in chest.items():
            expected = np.full(60_000, n) if what == "large" else [n] * 1000
            assert oracle.same(found, expected)
    assert os.path.exists(tmp_path / "chest")
