"""Small workloads for the tests that inject faults into system calls, in processes that cost next to nothing.

    python workloads.py

serves requests, one a line of JSON on stdin, one at a time: each is done by a forked child, which has everything
imported already. It waits until it is told to go, so that a tracer can be attached to it first: all that the tracer
counts then is the workload's. What the child has to say goes into memory shared with its parent and not into a pipe,
since a system call of the log's would be counted, and hit by faults, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
from oracle import State, Step, Tag, Wrong

from chest import Chest, _fs
from chest.engines._lmdb import LmdbIndex
from chest.errors import ChestError, FailedError

# What a workload does in each generation: + sets, ~ changes in place, - deletes, ? reads the key of this number; then
# how it is saved. Which values are files stands in the oracle: those of the keys 1, 3, 4, 8, 10 and 11.
PLANS = {
    "small": ["+0 +2 +5 flush", "+6 +7 -2 ?0 sync", "+0 ~5 -6 +9 flush"],
    "large": ["+1 +3 flush", "+4 +8 ?1 sync", "~1 +10 -3 flush"],
    "churn": ["+0 +1 +2 +3 flush", "+1 -3 ~2 +4 reopen", "+3 -1 ?4 ~4 sync", "-0 +1 ?3 reopen", "+8 ?8 -2 -3 flush"],
}
SPILLS = {"churn"}
_KINDS = {"+": "set", "~": "change", "-": "delete", "?": "read"}
_DOCUMENTED = (ChestError, MemoryError)
_ROOM = 1 << 20
_fsync = os.fsync


def _steps(seed: int, writer: int, generation: int, *, in_place: bool) -> list[Step]:
    """In place of the oracle's: ``seed`` is the number of the workload."""
    plans = list(PLANS.values())[seed]
    tokens = plans[generation].split()[:-1] if generation < len(plans) else []
    return [Step(_KINDS[token[0]], Tag(writer, int(token[1:]), generation, n)) for n, token in enumerate(tokens)]


class Life:
    """A workload that goes on until something fails, and then looks at what the failure has left."""

    def __init__(self, path: str, plan: str, log: Callable[[str], None], ack_early: bool) -> None:
        self.path, self.plan, self.log, self.ack_early = path, plan, log, ack_early
        self.memory = 300_000 if plan in SPILLS else 10**9
        self.state: State = {}
        self.possible: list[State] = [self.state]  # what may be in the chest after a step that has failed
        self.errors: list[str] = []  # documented ones, in order
        self.said_failed = False
        self.chest: Chest[Any, Any] | None = None

    def run(self) -> dict[str, Any]:
        """What happened: the errors, and what the last flush that returned has certainly written."""
        try:
            self.chest = Chest(path=self.path, available_memory=self.memory)
            for generation in range(len(PLANS[self.plan])):
                self._generation(generation)
            self.chest.close()
            final: State | None = self.state
        except _DOCUMENTED as error:
            self._note(error)
            final = self._aftermath()
        return {"errors": self.errors, "final": final if final is None else list(final.values())}

    def _note(self, error: BaseException) -> None:
        self.errors.append(f"{type(error).__name__}: {error}")
        self.said_failed = self.said_failed or isinstance(error, FailedError)

    def _generation(self, generation: int) -> None:
        self.log(f"begin 0 {generation}")
        for step in _steps(list(PLANS).index(self.plan), 0, generation, in_place=True):
            before, after = dict(self.state), dict(self.state)
            if oracle.apply(after, step):
                self.possible = [before, after]
                self._step(step, before.get(step.tag.key))
                self.state, self.possible = after, [after]
        if self.ack_early:
            self.log(f"ack 0 {generation}")
        assert self.chest is not None
        how = PLANS[self.plan][generation].split()[-1]
        if how == "reopen":
            self.chest.close()
            self.log(f"ack 0 {generation}")
            self.chest = None
            self.chest = Chest(path=self.path, available_memory=self.memory)
        else:
            self.chest.flush() if how == "flush" else self.chest.sync()
            self.log(f"ack 0 {generation}")

    def _step(self, step: Step, before: Tag | None) -> None:
        chest, key = self.chest, oracle.key(0, step.tag.key)
        assert chest is not None
        if step.kind == "set":
            chest[key] = oracle.value(step.tag)
        elif step.kind == "delete":
            del chest[key]
        else:
            found = chest[key]
            if oracle.whole(found, 0, step.tag.key) != before:
                raise Wrong(f"{key!r:.60} is {oracle.tag_of(found)}, and was set to {before}")
            if step.kind == "change":
                oracle.change(found, step.tag)

    # --- after an error

    def _aftermath(self) -> State | None:
        """What a last flush has written, if there was one that returned."""
        chest = self.chest
        if chest is None:
            return None
        found = self._readable(chest)
        final = None
        with self._documented():
            chest.flush()
            final = found
        if self.said_failed:
            self._must_refuse(chest)
        with self._documented():
            chest.close()
        return final

    @contextlib.contextmanager
    def _documented(self) -> Iterator[None]:
        try:
            yield
        except _DOCUMENTED as error:
            self._note(error)

    def _readable(self, chest: Chest[Any, Any]) -> State | None:
        """What the chest holds, None if not all of it can be read. What is in memory can."""
        in_memory = set(chest.inmem)
        found: State = {}
        n_errors = 0
        for number in range(oracle.N_KEYS):
            key = oracle.key(0, number)
            try:
                if key in chest:
                    found[number] = oracle.whole(chest[key], 0, number)
            except _DOCUMENTED as error:
                self._note(error)
                n_errors += 1
                if key in in_memory:
                    raise Wrong(f"{key!r:.60} is in memory and cannot be read") from error
            else:
                if found.get(number) not in [state.get(number) for state in self.possible]:
                    raise Wrong(f"{key!r:.60} is {found.get(number)}, and must be as in {self.possible}")
        return None if n_errors else found

    def _must_refuse(self, chest: Chest[Any, Any]) -> None:
        """A failed chest says so whenever it is to write: when something is set, or else when it is to be saved."""
        for number in range(2):
            try:
                chest["further", number] = number
                chest.sync()
            except FailedError:
                continue
            raise Wrong("the chest had failed, and writes again")


