"""Checking and repairing chests that are compressed, sealed, or without pickle: what is believed, and what is not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chest import Chest, Problem, check
from chest._problems import KINDS
from chest._sealing import Seal
from chest.errors import WrongKeyError
from test_check import Databases, describe, flip, look

np = pytest.importorskip("numpy")

MINE, OTHER = b"my own key: 32 bytes of my own..", b"somebody else's key of 32 bytes."
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gzip": {"compression": "gzip"},
    "zstd": {"compression": "zstd"},
    "lz4": {"compression": "lz4"},
    "blosc2": {"compression": "blosc2"},
    "json": {"serializer": "json", "compression": "gzip"},
    "signed": {"key": MINE},
    "signed-gzip": {"key": MINE, "compression": "gzip"},
    "encrypted": {"key": MINE, "encrypt": True},
    "encrypted-gzip": {"key": MINE, "encrypt": True, "compression": "gzip"},
    "safe": {"serializer": "safe"},
    "safe-gzip": {"serializer": "safe", "compression": "gzip"},
    "safe-encrypted": {"serializer": "safe", "key": MINE, "encrypt": True},
}
NEEDS = {"zstd": "backports.zstd", "lz4": "lz4.frame", "blosc2": "blosc2", "safe": "msgspec", "encrypt": "cryptography"}
SEALED = [name for name, given in MODES.items() if "key" in given]
OPEN = [name for name, given in MODES.items() if "key" not in given]

TEXTS = {n: [f"line {n} of {k}" for k in range(9_000)] for n in range(4)}
VALUES: dict[Any, Any] = {
    "a": TEXTS[0],
    "b": TEXTS[1],
    ("t", "u"): {"x": TEXTS[2]},
    "small": [1, 2, "x" * 400],
    True: "typed",
    ("k" * 700, 2): "the value of a long key",
    ("large", "L" * 700): TEXTS[3],
    "last": None,
}
JSON = {key: VALUES[key] for key in VALUES if key is not True}
LARGE = [key for key, value in VALUES.items() if value in TEXTS.values() or isinstance(value, dict)]


def values_of(mode: str) -> dict[Any, Any]:
    return VALUES


def for_check(mode: str) -> dict[str, Any]:
    """What ``check`` is told of a chest, of what it was made with."""
    return {name: MODES[mode][name] for name in ("serializer", "key") if name in MODES[mode]}


def need(mode: str) -> None:
    for word, package in NEEDS.items():
        if word in mode:
            with contextlib.suppress(ImportError):  # pragma: no cover - of Python 3.14, which has its own
                pytest.importorskip(package)


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Chests of each mode, made once: values were replaced, deleted, and changed in size."""
    made: dict[str, Path] = {}

    def make(mode: str) -> Path:
        need(mode)
        if mode not in made:
            path = made[mode] = tmp_path_factory.mktemp("made") / "c"
            with Chest[Any, Any](path=path, **MODES[mode]) as c:
                for key in [*VALUES, "deleted"]:
                    c[key] = ["first", TEXTS[3]]
                c.flush()
                del c["deleted"]
                c.update(VALUES)
                c.flush()
        return made[mode]

    return make


@pytest.fixture(name="mode", params=MODES)
def _mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="path")
def _path(made: Callable[[str], Path], mode: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made(mode), tmp_path / "c"))


def found(path: Path, mode: str, **more: Any) -> list[Problem]:
    return list(check(path, **{**for_check(mode), **more}))


def kinds(problems: list[Problem]) -> set[str]:
    return {problem.kind for problem in problems}


def file_of(path: Path, mode: str, key: Any) -> Path:
    with Chest[Any, Any](path=path, read_only=True, **MODES[mode]) as c:
        return Path(c._store.path_of(c._store.index.get(c._store.name(key))))  # type: ignore[arg-type]


