"""A fork under LMDB: which of the parent's threads it waits for, and that no reader of the parent's is harmed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest
from chest.engines import _environments
from chest.engines._environments import ENVIRONMENTS
from chest.engines._gate import GATE
from chest.errors import ChestError
from forking import DEADLINE_S, Forked, environment, in_child, needs_fork, wait_for

pytestmark = needs_fork


@pytest.fixture(name="chest", params=["path", "scratch"])
def _chest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c" if request.param == "path" else None) as chest:
        chest["small"], chest["large"] = [1], np.arange(20_000)
        chest.sync()
        yield chest
        assert GATE.inside == []
        assert not GATE.shut
        assert chest._store.index.version() >= 0


def _own_slots(chest: Chest[Any, Any]) -> int:
    """How many slots of the index's reader table are in the name of a process, or of this one's children."""
    found = chest._store.index._env._env.readers()  # type: ignore[attr-defined]
    return 0 if found.startswith("(no") else len(found.splitlines()) - 1


def test_a_child_that_closes_leaves_the_parents_readers_alone(chest: Chest[Any, Any]) -> None:
    env = chest._store.index._env  # type: ignore[attr-defined]
    begun, end = threading.Event(), threading.Event()
    found: list[Any] = []

    def read() -> None:  # as of a traceback that somebody keeps: the transaction has ended, and its slot is taken
        txn = env.begin()
        txn.abort()
        begun.set()
        end.wait(DEADLINE_S)
        found.append(txn)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait(DEADLINE_S)
    for _ in range(3):
        assert in_child(lambda: (chest["small"], chest.close())) == ([1], None)
    assert chest["small"] == [1]
    with GATE.entered():
        txn = env.begin()  # might have got the slot that the thread's transaction had
        assert _own_slots(chest) == 1
        end.set()
        thread.join()
        found.clear()
        assert _own_slots(chest) == 1
        txn.abort()
        del txn
    assert _own_slots(chest) == 0


def test_a_child_that_dies_while_it_reads_leaves_a_slot_that_is_cleared(chest: Chest[Any, Any]) -> None:
    def work() -> None:
        assert chest["small"] == [1]
        env = chest._store.index._env  # type: ignore[attr-defined]
        txn = env.begin()
        os.write(ready[1], b"%d" % bool(txn))
        signal.pause()

    ready = os.pipe()
    with Forked(work) as child:
        assert os.read(ready[0], 1) == b"1"
        assert _own_slots(chest) == 1
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    chest["small"] = [2]
    chest.sync()
    chest._store.index._env.reader_check()  # type: ignore[attr-defined]
    assert _own_slots(chest) == 0
    for end in ready:
        os.close(end)


def test_many_children_leave_no_slots(chest: Chest[Any, Any]) -> None:
    for _ in range(5):
        children = [Forked(lambda: (chest["small"], chest["large"].sum(), os._exit(0))) for _ in range(3)]
        for child in children:
            with child:
                assert os.waitstatus_to_exitcode(child.wait()) == 0
    chest._store.index._env.reader_check()  # type: ignore[attr-defined]
    assert _own_slots(chest) == 0
    assert chest["small"] == [1]


def test_a_fork_waits_for_the_transaction_of_another_thread(chest: Chest[Any, Any]) -> None:
    inside, end = threading.Event(), threading.Event()

    def write() -> None:
        with chest.transaction():
            chest["a"] = 1
            inside.set()
            end.wait(DEADLINE_S)
            chest["b"] = 2

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait(DEADLINE_S)
    threading.Timer(0.2, end.set).start()
    assert in_child(lambda: (chest.get("a"), chest.get("b"))) == (1, 2)
    thread.join()


def test_a_transaction_of_another_thread_that_never_ends_is_lost_to_the_child_and_to_nobody_else(
    chest: Chest[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_environments, "PATIENCE_S", 0.2)
    inside, end = threading.Event(), threading.Event()

    def write() -> None:
        with chest.transaction():
            chest["a"] = 1
            inside.set()
            end.wait(DEADLINE_S)

    other = Chest[str, int](path=tmp_path / "other")
    other["x"] = 1
    other.sync()
    thread = threading.Thread(target=write)
    thread.start()
    inside.wait(DEADLINE_S)

    def work() -> tuple[str, int]:
        with pytest.raises(ChestError) as caught:
            chest["small"]
        with pytest.raises(ChestError):
            Chest(path=chest.path)
        gc.collect()
        return caught.value.message, other["x"]

    message, x = in_child(work)
    assert "forked within a transaction" in message
    assert x == 1
    end.set()
    thread.join()
    assert chest["a"] == 1
    other.close()


def test_a_child_forked_within_a_transaction_cannot_touch_it(chest: Chest[Any, Any], tmp_path: Path) -> None:
    other = Chest[str, int](path=tmp_path / "other")
    other["x"] = 1
    other.sync()
    pid = -1
    try:
        with chest.transaction():
            chest["a"] = 1
            pid = os.fork()
            if not pid:
                for use in (lambda: chest["small"], lambda: chest.__setitem__("b", 2), lambda: chest.sync()):
                    with pytest.raises(ChestError, match="forked within a transaction"):
                        use()
                assert other["x"] == 1
            chest_of_parent = bool(pid)
        if not pid:
            os._exit(1)  # it was committed
    except ChestError as error:
        os._exit(0 if "this process" in error.message and not chest_of_parent else 2)
    except BaseException:
        if not pid:
            os._exit(3)
        raise
    assert os.waitstatus_to_exitcode(wait_for(pid)) == 0
    assert chest["a"] == 1
    assert "b" not in chest
    chest["c"] = 3
    chest.sync()
    with Chest[str, Any](path=chest.path) as again:
        assert (again["a"], again["c"]) == (1, 3)
    other.close()


def test_a_child_that_leaves_a_transaction_of_its_parent_ends_without_waiting_for_it(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom chest import Chest\n"
        "c = Chest(path=sys.argv[1])\n"
        "with c.transaction():\n"
        "    c['a'] = 1\n"
        "    pid = os.fork()\n"
        "    if not pid: sys.exit(7)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "    c['b'] = 2\n"
        "assert c == {'a': 1, 'b': 2}\n"
        "c.close()\n"
    )
    env = environment()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], env=env, capture_output=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_fork_without_pythons_hooks_before_it_is_noticed(chest: Chest[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that embed Python may call the hooks of the child only."""

    def work() -> str:
        ENVIRONMENTS.after_fork_in_child()
        chest._inherited()
        with pytest.raises(ChestError) as caught:
            chest["small"]
        return caught.value.message

    assert "forked within a transaction" in in_child(lambda: (chest["small"], work())[1])


def test_forks_of_several_threads_at_a_time(chest: Chest[Any, Any]) -> None:
    wrong: list[Any] = []

    def work() -> None:
        try:
            wrong.extend("value" for _ in range(5) if in_child(lambda: chest["small"]) != [1])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_finalizer_that_runs_while_the_process_forks_does_not_wait_for_it(tmp_path: Path) -> None:
    kept: list[Any] = [Chest[str, int](path=tmp_path / "c")]
    kept[0].sync()
    ENVIRONMENTS.before_fork()
    try:
        kept.clear()  # closed later
    finally:
        ENVIRONMENTS.after_fork_in_parent()
    with Chest[str, int](path=tmp_path / "c") as again:
        assert again._store.index._env.n_users == 1  # type: ignore[attr-defined]


def test_a_thread_that_opens_and_closes_does_not_stop_forks(tmp_path: Path) -> None:
    end = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            while not end.is_set():
                Chest[str, int](path=tmp_path / "c").close()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):

            def look() -> int:
                with Chest[str, int](path=tmp_path / "c") as chest:
                    return len(chest)

            assert in_child(look) == 0
    finally:
        end.set()
        thread.join()
    assert wrong == []
