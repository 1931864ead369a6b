"""Every error of the tree, provoked by what users do: its type, what it names, what it advises."""

from __future__ import annotations

import copy
import errno
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from chest import Chest, _fs, check, errors
from chest.errors import (
    ChestError,
    ClosedError,
    CorruptError,
    DiskFullError,
    FailedError,
    FormatError,
    InUseError,
    KeyTypeError,
    LoadError,
    MissingExtraError,
    NetworkPathError,
    NotAllowedError,
    PathError,
    ReadOnlyError,
    SerializeError,
    SerializerMismatchError,
    TamperedError,
    WriteError,
    WrongKeyError,
)

SOURCES = str(Path(__file__).resolve().parents[1] / "src")
ALL = [getattr(errors, name) for name in errors.__all__ if name != "short"]
LARGE = np.arange(20_000)

# What a message ends in: something that the reader can do.
ADVICE = re.compile(
    r"open it again|open it with|make room|make it|make what|choose|chmod|use |give |install|delete|change|put it back|"
    r"backup|move it|close it|run check|network=True|create|to allow=",
    re.IGNORECASE,
)

# --- the tree


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickling_and_copying(kind: type[ChestError]) -> None:
    error = kind("what happened. Do this.", key=("a", 1), path="/a/b")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == "what happened. Do this."
        assert again.key == ("a", 1)
        assert again.path == "/a/b"
        assert getattr(again, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("kind", ALL)
def test_no_error_is_a_key_error(kind: type[ChestError]) -> None:
    """``Mapping.get`` answers a KeyError by its default."""
    assert issubclass(kind, ChestError)
    assert not issubclass(kind, LookupError)


def test_errors_are_what_the_protocols_of_python_promise() -> None:
    promised: dict[type[ChestError], type[BaseException]] = {
        KeyTypeError: TypeError,
        ClosedError: ValueError,
        FailedError: OSError,
        SerializeError: TypeError,
        DiskFullError: OSError,
        SerializerMismatchError: ValueError,
        PathError: OSError,
        NetworkPathError: PathError,
        MissingExtraError: ImportError,
        CorruptError: LoadError,
        TamperedError: CorruptError,
        WrongKeyError: ValueError,
        ReadOnlyError: TypeError,
        InUseError: OSError,
    }
    for kind, base in promised.items():
        assert issubclass(kind, base)
    assert issubclass(SerializeError, WriteError)
    assert DiskFullError("full").errno == errno.ENOSPC


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"── (\w+)|^    (ChestError)$", errors.__doc__ or "", re.MULTILINE)
    assert {a or b for a, b in drawn} == {kind.__name__ for kind in ALL}


# --- provoked


def _corrupt(path: Path, name: str, damage: Callable[[Path], None]) -> None:
    with Chest[str, Any](path=path) as chest:
        chest["large"], chest["small"] = LARGE, [1]
        chest.flush()
        file = Path(chest.key_to_filename(name))
    damage(file)


def _flip(at: int) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return flip


def key_that_cannot_be_written(path: Path) -> None:
    with Chest[Any, Any](path=path) as chest:
        chest[lambda: 1] = 1


def key_nested_too_deep(path: Path) -> None:
    key: Any = 1
    for _ in range(200):
        key = (key,)
    with Chest[Any, Any](path=path) as chest:
        chest[key] = 1


def closed(path: Path) -> None:
    chest = Chest(path=path)
    chest.close()
    chest["a"] = 1


def folder_gone(path: Path) -> None:
    chest = Chest(path=path)
    chest["a"] = 1
    chest.flush()
    shutil.rmtree(path)
    chest["b"] = 2
    try:
        chest.flush()
    finally:
        chest._end()


def value_refused(path: Path) -> None:
    chest = Chest[str, Any](path=path)
    chest["the key"] = lambda: 1
    try:
        chest.flush()
    finally:
        chest._end()


def dump_with_an_os_error(path: Path) -> None:
    def dump(value: Any, file: Any) -> None:
        raise OSError(errno.EIO, "the tape is torn")

    chest = Chest[str, Any](path=path, dump=dump, load=pickle.load)
    chest["the key"] = 1
    try:
        chest.flush()
    finally:
        chest._end()


def class_missing(path: Path) -> None:
    with _module_with_class() as module, Chest[str, Any](path=path) as chest:
        chest["the key"] = module.Thing()
    with Chest[str, Any](path=path) as chest:
        chest["the key"]


