"""A chest's life and its end: closed, left open, collected, or killed with its process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest
from chest.errors import ClosedError, SerializeError

SOURCES = str(Path(__file__).resolve().parents[1] / "src")


def _python(script: str, *arguments: object, tmpdir: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script in another interpreter, which must end with this code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])}
    if tmpdir is not None:
        env["TMPDIR"] = str(tmpdir)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


# --- close and with


def test_close_writes_everything(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "c")
    chest["small"], chest["large"] = [1], np.arange(20_000)
    chest.close()
    with Chest(path=tmp_path / "c") as again:
        assert again["small"] == [1]
        assert np.array_equal(again["large"], np.arange(20_000))


def test_with_closes(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c") as chest:
        chest["a"] = 1
    with pytest.raises(ClosedError):
        chest["a"]
    with Chest(path=tmp_path / "c") as again:
        assert again == {"a": 1}


def test_an_exception_inside_with_passes_and_the_values_are_written(tmp_path: Path) -> None:
    mine = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught, Chest(path=tmp_path / "c") as chest:  # noqa: PT012
        chest["a"] = 1
        raise mine
    assert caught.value is mine
    with Chest(path=tmp_path / "c") as again:
        assert again == {"a": 1}


def test_an_exception_inside_with_is_not_hidden_by_a_value_that_cannot_be_written(tmp_path: Path) -> None:
    mine = RuntimeError("mine")
    chest = Chest[str, Any](path=tmp_path / "c")
    with pytest.raises((RuntimeError, SerializeError)) as caught, chest:  # noqa: PT012
        chest["bad"] = lambda: None
        raise mine
    assert caught.value is mine or caught.value.__context__ is mine
    chest.pop("bad", None)
    chest.close()


def test_closing_twice_does_nothing(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "c")
    chest.close()
    chest.close()
    with Chest(path=tmp_path / "c") as other:
        other["a"] = 1
        chest.close()
        assert other["a"] == 1


USES: dict[str, Callable[[Chest[Any, Any]], Any]] = {
    "get": lambda c: c["a"],
    "get in memory": lambda c: c["unwritten"],
    "get default": lambda c: c.get("a", 1),
    "get default missing": lambda c: c.get("missing", 1),
    "missing": lambda c: c["missing"],
    "set": lambda c: c.__setitem__("a", 1),
    "delete": lambda c: c.__delitem__("a"),
    "in": lambda c: "a" in c,
    "len": len,
    "bool": bool,
    "iter": lambda c: list(c),
    "reversed": lambda c: list(reversed(c)),
    "keys": lambda c: list(c.keys()),
    "values": lambda c: list(c.values()),
    "items": lambda c: list(c.items()),
    "==": lambda c: c == {"a": 1},
    "pop": lambda c: c.pop("a"),
    "pop default": lambda c: c.pop("missing", None),
    "popitem": lambda c: c.popitem(),
    "setdefault": lambda c: c.setdefault("a", 1),
    "clear": lambda c: c.clear(),
    "update": lambda c: c.update({"a": 1}),
    "copy": lambda c: c.copy(),
    "|": lambda c: c | {"a": 1},
    "r|": lambda c: {"a": 1} | c,
    "|=": lambda c: c.__ior__({"a": 1}),
    "flush": lambda c: c.flush(),
    "sync": lambda c: c.sync(),
    "shrink": lambda c: c.shrink(),
    "move_to_disk": lambda c: c.move_to_disk("a"),
    "get_from_disk": lambda c: c.get_from_disk("a"),
    "prefetch": lambda c: c.prefetch(["a"]),
    "get_many": lambda c: c.get_many(["a"]),
    "prefetch one": lambda c: c.prefetch("a"),
    "write_keys": lambda c: c.write_keys(),
    "key_to_filename": lambda c: c.key_to_filename("a"),
    "stats": lambda c: c.stats(),
    "drop": lambda c: c.drop(),
    "with": lambda c: c.__enter__(),
    "transaction": lambda c: c.transaction().__enter__(),
    "edit": lambda c: c.edit("a").__enter__(),
    "wait": lambda c: c.wait("a", timeout=0),
    "changes": lambda c: c.changes(),
    "check": lambda c: c.check(),
    "compact": lambda c: c.compact(),
    "backup": lambda c: c.backup("/tmp/never made by a test"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["path", "scratch"])
def test_every_use_after_close_is_a_closed_error(tmp_path: Path, kind: str, use: str) -> None:
    chest = Chest[Any, Any](path=tmp_path / "c" if kind == "path" else None)
    chest["a"], chest["large"] = [1], np.arange(20_000)
    chest.flush()
    chest["unwritten"] = [2]
    chest["a"]
    chest.close()
    with pytest.raises(ClosedError, match=r"closed.*open it again") as caught:
        USES[use](chest)
    assert isinstance(caught.value, ValueError)  # as with files


def test_every_public_method_is_tried_after_close() -> None:
    tried = {
        *("get", "pop", "popitem", "setdefault", "clear", "update", "copy", "keys", "values", "items", "flush", "sync"),
        *("shrink", "move_to_disk", "get_from_disk", "prefetch", "write_keys", "key_to_filename", "stats", "drop"),
        *("transaction", "edit", "wait", "changes", "check", "compact", "backup", "get_many"),
    }
    public = {name for name in dir(Chest) if not name.startswith("_") and callable(getattr(Chest, name))}
    assert public - tried == {"close", "fromkeys"}


def test_a_closed_chest_still_says_what_it_was(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "c")
    chest["a"] = 1
    chest.close()
    assert str(tmp_path / "c") in str(chest)
    assert "closed" in repr(chest)
    assert chest.path == str(tmp_path / "c")
    assert chest.memory_usage == 0
    assert dict(chest.inmem) == {}


def test_values_of_a_closed_chest_stay_readable(tmp_path: Path) -> None:
    with Chest[str, Any](path=tmp_path / "c") as chest:
        chest["a"] = np.arange(100_000)
        chest.flush()
        mapped = chest["a"]
    assert np.array_equal(mapped, np.arange(100_000))
    mapped[0] = 7


def test_iterating_over_a_chest_that_is_closed_meanwhile_is_a_closed_error(tmp_path: Path) -> None:
    chest = Chest[int, int](path=tmp_path / "c")
    for n in range(2500):
        chest[n] = n
    walk = iter(chest)
    assert next(walk) == 0
    chest.close()
    with pytest.raises(ClosedError):
        list(walk)


def test_threads_that_use_a_chest_while_it_is_closed_get_closed_errors_only(tmp_path: Path) -> None:
    for life in range(10):
        chest = Chest[int, Any](path=tmp_path / str(life), available_memory=20_000)
        chest.update((n, [n]) for n in range(200))
        wrong: list[Any] = []
        running = threading.Barrier(5)

        def work(seed: int, chest: Chest[int, Any] = chest, wrong: list[Any] = wrong, at: Any = running) -> None:
            at.wait()
            try:
                for n in range(1_000_000):
                    key = (n * 7 + seed) % 200
                    if n % 5 == 0:
                        chest[key] = [key]
                    elif chest[key] != [key]:
                        wrong.append(key)
            except ClosedError:
                return
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        running.wait()
        for n in range(50 * life):
            chest[n % 200] = [n % 200]
        chest.close()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        with Chest[int, Any](path=tmp_path / str(life)) as again:
            assert again == {n: [n] for n in range(200)}


# --- the interpreter's exit

OPEN = """
import sys, threading, os
from chest import Chest
c = Chest(path=sys.argv[1])
c['flushed'] = 0
c.flush()
c['small'] = [1]
c['large'] = list(range(50_000))
"""

ENDS = {
    "falls off the end": ("", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "sys.exit with a code": ("sys.exit(5)", 5),
    "unhandled exception": ("raise RuntimeError('mine')", 1),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "in a function": ("def f():\n    d = c\n    sys.exit(0)\nf()", 0),
    "in a reference cycle": ("class A: pass\na = A(); a.a = a; a.c = c; del c", 0),
    "held by a module": ("import types; sys.modules['kept'] = types.SimpleNamespace(c=c)", 0),
    "changed in place last": ("c.sync(); c['small'].append(2); c['small'].pop()", 0),
    "a daemon thread reads": (
        "import time\n"
        "ready = threading.Event()\n"
        "def work():\n"
        "    while True:\n"
        "        c['small']; c['flushed']; ready.set()\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "ready.wait()",
        0,
    ),
    "a daemon thread writes": (
        "ready = threading.Event()\n"
        "def work():\n"
        "    n = 0\n"
        "    while True:\n"
        "        n += 1; c['flushed'] = 0; ready.set()\n"
        "        if n % 100 == 0: c.sync()\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "ready.wait()",
        0,
    ),
    "a thread goes on after the main one": (
        "del c['small'], c['large']\n"
        "gone = threading.main_thread()\n"
        "def work():\n"
        "    gone.join()\n"
        "    c['small'] = [1]; c['large'] = list(range(50_000))\n"
        "threading.Thread(target=work).start()",
        0,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_chest_that_is_open_at_the_end_of_the_script_is_written(tmp_path: Path, end: str) -> None:
    script, code = ENDS[end]
    done = _python(OPEN + script, tmp_path / "c", code=code)
    if "exception" in end:
        assert "RuntimeError: mine" in done.stderr
    elif "daemon" not in end and "Keyboard" not in end:
        assert done.stderr == ""
    with Chest(path=tmp_path / "c") as chest:
        assert chest == {"flushed": 0, "small": [1], "large": list(range(50_000))}
        assert list(chest) == ["flushed", "small", "large"]


def test_what_cannot_be_written_at_exit_is_said_and_the_rest_is_written(tmp_path: Path) -> None:
    done = _python(OPEN + "c['the bad one'] = lambda: None\nd = Chest(path=sys.argv[1] + '2'); d['x'] = 1", tmp_path / "c")
    assert "the bad one" in done.stderr
    with Chest[str, Any](path=tmp_path / "c") as chest, Chest[str, Any](path=tmp_path / "c2") as other:
        assert chest == {"flushed": 0, "small": [1], "large": list(range(50_000))}
        assert other == {"x": 1}


def test_os_exit_loses_what_was_not_flushed_and_nothing_else(tmp_path: Path) -> None:
    _python(OPEN + "os._exit(0)", tmp_path / "c")
    with Chest(path=tmp_path / "c") as chest:
        assert chest == {"flushed": 0}


def test_a_chest_opened_inside_an_atexit_function_is_written(tmp_path: Path) -> None:
    script = (
        "import atexit, sys\nfrom chest import Chest\n"
        "def last():\n    global c\n    c = Chest(path=sys.argv[1]); c['a'] = 1; c.close()\n"
        "atexit.register(last)\n"
    )
    _python(script, tmp_path / "c")
    with Chest(path=tmp_path / "c") as chest:
        assert chest == {"a": 1}


# --- collected unclosed


def test_a_chest_that_is_collected_unclosed_warns_and_is_written(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "c")
    chest["small"], chest["large"] = [1], np.arange(20_000)
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del chest
        gc.collect()
    with Chest[str, Any](path=tmp_path / "c") as again:
        assert again["small"] == [1]
        assert np.array_equal(again["large"], np.arange(20_000))


def test_the_warning_names_the_path(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "my_chest")
    chest["a"] = 1
    with pytest.warns(ResourceWarning, match="my_chest"):  # noqa: PT031
        del chest
        gc.collect()


def test_changes_in_place_of_a_chest_that_is_collected_unclosed_are_written(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "c") as chest:
        chest["a"] = [1]
    chest = Chest(path=tmp_path / "c")
    chest["a"].append(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # whether it warns is not the question
        del chest
        gc.collect()
    with Chest(path=tmp_path / "c") as again:
        assert again["a"] == [1, 2]


def test_a_chest_with_nothing_unwritten_is_collected_in_silence(tmp_path: Path) -> None:
    chest = Chest(path=tmp_path / "c")
    chest["a"] = 1
    chest.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del chest
        gc.collect()


def test_a_chest_in_a_reference_cycle_is_collected_and_written(tmp_path: Path) -> None:
    class Holder:
        pass

    holder: Any = Holder()
    holder.me, holder.chest = holder, Chest(path=tmp_path / "c")
    holder.chest["a"] = 1
    with pytest.warns(ResourceWarning, match="was not closed"):  # noqa: PT031
        del holder
        gc.collect()
    with Chest(path=tmp_path / "c") as again:
        assert again == {"a": 1}


def test_a_chest_whose_constructor_fails_is_collected_in_silence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for arguments in ({"path": tmp_path / "file"}, {"available_memory": "x"}, {"mode": "q"}, {"verify": "no"}):
        with pytest.raises((OSError, ValueError)):
            Chest(**arguments)  # type: ignore[arg-type]
    gc.collect()


# --- scratch


def test_a_scratch_folder_is_private_and_below_the_temporary_folder(place: Path) -> None:
    with Chest() as chest:
        assert Path(chest.path).parent == place
        assert os.stat(chest.path).st_mode & 0o777 == 0o700


def test_a_scratch_folder_is_gone_when_its_chest_is_closed(place: Path) -> None:
    chest = Chest[str, Any](available_memory=0)
    chest["a"], chest["b"] = [1], np.arange(20_000)
    assert os.path.isdir(chest.path)
    chest.close()
    assert list(place.iterdir()) == []


def test_a_scratch_chest_closes_with_values_that_cannot_be_written(place: Path) -> None:
    chest = Chest[str, Any]()
    chest["a"] = lambda: None
    chest.close()
    assert list(place.iterdir()) == []


def test_a_scratch_folder_is_gone_when_its_chest_is_collected_and_nothing_is_warned_of(place: Path) -> None:
    chest = Chest[str, Any]()
    chest["a"] = [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del chest
        gc.collect()
    assert list(place.iterdir()) == []


def test_mapped_values_outlive_their_scratch_folder(place: Path) -> None:
    chest = Chest[str, Any]()
    chest["a"] = np.arange(100_000)
    chest.flush()
    mapped = chest["a"]
    chest.close()
    assert list(place.iterdir()) == []
    assert np.array_equal(mapped, np.arange(100_000))


def test_a_dropped_scratch_chest_leaves_nothing(place: Path) -> None:
    chest = Chest[str, Any]()
    chest["a"] = 1
    chest.drop()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise RuntimeError", "c.close()", "del c"])
def test_a_scratch_folder_is_gone_when_the_interpreter_exits(place: Path, end: str) -> None:
    script = "import sys\nfrom chest import Chest\nc = Chest(available_memory=0)\nc['a'] = [1]\nc.flush()\n"
    code = {"sys.exit(3)": 3, "raise RuntimeError": 1}.get(end, 0)
    _python(script + end, tmpdir=place, code=code)
    assert list(place.iterdir()) == []


KILLED = """
import os, signal, sys
from chest import Chest
path = None if sys.argv[1] == "-" else sys.argv[1]
c = Chest(path=path, available_memory=0)
c['a'] = list(range(50_000))
c['b'] = [1]
c.flush()
print(c.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_scratch_folder_of_a_killed_process_is_removed_by_the_next_chest_of_another(place: Path) -> None:
    done = _python(KILLED, "-", tmpdir=place, code=-signal.SIGKILL)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    assert left.parent == place
    _python("from chest import Chest\nc = Chest()\nc['a'] = 1", tmpdir=place)
    assert list(place.iterdir()) == []


def test_the_scratch_folder_of_a_living_process_is_left_alone(place: Path) -> None:
    with Chest[str, Any](available_memory=0) as chest:
        chest["a"] = np.arange(20_000)
        _python("from chest import Chest\nc = Chest()\nc['a'] = 1", tmpdir=place)
        assert os.path.isdir(chest.path)
        assert np.array_equal(chest["a"], np.arange(20_000))


def test_one_scratch_folder_of_many_is_left_alone_while_one_is_removed(place: Path) -> None:
    _python(KILLED, "-", tmpdir=place, code=-signal.SIGKILL)
    with Chest() as chest:
        _python("from chest import Chest\nc = Chest()", tmpdir=place)
        assert [str(p) for p in place.iterdir()] == [chest.path]


@pytest.mark.parametrize("name", ["mine", "mine.chest", "mine.chest.dead", "tmpabcdef.chest"])
def test_a_folder_with_a_path_of_the_users_is_never_removed(place: Path, name: str) -> None:
    """Whatever it is called, wherever it lies, and although its last owner was killed."""
    _python(KILLED, place / name, tmpdir=place, code=-signal.SIGKILL)
    _python("from chest import Chest\nc = Chest()\nc['a'] = 1", tmpdir=place)
    assert (place / name).is_dir()
    with Chest(path=place / name) as chest:
        assert chest == {"a": list(range(50_000)), "b": [1]}


def test_other_folders_and_links_in_the_temporary_folder_are_left_alone(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / ".keys").mkdir(parents=True)
    (target / ".keys" / "owner-1-2-3").write_bytes(b"")
    (place / "link.chest").symlink_to(target)
    (place / "someone.chest").mkdir()
    (place / "someone.chest" / "file").write_bytes(b"mine")
    (place / "file.chest").write_bytes(b"mine")
    _python("from chest import Chest\nc = Chest()", tmpdir=place)
    assert {p.name for p in place.iterdir()} == {"link.chest", "someone.chest", "file.chest"}
    assert (target / ".keys" / "owner-1-2-3").exists()
    assert (place / "someone.chest" / "file").read_bytes() == b"mine"


# --- values that cannot be written


def test_a_value_that_cannot_be_pickled_stays_in_memory_and_others_leave_it(tmp_path: Path) -> None:
    bad = lambda: 7  # noqa: E731
    with Chest[Any, Any](path=tmp_path / "c", available_memory=20_000) as chest:
        chest["bad one"] = bad
        for n in range(300):
            chest[n] = "x" * 500
        assert chest.stats().spills > 200
        assert chest.memory_usage < 40_000
        assert chest["bad one"] is bad
        assert "bad one" in chest.inmem
        del chest["bad one"]
    with Chest[Any, Any](path=tmp_path / "c") as again:
        assert list(again) == list(range(300))


def test_flush_names_the_key_that_cannot_be_written_and_writes_all_others(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    chest["before"], chest["the bad one"], chest["after"] = [1], lambda: None, np.arange(20_000)
    for save in (chest.flush, chest.sync, chest.flush):
        with pytest.raises(SerializeError, match="the bad one") as caught:
            save()
        assert caught.value.key == "the bad one"
        assert isinstance(caught.value, TypeError)
    assert list(chest.inmem) == ["the bad one"]
    with Chest[str, Any](path=tmp_path / "c") as other:
        assert other["before"] == [1]
        assert np.array_equal(other["after"], np.arange(20_000))
        assert list(other) == ["before", "after"]
    assert list(chest) == ["before", "the bad one", "after"]
    assert chest["the bad one"]() is None
    del chest["the bad one"]
    chest.close()


def test_flush_names_all_keys_that_cannot_be_written(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    chest["one"], chest["good"], chest["two"] = (lambda: None), 1, (lambda: None)
    with pytest.raises(SerializeError, match=r"(?s)'one'.*'two'") as caught:
        chest.flush()
    assert "good" not in str(caught.value)
    del chest["one"], chest["two"]
    chest.close()


def test_close_raises_and_leaves_the_chest_open_until_the_value_is_gone(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    chest["bad"], chest["good"] = (lambda: 7), [1]
    for _ in range(2):
        with pytest.raises(SerializeError, match="'bad'"):
            chest.close()
    assert chest["bad"]() == 7
    assert chest["good"] == [1]
    chest["more"] = [2]
    del chest["bad"]
    chest.close()
    with Chest[str, Any](path=tmp_path / "c") as again:
        assert again == {"good": [1], "more": [2]}


def test_a_value_that_could_not_be_written_is_once_it_can(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    value: list[Any] = [lambda: 7]
    chest["a"] = value
    with pytest.raises(SerializeError):
        chest.flush()
    value[0] = 7
    chest.close()
    with Chest[str, Any](path=tmp_path / "c") as again:
        assert again == {"a": [7]}


def test_the_old_value_stays_on_disk_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    chest["a"] = [1]
    chest.flush()
    chest["a"] = lambda: 7
    with pytest.raises(SerializeError):
        chest.flush()
    assert chest["a"]() == 7
    with Chest[str, Any](path=tmp_path / "c") as other:
        assert other == {"a": [1]}
    del chest["a"]
    chest.close()
    with Chest[str, Any](path=tmp_path / "c") as again:
        assert again == {}


# --- flush and sync, and two chests on one folder


MAKERS: dict[str, Callable[[], Any]] = {
    "int": lambda: 1,
    "str": lambda: "x" * 100,
    "list": lambda: [1, 2],
    "array": lambda: np.arange(20_000),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_flush_empties_memory_and_sync_does_not(tmp_path: Path, kind: str) -> None:
    make = MAKERS[kind]
    with Chest[str, Any](path=tmp_path / "c") as chest:
        chest["a"] = make()
        chest.sync()
        assert list(chest.inmem) == ["a"]
        used = chest.memory_usage
        assert used > 0
        chest.flush()
        assert dict(chest.inmem) == {}
        assert chest.memory_usage < used
        assert np.array_equal(chest["a"], make())
        assert list(chest.inmem) == ["a"]


@pytest.mark.parametrize("save", ["flush", "sync"])
def test_two_chests_on_one_folder_see_what_the_other_has_saved(tmp_path: Path, save: str) -> None:
    with Chest[str, Any](path=tmp_path / "c") as a, Chest[str, Any](path=tmp_path / "c") as b:
        a["x"], a["large"] = [1], np.zeros(20_000)
        assert "x" not in b
        getattr(a, save)()
        assert b["x"] == [1]
        assert b["large"].sum() == 0
        b["x"] = [2]
        b["large"][0] = 5
        getattr(b, save)()
        assert a["x"] == [2]
        assert a["large"].sum() == 5
        a["x"].append(3)
        getattr(a, save)()
        assert b["x"] == [2, 3]
        del b["x"]
        getattr(b, save)()
        assert "x" not in a
        assert a.get("x", "default") == "default"
        assert list(a) == list(b) == ["large"]
        assert len(a) == len(b) == 1
        assert not os.path.exists(tmp_path / "c" / "x")


def test_one_of_two_chests_on_a_folder_goes_on_when_the_other_is_closed(tmp_path: Path) -> None:
    a, b = Chest[str, Any](path=tmp_path / "c"), Chest[str, Any](path=tmp_path / "c")
    a["x"] = [1]
    a.close()
    assert b["x"] == [1]
    b["y"] = [2]
    b.flush()
    with Chest[str, Any](path=b.path) as again:
        assert again == {"x": [1], "y": [2]}
        b.close()
        assert again["y"] == [2]
        again["z"] = 3
    with Chest[str, Any](path=tmp_path / "c") as last:
        assert list(last) == ["x", "y", "z"]
