"""A chest that is opened to be read: not a byte changes in its folder, on whatever medium, and no value is ever wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chest import Chest, ReadOnlyError
from chest.errors import ChestError, CorruptError, PathError, UnsafePathWarning

np = pytest.importorskip("numpy")

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def look(path: Path) -> dict[str, tuple[Any, ...]]:
    """All that could change in a folder; the time of reading does where the file system notes it."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in [".", *names]:
            file = os.path.join(folder, name)
            status = os.lstat(file)
            content = Path(file).read_bytes() if os.path.isfile(file) else b""
            found[file] = (status.st_mode, status.st_uid, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def fill(path: Path, **settings: Any) -> dict[Any, Any]:
    """A chest with everything that takes a way of its own to the disk."""
    values: dict[Any, Any] = {"small": [1, 2], ("a", "b"): {"x": 1}, 1: "one", "k" * 600: "long", "large": np.arange(20_000)}
    values["text"] = "t" * 90_000
    values[("deep", 2.5)] = np.ones(100_000)
    with Chest[Any, Any](path=path, **settings) as chest:
        for key, value in values.items():
            chest[key] = value
        chest.flush()
    return values


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool((a == b).all() if isinstance(a, np.ndarray) else a == b)


@pytest.fixture(name="filled")
def _filled(tmp_path: Path) -> tuple[Path, dict[Any, Any]]:
    return tmp_path / "c", fill(tmp_path / "c")


WRITES: dict[str, Callable[[Chest[Any, Any]], Any]] = {
    "set": lambda c: c.__setitem__("small", 2),
    "set a new key": lambda c: c.__setitem__("new", 2),
    "delete": lambda c: c.__delitem__("small"),
    "update": lambda c: c.update({"a": 1}),
    "clear": lambda c: c.clear(),
    "transaction": lambda c: c.transaction().__enter__(),
    "edit": lambda c: c.edit("small").__enter__(),
    "pop": lambda c: c.pop("small"),
    "popitem": lambda c: c.popitem(),
    "setdefault": lambda c: c.setdefault("new", 1),
    "|=": lambda c: c.__ior__({"a": 1}),
    "drop": lambda c: c.drop(),
    "key_to_filename of a value without a file": lambda c: c.key_to_filename("packed"),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_write_is_refused_and_leaves_the_chest_usable_and_the_folder_as_it_was(tmp_path: Path, what: str) -> None:
    fill(tmp_path / "c", loose=0)
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest["packed"] = 5
    with Chest[Any, Any](path=tmp_path / "c", loose=0) as chest:
        chest["packed"] = 6
    before = look(tmp_path / "c")
    with Chest[Any, Any](path=tmp_path / "c", read_only=True) as chest:
        with pytest.raises(ReadOnlyError, match="read_only=True") as caught:
            WRITES[what](chest)
        assert isinstance(caught.value, TypeError)
        assert chest["small"] == [1, 2]
        assert len(chest) == 8
    assert look(tmp_path / "c") == before


def test_everything_can_be_read_and_not_a_byte_changes(filled: tuple[Path, dict[Any, Any]]) -> None:
    path, values = filled
    before = look(path)
    for memory in (10**9, 0):
        with Chest[Any, Any](path=path, read_only=True, available_memory=memory) as chest:
            assert list(chest) == list(values)
            assert list(reversed(chest)) == list(values)[::-1]
            assert all(same(chest[key], value) for key, value in values.items())
            assert all(same(found, values[key]) for key, found in chest.items())
            assert "missing" not in chest
            assert chest.get("missing", 5) == 5
            assert chest.pop("missing", 6) == 6
            assert chest.setdefault("small", 7) == [1, 2]
            assert same(pickle.loads(Path(chest.key_to_filename("large")).read_bytes()), values["large"])
            chest.prefetch("large")
            chest.move_to_disk("large") if memory else None
            chest.shrink()
            chest.sync()
            chest.flush()
            twin = chest.copy()
            twin["new"] = 1
            assert len(twin) == len(values) + 1
            twin.close()
            again = pickle.loads(pickle.dumps(chest))
            with pytest.raises(ReadOnlyError):
                again["x"] = 1
            again.close()
            assert "8 keys" not in repr(chest)
    assert look(path) == before


def test_a_change_in_place_is_an_error_where_it_should_be_written_and_the_chest_closes(
    filled: tuple[Path, dict[Any, Any]],
) -> None:
    path, _ = filled
    before = look(path)
    chest = Chest[Any, Any](path=path, read_only=True)
    chest["small"].append(3)
    chest["large"][0] = 5
    with pytest.raises(ReadOnlyError, match=r"small.*large"):
        chest.sync()
    with pytest.raises(ReadOnlyError):
        chest.flush()
    assert chest["small"] == [1, 2, 3]  # nothing that was changed leaves memory
    with pytest.raises(ReadOnlyError):
        chest.close()
    chest.close()
    with pytest.raises(ChestError, match="closed"):
        chest["small"]
    assert look(path) == before


def test_a_changed_value_does_not_fall_back_when_memory_is_short(filled: tuple[Path, dict[Any, Any]]) -> None:
    path, values = filled
    chest = Chest[Any, Any](path=path, read_only=True, available_memory=3_000_000)
    chest["small"].append(3)
    for _ in range(3):
        for key in values:
            chest.get(key)
    assert chest["small"] == [1, 2, 3]
    with pytest.raises(ReadOnlyError):
        chest.close()


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: (path / ".keys").mkdir(parents=True)]
)
def test_a_folder_without_a_chest_is_a_clear_error_and_none_is_made(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "c")
    before = look(tmp_path)
    with pytest.raises(PathError, match="there is no chest"):
        Chest(path=tmp_path / "c", read_only=True)
    assert look(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"data": {"a": 1}}, {"path": None}, {"write_through": True}])
