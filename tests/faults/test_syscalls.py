"""A fault in any single system call: ``kill -9`` at exactly this one, or an error from it, once or for ever.

What is asked of a kill is what the oracle asks of every crash. What is asked of an error: it is reported as one of chest's
own or changes nothing; no signal, no hang, no wrong value, then or later; what was acknowledged is there for the next
process. The same faults strike while a chest recovers from a crash. Of a transaction, what a kill or an error leaves is all
or nothing; after an error this goes for the memory of the chest that lives on, too, and it can be tried again.
"""

from __future__ import annotations

import errno
import itertools
import os
import queue
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import injection
import oracle
import pytest
from counts import count
from injection import Call, Fault, Outcome, Worker

from chest import Chest
from workloads import ATOMIC, PLANS

pytestmark = pytest.mark.torture

T = TypeVar("T")
Scale = Callable[[int, int], int]
ALL = 10**6
AT_A_TIME = 2
ERRORS = {
    "openat": ("EIO", "ENOSPC", "EMFILE", "EINTR"),
    "mmap": ("ENOMEM",),
    **dict.fromkeys(injection.WRITES + injection.SYNCS + injection.SIZES, ("EIO", "ENOSPC", "EINTR")),
    **dict.fromkeys(injection.NAMES, ("EIO", "ENOSPC")),
    **dict.fromkeys(injection.REMOVES + injection.LOOKS, ("EIO",)),
}


class Sweep:
    """Tries cases, two at a time, each in a folder of its own."""

    def __init__(self, folder: Path, workers: list[Worker]) -> None:
        self.folder = folder
        self.workers = workers

    def killable(self, request: dict[str, Any]) -> list[Call]:
        """The calls of a workload that change something on the disk, or may."""
        return self.workers[0].trace(request, injection.CHANGES)

    def faults(self, request: dict[str, Any]) -> list[Fault]:
        """Every error at every call. An interruption that never ends is left out: who tries again does so for ever."""
        return [
            Fault(call, what, times)
            for call in self.workers[0].trace(request, tuple(ERRORS))
            for what in ERRORS[call.kind]
            for times in ("once", "five times" if what == "EINTR" else "for ever")
        ]

    def over(self, cases: Sequence[T], problem_of: Callable[[Worker, Path, T], str]) -> list[str]:
        """What is wrong, for each case in which something is."""
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            idle.put(worker)

        def attempt(number: int) -> str:
            worker, folder = idle.get(), self.folder / str(number)
            folder.mkdir()
            try:
                problem = problem_of(worker, folder / "chest", cases[number])
            finally:
                idle.put(worker)
                shutil.rmtree(folder)
            return problem and f"{cases[number]}\n{problem}"

        with ThreadPoolExecutor(len(self.workers)) as pool:
            return list(filter(None, pool.map(attempt, range(len(cases)))))


@pytest.fixture(name="sweep")
def _sweep(tmp_path: Path) -> Iterator[Sweep]:
    if reason := injection.why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield Sweep(tmp_path, [stack.enter_context(Worker()) for _ in range(AT_A_TIME)])


