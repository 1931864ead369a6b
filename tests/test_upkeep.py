"""Compacting and backing up a chest: beside others, and killed at any instant."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chest import Chest, check
from chest.errors import ChestError, CorruptError, InUseError, PathError, ReadOnlyError

np = pytest.importorskip("numpy")

SOURCES = str(Path(__file__).resolve().parents[1] / "src")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCES, "PYTHONFAULTHANDLER": ""}


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool((a == b).all() if isinstance(a, np.ndarray) else a == b)


def fill(path: Path, n: int = 3000) -> dict[Any, Any]:
    """A chest with much room that is free again."""
    values: dict[Any, Any] = {key: [key, "x" * 300] for key in range(0, n, 50)}
    values |= {("large", k): np.arange(10_000) + k for k in range(5)} | {"k" * 600: 1}
    with Chest[Any, Any](path=path) as c:
        c.update({key: [key, "x" * 300] for key in range(n)})
        for key in range(n):
            if key not in values:
                del c[key]
        for k in range(5):
            c["large", k] = np.arange(10_000) + k
        c["k" * 600] = 1
    return values


def assert_holds(c: Chest[Any, Any], values: dict[Any, Any]) -> None:
    assert list(c) == list(values)
    assert all(same(c[key], value) for key, value in values.items())
    assert not list(c.check())


# --- compact


def test_compacting_gives_room_back_and_changes_nothing(tmp_path: Path) -> None:
    values = fill(tmp_path / "c")
    data = tmp_path / "c" / ".keys" / "data.mdb"
    before = data.stat().st_size
    with Chest[Any, Any](path=tmp_path / "c") as c:
        c[0].append("in place")
        values[0] = [0, "x" * 300, "in place"]
        freed = c.compact()
        assert freed == before - data.stat().st_size > 500_000
        assert_holds(c, values)
        c["new"] = values["new"] = np.arange(9_000)
        c[50] = values[50] = "changed"
        with c.transaction():
            c[100] = values[100] = "in a transaction"
        c.flush()
        assert_holds(c, values)
        assert c.compact() < 200_000
        assert_holds(c, values)
    with Chest[Any, Any](path=tmp_path / "c") as c:
        assert_holds(c, values)


def test_versions_go_on_so_that_nothing_stale_is_ever_taken_for_new(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with Chest[Any, Any](path=tmp_path / "c") as c, Chest[Any, Any](path=tmp_path / "c") as d:
        assert d[0] == c[0]
        before = c._store.index.version()
        seen = list(c.changes(timeout=0))
        c.compact()
        assert c._store.index.version() > before
        assert c._store.index.generation[0] == c._store.index.version()
        changes = d.changes(timeout=0)
        c[0] = "newer"
        c.sync()
        assert d[0] == "newer"
        assert [*changes] == [0]
        assert seen == []
        d[0] = "newest"
        d.sync()
        assert c[0] == "newest"


def test_others_of_this_process_and_its_threads_go_on(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    over = threading.Event()
    wrong: list[Any] = []
    counts = [0] * 4

    def work(number: int, c: Chest[Any, Any]) -> None:
        try:
            while not over.is_set():
                counts[number] += 1
                c["t", number] = counts[number]
                if number % 2:
                    c.flush()
                if c["t", number] != counts[number]:
                    wrong.append(number)
                list(c)
                if number == 3:
                    with c.transaction():
                        c["both"] = c["t", 3]
        except BaseException as error:
            wrong.append(error)

    with Chest[Any, Any](path=tmp_path / "c") as c, Chest[Any, Any](path=tmp_path / "c") as d:
        threads = [threading.Thread(target=work, args=(n, [c, d][n // 2])) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                c.compact()
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert min(counts) > 0
        c.flush()
        d.flush()
        assert [c["t", n] for n in range(4)] == counts
    assert not list(check(tmp_path / "c"))


OPEN = """
import sys
from chest import Chest
with Chest(path=sys.argv[1]) as c:
    for line in sys.stdin:
        key, value = line.split()
        c[key] = value
        c.sync()
        print(len(c), c[key], flush=True)