def test_nonsense_beside_read_only_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="read_only"):
        Chest[Any, Any](**{"path": tmp_path / "c", "read_only": True, **wrong})


def test_what_a_crash_left_to_be_done_is_honoured_and_not_done(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np\nfrom chest import Chest\nfrom chest._store import Store\n"
        "c = Chest(path=sys.argv[1])\nc['old'] = np.arange(20_000)\nc['gone'] = np.arange(20_000)\nc.sync()\n"
        "Store.settle = lambda self: os._exit(9)\n"
        "c['old'] = np.arange(30_000)\nc['new'] = np.ones(20_000)\ndel c['gone']\nc.sync()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], env=_environment(), timeout=60)
    assert done.returncode == 9
    before = look(tmp_path / "c")
    assert len(list((tmp_path / "c" / ".keys" / "new").glob("[0-9]*"))) == 2
    with Chest[Any, Any](path=tmp_path / "c", read_only=True) as chest:
        assert list(chest) == ["old", "new"]
        assert same(chest["old"], np.arange(30_000))
        assert same(chest["new"], np.ones(20_000))
    assert look(tmp_path / "c") == before
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        assert same(chest["old"], np.arange(30_000))


def _environment() -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "PYTHONFAULTHANDLER": ""}


WRITER = """
import sys, numpy as np
from chest import Chest
path, rounds = sys.argv[1], int(sys.argv[2])
with Chest(path=path, available_memory=1_000_000) as c:
    for n in range(rounds):
        with c.transaction():
            for key in range(20):
                c[key] = [n, key, "x" * (n * 37 % 500)]
            c["large"] = np.full(9_000 + n % 5, n)
            if n % 3 == 0:
                c["n", n] = n
            if n % 7 == 0 and n:
                for old in range(n - 7, n):
                    c.pop(("n", old), None)
        if n % 40 == 0:
            print(n, flush=True)
    print("end", flush=True)
    sys.stdin.readline()
"""


