"""Small workloads for the tests that inject faults into system calls, in processes that cost next to nothing.

    python workloads.py

serves requests, one a line of JSON on stdin, one at a time: each is done by a forked child, which has everything
imported already. It waits until it is told to go, so that a tracer can be attached to it first: all that the tracer
counts then is the workload's. What the child has to say goes into memory shared with its parent and not into a pipe,
since a system call of the log's would be counted, and hit by faults, too.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
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

# What a workload does in each generation: + sets, ~ changes in place, - deletes, ? reads the key of this number; > updates
# several, * edits, ^ pops, = sets and : reads a default; then how it is saved, or the block that it is (see ``_BLOCKS``).
# Which values are files stands in the oracle: those of the keys 1, 3, 4, 8, 10 and 11.
PLANS = {
    "small": ["+0 +2 +5 flush", "+6 +7 -2 ?0 sync", "+0 ~5 -6 +9 flush"],
    "large": ["+1 +3 flush", "+4 +8 ?1 sync", "~1 +10 -3 flush"],
    "churn": ["+0 +1 +2 +3 flush", "+1 -3 ~2 +4 reopen", "+3 -1 ?4 ~4 sync", "-0 +1 ?3 reopen", "+8 ?8 -2 -3 flush"],
    "transact": [
        *("+0 +1 +2 +5 +3 block", "~1 +6 -2 *5 ?3 +0 block", "+4 -1 ~5 ^0 +3 *6 undo", "+9 later"),
        *("~6 ^3 =2 :5 +8 stubborn", ">1,2,7,12 alone", "through", "~2 +10 ^8 *1 >0,13 =11 block"),
        *("*12 alone", "^10 +3 >5,9 ~1 undo", "~5 later", "~5 -7 +4 ?11 block", "^11 alone", "=8 alone", "reopen"),
        *("-9 later", "+8 ^1 +3 ~4 undo", "~4 *8 ^0 +1 +10 -6 block"),
    ],
}
MEMORY = {"churn": 300_000, "transact": 20_000}  # of the others, everything stays in memory
ATOMIC = ("transact",)  # plans whose generations happen as a whole: blocks, one call, or one step that is left unwritten
_KINDS = {"+": "set", "~": "change", "-": "delete", "?": "read"} | {">": "set", "*": "change", "^": "delete"}
_KINDS |= {"=": "set", ":": "read"}
_BLOCKS = ("block", "undo", "stubborn")  # transactions: one that raises, and one that tries each step twice
_DOCUMENTED = (ChestError, MemoryError)
_ROOM = 1 << 20
_fsync = os.fsync


class _Undone(Exception):
    """Raised in a block to undo it."""


def _moves(plan: str, generation: int) -> list[tuple[str, list[Step]]]:
    """What is done in a generation: calls, and the steps that each of them is."""
    *tokens, _ = PLANS[plan][generation].split()
    number = itertools.count()
    return [
        (token[0], [Step(_KINDS[token[0]], Tag(0, int(key), generation, next(number))) for key in token[1:].split(",")])
        for token in tokens
    ]


def _steps(seed: int, writer: int, generation: int, *, in_place: bool) -> list[Step]:
    """In place of the oracle's: ``seed`` is the number of the workload. Nothing comes of what is undone."""
    plan = list(PLANS)[seed]
    if generation >= len(PLANS[plan]) or PLANS[plan][generation].endswith("undo"):
        return []
    return [step for _, steps in _moves(plan, generation) for step in steps]


