"""All of chest 0.2's interface, and its folders."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chest.core
from chest import Chest, CorruptError
from chest.engines import _legacy


def old_name(key: Any) -> str:
    """The file name that chest 0.2 gave a key."""
    if isinstance(key, str) and re.match(r"^[_a-zA-Z]\w*$", key):
        return key
    if isinstance(key, tuple):
        return os.path.join(*["_" + old_name(k) for k in key[:-1]], old_name(key[-1]))
    return hashlib.md5(str(key).encode()).hexdigest()


def old_folder(path: Path, data: dict[Any, Any], dump: Callable[..., Any], opener: Any = open, mode: str = "wb") -> Path:
    """A folder as chest 0.2 left it."""
    path.mkdir()
    for key, value in data.items():
        file = path / old_name(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with opener(file, mode) as f:
            dump(value, f)
    with opener(path / ".keys", mode) as f:
        dump([(key, old_name(key)) for key in data], f)
    return path


DATA = {"x": [1, 2, 3], "_y": "text", ("a", "b"): np.arange(20_000), 5: {"five": 5}, ("a", 1): None}


def equal(c: Any, data: dict[Any, Any]) -> bool:
    return list(c) == list(data) and all(
        np.array_equal(c[k], v) if isinstance(v, np.ndarray) else c[k] == v for k, v in data.items()
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("protocol", [1, 2, 5])
def test_an_old_folder_opens_and_reading_leaves_it_as_it_is(tmp_path: Path, protocol: int) -> None:
    path = old_folder(tmp_path / "old", DATA, partial(pickle.dump, protocol=protocol))
    before = contents(path)
    with Chest(path=path) as c:
        assert equal(c, DATA)
        assert len(c) == 5
        assert list(reversed(c)) == list(DATA)[::-1]
        assert "q" not in c
        c.flush()
        assert pickle.loads(Path(c.key_to_filename("x")).read_bytes()) == [1, 2, 3]
    assert contents(path) == before


def test_an_old_folder_is_upgraded_when_it_is_written(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "old", DATA, partial(pickle.dump, protocol=1))
    expected = dict(DATA)
    with Chest(path=path) as c:
        c["new"] = 1
        c["x"].append(4)
        del c[5]
        c.flush()
        del expected[5]
        expected |= {"x": [1, 2, 3, 4], "new": 1}
        assert equal(c, expected)
    with Chest(path=path) as c:
        assert equal(c, expected)
        c["x"].append(5)
    with Chest(path=path) as c:
        assert c["x"] == [1, 2, 3, 4, 5]
    assert (path / ".keys" / ".keys-0.2").is_file()


def test_an_old_json_folder_opens_with_and_without_its_load(tmp_path: Path) -> None:
    data = {"x": [1, 2], "y": {"a": 1}}
    path = old_folder(tmp_path / "old", data, json.dump, mode="w")
    with Chest(path=path) as c:
        assert equal(c, data)
    with Chest(path=path, dump=json.dump, load=json.load, mode="t") as c:
        assert equal(c, data)
        c["z"] = 3
    with Chest(path=path) as c:
        assert dict(c) == data | {"z": 3}
        assert c.load is json.load


def test_an_old_json_folder_with_tuples_as_keys(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "old", {("a", "b"): 1}, json.dump, mode="w")
    with Chest(path=path, dump=json.dump, load=json.load) as c:
        assert c["a", "b"] == 1


def test_an_old_gzip_folder_opens_with_its_open(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "old", DATA, pickle.dump, gzip.open)
    with Chest(path=path, open=gzip.open) as c:
        assert equal(c, DATA)
        c["x"].append(4)
    with Chest(path=path, open=gzip.open) as c:
        assert c["x"] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", range(1, 5))
def test_an_interrupted_upgrade_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    path = old_folder(tmp_path / "old", DATA, pickle.dump)
    calls = 0

    class Died(BaseException):
        pass

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Died
            return real(*args)

        return call

    c = Chest(path=path)
    c["new"] = 1
    monkeypatch.setattr(_legacy.os, "rename", counted(os.rename))
    monkeypatch.setattr(_legacy._fs, "fsync_folder", counted(_legacy._fs.fsync_folder))
    with pytest.raises(Died):
        c.flush()
    monkeypatch.undo()
    c._end()
    with Chest(path=path) as c:
        assert equal(c, DATA)
        c["new"] = 2
    with Chest(path=path) as c:
        assert equal(c, DATA | {"new": 2})
    assert not (path / ".keys-upgrade").exists()
    assert not (path / ".keys-0.2").exists()


def test_a_damaged_list_of_keys_is_an_error_and_not_an_empty_chest(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "old", DATA, pickle.dump)
    (path / ".keys").write_bytes((path / ".keys").read_bytes()[:-20])
    before = contents(path)
    with pytest.raises(CorruptError, match="not the list of keys"):
        Chest(path=path)
    assert contents(path) == before


def test_a_missing_value_file_is_an_error(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "old", DATA, pickle.dump)
    (path / "x").unlink()
    with Chest(path=path) as c:
        with pytest.raises(CorruptError, match="gone"):
            c["x"]
        with pytest.raises(CorruptError):
            c.get("x", 5)
        assert c["_y"] == "text"


def test_parameters_stand_in_their_old_positions(tmp_path: Path) -> None:
    missed: list[Any] = []
    overflowed: list[Any] = []

    @contextmanager
    def many(names: list[str], mode: str = "rb") -> Any:
        files = [open(name, mode) for name in names]  # noqa: SIM115
        yield files
        for file in files:
            file.close()

    c = Chest(
        {"a": 1}, str(tmp_path / "c"), 1e6, json.dump, json.load, lambda key: f"file-{key}", missed.append, overflowed.append,
        open, many, "t",
    )  # fmt: skip
    c.flush()
    assert c["a"] == 1
    assert missed == ["a"]
    assert json.loads((tmp_path / "c" / "file-a").read_text()) == 1
    assert c.available_memory == 1_000_000
    assert c.mode == "t"
    assert (c.dump, c.load, c.open_many) == (json.dump, json.load, many)
    c.move_to_disk("a")
    assert overflowed == []  # it was written already
    c["b"] = 2
    c.move_to_disk("b")
    assert overflowed == ["b"]
    c.close()


def test_attributes_and_methods(tmp_path: Path) -> None:
    c: Chest[Any, Any] = Chest(path=str(tmp_path / "c"), available_memory=10_000)
    c["x"] = [1, 2, 3]
    assert dict(c.inmem) == {"x": [1, 2, 3]}
    assert 0 < c.memory_usage < 1_000
    assert c.path == str(tmp_path / "c")
    with c.lock:
        c["y"] = 1
    c.write_keys()
    c.flush()
    assert dict(c.inmem) == {}
    assert c.memory_usage == 0
    assert {".keys", "x", "y"} == set(os.listdir(c.path))
    c.get_from_disk("x")
    assert "x" in c.inmem
    c.move_to_disk("x")
    assert "x" not in c.inmem
    c.prefetch(["x", "y"])
    assert set(c.inmem) == {"x", "y"}
    c.shrink()
    with c.open(c.key_to_filename("x"), "rb") as f:
        assert c.load(f) == [1, 2, 3]
    with c.open_many([c.key_to_filename("x"), c.key_to_filename("y")], mode="rb") as files:
        assert [c.load(f) for f in files] == [[1, 2, 3], 1]
    assert str(c) == f"<Chest at {c.path}>"
    assert "2 keys" in repr(c)
    assert c.path in repr(c)
    assert "in memory" in repr(c)
    assert "on disk" in repr(c)
    c.drop()
    assert not os.path.exists(c.path)


def test_prefetch_of_one_key_and_of_a_missing_one(tmp_path: Path) -> None:
    with Chest({("a", "b"): 1, "x": 2}) as c:
        c.flush()
        c.prefetch(("a", "b"))
        c.prefetch("x")
        assert set(c.inmem) == {("a", "b"), "x"}
        with pytest.raises(KeyError):
            c.prefetch(["nothing"])


def test_update_from_a_chest_links_the_files(tmp_path: Path) -> None:
    with Chest(path=tmp_path / "a") as a, Chest(path=tmp_path / "b") as b:
        a["big"], a["small"], b["small"], b["own"] = np.arange(50_000), [1], [2], 3
        b.update(a, overwrite=False)
        assert b["small"] == [2]
        b.update(a)
        assert b["small"] == [1]
        assert np.array_equal(b["big"], a["big"])
        assert os.stat(b.key_to_filename("big")).st_ino == os.stat(a.key_to_filename("big")).st_ino
        assert list(b) == ["small", "own", "big"]
        b["big"][0] = -1
        b.flush()
        assert a["big"][0] == 0
    with Chest(path=tmp_path / "b") as b:
        assert b["big"][0] == -1
        assert b["own"] == 3
    with Chest(path=tmp_path / "a") as a:
        assert a["big"][0] == 0


def test_the_old_names_can_be_imported_from_core() -> None:
    assert chest.core.Chest is Chest
    assert chest.core.nbytes(np.ones(1000, dtype="i4")) == 4000
    assert chest.core.key_to_filename("x") == "x"
    assert chest.core.key_to_filename(("foo", "bar")) == "_foo/bar"


def test_a_file_of_somebody_else_in_the_folder_is_never_touched(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "x").write_text("mine")
    (folder / "y").write_text("mine too")
    with Chest(path=folder) as c:
        c["x"] = np.arange(20_000)
        c["y"] = 5
        c.flush()
        assert c["x"].sum() == np.arange(20_000).sum()
        assert c["y"] == 5
        del c["x"], c["y"]
    with Chest(path=folder) as c:
        assert len(c) == 0
        c["x"] = 1
        c.drop()
    assert (folder / "x").read_text() == "mine"
    assert (folder / "y").read_text() == "mine too"
