"""``kill -9`` at any instant: nothing acknowledged is lost, nothing is torn, nothing is left lying about.

The instant is random, but measured in what the writer has done and not in seconds: after so many lines of its log, and
a few hundred microseconds more or less. Each folder goes through several lives, so that leftovers would pile up.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from counts import count
from oracle import Run, Wrong

from chest import Chest

pytestmark = pytest.mark.torture

HERE = Path(__file__).parent
LIVES = 5  # of a folder
FULL = os.environ.get("CHEST_TORTURE", "") not in ("", "0")


class Plan(NamedTuple):
    """What one writing process is told."""

    seed: int
    first: int  # number of its first writer
    writers: int  # threads, each with keys of its own
    memory: int
    in_place: int
    ack_early: int
    atomic: int


def draw(rng: random.Random, first: int, **given: int) -> Plan:
    writers = rng.choice([1, 1, 3])
    memory = rng.choice([10**9, 10**9, 600_000, 0])
    in_place = int(writers == 1)
    plan = Plan(rng.randrange(1 << 30), first, writers, memory, in_place, 0, rng.choice([0, 0, 1]))
    return plan._replace(**given)


def live_and_die(path: Path, rng: random.Random, plans: Sequence[Plan]) -> list[Run]:
    """Let processes write to a folder, and kill them, all at once."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_writer(path, plan)) for plan in plans]
        pipes = [process.stdout.fileno() for process in processes if process.stdout is not None]
        logs = dict.fromkeys(pipes, b"")
        lines = rng.randrange(1, 80)
        while max(log.count(b"\n") for log in logs.values()) < lines:
            for pipe in select.select(pipes, [], [])[0]:
                part = os.read(pipe, 65536)
                assert part, f"a writer ended by itself: {logs[pipe][-500:]!r}"
                logs[pipe] += part
        until = time.perf_counter_ns() + rng.randrange(600_000)
        while time.perf_counter_ns() < until:
            pass
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            while part := os.read(pipe, 65536):
                logs[pipe] += part
            assert process.wait() == -signal.SIGKILL, logs[pipe][-500:]
    return [
        Run(p.seed, range(p.first, p.first + p.writers), bool(p.in_place), p.memory < 10**9, log.decode(), bool(p.atomic))
        for p, log in zip(plans, logs.values(), strict=True)
    ]


@contextlib.contextmanager
def _writer(path: Path, plan: Plan) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "writer.py", str(path), *map(str, plan)]
    process = subprocess.Popen(command, cwd=HERE, env=oracle.environment(), stdout=subprocess.PIPE, bufsize=0)
    with process:
        try:
            yield process
        finally:
            process.kill()


PROCESSES_AND_FOLDERS = [(1, folder) for folder in range(5)] + [
    (n, folder) for n in (3, 8) for folder in range(5 if FULL else 1)
]


@pytest.mark.parametrize(("n_processes", "folder"), PROCESSES_AND_FOLDERS)
def test_whatever_was_acknowledged_survives_kill_9(
    tmp_path: Path, folder: int, n_processes: int, scale: Callable[[int, int], int]
) -> None:
    for number in range(folder, scale(5, 20), 5):
        rng = random.Random(f"{number} {n_processes}")
        path = tmp_path / str(number)
        runs: list[Run] = []
        for life in range(LIVES):
            runs += live_and_die(path, rng, [draw(rng, life * 100 + i * 10) for i in range(n_processes)])
            try:
                oracle.check_folder(path, runs)
            except Exception as error:
                last = [run._replace(log=run.log[-200:]) for run in runs[-n_processes:]]
                raise AssertionError(f"folder {number}, life {life}: {last}") from error
            count(f"kill -9 of {n_processes} writing process{'es' if n_processes > 1 else ''}", 1, 1)
        shutil.rmtree(path)


OPENS_AND_DIES = """
import os, signal, sys
from chest import Chest
import chest
root, at, lines = os.path.dirname(chest.__file__), int(sys.argv[2]), 0
def trace(frame, event, argument):
    global lines
    if not frame.f_code.co_filename.startswith(root):
        return None
    if event == "line":
        lines += 1
        if lines == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace
sys.settrace(trace)
c = Chest(path=sys.argv[1])
sys.settrace(None)
print(lines)
c.close()
"""