def large_value_truncated(path: Path) -> None:
    _corrupt(path, "large", lambda file: os.truncate(file, 1000))
    with Chest[str, Any](path=path) as chest:
        chest["large"]


def large_value_flipped(path: Path) -> None:
    _corrupt(path, "large", _flip(70_000))
    with Chest[str, Any](path=path) as chest:
        chest["large"]


def large_value_gone(path: Path) -> None:
    _corrupt(path, "large", Path.unlink)
    with Chest[str, Any](path=path) as chest:
        chest["large"]


def file_in_the_way(path: Path) -> None:
    path.write_bytes(b"mine")
    Chest(path=path)


def file_in_the_way_above(path: Path) -> None:
    path.write_bytes(b"mine")
    Chest(path=path / "below")


def index_truncated(path: Path) -> None:
    with Chest[int, Any](path=path) as chest:
        for n in range(2000):
            chest[n] = [n]
    os.truncate(path / ".keys" / "data.mdb", 8192)
    Chest(path=path)


def index_no_index(path: Path) -> None:
    with Chest(path=path) as chest:
        chest["a"] = 1
    (path / ".keys" / "data.mdb").write_bytes(b"something else" * 5000)
    Chest(path=path)


def keys_file_of_something_else(path: Path) -> None:
    path.mkdir()
    (path / ".keys").write_bytes(b"something else")
    Chest(path=path)


def other_serializer(path: Path) -> None:
    with Chest(path=path, serializer="json") as chest:
        chest["a"] = 1
    Chest(path=path, serializer="pickle")


def serializer_of_ones_own_forgotten(path: Path) -> None:
    with Chest(path=path, dump=_dump, load=_load) as chest:
        chest["a"] = 1
    Chest(path=path)


def written_to_though_read_only(path: Path) -> None:
    Chest({"a": 1}, path=path).close()
    with Chest(path=path, read_only=True) as chest:
        chest["a"] = 2


def no_chest_to_read(path: Path) -> None:
    Chest(path=path, read_only=True)


def repaired_while_open(path: Path) -> None:
    with Chest(path=path):
        check(path, repair=True)


def class_not_allowed(path: Path) -> None:
    with Chest(path=path) as chest:
        chest["the key"] = [re.compile("x")]
    with Chest(path=path, allow=["numpy"]) as chest:
        chest["the key"]


def newer_format(path: Path) -> None:
    with Chest(path=path) as chest:
        chest._store.index.commit(meta={b"format": b"99"})
    Chest(path=path)


KEY = b"a key for tests, of 32 bytes...."


def signed_file_changed(path: Path) -> None:
    with Chest[str, Any](path=path, key=KEY) as chest:
        chest["large"] = LARGE
    _flip(70_000)(path / "large")
    with Chest[str, Any](path=path, key=KEY) as chest:
        chest["large"]


def another_key(path: Path) -> None:
    Chest(path=path, key=KEY).close()
    Chest(path=path, key=KEY[::-1])


def key_missing(path: Path) -> None:
    Chest(path=path, key=KEY).close()
    Chest(path=path)


def _dump(value: Any, file: Any) -> None:
    pickle.dump(value, file)


def _load(file: Any) -> Any:
    return pickle.load(file)


PROVOKED: dict[Callable[[Path], None], tuple[type[ChestError], tuple[str, ...]]] = {
    # how: the error, and what its message names ("{path}" stands for the path)
    key_that_cannot_be_written: (KeyTypeError, ("lambda",)),
    key_nested_too_deep: (KeyTypeError, ("deep",)),
    closed: (ClosedError, ("{path}",)),
    folder_gone: (FailedError, ("{path}",)),
    value_refused: (SerializeError, ("'the key'", "stays in memory")),
    dump_with_an_os_error: (WriteError, ("'the key'", "tape is torn", "stays in memory")),
    class_missing: (LoadError, ("'the key'", "module_that_comes_and_goes", "unharmed")),
    large_value_truncated: (CorruptError, ("'large'", "{path}")),
    large_value_flipped: (CorruptError, ("'large'", "{path}")),
    large_value_gone: (CorruptError, ("'large'", "{path}", "gone")),
    file_in_the_way: (PathError, ("{path}", "file")),
    file_in_the_way_above: (PathError, ("{path}",)),
    index_truncated: (CorruptError, ("{path}",)),
    index_no_index: (CorruptError, ("{path}",)),
    keys_file_of_something_else: (CorruptError, ("{path}", ".keys")),
    other_serializer: (SerializerMismatchError, ("{path}", "json", "pickle")),
    serializer_of_ones_own_forgotten: (SerializerMismatchError, ("{path}", "_dump")),
    written_to_though_read_only: (ReadOnlyError, ("{path}",)),
    no_chest_to_read: (PathError, ("{path}",)),
    repaired_while_open: (InUseError, ("{path}",)),
    class_not_allowed: (NotAllowedError, ("'the key'", "re._compile", "allow=")),
    newer_format: (FormatError, ("{path}", "99")),
    signed_file_changed: (TamperedError, ("'large'", "{path}")),
    another_key: (WrongKeyError, ("{path}",)),
    key_missing: (WrongKeyError, ("{path}", "key=")),
}


