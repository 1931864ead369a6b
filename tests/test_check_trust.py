"""Checking and repairing chests that are compressed, signed, encrypted, or without pickle: what is believed, what not."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import chest
from chest import Chest, Problem, UnsafePathWarning, check
from chest._problems import KINDS
from chest._sealing import Seal
from chest.errors import ChestError, SerializerMismatchError, WrongKeyError
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
NEEDS = {
    "zstd": "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
    "lz4": "lz4.frame",
    "blosc2": "blosc2",
    "safe": "msgspec",
    "encrypt": "cryptography",
}

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
LARGE = [key for key, value in VALUES.items() if value in TEXTS.values() or isinstance(value, dict)]


def for_check(mode: str) -> dict[str, Any]:
    """What ``check`` is told of a chest, of what it was made with."""
    return {name: MODES[mode][name] for name in ("serializer", "key") if name in MODES[mode]}


def need(mode: str) -> None:
    for word, package in NEEDS.items():
        if word in mode:
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


@pytest.mark.parametrize("mode", ["gzip", "signed", "encrypted-gzip", "safe"], indirect=True)
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


OF_FILES = (cut_file, flip_file, remove_file, swap_files, move_file, flip_large_record)
DAMAGED = [
    (damage, mode)
    for damage in DAMAGES
    for mode in (
        ("gzip", "signed-gzip", "encrypted-gzip") if damage.break_it in OF_FILES else ("signed-gzip", "encrypted-gzip", "safe")
    )
]


@pytest.mark.parametrize(
    ("damage", "mode"),
    DAMAGED,
    indirect=["mode"],
    ids=lambda part: part.break_it.__name__ if isinstance(part, Damage) else part,
)
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


# --- forgeries, with checksums that are right


def forge_record(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        data = dbs.get("index", dbs.name("small"))[:-8]
        dbs.put("index", dbs.name("small"), flip(data, 20), seal=True)


def exchange_records(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        a, b = (dbs.get("index", dbs.name(key))[:-8] for key in ("a", "b"))
        dbs.put("index", dbs.name("a"), a[:17] + b[17:], seal=True)


def forge_place(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        place, name = dbs.place("small"), dbs.name("small")
        dbs.put("order", place, len(name).to_bytes(2, "little") + name + Bomb.pickled() + bytes(16), seal=True)


def forge_note(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("pending", (7).to_bytes(8, "big"), b"\2\0\0\0sasmall" + bytes(16), seal=True)


def forge_log(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        key, data = next(iter(dbs.txn.cursor(dbs.dbs["changed"])))
        dbs.put("changed", bytes(key), flip(bytes(data)[:-8], -1), seal=True)


def forge_file(path: Path, mode: str) -> None:
    """The file of another chest whose value is another, under the name of this one's."""
    file = file_of(path, mode, "a")
    with Chest[Any, Any](path=path.parent / "other", **{**MODES[mode], "key": OTHER}) as c:
        c["a"] = TEXTS[1][::-1]
        c.flush()
        other = Path(c.key_to_filename("a"))
    file.write_bytes(other.read_bytes())