def _opens_and_dies(path: Path, at_line: int) -> subprocess.CompletedProcess[str]:
    """Open a chest in a process that is killed at this line of chest's code (0: never)."""
    return subprocess.run(
        [sys.executable, "-c", OPENS_AND_DIES, str(path), str(at_line)],
        env=oracle.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("folder", range(4))
def test_a_second_kill_while_the_first_is_recovered_from_does_no_harm(
    tmp_path: Path, folder: int, scale: Callable[[int, int], int]
) -> None:
    rng = random.Random(folder + 1000)
    path = tmp_path / "chest"
    runs = live_and_die(path, rng, [draw(rng, 0)])
    _leave_work_behind(path)
    whole = shutil.copytree(path, tmp_path / "copy", symlinks=True)
    done = _opens_and_dies(whole, 0)
    assert done.returncode == 0, done.stderr
    n_lines = int(done.stdout)
    n_kills = 0
    for at_line in sorted(rng.sample(range(1, n_lines), scale(6, 60))):
        # The same folder over and over: what one open has half repaired, the next goes on with.
        done = _opens_and_dies(path, at_line)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr  # 0: less was left to be done than at first
        n_kills += done.returncode != 0
    with Chest[Any, Any](path=path) as chest:
        oracle.check_tidy(chest)
        for n in range(5):
            assert oracle.same(chest.pop(("kept", n)), np.arange(20_000) + n)
    oracle.check_folder(path, runs)
    count("kill -9 while a crash is recovered from", n_kills, n_kills)


def test_a_kill_while_a_chest_is_created_leaves_a_folder_that_opens(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    done = _opens_and_dies(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    n_lines = int(done.stdout)
    chosen = random.Random(1).sample(range(1, n_lines + 1), min(n_lines, scale(12, 150)))
    for at_line in chosen:
        path = tmp_path / str(at_line)
        assert _opens_and_dies(path, at_line).returncode == -signal.SIGKILL
        with Chest[Any, Any](path=path) as chest:
            assert len(chest) == 0
            chest["a"] = [1]
        with Chest[Any, Any](path=path) as chest:
            assert chest == {"a": [1]}
            oracle.check_tidy(chest)
    count("kill -9 while a chest is created", len(chosen), len(chosen))


def _leave_work_behind(path: Path) -> None:
    """The folder as a crash between a commit and what it left to be done leaves it: notes, and files in ``new``."""
    script = (
        "import os, sys\nimport numpy as np\nfrom chest import Chest\nfrom chest.engines._lmdb import LmdbIndex\n"
        "LmdbIndex.settle = lambda *arguments, **more: (None, 0)\n"  # what the one before has left is to be left, too
        "c = Chest(path=sys.argv[1])\n"
        "LmdbIndex.settle = lambda *arguments, **more: os._exit(9)\n"
        "for n in range(5): c['kept', n] = np.arange(20_000) + n\n"
        "c.flush()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=oracle.environment(), timeout=60)
    assert done.returncode == 9
    for n in range(5):
        (path / ".keys" / "new" / f"stray{n}").write_bytes(b"half a value")


# --- the oracle must catch what is wrong


N_GENERATIONS = 33


@pytest.fixture(name="acknowledged")
def _acknowledged(tmp_path: Path) -> tuple[Path, Run]:
    """A folder with acknowledged generations, whose writer has died."""
    path, seed, log = tmp_path / "chest", 7, ""
    state: oracle.State = {}
    with Chest[Any, Any](path=path) as chest:
        for generation in range(N_GENERATIONS):
            for step in oracle.steps(seed, 0, generation, in_place=False):
                if oracle.apply(state, step) and step.kind == "set":
                    chest[oracle.key(0, step.tag.key)] = oracle.value(step.tag)
                elif step.kind == "delete":
                    chest.pop(oracle.key(0, step.tag.key), None)
            chest.flush()
            log += f"begin 0 {generation}\nack 0 {generation}\n"
    run = Run(seed, range(1), False, True, log)
    oracle.check_folder(path, [run])
    return path, run


def _some_file(path: Path) -> Path:
    with Chest(path=path) as chest:
        number = next(n for n in (1, 8) if oracle.key(0, n) in chest)
        return Path(chest.key_to_filename(oracle.key(0, number)))


def test_the_oracle_sees_that_a_file_is_gone(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    _some_file(path).unlink()
    with pytest.raises(Wrong, match="not there"):
        oracle.check_folder(path, [run])


def test_the_oracle_sees_that_an_acknowledged_value_is_gone(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    with Chest[Any, Any](path=path) as chest:
        del chest[next(iter(chest))]
    with pytest.raises(Wrong, match="acknowledged"):
        oracle.check_folder(path, [run])


def test_the_oracle_sees_an_older_value(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    with Chest[Any, Any](path=path) as chest:
        number = next(n for n in range(oracle.N_KEYS) if oracle.key(0, n) in chest)
        tag = oracle.tag_of(chest[oracle.key(0, number)])
        chest[oracle.key(0, number)] = oracle.value(tag._replace(generation=tag.generation - 1))
    with pytest.raises(Wrong, match="acknowledged"):
        oracle.check_folder(path, [run])


def test_the_oracle_sees_a_torn_value(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    with Chest[Any, Any](path=path) as chest:
        chest[oracle.key(0, next(n for n in (1, 8) if oracle.key(0, n) in chest))][-1] += 1
    with pytest.raises(Wrong, match="torn"):
        oracle.check_folder(path, [run])


def test_the_oracle_sees_a_hole_in_a_writers_steps(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    with Chest[Any, Any](path=path) as chest:  # the last two steps of a generation that was not acknowledged, not the first
        tags = [step.tag for step in oracle.steps(run.seed, 0, N_GENERATIONS, in_place=False) if step.kind == "set"]
        assert len({tag.key for tag in tags}) > 2
        for tag in tags[-2:]:
            chest[oracle.key(0, tag.key)] = oracle.value(tag)
    begun = run._replace(log=run.log + f"begin 0 {N_GENERATIONS}\n")
    oracle.check_folder(path, [begun])
    with pytest.raises(Wrong, match="never the state"):
        oracle.check_folder(path, [begun._replace(spills=False)])


def test_the_oracle_sees_what_is_left_lying_about(acknowledged: tuple[Path, Run]) -> None:
    path, _ = acknowledged
    with Chest[Any, Any](path=path) as chest:
        (path / "word0x99").write_bytes(b"nobody's")
        with pytest.raises(Wrong, match="lying about"):
            oracle.check_tidy(chest)
        (path / "word0x99").unlink()
        (path / ".keys" / "new" / "stray").write_bytes(b"nobody's")
        with pytest.raises(Wrong, match="lying about"):
            oracle.check_tidy(chest)


@pytest.mark.parametrize("atomic", [0, 1], ids=["flushes", "transactions"])
def test_the_oracle_catches_a_writer_that_acknowledges_before_it_is_committed(tmp_path: Path, atomic: int) -> None:
    rng = random.Random(4)
    for number in range(20):
        path = tmp_path / str(number)
        plan = draw(rng, 0, ack_early=1, atomic=atomic, memory=10**9)
        runs = live_and_die(path, rng, [plan])
        with contextlib.suppress(Wrong):
            oracle.check_folder(path, runs)
            continue
        count(f"a writer that acknowledges before its {'transaction ends' if atomic else 'flush'}", 1, 0, control=True)
        return
    pytest.fail("twenty liars were believed")


def test_the_oracle_sees_half_a_transaction(acknowledged: tuple[Path, Run]) -> None:
    path, run = acknowledged
    tags = [step.tag for step in oracle.steps(run.seed, 0, N_GENERATIONS, in_place=False) if step.kind == "set"]
    with Chest[Any, Any](path=path) as chest:
        chest[oracle.key(0, tags[0].key)] = oracle.value(tags[0])
    begun = run._replace(log=run.log + f"begin 0 {N_GENERATIONS}\n")
    oracle.check_folder(path, [begun])
    with pytest.raises(Wrong, match="never the state"):
        oracle.check_folder(path, [begun._replace(atomic=True)])


def test_values_derive_from_their_tags_alone() -> None:
    for number in range(oracle.N_KEYS):
        tag = oracle.Tag(2, number, 5, 3)
        assert oracle.whole(oracle.value(tag), 2, number) == tag
        changed = oracle.value(tag)
        if oracle.change(changed, tag._replace(step=4)):
            assert oracle.same(changed, oracle.value(tag._replace(step=4)))
    assert not oracle.same(np.arange(3), np.arange(4))