@pytest.mark.parametrize("provoke", PROVOKED, ids=lambda provoke: provoke.__name__)
def test_a_provoked_error_says_what_where_and_what_to_do(tmp_path: Path, provoke: Callable[[Path], None]) -> None:
    path = tmp_path / "my chest"
    kind, words = PROVOKED[provoke]
    with pytest.raises(kind) as caught:
        provoke(path)
    error = caught.value
    assert type(error) is kind
    message = str(error)
    for word in words:
        assert word.format(path=path) in message
    last = message.rstrip(".").split(". ")[-1]
    assert ADVICE.search(last), f"no advice at the end of: {message}"
    if "'the key'" in words:
        assert error.key == "the key"
    if "'large'" in words:
        assert error.key == "large"
    if "{path}" in words:
        assert error.path is not None
        assert error.path.startswith(str(path))
    again = pickle.loads(pickle.dumps(error)) if kind is not KeyTypeError else error  # that key cannot be pickled at all
    assert (type(again), str(again), again.path) == (kind, message, error.path)


def test_every_error_is_provoked_here() -> None:
    elsewhere = {
        DiskFullError,  # test_full_disk
        ChestError,  # the root
        NetworkPathError,
        MissingExtraError,  # below
    }
    assert {kind for kind, _ in PROVOKED.values()} | elsewhere == set(ALL)


def test_an_error_about_a_key_that_cannot_be_pickled_can_still_be_sent_to_another_process() -> None:
    with Chest[Any, Any]() as chest, pytest.raises(KeyTypeError) as caught:
        chest[lambda: 1] = 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is KeyTypeError
    assert str(again) == str(caught.value)


# --- keys


def test_a_missing_key_is_a_plain_key_error() -> None:
    with Chest() as chest:
        for missing in ("a", ("a", 1), None):
            with pytest.raises(KeyError) as caught:
                chest[missing]
            assert type(caught.value) is KeyError
            assert caught.value.args == (missing,)


@pytest.mark.parametrize("use", ["get", "set", "delete", "in", "get default", "pop"])
def test_an_unhashable_key_is_a_plain_type_error(use: str) -> None:
    uses: dict[str, Callable[[Chest[Any, Any]], Any]] = {
        "get": lambda c: c[[]],
        "set": lambda c: c.__setitem__([], 1),
        "delete": lambda c: c.__delitem__([]),
        "in": lambda c: [] in c,
        "get default": lambda c: c.get([], 1),
        "pop": lambda c: c.pop([], 1),
    }
    with Chest[Any, Any]() as chest:
        with pytest.raises(TypeError, match="unhashable") as caught:
            uses[use](chest)
        assert not isinstance(caught.value, ChestError)
        assert len(chest) == 0


def test_a_key_that_cannot_be_written_is_refused_when_it_is_set_and_changes_nothing() -> None:
    with Chest[Any, Any]() as chest:
        chest["a"] = 1
        for bad in (lambda: 1, ("a", lambda: 1)):
            with pytest.raises(KeyTypeError):
                chest[bad] = 1
            assert bad not in chest
        assert list(chest) == ["a"]
        chest.flush()


def test_an_error_names_a_huge_key_shortly_and_a_key_whose_repr_fails_at_all() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    assert len(errors.short("x" * 10**6)) == 80
    assert "Mute" in errors.short(Mute())
    with Chest[Any, Any]() as chest:
        chest["k" * 10_000] = lambda: 1
        with pytest.raises(SerializeError) as caught:
            chest.flush()
        assert len(str(caught.value)) < 1000