"""


@pytest.fixture(name="other")
def _other(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Another process that has the chest ``c`` open, and sets what it is told to."""
    fill(tmp_path / "c")
    with subprocess.Popen(
        [sys.executable, "-c", OPEN, str(tmp_path / "c")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def tell(line: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline()

        tell("other ready")
        yield tell
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


def test_a_chest_that_another_process_has_open_is_not_compacted_and_unharmed(
    tmp_path: Path, other: Callable[[str], str]
) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as c:
        inode = (tmp_path / "c" / ".keys" / "data.mdb").stat().st_ino
        for n in range(5):
            with pytest.raises(InUseError, match="another process"):
                c.compact()
            assert other(f"x {n}").split()[1] == str(n)
            assert c["x"] == str(n)
            c["y"] = n
            c.sync()
        assert (tmp_path / "c" / ".keys" / "data.mdb").stat().st_ino == inode
        assert not list(c.check())


def test_a_reader_in_another_process_goes_on_beside_a_compaction(tmp_path: Path) -> None:
    values = fill(tmp_path / "c")
    code = OPEN.replace("path=sys.argv[1]", "path=sys.argv[1], read_only=True, available_memory=0")
    code = code.replace("c[key] = value\n        c.sync()\n        ", "").replace("c[key]", "c.get(key)")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with Chest[Any, Any](path=tmp_path / "c") as c:
            for n in range(6):
                c["x"] = n
                c.sync()
                c.compact()
                process.stdin.write("x 0\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{len(values) + 1} {n}\n"
        process.stdin.close()
        assert process.wait() == 0


def test_files_that_are_left_over_are_removed_and_those_of_lost_keys_stay(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    fill(tmp_path / "d")
    with Chest[Any, Any](path=tmp_path / "d") as d:
        d["unknown"] = np.arange(20_000)
        d["large", 0] = np.arange(30_000)
    shutil.copy(tmp_path / "d" / "_large" / Path(_file(tmp_path / "d", ("large", 0))).name, tmp_path / "c" / "older")
    shutil.copy(tmp_path / "d" / "unknown", tmp_path / "c" / "unknown")
    with Chest[Any, Any](path=tmp_path / "c") as c:
        assert c.compact() > 240_000
        assert not (tmp_path / "c" / "older").exists()
        assert (tmp_path / "c" / "unknown").exists()
        assert [p.kind for p in c.check()] == ["orphan"]


def _file(path: Path, key: Any) -> str:
    with Chest[Any, Any](path=path) as c:
        return c.key_to_filename(key)


@pytest.mark.torture
def test_a_compaction_that_is_killed_leaves_a_whole_chest(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    values = fill(tmp_path / "c")
    code = (
        "import os, sys\nfrom chest import Chest\nn = int(sys.argv[2])\nc = Chest(path=sys.argv[1])\n"
        "import chest._fs, chest.engines._environment as e, chest.engines._pages as p\n"
        "def counted(function):\n    def call(*args, **kwargs):\n        global n\n        n -= 1\n"
        "        if n == 0: os.kill(os.getpid(), 9)\n        return function(*args, **kwargs)\n    return call\n"
        "for name in ('open', 'close', 'replace', 'fsync', 'unlink', 'stat', 'write', 'lstat'):\n"
        "    setattr(os, name, counted(getattr(os, name)))\n"
        "c.compact()\nn = 0\nc.close()\n"
    )
    n = 1
    for _ in range(1000):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c"), str(n)], env=environment(), capture_output=True)
        assert done.returncode in (0, -9), done.stderr
        assert not list(check(tmp_path / "c"))
        with Chest[Any, Any](path=tmp_path / "c") as c:
            assert_holds(c, values)
            c["again"] = n
            del c["again"]
        assert not [p for p in (tmp_path / "c" / ".keys" / "new").iterdir() if not p.name.startswith("owner-")]
        if done.returncode == 0:
            break
        n += scale(9, 1)
    assert n > 15


# --- backup


def test_a_backup_is_a_chest_with_the_same_content(tmp_path: Path) -> None:
    values = fill(tmp_path / "c")
    with Chest[Any, Any](path=tmp_path / "c") as c:
        c["unwritten"] = values["unwritten"] = "yet"
        c.backup(tmp_path / "b")
        c["later"] = 1
        c["large", 0] = np.zeros(20_000)
        del c["large", 1]
        c.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    assert not list(check(tmp_path / "b"))
    with Chest[Any, Any](path=tmp_path / "b", verify="always") as b:
        assert_holds(b, values)
        b["large", 2] = values["large", 2] = "other"
        b.flush()
        assert_holds(b, values)
    with Chest[Any, Any](path=tmp_path / "c") as c:
        assert same(c["large", 2], np.arange(10_000) + 2)
        assert not list(c.check())


@pytest.mark.parametrize("links", [True, False])
def test_value_files_are_linked_where_that_is_possible_and_copied_where_not(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = fill(tmp_path / "c")
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    with Chest[Any, Any](path=tmp_path / "c") as c:
        c.backup(tmp_path / "b")
        file = Path(c.key_to_filename(("large", 0)))
    other = tmp_path / "b" / file.relative_to(tmp_path / "c")
    assert (file.stat().st_ino == other.stat().st_ino) == links
    assert other.read_bytes() == file.read_bytes()
    for folder, _, names in os.walk(tmp_path / "b"):
        assert os.stat(folder).st_mode & 0o777 == 0o700
        assert all(os.lstat(os.path.join(folder, name)).st_mode & 0o777 == 0o600 for name in names)
    monkeypatch.undo()
    with Chest[Any, Any](path=tmp_path / "b") as b:
        assert_holds(b, values)


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError(18, "another file system")


def test_a_scratch_chest_can_be_kept_by_a_backup(tmp_path: Path) -> None:
    with Chest[Any, Any]({"a": np.arange(20_000), "b": 1}) as c:
        c.backup(tmp_path / "b")
    with Chest[Any, Any](path=tmp_path / "b") as b:
        assert_holds(b, {"a": np.arange(20_000), "b": 1})


def test_what_is_there_already_is_never_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with Chest[Any, Any](path=tmp_path / "c") as c:
        for name in ("file", "full", "link", "c", "c/inside", "c/.keys/x"):
            with pytest.raises(PathError):
                c.backup(tmp_path / name)
        c.backup(tmp_path / "empty")
        c.backup(tmp_path / "new" / "below")
        with pytest.raises(PathError):
            c.backup("/proc/nowhere/b")
        assert not list(c.check())
    assert (tmp_path / "full" / "x").read_text() == "mine"
    assert not list(check(tmp_path / "empty"))
    assert not list(check(tmp_path / "new" / "below"))


def test_a_chest_that_is_damaged_is_not_backed_up_in_silence(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    os.unlink(_file(tmp_path / "c", ("large", 3)))
    with Chest[Any, Any](path=tmp_path / "c") as c, pytest.raises(PathError, match="missing"):
        c.backup(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("method", ["compact", "backup"])
def test_not_within_a_transaction_nor_of_a_chest_to_be_read(tmp_path: Path, method: str) -> None:
    fill(tmp_path / "c")
    arguments = [tmp_path / "b"] if method == "backup" else []
    with Chest[Any, Any](path=tmp_path / "c") as c:
        with c.transaction(), pytest.raises(ChestError, match="within a transaction"):
            getattr(c, method)(*arguments)
        getattr(c, method)(*arguments)
    with Chest[Any, Any](path=tmp_path / "c", read_only=True) as c, pytest.raises(ReadOnlyError):
        getattr(c, method)(*arguments)
    with pytest.raises(ChestError, match="closed"):
        getattr(c, method)(*arguments)


def test_a_folder_of_an_older_chest_is_upgraded_first(tmp_path: Path) -> None:
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(pickle.dumps(["x"]))
        (tmp_path / name / ".keys").write_bytes(pickle.dumps([("x", "x")]))
    with Chest[Any, Any](path=tmp_path / "c") as c:
        c.backup(tmp_path / "b")
    with Chest[Any, Any](path=tmp_path / "d") as c:
        c.compact()
        assert c == {"x": ["x"]}
    with Chest[Any, Any](path=tmp_path / "b") as c:
        assert c == {"x": ["x"]}


WRITER = """
import sys, numpy as np
from chest import Chest
with Chest(path=sys.argv[1], available_memory=500_000) as c:
    n = 0
    while True:
        n += 1
        with c.transaction():
            c["n"] = n
            for key in range(4):
                c[key] = np.full(9_000 + n % 3, n) if (n + key) % 4 else [n]
            c["m", n % 10] = np.full(9_000, n)
            c.pop(("m", (n + 5) % 10), None)
        if n == 3:
            print("ready", flush=True)
"""


@pytest.fixture(name="writer")
def _writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "c")], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_backup_beside_a_writer_is_of_one_instant(
    tmp_path: Path, writer: subprocess.Popen[str], scale: Callable[[int, int], int]
) -> None:
    seen = []
    with Chest[Any, Any](path=tmp_path / "c") as c:
        for number in range(scale(5, 100)):
            c.backup(tmp_path / f"b{number}")
            assert not list(check(tmp_path / f"b{number}"))
            with Chest[Any, Any](path=tmp_path / f"b{number}", verify="always") as b:
                n = b["n"]
                seen.append(n)
                for key in range(4):
                    assert same(b[key], np.full(9_000 + n % 3, n) if (n + key) % 4 else [n])
                assert [int(b["m", k][0]) % 10 for k in range(10) if ("m", k) in b] == [k for k in range(10) if ("m", k) in b]
                assert n == b["m", n % 10][0]
            shutil.rmtree(tmp_path / f"b{number}")
    assert writer.poll() is None
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


@pytest.mark.torture
def test_a_backup_that_is_killed_is_not_there_and_leaves_nothing_behind(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    values = fill(tmp_path / "c", 300)
    code = (
        "import os, sys\nfrom chest import Chest\nn = int(sys.argv[3])\nc = Chest(path=sys.argv[1])\n"
        "def hook(event, args):\n    global n\n"
        "    if event in ('open', 'os.rename', 'os.link', 'os.mkdir', 'os.remove', 'os.listdir'):\n"
        "        n -= 1\n        if n == 0: os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(hook)\nc.backup(sys.argv[2])\nn = 0\n"
    )
    rng = random.Random(3)
    n = 1
    for _ in range(1000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "c"), str(tmp_path / "b"), str(n)],
            env=environment(),
            capture_output=True,
        )
        assert done.returncode in (0, -9), done.stderr
        if done.returncode:
            if (tmp_path / "b").exists():
                break  # it was killed after the rename
            for half in tmp_path.glob(".b.backup-*"):
                generation = half / ".keys" / "generation"
                if (half / ".keys" / "data.mdb").exists():
                    assert not list(check(half))  # all of it
                elif generation.exists() and generation.stat().st_size:
                    with pytest.raises(CorruptError):
                        Chest(path=half)
            if rng.random() < 0.5:
                with Chest[Any, Any](path=tmp_path / "c") as c:
                    c.backup(tmp_path / "b")
                assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
                shutil.rmtree(tmp_path / "b")
        else:
            break
        n += scale(7, 1)
    assert n > 10
    with Chest[Any, Any](path=tmp_path / "b") as b:
        assert_holds(b, values)
    with Chest[Any, Any](path=tmp_path / "c") as c:
        assert_holds(c, values)
