"""Every kind of damage is found and named, and mended as far as something of it is left; a healthy chest has no problem."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import pytest
from xxhash import xxh3_64_digest

import chest
from chest import Chest, Problem, check
from chest._problems import KINDS
from chest.errors import ChestError, InUseError, PathError

np = pytest.importorskip("numpy")

SOURCES = str(Path(__file__).resolve().parents[1] / "src")
LONG, LONG_LARGE = "k" * 700, ("long", "L" * 700)
VALUES: dict[Any, Any] = {
    "a": np.arange(20_000),
    "b": np.arange(30_000) * 2,
    "big": np.arange(300_000),  # its payload is read by check only
    ("t", "u"): {"x": np.ones(10_000), "y": "text"},
    "text": "t" * 90_000,
    LONG_LARGE: np.full(9_000, 3),
    "small": [1, 2],
    True: "typed",
    2.5: ["float"],
    ("p", 1): {"z": 1},
    LONG: "the value of a long key",
    "last": None,
}
LARGE = [key for key in VALUES if key in ("a", "b", "big", ("t", "u"), "text", LONG_LARGE)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCES, "PYTHONFAULTHANDLER": ""}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool((a == b).all() if isinstance(a, np.ndarray) else a == b)


@pytest.fixture(name="template", scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "c"
    with Chest[Any, Any](path=path) as c:
        for key in [*VALUES, "deleted"]:
            c[key] = ["first", np.arange(9_000)]
        c.flush()
        del c["deleted"]
        for key, value in VALUES.items():
            c[key] = value
        c.flush()
    return path


@pytest.fixture(name="path")
def _path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "c"))


class Databases:
    """The index, to be changed behind the chest's back."""

    def __init__(self, path: Path) -> None:
        self._generation = path / ".keys" / "generation"
        self._env = lmdb.open(str(path / ".keys"), max_dbs=10, lib_version=0)
        self.txn = self._env.begin(write=True)
        self.dbs = {
            n: self._env.open_db(n.encode(), self.txn, create=False) for n in ("index", "order", "pending", "meta", "changed")
        }

    def __enter__(self) -> Databases:
        return self

    def __exit__(self, *_: object) -> None:
        with self._generation.open("r+b") as file:
            file.write(self.txn.id().to_bytes(8, "little"))
        self.txn.commit()
        self._env.close()

    def get(self, database: str, key: bytes) -> bytes:
        found = self.txn.get(key, db=self.dbs[database])
        assert found is not None
        return bytes(found)

    def put(self, database: str, key: bytes, data: bytes, *, seal: bool = False) -> None:
        """``seal``: with a checksum that is right."""
        self.txn.put(key, data + xxh3_64_digest(key + data) if seal else data, db=self.dbs[database])

    def delete(self, database: str, key: bytes) -> None:
        assert self.txn.delete(key, db=self.dbs[database])

    def name(self, key: Any) -> bytes:
        found = chest._keys.name_of(key)  # type: ignore[attr-defined]
        assert found is not None
        return bytes(found)

    def place(self, key: Any) -> bytes:
        return self.get("index", self.name(key))[8:16][::-1]