def forge_setting(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.put("meta", b"serializer", b"dill", seal=True)


class Bomb:
    """What nobody may unpickle."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)

    @staticmethod
    def pickled() -> bytes:
        return pickle.dumps(Bomb(), 5)


FORGERIES = [
    Damage(forge_record, {"record"}, ["small"]),
    Damage(exchange_records, {"record"}, ["a"]),
    Damage(forge_place, {"order"}),
    Damage(forge_note, {"note"}),
    Damage(forge_log, {"log"}),
    Damage(forge_file, {"value"}, ["a"]),
    Damage(forge_setting, {"meta"}),
]


@pytest.mark.parametrize("mode", ["signed", "encrypted-gzip"], indirect=True)
@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.break_it.__name__)
def test_a_forgery_is_found_with_the_key_and_only_what_is_genuine_is_kept(path: Path, mode: str, forgery: Damage) -> None:
    with Chest[Any, Any](path=path, read_only=True, **MODES[mode]) as c:  # opened before: it is read with its own key
        forgery.break_it(path, mode)
        problems = list(c.check())
    expected, lost = set(forgery.kinds), list(forgery.lost)
    if forgery.break_it is exchange_records and "encrypt" in MODES[mode]:  # whose file a is nobody says now
        expected |= {"orphan"}
    if forgery.break_it is forge_place and "encrypt" in MODES[mode]:
        lost = ["small"]
    assert kinds(problems) == expected, describe(problems)
    assert found(path, mode) == problems
    with pytest.raises(WrongKeyError, match="give the key="):
        check(path, repair=True)
    assert kinds(found(path, mode, repair=True)) == expected
    assert not (rest := found(path, mode)), describe(rest)
    if forgery.break_it is forge_file:
        shutil.rmtree(path.parent / "other")
    assert_holds(path, mode, lost)


@pytest.mark.parametrize("mode", ["plain"], indirect=True)
@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.break_it.__name__)
def test_without_a_key_most_forgeries_are_believed(path: Path, mode: str, forgery: Damage) -> None:
    if forgery.break_it in (forge_record, exchange_records):
        forgery.break_it(path, mode)
        assert "record" not in kinds(found(path, mode))


@pytest.mark.parametrize("mode", ["signed", "signed-gzip", "encrypted", "safe-encrypted"], indirect=True)
def test_without_the_key_only_that_is_said_and_nothing_is_unpickled(
    path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_pickles(monkeypatch)
    before = look(path)
    (problem,) = check(path)
    assert problem.kind == "seal"
    assert ("encrypted" if "encrypt" in MODES[mode] else "signed") in problem.message
    assert "key=" in problem.message
    with pytest.raises(WrongKeyError, match="give the key="):
        check(path, repair=True)
    for repair in (False, True):
        with pytest.raises(WrongKeyError, match="not the key"):
            list(check(path, key=OTHER, repair=repair))
    after = look(path)
    assert {name: part[3] for name, part in after.items() if "lock.mdb" not in name} == {
        name: part[3] for name, part in before.items() if "lock.mdb" not in name
    }


@pytest.mark.parametrize("mode", ["signed", "signed-gzip", "encrypted"], indirect=True)
@pytest.mark.parametrize("break_it", [flip_record, lose_place, damage_log, cut_file, remove_file], ids=lambda f: f.__name__)
def test_damage_is_found_without_the_key_too_where_no_key_is_needed(
    path: Path, mode: str, break_it: Callable[[Path, str], None]
) -> None:
    break_it(path, mode)
    (damage,) = (d for d in DAMAGES if d.break_it is break_it)
    needs_the_key = break_it in (cut_file, remove_file) and mode == "encrypted"
    assert kinds(list(check(path))) == {"seal"} | (set() if needs_the_key else damage.kinds)


def test_bytes_of_a_signed_file_are_checked_without_the_key(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("signed"), tmp_path / "c"))
    flip_file(path, "signed")
    assert [(p.kind, p.key) for p in check(path)] == [("seal", None), ("value", "a")]


@pytest.mark.parametrize("mode", ["signed", "encrypted"], indirect=True)
@pytest.mark.parametrize("how", ["taken away", "of another chest", "damaged", "nonsense", "with its index"])
def test_without_its_seal_nothing_is_believed_and_nothing_repaired(
    path: Path, mode: str, how: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "with its index":
        (path / ".keys" / "data.mdb").unlink()
    else:
        other = tmp_path / "other"
        Chest(path=other, **MODES[mode]).close()
        with Databases(other) as dbs:
            setting = dbs.get("meta", b"seal")[:-8]
        with Databases(path) as dbs:
            if how == "taken away":
                dbs.delete("meta", b"seal")
            elif how == "damaged":
                dbs.put("meta", b"seal", flip(dbs.get("meta", b"seal"), 5))
            else:
                dbs.put("meta", b"seal", setting if how == "of another chest" else b"nonsense", seal=True)
    before = look(path)
    _refuse_pickles(monkeypatch)
    problems = found(path, mode)
    assert "seal" in kinds(problems), describe(problems)
    assert kinds(problems) <= {"seal", "meta", "record", "index"}, describe(problems)
    with pytest.raises(ChestError, match="cannot be repaired"):
        found(path, mode, repair=True)
    assert all(look(path)[name][3] == part[3] for name, part in before.items() if "lock.mdb" not in name)
    if mode == "encrypted":  # that shows without the key
        assert "seal" in kinds(list(check(path))) or how == "with its index"
        with pytest.raises(ChestError):
            check(path, repair=True)


@pytest.mark.parametrize("mode", ["signed", "encrypted"], indirect=True)
def test_a_seal_that_lost_its_checksum_only_is_used_and_written_anew(path: Path, mode: str) -> None:
    with Databases(path) as dbs:
        dbs.put("meta", b"seal", flip(dbs.get("meta", b"seal"), -1))
    assert kinds(found(path, mode)) == {"meta"}
    assert kinds(found(path, mode, repair=True)) == {"meta"}
    assert not found(path, mode)
    assert_holds(path, mode)


@pytest.mark.parametrize("mode", ["signed", "encrypted"], indirect=True)
def test_of_a_damaged_index_what_is_genuine_comes_back(path: Path, mode: str) -> None:
    with (path / ".keys" / "data.mdb").open("r+b") as file:
        file.write(bytes(8192))
    assert {"index", "seal"} == kinds(found(path, mode))
    found(path, mode, repair=True)
    assert not (rest := found(path, mode)), describe(rest)
    with Chest[Any, Any](path=path, **MODES[mode]) as c:
        assert c.keys() >= set(LARGE)
        assert {key: VALUES[key] for key in c if key != "deleted"} == {key: c[key] for key in c if key != "deleted"}


# --- safe


def _refuse_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(chest._keys._loaded, "__defaults__", None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["safe", "safe-encrypted"], indirect=True)
@pytest.mark.parametrize("break_it", [move_file, flip_large_record, lose_place, damage_setting, lose_settings])
def test_nothing_of_a_safe_chest_is_ever_unpickled(
    path: Path, mode: str, break_it: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(path, mode)
    work = Path(shutil.copytree(path, path.parent / "work"))
    _refuse_pickles(monkeypatch)
    key = {"key": MODES[mode]["key"]} if "key" in MODES[mode] else {}
    problems = list(check(path, **key))  # the folder says that it is a safe one, or nothing does
    list(check(path, repair=True, **key))
    assert not (rest := list(check(path, **key))), describe(rest)
    assert kinds(found(work, mode)) == kinds(problems)
    found(work, mode, repair=True)
    assert not (rest := found(work, mode)), describe(rest)


@pytest.mark.parametrize("mode", ["safe"], indirect=True)
def test_what_the_folder_says_makes_nothing_be_unpickled_where_safe_was_asked_for(
    path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Databases(path) as dbs:
        dbs.put("meta", b"serializer", b"pickle", seal=True)
        place, name = dbs.place(True), dbs.name(True)
        dbs.put("order", place, len(name).to_bytes(2, "little") + name + Bomb.pickled(), seal=True)
    (path / "file").write_bytes(file_of_pickles(path.parent))
    with Chest[Any, Any](path=path.parent / "spare") as c:
        c["x"] = 1
    with monkeypatch.context() as patch:
        _refuse_pickles(patch)
        (problem,) = found(path, mode)
        assert problem.kind == "meta"
        assert "pickle" in problem.message
        with pytest.raises(SerializerMismatchError):
            found(path, mode, repair=True)
        (path.parent / "old").mkdir()
        (path.parent / "old" / ".keys").write_bytes(Bomb.pickled())
        assert [p.kind for p in check(path.parent / "old", serializer="safe")] == ["old-format"]
        assert [p.kind for p in check(path.parent / "old", key=MINE)] == ["old-format"]
    with pytest.raises(pytest.fail.Exception, match="a pickle was loaded"):  # who trusts the folder runs it
        list(check(path))
    assert "key" in kinds(list(check(path, allow=[])))  # and who has a list does not


def file_of_pickles(folder: Path) -> bytes:
    """A value file of the default serializer."""
    with Chest[Any, Any](path=folder / "pickles") as c:
        c["gone"] = TEXTS[0]
        c.flush()
        return Path(c.key_to_filename("gone")).read_bytes()


@pytest.mark.parametrize("mode", ["safe", "json"], indirect=True)
def test_files_of_another_serializer_are_not_this_chests(path: Path, mode: str) -> None:
    (path / "file").write_bytes(file_of_pickles(path.parent))
    assert not (problems := found(path, mode)), describe(problems)
    lose_place(path, mode)
    found(path, mode, repair=True)
    assert (path / "file").exists()
    assert_holds(path, mode)


@pytest.mark.parametrize("mode", ["plain"], indirect=True)
def test_a_file_of_the_same_serializer_becomes_the_value_of_its_key_again(path: Path, mode: str) -> None:
    (path / "file").write_bytes(file_of_pickles(path.parent))
    assert kinds(found(path, mode)) == {"orphan"}
    found(path, mode, repair=True)
    with Chest[Any, Any](path=path) as c:
        assert c["gone"] == TEXTS[0]


@pytest.mark.parametrize("mode", ["gzip", "zstd", "safe-gzip"], indirect=True)
def test_a_compressed_file_that_nothing_refers_to_becomes_the_value_of_its_key_again(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.delete("order", dbs.place("a"))
        dbs.delete("index", dbs.name("a"))
    assert [(p.kind, p.key) for p in found(path, mode)] == [("orphan", "a")]
    found(path, mode, repair=True)
    assert not (rest := found(path, mode)), describe(rest)
    assert_holds(path, mode)


@pytest.mark.parametrize("mode", ["signed", "encrypted"], indirect=True)
def test_a_file_that_nothing_genuine_refers_to_is_set_aside_and_not_believed(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        dbs.delete("order", dbs.place("a"))
        dbs.delete("index", dbs.name("a"))
    assert kinds(found(path, mode)) == {"orphan"}
    found(path, mode, repair=True)
    assert not (rest := found(path, mode)), describe(rest)
    assert len(list((path / ".keys").glob("aside-*/*"))) == 3  # the file, the index as it was, the log
    assert_holds(path, mode, ["a"])


# --- what cannot be looked at


@pytest.mark.parametrize("mode", ["zstd"], indirect=True)
def test_values_that_cannot_be_decompressed_here_are_no_damage(path: Path, mode: str) -> None:
    with Sealed(path, mode) as dbs:
        data = dbs.get("index", dbs.name("a"))[:-8]
        dbs.put("index", dbs.name("a"), data[:16] + bytes([data[16] & 3 | 63 << 2]) + data[17:], seal=True)
    (problem,) = found(path, mode)
    assert (problem.kind, problem.key, problem.repair) == ("unreadable", "a", "")
    assert "newer" in problem.message
    lose_place(path, mode)
    found(path, mode, repair=True)
    assert kinds(found(path, mode)) == {"unreadable"}  # and stays where it was
    assert (path / "a").exists()


# --- warnings


def test_nobody_is_warned_of_who_can_write_where_that_runs_nothing(made: Callable[[str], Path], tmp_path: Path) -> None:
    for mode, safe in (("plain", False), ("safe", True), ("signed", True)):
        path = Path(shutil.copytree(made(mode), tmp_path / mode))
        os.chmod(path, 0o777)
        assert ("unsafe" in kinds(found(path, mode))) is not safe
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Chest[Any, Any](path=path, **MODES[mode]) as c:
                assert ("unsafe" in kinds(list(c.check()))) is not safe
        assert bool(caught) is not safe
    assert "unsafe" in kinds(list(check(tmp_path / "safe")))  # who believes what the folder says
    with pytest.warns(UnsafePathWarning), Chest[Any, Any](path=tmp_path / "safe") as c:
        assert "unsafe" in kinds(list(c.check()))


def test_nonsense_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for wrong in ({"key": b"short"}, {"serializer": "nonsense"}, {"serializer": "dill", "allow": ["x"]}):
        with pytest.raises((ValueError, ChestError)):
            check(tmp_path, **wrong)
