"""A chest in a forked child: what it sees, what it may write, and that the parent's things stay the parent's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chest import Chest, _fs, _lifetime, _scratch
from chest.engines._gate import GATE
from chest.engines._lmdb import LmdbIndex
from chest.errors import ChestError, ClosedError, PathError
from forking import DEADLINE_S, Forked, environment, in_child, needs_fork, until

pytestmark = needs_fork


@pytest.fixture(name="chest", params=["path", "scratch"])
def _chest(request: pytest.FixtureRequest, tmp_path: Path, place: Path) -> Iterator[Chest[Any, Any]]:
    with Chest[Any, Any](path=tmp_path / "c" if request.param == "path" else None) as chest:
        chest["small"], chest["large"] = [1], np.arange(20_000)
        chest.sync()
        yield chest
        assert GATE.inside == []
        assert not GATE.shut
        assert chest._store.index.version() >= 0
    assert list(place.iterdir()) == []


# --- what a child sees


def test_a_child_sees_what_was_committed(chest: Chest[Any, Any]) -> None:
    def look() -> tuple[Any, ...]:
        return list(chest), len(chest), chest["small"], chest["large"].sum(), "small" in chest, "x" in chest

    assert in_child(look) == (["small", "large"], 2, [1], np.arange(20_000).sum(), True, False)


READS: dict[str, Callable[[Chest[Any, Any]], Any]] = {
    "get": lambda c: c["small"],
    "get default": lambda c: c.get("small"),
    "in": lambda c: "small" in c,
    "len": len,
    "list": list,
    "reversed": lambda c: list(reversed(c)),
    "keys": lambda c: list(c.keys()),
    "items": lambda c: dict(c.items())["small"],
    "values": lambda c: next(iter(c.values())),
    "==": lambda c: c == {"small": [1]},
    "copy": lambda c: list(c.copy()),
    "prefetch": lambda c: c.prefetch("small"),
    "stats": lambda c: c.stats().keys,
    "repr": lambda c: "2 keys" in repr(c),
    "with": lambda c: c.__enter__()["small"],
    "inmem": lambda c: list(c.inmem),
    "usage": lambda c: c.memory_usage,
    "flush": lambda c: c.flush(),
    "shrink": lambda c: c.shrink(),
    "pop": lambda c: c.pop("small"),
    "popitem": lambda c: c.popitem()[0],
    "setdefault": lambda c: c.setdefault("small", 2),
    "update": lambda c: c.update(small=2),
    "delete": lambda c: c.__delitem__("small"),
    "set": lambda c: c.__setitem__("small", 2),
    "clear": lambda c: c.clear(),
    "key_to_filename": lambda c: os.path.exists(c.key_to_filename("large")),
    "available_memory": lambda c: setattr(c, "available_memory", 1000),
    "edit": lambda c: c.edit("small").__enter__(),
    "|": lambda c: list(c | {"y": 1}),
}


@pytest.mark.parametrize("use", READS)
def test_every_first_use_in_a_child_is_what_it_is_in_another_process(tmp_path: Path, place: Path, use: str) -> None:
    chest = Chest[Any, Any](path=tmp_path / "c")
    chest["small"], chest["large"] = [1], np.arange(20_000)
    chest.flush()
    chest["unwritten"] = [3]

    def look() -> Any:
        answer = READS[use](chest)
        return answer, "unwritten" in chest, chest.available_memory

    answer, seen, _ = in_child(look)
    assert not seen
    with Chest[Any, Any](path=tmp_path / "other") as other:
        other["small"], other["large"] = [1], np.arange(20_000)
        other.flush()
        expected = READS[use](other)
    assert (answer is None) == (expected is None)
    if not isinstance(answer, np.ndarray):
        assert answer == expected
    assert chest["unwritten"] == [3]
    chest.drop()


def test_what_the_parent_has_not_written_is_not_there_in_a_child(chest: Chest[Any, Any]) -> None:
    chest["new"], chest["small"] = 1, [2]
    del chest["large"]
    assert in_child(lambda: ("new" in chest, chest["small"], "large" in chest)) == (False, [1], True)
    assert ("new" in chest, chest["small"], "large" in chest) == (True, [2], False)


def test_changes_in_place_that_the_parent_has_not_written_are_not_there_in_a_child(chest: Chest[Any, Any]) -> None:
    chest["small"].append(2)
    held = chest["large"]
    held[0] = 7
    assert in_child(lambda: (chest["small"], int(chest["large"][0]))) == ([1], 0)
    chest.sync()
    assert in_child(lambda: (chest["small"], int(chest["large"][0]))) == ([1, 2], 7)


def test_a_value_from_before_the_fork_stays_usable_and_is_private_to_the_child(chest: Chest[Any, Any]) -> None:
    chest.flush()
    mapped = chest["large"]

    def work() -> int:
        mapped[0] = 9
        chest.sync()
        return int(mapped.sum())

    assert in_child(work) == np.arange(20_000).sum() + 9
    assert mapped[0] == 0


def test_parent_and_child_see_each_others_commits(chest: Chest[Any, Any]) -> None:
    to_child, to_parent = os.pipe(), os.pipe()

    def work() -> Any:
        assert chest["small"] == [1]
        chest["from the child"] = [5]
        chest["small"] = [2]
        chest.sync()
        os.write(to_parent[1], b".")
        os.read(to_child[0], 1)
        return chest["small"], chest["from the parent"]

    with Forked(work) as child:
        os.read(to_parent[0], 1)
        assert chest["small"] == [2]
        assert chest["from the child"] == [5]
        chest["from the parent"], chest["small"] = 6, [3]
        chest.sync()
        os.write(to_child[1], b".")
        assert child.result() == ([3], 6)
    for end in (*to_child, *to_parent):
        os.close(end)


def test_a_child_of_a_child_that_has_not_used_the_chest(chest: Chest[Any, Any]) -> None:
    assert in_child(lambda: in_child(lambda: chest["small"])) == [1]
    assert in_child(lambda: (chest["small"], in_child(lambda: chest["small"]), chest["small"])) == ([1], [1], [1])


def test_settings_of_a_chest_hold_in_a_child(tmp_path: Path) -> None:
    missed: list[Any] = []
    chest = Chest[Any, Any](
        path=tmp_path / "c",
        available_memory=5_000_000,
        serializer="json",
        key_to_filename=lambda key: f"k-{key}",
        on_miss=missed.append,
        write_through=True,
        loose=None,
    )
    chest["a"] = [1]
    chest.flush()

    def work() -> Any:
        chest["b"] = chest["a"]
        return missed, os.path.basename(chest.key_to_filename("a")), chest.available_memory, chest.dump.__module__

    assert in_child(work) == (["a"], "k-a", 5_000_000, "json")
    assert chest["b"] == [1]  # without a sync
    chest.close()


def test_iterating_goes_on_in_a_child_or_says_why_not(chest: Chest[Any, Any]) -> None:
    chest.update((n, n) for n in range(100))
    chest.sync()
    walk, items = iter(chest), iter(chest.items())
    next(walk), next(items)

    assert in_child(lambda: list(walk)) == ["large", *range(100)]

    def work() -> str:
        with pytest.raises(ChestError) as caught:
            list(items)
        return caught.value.message

    assert "parent of this process" in in_child(work)


def test_an_index_of_the_parent_is_refused_in_a_child_and_opens_anew(tmp_path: Path) -> None:
    index = LmdbIndex.open(str(tmp_path / "i"))

    def work() -> str:
        message = ""
        for use in (index.version, lambda: index.get(b"x"), lambda: index.commit(meta={b"a": b"b"})):
            with pytest.raises(ChestError) as caught:
                use()
            message = caught.value.message
        index.close()
        other = LmdbIndex.open(str(tmp_path / "i"))
        other.commit(meta={b"a": b"c"})
        other.close()
        return message

    assert "parent of this process" in in_child(work)
    assert index.meta(b"a") == b"c"
    index.close()


def test_a_chest_that_was_closed_before_the_fork_stays_closed(tmp_path: Path) -> None:
    chest = Chest[str, int](path=tmp_path / "c")
    chest.close()

    def work() -> str:
        with pytest.raises(ClosedError, match="closed"):
            chest["a"]
        return "right"

    assert in_child(work) == "right"


def test_a_chest_that_a_child_closes_unused_is_closed_there(chest: Chest[Any, Any]) -> None:
    def work() -> bool:
        chest.close()
        chest.close()
        with pytest.raises(ClosedError):
            chest["small"]
        return "closed" in repr(chest)

    assert in_child(work)
    assert chest["small"] == [1]


def test_a_child_of_a_path_that_is_gone_says_so(tmp_path: Path) -> None:
    chest = Chest[str, int](path=tmp_path / "c")
    begin = os.pipe()

    def work() -> bool:
        os.read(begin[0], 1)
        with pytest.raises(PathError, match="no chest"):
            len(chest)
        return os.path.exists(chest.path)

    with Forked(work) as child:
        chest.drop()
        os.write(begin[1], b".")
        assert child.result() is False
    for end in begin:
        os.close(end)


# --- who writes


def test_what_the_parent_had_unwritten_is_written_once(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c", available_memory=10_000_000)
    chest["deleted"] = 0
    chest.sync()
    del chest["deleted"]
    chest["a"], chest["large"] = [1], np.arange(20_000)

    def work() -> int:
        chest["child's"] = 1
        chest.flush()
        chest.shrink()
        chest.close()
        _lifetime._at_exit()
        return 0

    in_child(work)
    with Chest[str, Any](path=tmp_path / "c") as other:
        assert list(other) == ["deleted", "child's"]
    chest.sync()
    n_writes = chest.stats().writes
    assert n_writes == 3  # "deleted", "a", "large"
    with Chest[str, Any](path=tmp_path / "c") as other:
        assert set(other) == {"child's", "a", "large"}
    chest.close()


ENDS = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "falls off the end": "",
    "an exception": "raise RuntimeError('mine')",
    "collected": "del c; gc.collect(); os._exit(0)",
    "sys.exit after a use": "c['a']; sys.exit(0)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["path", "scratch"])
def test_the_end_of_a_child_leaves_the_parents_chest_as_it_is(tmp_path: Path, kind: str, end: str) -> None:
    """Nothing is written twice, nothing is removed, and nothing is said."""
    script = (
        "import gc, os, sys\nfrom chest import Chest\n"
        f"c = Chest(path=sys.argv[1] if {kind == 'path'} else None)\n"
        "c['a'] = 1; c.sync(); c['unwritten'] = 2; c['array'] = list(range(30_000))\n"
        "pid = os.fork()\n"
        f"if not pid:\n    {ENDS[end] or 'pass'}\n"
        "else:\n"
        "    os.waitpid(pid, 0)\n"
        "    assert os.path.isdir(c.path)\n"
        "    with Chest(path=c.path) as d: assert d == {'a': 1}, dict(d)\n"
        "    c.sync()\n"
        "    with Chest(path=c.path) as d: assert len(d) == 3\n"
        "    c.close()\n"
        "    print('fine')\n"
    )
    env = environment(TMPDIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")], env=env, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout == "fine\n", done
    if end != "an exception":
        assert done.stderr == ""
    assert [name for name in os.listdir(tmp_path) if name != "c"] == []


def test_what_a_child_set_itself_is_written_when_its_interpreter_ends(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom chest import Chest\n"
        "c = Chest(path=sys.argv[1]); c['parent'] = 1\n"
        "pid = os.fork()\n"
        "if not pid:\n    c['child'] = 2; d = Chest(path=sys.argv[1] + '2'); d['own'] = 3; sys.exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "with Chest(path=c.path) as e: assert e == {'child': 2}, dict(e)\n"
        "with Chest(path=c.path + '2') as e: assert e == {'own': 3}, dict(e)\n"
    )
    env = environment()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], env=env, capture_output=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, b"")
    with Chest[str, int](path=tmp_path / "c") as chest:
        assert set(chest) == {"parent", "child"}


# --- scratch folders


def test_a_child_that_uses_a_scratch_chest_owns_it_too(place: Path) -> None:
    chest = Chest[str, int]()
    chest["a"] = 1
    chest.sync()
    keys = os.path.join(chest.path, ".keys")
    assert len(_fs.owners(keys)) == 1
    assert in_child(lambda: (len(_fs.owners(keys)), chest["a"], len(_fs.owners(keys)))) == (1, 1, 2)
    assert in_child(lambda: (chest["a"], chest.close(), len(_fs.owners(keys)))) == (1, None, 2)  # one of them is dead
    chest.close()
    assert list(place.iterdir()) == []


def test_a_scratch_folder_goes_with_the_last_process_that_uses_it(place: Path) -> None:
    chest = Chest[str, int]()
    chest["a"] = 1
    chest.sync()
    to_child, to_parent = os.pipe(), os.pipe()

    def work() -> Any:
        found = [chest["a"]]
        os.write(to_parent[1], b".")
        os.read(to_child[0], 1)
        chest["b"] = 2
        found += [chest["a"], chest["last words"], chest["b"]]
        chest.close()
        return found, os.path.exists(chest.path)

    with Forked(work) as child:
        os.read(to_parent[0], 1)
        chest["last words"] = 5
        chest.close()  # writes, since somebody can still read it
        assert os.path.isdir(chest.path)
        os.write(to_child[1], b".")
        assert child.result() == ([1, 1, 5, 2], False)
    for end in (*to_child, *to_parent):
        os.close(end)
    assert list(place.iterdir()) == []


def test_a_child_that_comes_too_late_says_that_the_scratch_chest_is_gone(place: Path) -> None:
    chest = Chest[str, int]()
    begin = os.pipe()

    def work() -> str:
        os.read(begin[0], 1)
        with pytest.raises(PathError) as caught:
            chest["a"]
        return caught.value.message

    with Forked(work) as child:
        chest.close()
        os.write(begin[1], b".")
        assert "is gone" in child.result()
    for end in begin:
        os.close(end)
    assert list(place.iterdir()) == []


@pytest.mark.skipif(_fs._fcntl is None, reason="no fcntl: nobody is known to be dead")
def test_a_child_outlives_a_killed_parent_with_its_scratch_chest(tmp_path: Path) -> None:
    script = (
        "import os, sys, signal\nfrom chest import Chest\n"
        "c = Chest(); c['a'] = 1; c.sync()\n"
        "r, w = os.pipe()\n"
        "if not os.fork():\n"
        "    signal.alarm(30)\n"
        "    c['a']; os.write(w, b'.'); sys.stdin.read(1); print(c['a'], c.path, flush=True); sys.stdin.read(1); os._exit(0)\n"
        "os.read(r, 1); print('ready', flush=True); signal.pause()\n"
    )
    env = environment(TMPDIR=str(tmp_path))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        try:
            assert parent.stdout.readline() == "ready\n"
        finally:
            parent.kill()
            parent.wait()
        assert _scratch.sweep_scratch(str(tmp_path)) == 0
        parent.stdin.write("x")
        parent.stdin.flush()
        answer, path = parent.stdout.readline().split()
        assert answer == "1"
        assert os.path.isdir(path)
    until(lambda: _scratch.sweep_scratch(str(tmp_path)) == 1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_parent_had_in_memory_is_not_freed_in_a_child_that_does_not_use_the_chest() -> None:
    parent, freed = os.getpid(), []

    class Value:
        def __del__(self) -> None:
            if os.getpid() != parent:
                freed.append(self)

    with Chest[str, Any]() as chest:
        for key in ("cached", "dirty"):
            chest[key] = Value()
        assert in_child(lambda: len(freed)) == 0
        chest.clear()