def test_beside_a_live_writer_every_read_is_whole_and_none_is_older_than_what_was_read_before(tmp_path: Path) -> None:
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest.update({key: [-1, key, ""] for key in range(20)})
        chest["large"] = np.full(9_000, -1)
    rounds = 400
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "c"), str(rounds)],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        over = threading.Event()
        thread = threading.Thread(target=lambda: ([*iter(writer.stdout.readline, "end\n")], over.set()))  # type: ignore[union-attr]
        thread.start()
        try:
            seen: dict[Any, int] = {}
            n_reads = 0
            with Chest[Any, Any](path=tmp_path / "c", read_only=True, available_memory=300_000) as chest:
                ended = False
                while not ended:
                    ended = over.is_set()
                    for key in range(20):
                        n, its_key, _ = chest[key]
                        assert its_key == key
                        assert n >= seen.get(key, -1)
                        seen[key] = n
                        n_reads += 1
                    large = chest["large"]
                    assert len(set(large.tolist())) == 1
                    assert large[0] >= seen.get("large", -1)
                    seen["large"] = int(large[0])
                    keys = list(chest)
                    assert len(keys) == len(set(keys))
                    assert set(range(20)) < set(keys)
                    assert sum(1 for _ in chest.items()) >= 21
                assert seen == dict.fromkeys([*range(20), "large"], rounds - 1)
            assert n_reads > 20
        finally:
            writer.stdin.write("\n")
            writer.stdin.flush()
            thread.join()
    assert writer.returncode == 0


def test_a_reader_goes_on_when_the_index_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    fill(tmp_path / "d")
    with Chest[Any, Any](path=tmp_path / "d") as other:
        other["small"] = "another"
    with Chest[Any, Any](path=tmp_path / "c", read_only=True, available_memory=0) as chest:
        assert chest["small"] == [1, 2]
        os.replace(tmp_path / "d" / ".keys" / "data.mdb", tmp_path / "c" / ".keys" / "data.mdb")
        with (tmp_path / "c" / ".keys" / "generation").open("r+b") as file:  # as whoever replaces it does
            file.write((99).to_bytes(8, "little"))
        assert chest["small"] == "another"


def test_a_writer_beside_it_in_the_same_process_keeps_its_locks(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with Chest[Any, Any](path=tmp_path / "c") as writer:
        with Chest[Any, Any](path=tmp_path / "c", read_only=True) as chest:
            writer["small"] = "new"
            writer.sync()
            assert chest["small"] == "new"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys\nfrom chest import Chest\nwith Chest(path=sys.argv[1]) as c:\n    c['other'] = 1\n",
                str(tmp_path / "c"),
            ],
            env=_environment(),
            timeout=60,
        )
        assert done.returncode == 0
        writer["small"] = "newer"
        writer.sync()
        assert writer["other"] == 1
    with Chest[Any, Any](path=tmp_path / "c", read_only=True) as chest:
        assert (chest["small"], chest["other"]) == ("newer", 1)