# --- damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, 100),
        lambda file: os.truncate(file, file.stat().st_size - 1),
        _flip(0),
        _flip(30),
        _flip(70_000),
        _flip(-1),
        _flip(-40),
        Path.unlink,
        lambda file: file.write_bytes(pickle.dumps("another value")),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
    ],
    ids=["empty", "cut", "cut by one", "first", "head", "payload", "last", "footer", "gone", "replaced", "zeroed"],
)
def test_a_damaged_value_raises_from_everything_that_reads_it_and_never_gives_a_default(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "c"
    _corrupt(path, "large", damage)
    default = object()
    with Chest[str, Any](path=path) as chest:
        for use in (
            lambda: chest["large"],
            lambda: chest.get("large"),
            lambda: chest.get("large", default),
            lambda: chest.pop("large"),
            lambda: chest.pop("large", default),
            lambda: chest.setdefault("large", default),
            lambda: list(chest.items()),
            lambda: list(chest.values()),
            lambda: chest.prefetch("large"),
            lambda: chest == {"large": default, "small": [1]},
        ):
            with pytest.raises(CorruptError):
                use()
        assert "large" in chest
        assert chest["small"] == [1]
        assert list(chest) == ["large", "small"]
        chest["more"] = 1
        chest.flush()
        chest["large"] = LARGE  # a new value heals it
        chest.flush()
        assert np.array_equal(chest["large"], LARGE)
    with Chest[str, Any](path=path) as chest:
        assert np.array_equal(chest["large"], LARGE)


def test_a_damaged_value_can_be_deleted(tmp_path: Path) -> None:
    for name, damage in {"cut": lambda file: os.truncate(file, 9), "gone": Path.unlink}.items():
        _corrupt(tmp_path / name, "large", damage)
        with Chest[str, Any](path=tmp_path / name) as chest:
            del chest["large"]
        with Chest[str, Any](path=tmp_path / name) as chest:
            assert chest == {"small": [1]}


@pytest.mark.parametrize("use", ["delete", "small value", "large value"])
def test_a_damaged_record_can_be_deleted_and_overwritten(tmp_path: Path, use: str) -> None:
    path = tmp_path / "c"
    with Chest[str, Any](path=path) as chest:
        chest["small"], chest["large"], chest["other"] = [1], LARGE, [2]
    with lmdb.open(str(path / ".keys"), max_dbs=10, lib_version=0) as env, env.begin(write=True) as txn:
        index = env.open_db(b"index", txn, create=False)
        for name in (b"ssmall", b"slarge"):
            record = txn.get(name, db=index)
            txn.put(name, record[:-1] + bytes([record[-1] ^ 1]), db=index)
    new = {"delete": None, "small value": [3], "large value": LARGE + 1}[use]
    with Chest[str, Any](path=path) as chest:
        for key in ("small", "large"):
            with pytest.raises(CorruptError):
                chest[key]
            if use == "delete":
                del chest[key]
            else:
                chest[key] = new
            chest.flush()
    with Chest[str, Any](path=path) as chest:
        assert set(chest) == ({"other"} if use == "delete" else {"small", "large", "other"})
        assert chest["other"] == [2]
        if use != "delete":
            assert np.array_equal(chest["small"], new)
            assert np.array_equal(chest["large"], new)


def test_a_readable_copy_is_no_value_damaging_it_damages_nothing(tmp_path: Path) -> None:
    _corrupt(tmp_path / "c", "small", lambda file: file.write_bytes(b"garbage"))
    with Chest[str, Any](path=tmp_path / "c") as chest:
        assert chest["small"] == [1]


def test_a_flipped_bit_in_a_payload_above_a_mebibyte_is_found_by_verify_always(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with Chest[str, Any](path=path) as chest:
        chest["huge"] = np.zeros(1 << 20)
        chest.flush()
        file = Path(chest.key_to_filename("huge"))
    _flip(4 << 20)(file)
    with Chest[str, Any](path=path, verify="always") as chest, pytest.raises(CorruptError, match="'huge'"):
        chest["huge"]


@pytest.mark.parametrize("serializer", ["pickle", "json", "joblib"])
def test_damage_is_found_whatever_the_serializer(tmp_path: Path, serializer: str) -> None:
    pytest.importorskip(serializer)
    path = tmp_path / "c"
    value = list(range(60_000))
    with Chest[str, Any](path=path, serializer=serializer) as chest:
        chest["large"] = value
        chest.flush()
        file = Path(chest.key_to_filename("large"))
        assert chest["large"] == value
    data = file.read_bytes()
    file.write_bytes(data.replace(data[5000:5010], data[5000:5010][::-1], 1))  # may well load, as something else
    if file.read_bytes() != data:
        with Chest[str, Any](path=path, serializer=serializer) as chest, pytest.raises(CorruptError):
            chest["large"]


# --- values that cannot be loaded


class _module_with_class:
    """A module with the class ``Thing``, importable inside of the ``with``."""

    def __enter__(self) -> Any:
        self.module: Any = types.ModuleType("module_that_comes_and_goes")
        exec("class Thing:\n    def __eq__(self, other): return type(self) is type(other)\n", self.module.__dict__)
        sys.modules[self.module.__name__] = self.module
        return self.module

    def __exit__(self, *_: object) -> None:
        del sys.modules[self.module.__name__]


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_value_whose_class_is_missing_loads_once_it_is_importable(tmp_path: Path, large: bool) -> None:
    path = tmp_path / "c"
    with _module_with_class() as module, Chest[str, Any](path=path) as chest:
        chest["a"] = [module.Thing(), LARGE if large else 0]
        chest["b"] = 1
    with Chest[str, Any](path=path) as chest:
        for use in (lambda: chest["a"], lambda: chest.get("a", 1), lambda: chest.pop("a", 1)):
            with pytest.raises(LoadError, match="'a'") as caught:
                use()
            assert not isinstance(caught.value, CorruptError)
            assert isinstance(caught.value.__cause__, ImportError)
        assert chest["b"] == 1
        chest.flush()
        with _module_with_class() as module:
            assert type(chest["a"][0]) is module.Thing
            chest.flush()


def test_a_load_that_raises_a_key_error_is_a_load_error_and_not_a_missing_key(tmp_path: Path) -> None:
    def load(file: Any) -> Any:
        raise KeyError("inside of load")

    with Chest(path=tmp_path / "c", dump=_dump, load=load) as chest:
        chest["a"] = [1]
        chest.flush()
        for use in (lambda: chest["a"], lambda: chest.get("a", "default"), lambda: chest.pop("a", "default")):
            with pytest.raises(LoadError, match="inside of load"):
                use()


# --- paths


@pytest.fixture(name="open_place")
def _open_place() -> Iterator[Path]:
    """A folder that every user may enter (pytest's are private)."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


AS_NOBODY = """
import os, sys
from chest import Chest
from chest.errors import ChestError
import chest.engines, numpy  # whatever is imported later must be by now: nobody may not be able to read it
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with Chest(path=sys.argv[1]) as c:
        print("opened", dict(c))
except ChestError as error:
    print(type(error).__name__, error)
"""


def _as_nobody(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="permissions are other ones there")
@pytest.mark.parametrize("what", ["folder", "parent", "index folder", "index"])
def test_a_path_that_may_not_be_written_is_a_path_error(open_place: Path, what: str) -> None:
    path = open_place / "c"
    if what != "parent":
        with Chest(path=path) as chest:
            chest["a"] = 1
    everyone = {
        path: 0o777,
        path / ".keys": 0o777,
        path / ".keys" / "data.mdb": 0o666,
        path / ".keys" / "lock.mdb": 0o666,
    }
    denied = {
        "folder": path,
        "parent": open_place,
        "index folder": path / ".keys",
        "index": path / ".keys" / "data.mdb",
    }[what]
    for file, mode in everyone.items():
        if file.exists():
            file.chmod(mode)
    denied.chmod(0o555 if denied.is_dir() else 0o444)
    try:
        out = _as_nobody(path)
    finally:
        open_place.chmod(0o755)
    assert out.startswith("PathError"), out
    assert str(path) in out


@pytest.mark.skipif(os.name == "nt", reason="permissions are other ones there")
def test_a_chest_of_another_user_is_a_path_error_and_no_empty_chest(open_place: Path) -> None:
    with Chest(path=open_place / "c") as chest:
        chest["a"] = 1
    (open_place / "c").chmod(0o700)
    if os.geteuid() != 0:
        (open_place / "c").chmod(0)
    out = _as_nobody(open_place / "c")
    (open_place / "c").chmod(0o700)
    assert out.startswith("PathError"), out


def test_a_network_file_system_is_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "_file_system", lambda path: "nfs4")
    with pytest.raises(NetworkPathError, match=r"nfs4.*Choose") as caught:
        Chest(path=tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)
    assert caught.value.path == str(tmp_path / "c")
    assert isinstance(caught.value, OSError)
    with Chest(path=tmp_path / "c", network=True) as chest:
        chest["a"] = 1


def test_a_refused_path_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(PathError):
        Chest(path=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".keys").write_bytes(b"no list of keys")
    with pytest.raises(CorruptError):
        Chest(path=tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == [".keys"]
    assert (tmp_path / "folder" / ".keys").read_bytes() == b"no list of keys"
    monkeypatch.setattr(_fs, "_file_system", lambda path: "cifs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NetworkPathError):
        Chest(path=tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == []


# --- a folder that goes away


@pytest.mark.parametrize("how", ["removed", "renamed away and another made", "index removed"])
def test_a_folder_that_goes_away_fails_the_chest_and_memory_stays_readable(tmp_path: Path, how: str) -> None:
    path = tmp_path / "c"
    chest = Chest[str, Any](path=path)
    chest["a"], chest["large"] = [1], LARGE
    chest.sync()
    chest["unwritten"] = [2]
    if how == "removed":
        shutil.rmtree(path)
    elif how == "index removed":
        shutil.rmtree(path / ".keys")
    else:
        path.rename(tmp_path / "away")
        with Chest[str, Any](path=path) as other:
            other["somebody's"] = 1
    with pytest.raises(FailedError) as caught:
        chest.flush()
    assert isinstance(caught.value, OSError)
    for _ in range(2):
        with pytest.raises(FailedError):
            chest.sync()
        with pytest.raises(FailedError):
            chest["more"] = 1
        with pytest.raises(FailedError):
            del chest["a"]
    assert chest["unwritten"] == [2]
    assert chest.inmem["unwritten"] == [2]
    if how != "removed":
        with Chest[str, Any](path=path) as again:  # nothing was written to what is there now
            assert "unwritten" not in again
    chest.close()
    chest.close()


def test_a_folder_that_is_renamed_while_it_is_open_can_be_opened_under_its_new_name(tmp_path: Path) -> None:
    chest = Chest[str, Any](path=tmp_path / "c")
    chest["a"], chest["large"] = [1], LARGE
    chest.flush()
    (tmp_path / "c").rename(tmp_path / "d")
    with Chest[str, Any](path=tmp_path / "d") as other:
        assert other["a"] == [1]
        assert np.array_equal(other["large"], LARGE)
        other["b"] = 2
    with Chest[str, Any](path=tmp_path / "d") as other:
        assert other["b"] == 2
    chest.close()


# --- nonsense in arguments


@pytest.mark.parametrize(
    "memory", ["", "lots", "-1", -1, "5 XB", "200%", "-5%", "nan", float("nan"), "1 2", [], b"1", object()]
)
def test_nonsense_for_available_memory_is_refused_with_what_would_do(tmp_path: Path, memory: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)memory") as caught:
        Chest(path=tmp_path / "c", available_memory=memory)
    assert "500 MB" in str(caught.value) or "number" in str(caught.value)
    assert not (tmp_path / "c").exists()
    with Chest() as chest:
        limit = chest.available_memory
        with pytest.raises((ValueError, TypeError)):
            chest.available_memory = memory
        assert chest.available_memory == limit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"verify": "sometimes"}, "sometimes.*auto.*always"),
        ({"loose": -1}, "loose.*-1"),
        ({"loose": 1.5}, "loose.*1.5"),
        ({"loose": True}, "loose.*True"),
        ({"mode": "x"}, "mode.*'x'"),
        ({"serializer": "pickel"}, "pickel.*choose"),
        ({"serializer": 5}, "5.*dump"),
        ({"serializer": "json", "dump": _dump}, "not both"),
    ],
)
def test_nonsense_in_arguments_is_refused_and_nothing_is_made(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){words}"):
        Chest(path=tmp_path / "c", **arguments)
    assert not (tmp_path / "c").exists()


def test_a_serializer_whose_package_is_missing_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dill", None)
    with pytest.raises(MissingExtraError, match=r"dill.*pip install dill") as caught:
        Chest(path=tmp_path / "c", serializer="dill")
    assert isinstance(caught.value, ImportError)
    with pytest.raises(ImportError):
        importlib.import_module("dill")