def flip(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def file_of(path: Path, key: Any) -> Path:
    return path / chest.key_to_filename(key)


# --- damages: each breaks one thing


def cut_file(path: Path) -> None:
    os.truncate(file_of(path, "a"), 5_000)


def flip_payload(path: Path) -> None:
    file = file_of(path, "big")
    file.write_bytes(flip(file.read_bytes(), 1_000_000))


def flip_footer(path: Path) -> None:
    file = file_of(path, "a")
    file.write_bytes(flip(file.read_bytes(), -20))


def empty_file(path: Path) -> None:
    file_of(path, "text").write_bytes(b"")


def other_pickle(path: Path) -> None:
    file_of(path, "a").write_bytes(pickle.dumps(5))


def remove_file(path: Path) -> None:
    file_of(path, ("t", "u")).unlink()


def swap_files(path: Path) -> None:
    a, b = file_of(path, "a"), file_of(path, "b")
    a.rename(path / "spare")
    b.rename(a)
    (path / "spare").rename(b)


def move_file(path: Path) -> None:
    (path / "elsewhere").mkdir()
    file_of(path, "a").rename(path / "elsewhere" / "renamed")


def link_file(path: Path) -> None:
    (path.parent / "outside").write_bytes(file_of(path, "a").read_bytes())
    file_of(path, "a").unlink()
    file_of(path, "a").symlink_to(path.parent / "outside")


def fifo_file(path: Path) -> None:
    file_of(path, "a").unlink()
    os.mkfifo(file_of(path, "a"))


def folder_file(path: Path) -> None:
    file_of(path, "a").unlink()
    file_of(path, "a").mkdir()


def lose_key(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("order", dbs.place("a"))
        dbs.delete("index", dbs.name("a"))


def old_file(path: Path) -> None:
    shutil.copytree(path, path.parent / "other")
    with Chest[Any, Any](path=path.parent / "other") as other:
        other["a"] = np.zeros(11_000)
        other.flush()
    shutil.copy(file_of(path.parent / "other", "a"), path / "old")
    shutil.rmtree(path.parent / "other")


def flip_large_record(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("index", dbs.name("b"), flip(dbs.get("index", dbs.name("b")), 20))


def flip_small_record(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("index", dbs.name("small"), flip(dbs.get("index", dbs.name("small")), -12))


def lose_large_record(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("index", dbs.name(LONG_LARGE))


def lose_small_record(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("index", dbs.name("small"))


def lose_place(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("order", dbs.place("small"))


def lose_place_of_long_key(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("order", dbs.place(LONG))


def lose_place_of_long_key_with_a_file(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("order", dbs.place(LONG_LARGE))


def flip_place(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("order", dbs.place("a"), flip(dbs.get("order", dbs.place("a")), 3))


def double_place(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("order", (12345).to_bytes(8, "big"), dbs.get("order", dbs.place("a"))[:-8], seal=True)


def wrong_typed_key(path: Path) -> None:
    with Databases(path) as dbs:
        place, name = dbs.place(True), dbs.name(True)
        dbs.put("order", place, len(name).to_bytes(2, "little") + name + pickle.dumps("another"), seal=True)


def forge_label(path: Path, label: bytes = b"../../victim") -> None:
    (path.parent / "victim").write_bytes(b"mine")
    with Databases(path) as dbs:
        data = dbs.get("index", dbs.name("a"))
        body = data[17:-8]
        dbs.put("index", dbs.name("a"), data[:17] + body[: 17 + body[16]] + label, seal=True)


def forge_blob(path: Path) -> None:
    with Databases(path) as dbs:
        data = dbs.get("index", dbs.name("a"))
        dbs.put("index", dbs.name("a"), data[:17] + data[17:33] + b"\x0a../../../x" + b"a", seal=True)


def forge_kind(path: Path) -> None:
    with Databases(path) as dbs:
        data = dbs.get("index", dbs.name("b"))
        dbs.put("index", dbs.name("b"), data[:16] + b"\3" + data[17:-8], seal=True)


def damage_note(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("pending", (7).to_bytes(8, "big"), b"x" * 30)


def forge_note(path: Path) -> None:
    (path.parent / "victim").write_bytes(b"mine")
    with Databases(path) as dbs:
        dbs.put("pending", (7).to_bytes(8, "big"), b"\2\0\0\0sa../../victim", seal=True)


def forget_note(path: Path) -> None:
    """A value file in ``new/`` of which no note is left."""
    with Databases(path) as dbs:
        data = dbs.get("index", dbs.name("a"))
        blob = data[17 + 17 : 17 + 17 + data[33]].decode()
    file_of(path, "a").rename(path / ".keys" / "new" / blob)


def damage_setting(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("meta", b"serializer", b"pickle--damaged")


def lose_settings(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.delete("meta", b"format")


def damage_log(path: Path) -> None:
    with Databases(path) as dbs:
        key, data = next(iter(dbs.txn.cursor(dbs.dbs["changed"])))
        dbs.put("changed", bytes(key), flip(bytes(data), 0))


def old_generation(path: Path) -> None:
    (path / ".keys" / "generation").write_bytes((1).to_bytes(8, "little"))


def fifo_generation(path: Path) -> None:
    (path / ".keys" / "generation").unlink()
    os.mkfifo(path / ".keys" / "generation")


def link_lock(path: Path) -> None:
    (path.parent / "victim").write_bytes(b"mine")
    (path / ".keys" / "lock.mdb").unlink()
    (path / ".keys" / "lock.mdb").symlink_to(path.parent / "victim")


def folder_copy(path: Path) -> None:
    (path / "small").unlink()
    (path / "small").mkdir()


class Damage(NamedTuple):
    break_it: Callable[[Path], None]
    kinds: set[str]  # of the problems found
    keys: list[Any]  # which problems name, beside None
    lost: list[Any] = []  # noqa: RUF012 - keys that nothing is left of


DAMAGES = [
    Damage(cut_file, {"value"}, ["a"], ["a"]),
    Damage(flip_payload, {"value"}, ["big"], ["big"]),
    Damage(flip_footer, {"value"}, ["a"], ["a"]),
    Damage(empty_file, {"value"}, ["text"], ["text"]),
    Damage(other_pickle, {"value"}, ["a"], ["a"]),
    Damage(remove_file, {"missing"}, [("t", "u")], [("t", "u")]),
    Damage(swap_files, {"value", "orphan"}, ["a", "b"]),
    Damage(move_file, {"missing", "orphan"}, ["a"]),
    Damage(link_file, {"value"}, ["a"], ["a"]),
    Damage(fifo_file, {"value"}, ["a"], ["a"]),
    Damage(folder_file, {"value"}, ["a"], ["a"]),
    Damage(lose_key, {"orphan"}, ["a"]),
    Damage(old_file, {"orphan"}, ["a"]),
    Damage(flip_large_record, {"record"}, ["b"]),
    Damage(flip_small_record, {"record"}, ["small"], ["small"]),
    Damage(lose_large_record, {"order", "orphan"}, [LONG_LARGE]),
    Damage(lose_small_record, {"order"}, ["small"], ["small"]),
    Damage(lose_place, {"order"}, ["small"]),
    Damage(lose_place_of_long_key, {"order"}, [], [LONG]),
    Damage(lose_place_of_long_key_with_a_file, {"order"}, []),
    Damage(flip_place, {"order"}, ["a"]),
    Damage(double_place, {"order"}, ["a"]),
    Damage(wrong_typed_key, {"key"}, []),
    Damage(forge_label, {"record", "orphan"}, ["a"]),
    Damage(lambda path: forge_label(path, b"/etc/passwd"), {"record", "orphan"}, ["a"]),
    Damage(lambda path: forge_label(path, b"a\0b"), {"record"}, ["a"]),  # which is no label any more
    Damage(lambda path: forge_label(path, b".keys/data.mdb"), {"record", "orphan"}, ["a"]),
    Damage(forge_blob, {"record"}, ["a"]),
    Damage(forge_kind, {"record", "orphan"}, ["b"]),
    Damage(damage_note, {"note"}, []),
    Damage(forge_note, {"note"}, []),
    Damage(forget_note, {"note"}, ["a"]),
    Damage(damage_setting, {"meta"}, []),
    Damage(lose_settings, {"meta"}, []),
    Damage(damage_log, {"log"}, []),
    Damage(old_generation, {"generation"}, []),
    Damage(fifo_generation, {"generation"}, []),
    Damage(link_lock, {"index"}, []),
    Damage(folder_copy, {"copy"}, ["small"]),
]


def look(path: Path) -> dict[str, Any]:
    """All files below a folder, and what is in them."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in [".", *names]:
            file = os.path.join(folder, name)
            status = os.lstat(file)
            content = Path(file).read_bytes() if os.path.isfile(file) and not os.path.islink(file) else b""
            found[file] = status.st_mode, status.st_mtime_ns, status.st_ino, content
    return found


def describe(problems: list[Problem]) -> str:
    return "\n".join(map(str, problems))


def assert_holds(path: Path, lost: list[Any]) -> None:
    with Chest[Any, Any](path=path, verify="always") as c:
        for key, value in VALUES.items():
            if key in lost:
                assert key not in c
            else:
                assert same(c[key], value), key
        assert set(c) == set(VALUES) - set(lost)
        c["new"] = np.arange(10_000)
        c["small"] = 1
        c.flush()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: f"{d.break_it.__name__}-{DAMAGES.index(d)}")
def test_damage_is_found_and_mended(path: Path, damage: Damage) -> None:
    damage.break_it(path)
    before = look(path.parent)
    problems = list(check(path))
    assert {p.kind for p in problems} == damage.kinds, describe(problems)
    keys = [p.key for p in problems if p.key is not None]
    assert all(key in keys for key in damage.keys), describe(problems)
    assert all(key in damage.keys for key in keys), describe(problems)
    assert all(p.message and p.path and p.repair == KINDS[p.kind] for p in problems)
    assert look(path.parent) == before  # nothing is written
    again = list(check(path, repair=True))
    assert {p.kind for p in again} == damage.kinds
    assert not (rest := list(check(path))), describe(rest)
    asides = list((path / ".keys").glob("aside-*"))
    if damage.lost:
        assert len(asides) == 1
        assert len((asides[0] / "log.txt").read_text().splitlines()) >= 2
    assert_holds(path, damage.lost)
    assert not (rest := list(check(path, repair=True))), describe(rest)  # nothing is left to be done
    assert list((path / ".keys").glob("aside-*")) == asides
    victim = path.parent / "victim"
    assert not victim.exists() or victim.read_bytes() == b"mine"


def zero_page(path: Path, number: int) -> None:
    with (path / ".keys" / "data.mdb").open("r+b") as file:
        file.seek(number * 4096)
        file.write(bytes(4096))


def n_pages(path: Path) -> int:
    return (path / ".keys" / "data.mdb").stat().st_size // 4096


PAGES: dict[str, Callable[[Path], Any]] = {
    "removed": lambda path: (path / ".keys" / "data.mdb").unlink(),
    "emptied": lambda path: os.truncate(path / ".keys" / "data.mdb", 0),
    "cut in half": lambda path: os.truncate(path / ".keys" / "data.mdb", n_pages(path) // 2 * 4096),
    "cut to a byte": lambda path: os.truncate(path / ".keys" / "data.mdb", 1),
    "overwritten": lambda path: (path / ".keys" / "data.mdb").write_bytes(random.Random(1).randbytes(50_000)),
    "a FIFO": lambda path: ((path / ".keys" / "data.mdb").unlink(), os.mkfifo(path / ".keys" / "data.mdb")),
    "a folder": lambda path: ((path / ".keys" / "data.mdb").unlink(), (path / ".keys" / "data.mdb").mkdir()),
    "without its folder": lambda path: shutil.rmtree(path / ".keys"),
    "a link in place of its folder": lambda path: (
        (path / ".keys").rename(path.parent / "k"),
        (path / ".keys").symlink_to("../k"),
    ),
    "without meta pages": lambda path: (zero_page(path, 0), zero_page(path, 1)),
}


@pytest.mark.parametrize("how", PAGES)
def test_of_an_index_that_is_lost_the_value_files_come_back(path: Path, how: str) -> None:
    PAGES[how](path)
    problems = list(check(path))
    assert "index" in {p.kind for p in problems}
    assert {p.kind for p in check(path, repair=True)} == {p.kind for p in problems}
    assert not (rest := list(check(path))), describe(rest)
    with Chest[Any, Any](path=path) as c:
        assert all(same(c[key], VALUES[key]) for key in LARGE)
        assert all(key in VALUES and same(value, VALUES[key]) for key, value in c.items())
        if how in ("cut in half", "without meta pages", "a link in place of its folder"):
            assert how != "without meta pages" or "small" in c  # page by page
    assert not list(check(path))


def test_a_damaged_page_costs_what_was_on_it_and_nothing_else(path: Path, scale: Callable[[int, int], int]) -> None:
    with Chest[Any, Any](path=path, loose=None) as c:
        pass
    with Chest[Any, Any](path=path) as c:
        for n in range(400):
            c["n", n] = [n, "x" * 50]
    n_found = 0
    pages = n_pages(path)
    for number in range(0, pages, max(1, pages // scale(6, 100))):
        work = Path(shutil.copytree(path, path.parent / "work"))
        zero_page(work, number)
        problems = list(check(work))
        n_found += bool(problems)
        list(check(work, repair=True))
        assert not (rest := list(check(work))), (number, describe(rest))
        with Chest[Any, Any](path=work) as c:
            assert all(same(c[key], VALUES[key]) for key in LARGE), number
            for key, value in c.items():
                assert same(value, VALUES[key] if key in VALUES else [key[1], "x" * 50])
            assert len(c) > 300 or number in (0, 1), (number, len(c))
        shutil.rmtree(work)
    assert n_found > 2


def test_every_kind_is_shown_by_a_test_or_said_to_be_beyond_repair() -> None:
    assert {kind for damage in DAMAGES for kind in damage.kinds} == {kind for kind, repair in KINDS.items() if repair}


# --- healthy chests


def work_large(c: Chest[Any, Any]) -> None:
    for n in range(5):
        c[n] = np.arange(20_000) + n
    c.flush()
    for n in range(3):
        c[n] = np.arange(30_000) + n


def work_small(c: Chest[Any, Any]) -> None:
    c.update({n: [n] for n in range(300)})
    c.flush()
    for n in range(0, 300, 2):
        del c[n]


def work_transactions(c: Chest[Any, Any]) -> None:
    for n in range(5):
        with c.transaction():
            c["x"], c["y"] = n, np.full(20_000, n)
    with pytest.raises(ZeroDivisionError), c.transaction():  # noqa: PT012
        c["y"] = np.zeros(40_000)
        raise ZeroDivisionError


def work_kinds(c: Chest[Any, Any]) -> None:
    """From large to small and back, in place, under keys of all kinds."""
    for key in [*VALUES, frozenset({1})]:
        for value in ([1], np.arange(20_000), [2], np.arange(9_000), [3] if key == "a" else np.arange(10_000)):
            c[key] = value
            c.flush()
    c["b"][0] = 5
    c.flush()
    c.key_to_filename("a")
    c.popitem()


WORK = [work_large, work_small, work_transactions, work_kinds]


SETTINGS: list[dict[str, Any]] = [{"loose": 0}, {"serializer": "json"}, {"key_to_filename": lambda key: f"f{hash(str(key))}"}]
HEALTHY = [(work, settings) for settings in ({}, {"loose": None}) for work in WORK] + [(work_large, s) for s in SETTINGS]


@pytest.mark.parametrize(("work", "settings"), HEALTHY, ids=lambda part: getattr(part, "__name__", str(part)[:20]))
def test_a_healthy_chest_has_no_problem(
    tmp_path: Path, work: Callable[[Chest[Any, Any]], None], settings: dict[str, Any]
) -> None:
    if settings.get("serializer") == "json":
        with Chest[Any, Any](path=tmp_path / "c", **settings) as c:
            c["a"], c["b"] = [1] * 30_000, {"x": 1}
            c.flush()
            c["a"] = "t" * 70_000
    else:
        with Chest[Any, Any](path=tmp_path / "c", **settings) as c:
            work(c)
            assert not (found := list(c.check())), describe(found)
            c.flush()
            assert not (found := list(c.check())), describe(found)
    assert not (found := list(check(tmp_path / "c"))), describe(found)
    before = look(tmp_path)
    assert not list(check(tmp_path / "c", repair=True))
    assert look(tmp_path).keys() == before.keys()


def test_files_of_others_are_no_problem(path: Path) -> None:
    (path / "notes.txt").write_text("mine")
    (path / "folder").mkdir()
    (path / "folder" / "p").write_bytes(pickle.dumps(1))
    (path / "link").symlink_to("/etc")
    os.mkfifo(path / "fifo")
    assert not list(check(path))
    assert not list(check(path, repair=True))
    assert (path / "notes.txt").read_text() == "mine"


def test_a_scratch_chest_and_one_just_made_have_no_problem(tmp_path: Path) -> None:
    with Chest[Any, Any](available_memory=0) as c:
        c["a"] = np.arange(20_000)
        c["b"] = 1
        assert not list(c.check())
    Chest(path=tmp_path / "c").close()
    assert not list(check(tmp_path / "c"))


def test_where_there_is_no_chest_is_a_clear_error(tmp_path: Path) -> None:
    for repair in (False, True):
        with pytest.raises(PathError, match="no folder"):
            list(check(tmp_path / "missing", repair=repair))
        with pytest.raises(PathError, match="no chest"):
            list(check(tmp_path, repair=repair))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_an_older_chest_is_named_as_such_and_its_pairs_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.mkdir()
    for name in ("x", "y"):
        (path / name).write_bytes(pickle.dumps([name]))
    (path / ".keys").write_bytes(pickle.dumps([("x", "x"), ("y", "y"), ("z", "z"), ("w", "../w")]))
    before = look(path)
    found = [(p.kind, p.key) for p in check(path)]
    assert found == [("old-format", None), ("missing", "z"), ("value", "w")]
    assert [(p.kind, p.key) for p in check(path, repair=True)] == found
    assert look(path) == before
    with Chest[Any, Any](path=path, read_only=True) as c:
        assert c["x"] == ["x"]
        assert list(c.check()) == list(check(path))
    assert look(path) == before
    (path / ".keys").write_bytes(b"nonsense")
    assert [p.kind for p in check(path)] == ["old-format", "index"]


def test_a_newer_format_is_left_alone(path: Path) -> None:
    with Databases(path) as dbs:
        dbs.put("meta", b"format", b"2", seal=True)
        dbs.delete("index", dbs.name("a"))
    before = look(path)
    assert [p.kind for p in check(path)] == ["format"]
    assert [p.kind for p in check(path, repair=True)] == ["format"]
    assert {name: content[3] for name, content in look(path).items()} == {name: content[3] for name, content in before.items()}


def test_a_folder_that_others_can_write_to_is_reported(path: Path) -> None:
    os.chmod(path, 0o777)
    assert [p.kind for p in check(path)] == ["unsafe"]


# --- beside others


OTHER = """
import sys, numpy as np
from chest import Chest
with Chest(path=sys.argv[1], available_memory=500_000) as c:
    print("open", flush=True)
    n = 0
    while True:
        n += 1
        for key in range(6):
            c[key] = np.full(9_000 + n % 3, n) if (n + key) % 3 else [n, key]
        c["n", n % 20] = "s" * (n % 9)
        c.pop(("n", (n + 7) % 20), None)
        if n % 5 == 0:
            with c.transaction():
                c.pop(n % 6, None)
                c["t"] = np.arange(10_000)
        c.flush()
"""


@pytest.fixture(name="other")
def _other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the chest ``c`` all the time."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path / "c")], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            process.kill()


def test_what_is_only_under_way_is_not_reported(
    tmp_path: Path, other: subprocess.Popen[str], scale: Callable[[int, int], int]
) -> None:
    for _ in range(scale(5, 100)):
        assert not (found := list(check(tmp_path / "c"))), describe(found)
    assert other.poll() is None
    with Chest[Any, Any](path=tmp_path / "c", read_only=True) as c:
        assert not (found := list(c.check())), describe(found)
    other.send_signal(signal.SIGSTOP)
    try:
        assert not (found := list(check(tmp_path / "c"))), describe(found)
    finally:
        other.send_signal(signal.SIGCONT)


def test_repair_is_refused_while_somebody_has_the_chest_open(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(InUseError, match="another process"):
        check(tmp_path / "c", repair=True)
    assert other.poll() is None
    other.kill()
    other.wait()
    list(check(tmp_path / "c", repair=True))
    with Chest[Any, Any](path=tmp_path / "c"), pytest.raises(InUseError, match="this process"):
        check(tmp_path / "c", repair=True)


def test_whoever_opens_a_chest_that_is_being_repaired_waits(path: Path) -> None:
    from chest.engines._alone import alone

    code = (
        "import sys\nfrom chest import Chest\nprint('go', flush=True)\n"
        "with Chest(path=sys.argv[1]) as c:\n    c['x'] = len(c)\n"
    )
    with alone(str(path / ".keys")):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        for _ in range(50):
            os.sched_yield()
        assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 0
    with Chest[Any, Any](path=path) as c:
        assert c["x"] == len(VALUES)


@pytest.mark.torture
def test_a_writer_that_is_killed_leaves_no_problem(tmp_path: Path, scale: Callable[[int, int], int]) -> None:
    rng = random.Random(5)
    for _ in range(scale(6, 200)):
        with subprocess.Popen(
            [sys.executable, "-c", OTHER, str(tmp_path / "c")], env=environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            until = time.perf_counter_ns() + rng.randrange(60_000_000)
            while time.perf_counter_ns() < until:
                pass
            process.kill()
        assert not (found := list(check(tmp_path / "c"))), describe(found)


@pytest.mark.torture
def test_a_repair_that_is_killed_loses_nothing_and_the_next_one_ends_it(path: Path, scale: Callable[[int, int], int]) -> None:
    for break_it in (swap_files, flip_large_record, lose_large_record, lose_place, move_file, PAGES["without meta pages"]):
        break_it(path) if break_it is not swap_files else swap_files(path)
    code = (
        "import os, sys\nn = int(sys.argv[2])\n"
        "def hook(event, args):\n"
        "    global n\n"
        "    if event in ('open', 'os.rename', 'os.link', 'os.mkdir', 'os.remove', 'os.scandir'):\n"
        "        n -= 1\n        if n == 0: os.kill(os.getpid(), 9)\n"
        "from chest import check\nsys.addaudithook(hook)\nlist(check(sys.argv[1], repair=True))\nn = 0\nprint('end')\n"
    )
    n = step = scale(17, 1)
    for _ in range(1000):
        work = Path(shutil.copytree(path, path.parent / "work", symlinks=True))
        done = subprocess.run(
            [sys.executable, "-c", code, str(work), str(n)], env=environment(), capture_output=True, text=True
        )
        assert done.returncode in (0, -9), done.stderr
        if n % 2 and done.returncode:  # somebody opens it before it is repaired
            with contextlib.suppress(ChestError):
                Chest(path=work).close()
        list(check(work, repair=True))
        assert not (found := list(check(work))), (n, describe(found))
        with Chest[Any, Any](path=work, verify="always") as c:
            assert all(same(c[key], VALUES[key]) for key in LARGE), n
            assert all(same(value, VALUES[key]) for key, value in c.items())
        shutil.rmtree(work)
        if done.returncode == 0:
            break
        n += step
    assert n > 3 * step


def test_an_empty_file_in_the_place_of_the_index_is_no_chest_of_0_2(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with Chest[str, Any](path=path) as chest:
        chest["large"] = "x" * 100_000
    shutil.rmtree(path / ".keys")
    (path / ".keys").touch()
    assert {problem.kind for problem in check(path)} == {"index"}
    assert {problem.kind for problem in check(path, repair=True)} == {"index"}
    assert list(check(path)) == []
    with Chest[str, Any](path=path) as chest:
        assert dict(chest) == {"large": "x" * 100_000}