class Sealed(Databases):
    """The index of a chest in any mode, under the names that it has there."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path)
        self.seal: Seal | None = None
        if "key" in MODES[mode]:
            self.seal = Seal.recognized(self.get("meta", b"seal")[:-8], MINE, str(path))

    def name(self, key: Any) -> bytes:
        name = super().name(key)
        return name if self.seal is None else self.seal.name(name)


def assert_holds(path: Path, mode: str, lost: list[Any] = []) -> None:  # noqa: B006 - is not changed
    with Chest[Any, Any](path=path, verify="always", **MODES[mode]) as c:
        assert {key: c[key] for key in VALUES if key not in lost} == {k: v for k, v in VALUES.items() if k not in lost}
        assert set(c) == set(VALUES) - set(lost)
        c["new"] = TEXTS[0]
        c["small"] = 1
        c.flush()


# --- healthy


def test_a_healthy_chest_has_no_problem(path: Path, mode: str) -> None:
    assert not (problems := found(path, mode)), describe(problems)
    with Chest[Any, Any](path=path, **MODES[mode]) as c:
        assert not (problems := list(c.check())), describe(problems)
        c["a"] = [1]
        c["small"] = TEXTS[0]
        c.flush()
        c["b"].append(5)
        c.popitem()
        c["n"] = 1
        assert not (problems := list(c.check())), describe(problems)
    with Chest[Any, Any](path=path, read_only=True, **MODES[mode]) as c:
        assert c["b"][-1] == 5
        assert not (problems := list(c.check())), describe(problems)
    before = look(path)
    assert not (problems := found(path, mode, repair=True)), describe(problems)
    assert {name: part[3] for name, part in look(path).items()} == {name: part[3] for name, part in before.items()}


def test_compacting_and_backing_up(path: Path, mode: str, tmp_path: Path) -> None:
    with Chest[Any, Any](path=path, **MODES[mode]) as c:
        c.update({("n", n): "x" * 500 for n in range(2_000)})
        c.flush()
        for n in range(2_000):
            del c["n", n]
        assert c.compact() > 100_000
        assert dict(c) == VALUES
        c["after"] = TEXTS[1]
        c.backup(tmp_path / "copy")
        assert not (problems := list(c.check())), describe(problems)
        del c["after"]
    assert_holds(path, mode)
    assert not (problems := found(tmp_path / "copy", mode)), describe(problems)
    with Chest[Any, Any](path=tmp_path / "copy", verify="always", **MODES[mode]) as c:
        assert dict(c) == {**VALUES, "after": TEXTS[1]}
        c["more"] = TEXTS[0]
    if "key" in MODES[mode]:
        with pytest.raises(WrongKeyError):
            Chest(path=tmp_path / "copy")


# --- damage


def cut_file(path: Path, mode: str) -> None:
    os.truncate(file_of(path, mode, "a"), 5_000)


def flip_file(path: Path, mode: str) -> None:
    file = file_of(path, mode, "a")
    file.write_bytes(flip(file.read_bytes(), file.stat().st_size // 2))


def remove_file(path: Path, mode: str) -> None:
    file_of(path, mode, "a").unlink()


def swap_files(path: Path, mode: str) -> None:
    a, b = file_of(path, mode, "a"), file_of(path, mode, "b")
    a.rename(path / "spare")
    b.rename(a)
    (path / "spare").rename(b)


def move_file(path: Path, mode: str) -> None:
    (path / "elsewhere").mkdir()
    file_of(path, mode, "a").rename(path / "elsewhere" / "renamed")


def flip_record(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("index", dbs.name("small"), flip(dbs.get("index", dbs.name("small")), -12))


def flip_large_record(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("index", dbs.name("b"), flip(dbs.get("index", dbs.name("b")), 20))


def lose_place(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.delete("order", dbs.place("small"))


def damage_setting(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("meta", b"serializer", b"damaged--")


def lose_settings(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        for name in (b"serializer", b"format", b"folds"):
            dbs.delete("meta", name)


def damage_note(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("pending", (7).to_bytes(8, "big"), b"x" * 30)


def damage_log(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        key, data = next(iter(dbs.txn.cursor(dbs.dbs["changed"])))
        dbs.put("changed", bytes(key), flip(bytes(data), 0))


class Damage(NamedTuple):
    break_it: Callable[[Path, str], None]
    kinds: set[str]
    lost: list[Any] = []  # noqa: RUF012 - keys that nothing is left of


DAMAGES = [
    Damage(cut_file, {"value"}, ["a"]),
    Damage(flip_file, {"value"}, ["a"]),
    Damage(remove_file, {"missing"}, ["a"]),
    Damage(swap_files, {"value", "orphan"}),
    Damage(move_file, {"missing", "orphan"}),
    Damage(flip_record, {"record"}, ["small"]),
    Damage(flip_large_record, {"record"}, ["b"]),
    Damage(lose_place, {"order"}),
    Damage(damage_setting, {"meta"}),
    Damage(lose_settings, {"meta"}),
    Damage(damage_note, {"note"}),
    Damage(damage_log, {"log"}),
]


DAMAGED = ("gzip", "blosc2", "json", "signed", "signed-gzip", "encrypted-gzip", "safe")


@pytest.mark.parametrize("mode", DAMAGED, indirect=True)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.break_it.__name__)
def test_damage_is_found_and_mended_as_far_as_it_can_be(path: Path, mode: str, damage: Damage) -> None:
    sealed, footers = "key" in MODES[mode], mode != "json"
    encrypted = "encrypt" in MODES[mode]
    damage.break_it(path, mode)
    before = look(path)
    problems = found(path, mode)
    expected, lost = set(damage.kinds), list(damage.lost)
    if damage.break_it is swap_files:
        expected = {"value"} if encrypted or "compression" in MODES[mode] else expected  # all that is there belongs to a record
        lost = [] if sealed or footers else ["a", "b"]
    if damage.break_it is move_file:
        expected = {"missing"} if not footers or mode == "signed-gzip" else expected
        lost = [] if sealed or footers else ["a"]
    if damage.break_it is flip_large_record:
        expected = {"record", "orphan"} if encrypted else expected
        lost = [] if footers and not sealed else ["b"]
    if damage.break_it is lose_place and encrypted:
        lost = ["small"]
    assert kinds(problems) == expected, describe(problems)
    assert all(p.repair == KINDS[p.kind] for p in problems)
    assert look(path) == before
    assert kinds(found(path, mode, repair=True)) == expected
    assert not (rest := found(path, mode)), describe(rest)
    assert_holds(path, mode, lost)
    assert not (rest := found(path, mode, repair=True)), describe(rest)


@pytest.mark.parametrize("mode", ["gzip", "zstd", "lz4", "blosc2", "safe", "safe-gzip"], indirect=True)
def test_of_an_index_that_is_lost_the_value_files_come_back(path: Path, mode: str) -> None:
    (path / ".keys" / "data.mdb").unlink()
    (path / "notes.gz").write_bytes(b"\x1f\x8b mine, and no gzip")
    assert "index" in kinds(found(path, mode))
    assert "index" in kinds(found(path, "plain", repair=True))  # the serializer shows in the files
    assert not (rest := found(path, mode)), describe(rest)
    with Chest[Any, Any](path=path, verify="always", **MODES[mode]) as c:
        assert dict(c) == {key: VALUES[key] for key in c}
        assert set(c) == set(LARGE)
    assert (path / "notes.gz").exists()