class Life:
    """A workload that goes on until something fails, and then looks at what the failure has left."""

    def __init__(self, path: str, plan: str, log: Callable[[str], None], ack_early: bool) -> None:
        self.path, self.plan, self.log, self.ack_early = path, plan, log, ack_early
        self.state: State = {}
        self.possible: list[State] = [self.state]  # what may be in the chest after a step that has failed
        self.written: State = self.state  # what was acknowledged
        self.generation = 0
        self.errors: list[str] = []  # documented ones, in order
        self.said_failed = False
        self.chest: Chest[Any, Any] | None = None

    def open(self, **more: Any) -> None:
        self.chest = None
        self.chest = Chest(path=self.path, available_memory=MEMORY.get(self.plan, 10**9), **more)

    def run(self) -> dict[str, Any]:
        """What happened: the errors, and what the last flush that returned has certainly written."""
        try:
            self.open()
            for generation in range(len(PLANS[self.plan])):
                self.begin(generation)
            assert self.chest is not None
            self.chest.close()
            final: State | None = self.state
        except _DOCUMENTED as error:
            self._note(error)
            final = self._aftermath()
        return {"errors": self.errors, "final": final if final is None else list(final.values())}

    def _note(self, error: BaseException) -> None:
        self.errors.append(f"{type(error).__name__}: {error}")
        self.said_failed = self.said_failed or isinstance(error, FailedError)

    def begin(self, generation: int) -> None:
        self.generation = generation
        self.log(f"begin 0 {generation}")
        self._go_on()

    def _ack(self) -> None:
        self.written = self.state
        self.log(f"ack 0 {self.generation}")

    def _how(self) -> str:
        return PLANS[self.plan][self.generation].split()[-1]

    def _go_on(self) -> None:
        how = self._how()
        assert self.chest is not None
        if how in _BLOCKS:
            self._block(how)
        else:
            for sign, steps in _moves(self.plan, self.generation):
                after = dict(self.state)
                todo = [step for step in steps if oracle.apply(after, step)]
                self.possible = [self.state, after]
                self._move(sign, todo, self.state)
                self.state, self.possible = after, [after]
        if self.ack_early:
            self._ack()
        if how in ("flush", "sync"):
            self.chest.flush() if how == "flush" else self.chest.sync()
        elif how in ("reopen", "through"):
            self.chest.close()
            self._ack()
            self.open(write_through=how == "through")
        if how != "later":
            self._ack()

    def _block(self, how: str) -> None:
        """A transaction. Before its end it can only be undone; an error at its end may have come too late for that."""
        assert self.chest is not None
        after = dict(self.state)
        self.possible = [self.state]
        with contextlib.suppress(_Undone), self.chest.transaction():
            for sign, steps in _moves(self.plan, self.generation):
                before = dict(after)
                todo = [step for step in steps if oracle.apply(after, step)]
                try:
                    self._move(sign, todo, before)
                except _DOCUMENTED as error:
                    if how != "stubborn":
                        raise
                    self._note(error)
                    self._move(sign, todo, before)
            if how == "undo":
                raise _Undone
            if self.ack_early:
                self._ack()
            self.possible = [self.state, after]
        if how != "undo":
            self.state = after
        self.possible = [self.state]

    def _move(self, sign: str, steps: list[Step], state: State) -> None:
        chest = self.chest
        assert chest is not None
        if sign == ">":
            chest.update({oracle.key(0, step.tag.key): oracle.value(step.tag) for step in steps})
            return
        for kind, tag in steps:
            key, before = oracle.key(0, tag.key), state.get(tag.key)
            if sign == "+":
                chest[key] = oracle.value(tag)
            elif sign == "=":
                _is(chest.setdefault(key, oracle.value(tag)), tag.key, tag)
            elif sign == "-":
                del chest[key]
            elif sign == "^":
                _is(chest.pop(key), tag.key, before)
            else:
                with (
                    chest.edit(key)
                    if sign == "*"
                    else contextlib.nullcontext(chest.setdefault(key) if sign == ":" else chest[key]) as found
                ):
                    _is(found, tag.key, before)
                    if kind == "change":
                        oracle.change(found, tag)

    # --- after an error

    def _aftermath(self) -> State | None:
        """What is certainly on the disk: by a last flush that returned, or because nothing can have come to it since."""
        chest = self.chest
        if chest is None:
            return None
        found = self._readable(chest)
        if self._how() in (*_BLOCKS, "alone") and found == self.state and self.possible[0] is self.state:
            with self._documented():
                self._go_on()  # whoever was refused can try again
            found = self._readable(chest)
        final = self.written if self.possible == [self.written] else None
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
        if n_errors:
            return None
        if self.plan in ATOMIC and found not in self.possible:
            raise Wrong(f"found {found}, which is a part of a transaction, and must be one of {self.possible}")
        return found

    def _must_refuse(self, chest: Chest[Any, Any]) -> None:
        """A failed chest says so whenever it is to write: when something is set, or else when it is to be saved."""
        for number in range(4):
            try:
                with chest.transaction() if number % 2 else contextlib.nullcontext():
                    chest["further", number] = number
                chest.sync()
            except FailedError:
                continue
            raise Wrong("the chest had failed, and writes again")


def _is(found: Any, number: int, tag: Tag | None) -> None:
    if oracle.whole(found, 0, number) != tag:
        raise Wrong(f"{oracle.key(0, number)!r:.60} is {oracle.tag_of(found)}, and was set to {tag}")


# --- what a request asks for


def _live(path: str, plan: str, log: Callable[[str], None], wrong: str = "") -> dict[str, Any]:
    """``wrong`` is for controls, which must be caught.

    "acknowledges early"; "deaf" hears of no failed sync; transactions "step by step" are none.
    """
    with contextlib.ExitStack() as stack:
        if wrong == "deaf":
            stack.enter_context(mock.patch.object(os, "fsync", _deaf))
        if wrong == "step by step":
            stack.enter_context(mock.patch.object(Chest, "transaction", _step_by_step))
        return Life(path, plan, log, wrong == "acknowledges early").run()


def _deaf(fd: int) -> None:
    with contextlib.suppress(OSError):
        _fsync(fd)


@contextlib.contextmanager
def _step_by_step(chest: Chest[Any, Any]) -> Iterator[None]:
    """A transaction as one might write it: each step is committed as it is done, and put back if the user wants that."""
    before = {key: copy.deepcopy(value) for key, value in chest.items()}
    through, chest._write_through = chest._write_through, True
    try:
        yield
    except _Undone:
        chest.clear()
        for key, value in before.items():
            chest[key] = value
        raise
    finally:
        chest._write_through = through
    chest.sync()


def _break_off(path: str, plan: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Die between a commit and what it leaves to be done, in the middle of a read, with values half written."""
    life = Life(path, plan, log, False)
    life.open()
    last = len(PLANS[plan]) - 1
    for generation in range(last):
        life.begin(generation)
    assert life.chest is not None
    index = life.chest._store.index
    for n in range(2):
        _, fd = life.chest._store.blobs._create()
        os.write(fd, b"half a value" * n)
    (Path(path) / ".keys" / "new" / "stray").write_bytes(b"half a value")
    reading = index._env.begin()  # type: ignore[attr-defined]
    reading.get(b"x", db=index._env.index)  # type: ignore[attr-defined]
    with mock.patch.object(LmdbIndex, "settle", side_effect=lambda *arguments, **more: os._exit(9)):
        life.begin(last)
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
    run = oracle.Run(list(PLANS).index(plan), range(1), True, holes or plan in MEMORY, written, plan in ATOMIC)
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
        for plan in MEMORY:
            assert not _live(f"{folder}/{plan}", plan, lambda line: None)["errors"]
    _fs._kinds.clear()
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(_serve_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