@pytest.fixture(name="medium", params=["remounted tmpfs", "read-only bind mount"])
def _medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A medium that cannot be written, with a chest ``c`` on it."""
    if sys.platform != "linux" or not IS_ROOT:
        pytest.skip("a read-only medium is mounted by root on Linux")
    mount = tmp_path / "mount"
    mount.mkdir()

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()[-200:]}")

    if request.param == "remounted tmpfs":
        run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount))
        fill(mount / "c")
        run("mount", "-o", "remount,ro", str(mount))
    else:
        fill(tmp_path / "source" / "c")
        run("mount", "--bind", str(tmp_path / "source"), str(mount))
        run("mount", "-o", "remount,ro,bind", str(mount))
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True, capture_output=True)


def test_a_medium_that_cannot_be_written_is_read(medium: Path, tmp_path: Path) -> None:
    values = fill(tmp_path / "same")
    with pytest.raises(ChestError):
        Chest(path=medium / "c")
    with Chest[Any, Any](path=medium / "c", read_only=True) as chest:
        assert list(chest) == list(values)
        assert all(same(found, values[key]) for key, found in chest.items())
    if (tmp_path / "source").exists():  # somebody else can write to what is read here
        with Chest[Any, Any](path=medium / "c", read_only=True) as chest, Chest[Any, Any](path=tmp_path / "source" / "c") as w:
            assert chest["small"] == [1, 2]
            for n in range(30):
                w["small"] = n
                w["large"] = np.full(10_000, n)
                w.sync()
                assert chest["small"] == n
                assert same(chest["large"], np.full(10_000, n))


def test_a_user_without_the_right_to_write_reads(tmp_path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("becoming another user takes root")
    place = Path("/tmp") / f"chest-reader-{os.getpid()}"
    place.mkdir(mode=0o755)
    try:
        fill(place / "c")
        for folder, _, names in os.walk(place):
            os.chmod(folder, 0o755)
            for name in names:
                os.chmod(os.path.join(folder, name), 0o644)
        before = look(place)
        code = (
            "import os, sys, numpy\nfrom chest import Chest\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "try:\n    Chest(path=sys.argv[1])\nexcept OSError as error:\n    print(type(error).__name__)\n"
            "with Chest(path=sys.argv[1], read_only=True) as c:\n"
            "    print(len(c), c['small'], c['large'].sum(), len(list(c.items())))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(place / "c")], env=_environment(), capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == f"PathError 7 [1, 2] {np.arange(20_000).sum()} 7".split(), done.stderr
        assert look(place) == before
        os.chmod(place / "c" / ".keys" / "data.mdb", 0o600)
        done = subprocess.run(
            [sys.executable, "-c", code, str(place / "c")], env=_environment(), capture_output=True, text=True, timeout=60
        )
        assert "PathError" in done.stderr
        assert "Permission denied" in done.stderr
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


def test_damage_is_an_error_here_too(filled: tuple[Path, dict[Any, Any]]) -> None:
    path, values = filled
    data = path / ".keys" / "data.mdb"
    whole = data.read_bytes()
    n_errors = 0
    for at in range(0, len(whole), 97):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            with Chest[Any, Any](path=path, read_only=True) as chest:
                assert all(same(found, values[key]) for key, found in chest.items())
                for key, value in values.items():
                    assert key not in chest or same(chest[key], value)
        except ChestError:
            n_errors += 1
    assert n_errors > 10
    for size in (0, 1, 100, 4096, 8192, 12_288):
        data.write_bytes(whole[:size])
        with pytest.raises(CorruptError), Chest[Any, Any](path=path, read_only=True) as chest:
            list(chest.items())


def test_folders_of_others_are_warned_of_unless_they_are_trusted(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    os.chmod(tmp_path / "c", 0o777)
    with pytest.warns(UnsafePathWarning, match="every user can write"):
        Chest(path=tmp_path / "c").close()
    with pytest.warns(UnsafePathWarning):
        Chest(path=tmp_path / "c", read_only=True).close()
    Chest(path=tmp_path / "c", trusted=True).close()
    os.chmod(tmp_path / "c", 0o700)
    Chest(path=tmp_path / "c").close()
    os.chmod(tmp_path / "c" / ".keys", 0o702)
    with pytest.warns(UnsafePathWarning, match="keys"):
        Chest(path=tmp_path / "c").close()
    os.chmod(tmp_path / "c" / ".keys", 0o700)
    if IS_ROOT:
        os.chown(tmp_path / "c", 1234, 1234)
        with pytest.warns(UnsafePathWarning, match="another user"):
            Chest(path=tmp_path / "c").close()
        os.chown(tmp_path / "c", 0, 1234)
        os.chmod(tmp_path / "c", 0o770)
        with pytest.warns(UnsafePathWarning, match="group 1234"):
            Chest(path=tmp_path / "c").close()
        os.chown(tmp_path / "c", 0, 0)  # the owner's own group
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Chest(path=tmp_path / "c").close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_folders_and_files_are_the_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    code = (
        "import os, sys, numpy as np\nfrom chest import Chest\nos.umask(int(sys.argv[2]))\n"
        "with Chest(path=sys.argv[1]) as c:\n    c['small'] = 1\n    c['large'] = np.arange(20_000)\n"
        "    c['a', 'b'] = np.arange(20_000)\n    c['c', 'd'] = 1\n    c.flush()\n"
        "    for folder, _, names in os.walk(sys.argv[1]):\n"
        "        for name in ['.', *names]:\n"
        "            mode = os.lstat(os.path.join(folder, name)).st_mode\n"
        "            print(name, oct(mode & 0o7777), name == '.')\n"
    )
    if umask == 0o777 and not IS_ROOT:
        pytest.skip("nobody but root can use what this umask makes")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c"), str(umask)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) > 10
    for name, mode, is_folder in lines:
        assert int(mode, 8) & ~(0o700 if is_folder == "True" else 0o600) == 0, (name, mode)