def _share(cases: Sequence[T], number: int) -> list[T]:
    """So many of them, spread evenly: one out of each part, always the same, and the first and the last one."""
    if number >= len(cases):
        return list(cases)
    rng = random.Random(number)
    bounds = [1 + part * (len(cases) - 2) // (number - 2) for part in range(number - 1)]
    between = [cases[rng.randrange(start, stop)] for start, stop in itertools.pairwise(bounds)]
    return [cases[0], *between, cases[-1]]


def _survived(what: str, tried: int, problems: list[str]) -> None:
    count(what, tried, tried - len(problems))
    assert not problems, f"{what}: {len(problems)} of {tried}\n" + "\n\n".join(problems[:20])


def _live(path: Path, plan: str, **more: Any) -> dict[str, Any]:
    return {"do": "live", "path": str(path), "plan": plan, **more}


def _after_an_error(worker: Worker, path: Path, plan: str, outcome: Outcome, once: bool = False) -> str:
    result = outcome.result or {}
    if problem := outcome.problem():
        return problem
    if once and plan in ATOMIC and len(result["errors"]) > 1 and not any(e.startswith("FailedError") for e in result["errors"]):
        return f"one error, and neither is the chest usable after it nor does it say that it has failed: {result['errors']}"
    if outcome.struck.startswith(injection.SYNCS) and " EIO " in outcome.struck and not result["errors"]:
        return "a sync failed, and nobody was told"
    # These refuse some values and write others, or deletions only, for the room that they make.
    refusals = ["WriteError", "SerializeError", "DiskFullError"]
    if outcome.struck.startswith("openat"):  # files that cannot be made, and folders that cannot be synced: that is told
        refusals.append("FailedError")
    holes = any(error.startswith(tuple(refusals)) for error in result["errors"])
    if problem := worker.check(path, plan, outcome.log, result.get("final"), holes):
        return f"{problem}\nafter {result['errors']}"
    return ""


@pytest.mark.parametrize("plan", PLANS)
def test_a_kill_at_any_system_call_loses_nothing_acknowledged(sweep: Sweep, tmp_path: Path, plan: str, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, call: Call) -> str:
        return _killed(worker, path, plan, call)

    calls = _share(sweep.killable(_live(tmp_path / "whole", plan)), scale(20, ALL))
    _survived(f"kill -9 at a system call, {plan}", len(calls), sweep.over(calls, problem_of))


def _killed(worker: Worker, path: Path, plan: str, call: Call, **more: Any) -> str:
    outcome = worker.inject(_live(path, plan, **more), Fault(call, "SIGKILL"))
    # Which folders share a sync depends on the order of a set: this life may have had one call less.
    had_none = outcome.status == 0 and sum(made.kind == call.kind for made in outcome.calls) < call.number
    if outcome.status != -signal.SIGKILL and not had_none:
        return f"it was not killed: {outcome}"
    return worker.check(path, plan, outcome.log)


@pytest.mark.parametrize("plan", PLANS)
def test_an_error_from_any_system_call_is_reported_or_harmless(sweep: Sweep, tmp_path: Path, plan: str, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, fault: Fault) -> str:
        return _after_an_error(worker, path, plan, worker.inject(_live(path, plan), fault), fault.times == "once")

    faults = _share(sweep.faults(_live(tmp_path / "whole", plan)), scale(32, ALL))
    _survived(f"errors of system calls, {plan}", len(faults), sweep.over(faults, problem_of))


@pytest.mark.parametrize("plan", PLANS)
def test_a_write_that_falls_short_is_gone_on_with_or_reported(sweep: Sweep, tmp_path: Path, plan: str, scale: Scale) -> None:
    library = injection.short_writes(tmp_path)
    if library is None:
        pytest.skip("letting writes fall short takes a C compiler")

    def problem_of(worker: Worker, path: Path, short: tuple[int, bool]) -> str:
        return _after_an_error(worker, path, plan, worker.run(_live(path, plan, short=short)), not short[1])

    with ExitStack() as stack:
        short = Sweep(tmp_path, [stack.enter_context(Worker(LD_PRELOAD=str(library))) for _ in sweep.workers])
        outcome = short.workers[0].run(_live(tmp_path / "whole", plan, short=(0, False)))
        assert outcome.result is not None
        assert not outcome.problem(), outcome
        every = [(n, ever) for n in range(1, outcome.result["writes"] + 1) for ever in (False, True)]
        cases = _share(every, scale(8, ALL))
        _survived(f"short writes, {plan}", len(cases), short.over(cases, problem_of))


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One of the cases above, which a share of them may miss: the note that tells of the file must not be forgotten.
    lstat = os.lstat
    struck: list[Any] = []

    def fails_once(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if Path(path).parent.name == "new" and not Path(path).name.startswith("owner-") and not struck:
            struck.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return lstat(path, *arguments, **more)

    with Chest[str, str](path=tmp_path / "chest") as chest:
        chest["a"] = "a" * 90_000
        monkeypatch.setattr(os, "lstat", fails_once)
        chest.flush()
        monkeypatch.undo()
        assert struck
    for _ in range(2):
        with Chest[str, str](path=tmp_path / "chest") as chest:
            assert chest["a"] == "a" * 90_000
            oracle.check_tidy(chest)


def test_what_an_undone_block_wrote_is_not_left_for_the_next_process_to_remove(tmp_path: Path) -> None:
    with Worker() as worker:
        outcome = worker.run(_live(tmp_path / "chest", "transact"))
    assert not outcome.problem()
    assert outcome.result is not None
    assert not outcome.result["errors"]
    assert not os.listdir(tmp_path / "chest" / ".keys" / "new")


# --- while a crash is being recovered from


class Wreck(NamedTuple):
    """A folder as a crash has left it, and the log of who died there."""

    path: Path
    log: str

    def copy(self, path: Path) -> dict[str, Any]:
        """A request to open a copy of it."""
        shutil.copytree(self.path, path, symlinks=True)
        return {"do": "open", "path": str(path), "plan": self.path.name}


@pytest.fixture(name="wreck", params=PLANS)
def _wreck(sweep: Sweep, request: pytest.FixtureRequest, tmp_path: Path) -> Wreck:
    path = tmp_path / "wreck" / request.param
    path.parent.mkdir()
    outcome = sweep.workers[0].run({"do": "break off", "path": str(path), "plan": request.param})
    assert outcome.status == 9, outcome
    return Wreck(path, outcome.log)


def test_a_kill_at_any_system_call_of_a_recovery_does_no_harm(sweep: Sweep, wreck: Wreck, tmp_path: Path, scale: Scale) -> None:
    plan = wreck.path.name

    def problem_of(worker: Worker, path: Path, call: Call) -> str:
        outcome = worker.inject(wreck.copy(path), Fault(call, "SIGKILL"))
        if outcome.status != -signal.SIGKILL:
            return f"it was not killed: {outcome}"
        return worker.check(path, plan, wreck.log)

    calls = _share(sweep.killable(wreck.copy(tmp_path / "whole")), scale(10, ALL))
    _survived(f"kill -9 during recovery, {plan}", len(calls), sweep.over(calls, problem_of))


def test_an_error_during_a_recovery_does_no_harm(sweep: Sweep, wreck: Wreck, tmp_path: Path, scale: Scale) -> None:
    plan = wreck.path.name

    def problem_of(worker: Worker, path: Path, fault: Fault) -> str:
        outcome = worker.inject(wreck.copy(path), fault)
        return outcome.problem() or worker.check(path, plan, wreck.log)

    faults = _share(sweep.faults(wreck.copy(tmp_path / "whole")), scale(10, ALL))
    _survived(f"errors during recovery, {plan}", len(faults), sweep.over(faults, problem_of))


# --- controls: what must be caught


def _caught(what: str, tried: int, problems: list[str], sign: str) -> None:
    count(what, tried, tried - len(problems), control=True)
    assert any(sign in problem for problem in problems), f"{what}: none of {tried} was caught as {sign!r}: {problems[:3]}"


def test_a_chest_that_acknowledges_before_it_flushes_is_caught(sweep: Sweep, tmp_path: Path, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, call: Call) -> str:
        return _killed(worker, path, "large", call, wrong="acknowledges early")

    calls = _share(sweep.killable(_live(tmp_path / "whole", "large")), scale(12, 60))
    _caught("control: acknowledged before the flush", len(calls), sweep.over(calls, problem_of), "never the state")


def test_a_chest_that_does_not_hear_of_failed_syncs_is_caught(sweep: Sweep, tmp_path: Path, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, fault: Fault) -> str:
        return _after_an_error(worker, path, "large", worker.inject(_live(path, "large", wrong="deaf"), fault))

    calls = sweep.workers[0].trace(_live(tmp_path / "whole", "large"), ("fsync",))
    faults = [Fault(call, "EIO") for call in _share(calls, scale(6, ALL))]
    _caught("control: deaf to failed syncs", len(faults), sweep.over(faults, problem_of), "nobody was told")


def test_transactions_that_commit_step_by_step_are_caught_by_a_kill(sweep: Sweep, tmp_path: Path, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, call: Call) -> str:
        return _killed(worker, path, "transact", call, wrong="step by step")

    calls = _share(sweep.killable(_live(tmp_path / "whole", "transact", wrong="step by step")), scale(8, 60))
    _caught("control: transactions step by step, killed", len(calls), sweep.over(calls, problem_of), "never the state")


def test_transactions_that_an_error_does_not_undo_are_caught(sweep: Sweep, tmp_path: Path, scale: Scale) -> None:
    def problem_of(worker: Worker, path: Path, fault: Fault) -> str:
        return _after_an_error(worker, path, "transact", worker.inject(_live(path, "transact", wrong="step by step"), fault))

    calls = sweep.workers[0].trace(_live(tmp_path / "whole", "transact", wrong="step by step"), ("fdatasync",))
    faults = [Fault(call, "EIO") for call in _share(calls, scale(8, 60))]
    problems = sweep.over(faults, problem_of)
    _caught("control: transactions step by step, errors", len(faults), problems, "must be")
