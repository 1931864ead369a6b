"""Power cuts: what a flush has promised is there when the disk is mounted again, and all that is there is whole.

A killed process loses nothing that the kernel knows. A power cut does, and only syncs in the right order help; so chests
without them must be caught here, or the cuts prove nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cutter
import pytest
from counts import count
from cutter import CutDisk, NoPowerCutError
from oracle import Wrong

pytestmark = pytest.mark.torture

LIVES = 5  # of a disk
MOST_CUTS = 40  # until a control is caught; the slowest take four or so

NewDisk = Callable[[random.Random], contextlib.AbstractContextManager[CutDisk]]


@pytest.fixture(name="why_not", scope="module")
def _why_not(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Why power cannot be cut here, "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "cutting the power of a disk takes root on Linux"
    disk = CutDisk(tmp_path_factory.mktemp("trial"), random.Random(0))
    try:
        disk.make()
        disk.recover_and_lose_power()
    except NoPowerCutError as error:
        return f"the power of a disk cannot be cut here: {error}"
    finally:
        disk.close()
    return ""


@pytest.fixture(name="new_disk")
def _new_disk(tmp_path: Path, why_not: str) -> Iterator[NewDisk]:
    """Makes disks, and leaves nothing of them."""
    if why_not:
        pytest.skip(why_not)

    @contextlib.contextmanager
    def new_disk(rng: random.Random) -> Iterator[CutDisk]:
        disk = CutDisk(tmp_path / f"{rng.getrandbits(64):x}", rng)
        stack.callback(disk.close)  # should an interrupt fall into the other one
        try:
            disk.make()
            yield disk
        finally:
            disk.close()

    with contextlib.ExitStack() as stack:
        yield new_disk


@pytest.mark.parametrize("share", range(4))
def test_whatever_was_acknowledged_survives_power_cuts(new_disk: NewDisk, share: int, scale: Callable[[int, int], int]) -> None:
    n_cuts = n_while_recovering = 0
    for number in range(share, scale(4, 20), 4):
        rng = random.Random(number)
        with new_disk(rng) as disk:
            for life in range(scale(2, LIVES)):
                disk.live_and_lose_power()
                n_cuts += 1
                if not rng.randrange(3):
                    disk.recover_and_lose_power()
                    n_while_recovering += 1
                try:
                    disk.check()
                except Wrong as error:
                    count("power cuts", n_cuts, n_cuts - 1)
                    last = [run._replace(log=run.log[-200:]) for run in disk.runs]
                    raise AssertionError(f"disk {number}, life {life}: {error} {last}") from None
    count("power cuts", n_cuts, n_cuts)
    count("power cuts, one more while the first is recovered from", n_while_recovering, n_while_recovering)


@pytest.mark.parametrize("control", cutter.CONTROLS)
def test_the_cuts_catch_what_syncs_too_little(new_disk: NewDisk, control: str) -> None:
    n_cuts = 0
    while n_cuts < MOST_CUTS:
        with new_disk(random.Random(f"{control}/{n_cuts}")) as disk:
            for _ in range(LIVES):
                disk.live_and_lose_power(control)
                n_cuts += 1
                try:
                    disk.check()
                except Wrong:
                    count(f"power cuts: {control}", n_cuts, n_cuts - 1, control=True)
                    return
    pytest.fail(f"{control}: {n_cuts} cuts have found no harm in it")


def test_no_mount_no_loop_device_and_no_image_is_left_after_an_interrupt(new_disk: NewDisk) -> None:
    left: list[tuple[CutDisk, int]] = []

    def interrupted() -> None:
        with new_disk(random.Random(1)) as disk:
            disk.live_and_lose_power()
            assert disk.devices()
            held = os.open(disk.mount / "held", os.O_CREAT | os.O_WRONLY)  # it cannot be unmounted as it should be
            left.append((disk, held))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    [(disk, held)] = left
    os.close(held)
    assert not os.path.ismount(disk.mount)
    assert not disk.image.exists()
    assert not disk.devices()
    disk.close()  # once more does no harm
