"""Forked children for tests: what they answer comes back, none of them outlives its test, and nobody waits for ever."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
DEADLINE_S = 60


def environment(**more: str) -> dict[str, str]:
    """The environment of a program that is to import this chest."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), **more}


class Forked:
    """A child that does ``work`` and ends by ``os._exit``; use it as a context manager, or through ``in_child``."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._reads, writes = os.pipe()
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(DEADLINE_S)
                os.close(self._reads)
                try:
                    answer: tuple[bool, Any] = True, work()
                except BaseException:
                    answer = False, traceback.format_exc()
                with open(writes, "wb") as file:
                    file.write(pickle.dumps(answer))
                code = 0
            finally:
                os._exit(code)
        os.close(writes)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._reads)

    def result(self) -> Any:
        """What ``work`` returned. An exception of the child's, or its death, is an ``AssertionError`` here."""
        parts: list[bytes] = []
        while True:
            ready, _, _ = select.select([self._reads], [], [], DEADLINE_S)
            assert ready, "the child hangs"
            part = os.read(self._reads, 1 << 16)
            if not part:
                break
            parts.append(part)
        status = self.wait()
        assert parts, f"the child ended with status {status} and without an answer"
        ok, answer = pickle.loads(b"".join(parts))
        assert ok, answer
        return answer

    def wait(self) -> int:
        """The status with which the child ended."""
        if self.status is None:
            self.status = wait_for(self.pid)
        return self.status


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked child."""
    with Forked(work) as child:
        return child.result()


def wait_for(pid: int) -> int:
    """The status with which a child ended, by a deadline."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def until(true: Callable[[], Any]) -> None:
    """Return as soon as ``true()`` is."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)