# --- what a request asks for


def _live(path: str, plan: str, log: Callable[[str], None], wrong: str = "") -> dict[str, Any]:
    """``wrong`` is for controls, which must be caught: "acknowledges early" or "deaf", which hears of no failed sync."""
    with mock.patch.object(os, "fsync", _deaf) if wrong == "deaf" else contextlib.nullcontext():
        return Life(path, plan, log, wrong == "acknowledges early").run()


def _deaf(fd: int) -> None:
    with contextlib.suppress(OSError):
        _fsync(fd)


def _break_off(path: str, plan: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Die between a commit and what it leaves to be done, in the middle of a read, with values half written."""
    life = Life(path, plan, log, False)
    life.chest = Chest(path=path, available_memory=life.memory)
    last = len(PLANS[plan]) - 1
    for generation in range(last):
        life._generation(generation)
    assert life.chest is not None
    index = life.chest._store.index
    for n in range(2):
        _, fd = life.chest._store.blobs._create()
        os.write(fd, b"half a value" * n)
    (Path(path) / ".keys" / "new" / "stray").write_bytes(b"half a value")
    reading = index._env.begin()  # type: ignore[attr-defined]
    reading.get(b"x", db=index._env.index)  # type: ignore[attr-defined]
    with mock.patch.object(LmdbIndex, "settle", side_effect=lambda *arguments, **more: os._exit(9)):
        life._generation(last)
    raise AssertionError("nothing was left to be done")


def _open(path: str, plan: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Recover, read everything, close."""
    errors = []
    try:
        with Chest[Any, Any](path=path) as chest:
            for number in range(oracle.N_KEYS):
                if (key := oracle.key(0, number)) in chest:
                    oracle.whole(chest[key], 0, number)
    except _DOCUMENTED as error:
        errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors}


def _check(
    path: str, plan: str, log: Callable[[str], None], written: str, final: list[Any] | None, holes: bool
) -> dict[str, Any]:
    """Everything that must hold for the folder; and exactly ``final`` if a last flush has returned.

    ``holes``: values may have been refused one by one, while others were written.
    """
    if final is not None:
        expected = {tag[1]: Tag(*tag) for tag in final}
        with Chest[Any, Any](path=path) as chest:
            if (actual := oracle._actual(chest, 0)) != expected:
                raise Wrong(f"found {actual}, and the last flush that returned has written {expected}")
    run = oracle.Run(list(PLANS).index(plan), range(1), True, holes or plan in SPILLS, written)
    oracle.check_folder(Path(path), [run])
    return {}


_DOES: dict[str, Callable[..., dict[str, Any]]] = {"live": _live, "break off": _break_off, "open": _open, "check": _check}


# --- serving


def _shorten(at: int, ever: bool) -> None:
    """Let the n-th write fall short, or (``ever``) each from there on, by way of the preloaded library; 0: none."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.shorten(ctypes.c_long(at), ctypes.c_int(ever))


def _child(request: dict[str, Any], go: int, shared: mmap.mmap) -> None:
    """Do it, and say how it went."""
    report = ""

    def log(line: str) -> None:
        nonlocal report
        data = (line + "\n").encode()
        at = len(report)
        shared[at : at + len(data)] = data
        report += line + "\n"

    arguments = {key: value for key, value in request.items() if key not in ("do", "short", "deadline")}
    select.select([go], [], [])  # not a read, which would be counted if the tracer happens to see it
    if "short" in request:
        _shorten(*request["short"])
    try:
        with mock.patch.object(oracle, "steps", _steps):
            result = _DOES[request["do"]](log=log, **arguments)
    except BaseException:
        result = {"wrong": traceback.format_exc()[-6000:]}
    if "short" in request:
        result["writes"] = int(ctypes.CDLL(os.environ["LD_PRELOAD"]).calls())
    log("end " + json.dumps(result).encode("ascii", "backslashreplace").decode())
    os._exit(0)


def _serve_one(request: dict[str, Any]) -> dict[str, Any]:
    """Status -9 and so on as in ``subprocess``; what was logged, and the child's last words or None."""
    shared = mmap.mmap(-1, _ROOM)
    waits, goes = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(goes)
        os.dup2(2, 1)
        _child(request, waits, shared)
    os.close(waits)
    hang = False
    try:
        print(json.dumps({"pid": pid}), flush=True)
        if sys.stdin.readline():
            os.write(goes, b"g")
        else:
            os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + request["deadline"]
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until and not hang:
                hang = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
    finally:
        os.close(goes)
    log, _, last = bytes(shared).rstrip(b"\0").decode().partition("end ")
    shared.close()
    status = os.waitstatus_to_exitcode(done[1])
    return {"status": status, "hang": hang, "log": log, "result": json.loads(last) if last else None}


def _serve() -> None:
    with tempfile.TemporaryDirectory() as folder:  # what is imported only when it is needed is imported now
        assert not _live(folder, "churn", lambda line: None)["errors"]
    _fs._kinds.clear()
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(_serve_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
