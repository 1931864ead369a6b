"""Signed and encrypted chests: whatever somebody without the key puts into the folder is noticed before it is decoded.

The forger of these tests knows the format: every checksum that needs no key is put right. That this is so is shown by the same
forgeries in a chest without a key, which takes them for true.
"""

from __future__ import annotations

import builtins
import contextlib
import gzip
import hmac
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from chest import Chest, ChestError, CorruptError, MissingExtraError, TamperedError, WrongKeyError, _sealing
from chest._compression import private_memory
from chest._records import BLOB, KIND, LOOSE, PACKED
from chest._sealed import SealedIndex
from chest._sealing import CHUNK, CIPHERS, KEY, NOTE, RECORD, Seal, derive
from chest.abc import Index
from chest.engines._lmdb import LmdbIndex
from chest.testing.index import IndexContract
from test_state_machine import FULL, ChestMachine, run_state_machine_as_test

MINE, OTHER = b"my own key: 32 bytes of my own..", b"somebody else's key of 32 bytes."
MARK = "a text that nobody may read"


class Custom:
    """A key whose equality only it knows."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.n == self.n

    def __hash__(self) -> int:
        return hash(self.n)


CONTENT: dict[Any, Any] = {
    "a": ["small"],
    "b": [MARK] * 3,
    "large": np.arange(300_000),
    "larger": np.arange(400_000)[::-1].copy(),
    "words": [MARK + str(n) for n in range(20_000)],
    ("pair", MARK): {"x": [np.zeros(20_000), MARK]},
    MARK: 1,
    1.5: "number",
    True: "typed",
    "long " * 300 + MARK: 2,
    frozenset({1, MARK}): 3,
    Custom(7): [Custom(8)],
}


def key_of_somebody() -> bytes:
    return MINE


@pytest.fixture(name="mode", params=["signed", *CIPHERS])
def _mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "signed":
        return {"key": MINE}
    pytest.importorskip("cryptography")
    return {"key": MINE, "encrypt": request.param}


@pytest.fixture(name="memory", params=[None, 0], ids=["all in memory", "all spilled"])
def _memory(request: pytest.FixtureRequest) -> Any:
    return request.param


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, (list, dict)):
        items = a.items() if isinstance(a, dict) else enumerate(a)
        return type(a) is type(b) and len(a) == len(b) and all(same(value, b[key]) for key, value in items)
    return type(a) is type(b) and bool(a == b)


def make(path: Path, content: dict[Any, Any] = CONTENT, **given: Any) -> None:
    with Chest[Any, Any](path=path, **given) as chest:
        for key, value in content.items():
            chest[key] = value


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Copies of a chest with the content above, which is written once for each way to seal it."""
    folder, made = tmp_path_factory.mktemp("made"), {}

    def copy_to(path: Path, **given: Any) -> Path:
        name = repr(sorted(given.items()))
        if name not in made:
            made[name] = folder / str(len(made))
            make(made[name], **given)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(made[name], path)
        return path

    return copy_to


def all_bytes(path: Path) -> bytes:
    found = [file.relative_to(path).as_posix().encode() for file in path.rglob("*")]
    return b"\n".join(found + [file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock.mdb"])


# --- what a forger does


def pairs(path: Path, table: str) -> dict[bytes, bytes]:
    """What a table of the index holds, without checksums."""
    with _table(path, table) as (txn, db):
        return {bytes(name): bytes(data)[:-8] for name, data in txn.cursor(db)}


def put(path: Path, table: str, forged: dict[bytes, bytes]) -> None:
    """Entries with the right checksums."""
    with _table(path, table) as (txn, db):
        for name, data in forged.items():
            txn.put(name, data + xxh3_64_digest(name + data), db=db)


def drop(path: Path, table: str, name: bytes) -> None:
    with _table(path, table) as (txn, db):
        txn.delete(name, db=db)


@contextlib.contextmanager
def _table(path: Path, table: str) -> Iterator[tuple[Any, Any]]:
    env = lmdb.open(str(path / ".keys"), max_dbs=10, lib_version=0)
    try:
        with env.begin(write=True) as txn:
            yield txn, env.open_db(table.encode(), txn, create=False)
    finally:
        env.close()


def place_of(path: Path, given: dict[str, Any], key: Any) -> tuple[bytes, Path]:
    """The name of a key in the index, and its file."""
    with Chest[Any, Any](path=path, **given) as chest:
        name = chest._store.name(key)
        assert name is not None
        seal = None if chest._store._envelope is None else chest._store._envelope.seal
        record = chest._store.index.get(name)
        assert record is not None
        return name if seal is None else seal.name(name), Path(chest._store.path_of(record) or "none")


def resum(data: bytes) -> bytes:
    """A value file with the checksum of its footer put right."""
    if data[-8:] != b"CHESTv1\n":
        return data
    (end,) = struct.unpack_from("<Q", data, len(data) - 40)
    return data[:-16] + struct.pack("<Q", xxh3_64_intdigest(data[end:-16])) + data[-8:]


def swap_records(path: Path, first: bytes, second: bytes) -> None:
    found = pairs(path, "index")
    put(path, "index", {first: found[second], second: found[first]})


def flip_record(path: Path, first: bytes, second: bytes) -> None:
    data = pairs(path, "index")[first]
    at = len(data) - 24
    put(path, "index", {first: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]})


def change_kind(path: Path, first: bytes, second: bytes) -> None:
    data = pairs(path, "index")[first]
    put(path, "index", {first: data[:16] + bytes([data[16] ^ 1 << 2]) + data[17:]})


def truncate_record(path: Path, first: bytes, second: bytes) -> None:
    put(path, "index", {first: pairs(path, "index")[first][:-1]})


def empty_record(path: Path, first: bytes, second: bytes) -> None:
    put(path, "index", {first: pairs(path, "index")[first][:17]})


FORGED_RECORDS = [swap_records, flip_record, change_kind, truncate_record, empty_record]


@pytest.mark.parametrize("forge", FORGED_RECORDS, ids=lambda forge: forge.__name__)
def test_a_forged_record_is_noticed(
    tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any], memory: Any, forge: Callable[..., None]
) -> None:
    for first, second in (("a", "b"), ("large", "larger"), ("a", "large")):
        path = made(tmp_path / "c", **mode)
        forge(path, place_of(path, mode, first)[0], place_of(path, mode, second)[0])
        _check_damaged(path, mode, memory, first, second)


def _check_damaged(path: Path, mode: dict[str, Any], memory: Any, first: str, second: str) -> None:
    with Chest[Any, Any](path=path, available_memory=memory, **mode) as chest:
        with pytest.raises(TamperedError, match=f"'{first}'.*is damaged.*key") as caught:
            chest[first]
        assert caught.value.key == first
        assert isinstance(caught.value, CorruptError)
        with pytest.raises(TamperedError):
            chest.get(first, "a default")
        with pytest.raises(TamperedError):
            list(chest.items())
        assert chest[MARK] == 1
        chest[first] = "anew"  # what is damaged can be overwritten
        chest.flush()
        assert chest[first] == "anew"
        del chest[second]


def test_without_a_key_the_same_forgeries_are_believed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    make(path)
    swap_records(path, b"sa", b"sb")
    with Chest[Any, Any](path=path) as chest:
        assert chest["a"] == CONTENT["b"]
        assert chest["b"] == CONTENT["a"]


# --- files


def flip_file(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(resum(bytes(data)))


def truncate_file(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def cut_off_a_chunk(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - file.stat().st_size % CHUNK)


def swap_files(file: Path, other: Path) -> None:
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def put_something_else(file: Path, other: Path) -> None:
    file.write_bytes(pickle.dumps(np.arange(300_000)))


FORGED_FILES = [flip_file, truncate_file, cut_off_a_chunk, swap_files, put_something_else]


@pytest.mark.parametrize(("compression", "memory"), [(None, 0), ("gzip", None)])
@pytest.mark.parametrize("forge", FORGED_FILES, ids=lambda forge: forge.__name__)
def test_a_forged_file_is_noticed(
    tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any], memory: Any, forge: Callable[..., None], compression: Any
) -> None:
    path = made(tmp_path / "c", compression=compression, **mode)
    file = place_of(path, mode, "large")[1]
    forge(file, place_of(path, mode, "larger")[1])
    with Chest[Any, Any](path=path, available_memory=memory, **mode) as chest:
        with pytest.raises(CorruptError, match=f"'large'.*{file.name}") as caught:
            chest["large"]
        assert caught.value.path == str(file)
        same_size = forge in (flip_file,)
        assert type(caught.value) is TamperedError or not same_size
        assert same(chest["words"], CONTENT["words"])


def test_each_bit_of_a_file_counts(tmp_path: Path, mode: dict[str, Any]) -> None:
    """Of the size that the record says, so that only the seal can tell."""
    path = tmp_path / "c"
    make(path, {"x": np.arange(10_000), "y": np.arange(10_000) + 1}, **mode)
    file, other = (place_of(path, mode, key)[1] for key in "xy")
    data = file.read_bytes()
    assert len(data) == len(other.read_bytes())
    with Chest[Any, Any](path=path, available_memory=0, **mode) as chest:
        for at in [*range(64), *range(1000, len(data), 20_001), *range(len(data) - 64, len(data))]:
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            file.write_bytes(resum(bytes(changed)) if at < len(data) - 40 else bytes(changed))
            with pytest.raises(TamperedError, match="'x'"):
                chest["x"]
        file.write_bytes(other.read_bytes())
        with pytest.raises(TamperedError, match="'x'"):
            chest["x"]
        file.write_bytes(data)
        assert same(chest["x"], np.arange(10_000))


def test_what_another_key_has_signed_is_noticed(
    tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any], memory: Any
) -> None:
    """Somebody makes the same chest with a key of his own, and puts his records and files in the place of mine."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    other = {**mode, "key": OTHER}
    made(mine, **mode)
    made(theirs, **other)
    for key in ("a", "large"):
        (my_name, my_file), (their_name, their_file) = place_of(mine, mode, key), place_of(theirs, other, key)
        put(mine, "index", {my_name: pairs(theirs, "index")[their_name]})
        if key == "large":
            shutil.copy(their_file, my_file)
    with Chest[Any, Any](path=mine, available_memory=memory, **mode) as chest:
        for key in ("a", "large"):
            with pytest.raises(TamperedError, match=key):
                chest[key]


def test_an_older_file_in_the_place_of_a_newer_one_is_noticed(tmp_path: Path, mode: dict[str, Any]) -> None:
    path = tmp_path / "c"
    make(path, {"x": np.arange(10_000)}, **mode)
    file = place_of(path, mode, "x")[1]
    older = file.read_bytes()
    make(path, {"x": np.arange(10_000) * 2}, **mode)
    file.write_bytes(older)
    with Chest[Any, Any](path=path, **mode) as chest, pytest.raises(TamperedError):
        chest["x"]


# --- keys and their order


def test_forged_keys_are_noticed_before_they_are_unpickled(
    tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any]
) -> None:
    path = made(tmp_path / "c", **mode)
    order = pairs(path, "order")
    flag = tmp_path / "unpickled"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(flag),)

    evil = pickle.dumps(Evil())
    for at, data in list(order.items())[:: len(order) - 1]:
        n = 2 + data[0] + (data[1] << 8)
        for typed in (b"", evil, data[n:-1], evil + data[n:][-16:], data[n:] + b"\0"):
            put(path, "order", {at: data[:n] + typed})
            with Chest[Any, Any](path=path, **mode) as chest, pytest.raises(TamperedError):
                list(chest)
        put(path, "order", {at: data})
    (one, a), (two, b) = list(order.items())[-4:-2]
    n, m = (2 + data[0] + (data[1] << 8) for data in (a, b))
    put(path, "order", {one: a[:n] + b[m:], two: b[:m] + a[n:]})
    with Chest[Any, Any](path=path, **mode) as chest:
        with pytest.raises(TamperedError):
            list(chest)
        with pytest.raises(TamperedError):
            [chest.popitem() for _ in order]
    assert not flag.exists()


def test_nothing_is_unpickled_that_the_key_has_not_signed(tmp_path: Path, mode: dict[str, Any]) -> None:
    class Evil:
        def __init__(self, flag: Path) -> None:
            self.flag = flag

        def __reduce__(self) -> Any:
            return os.mkdir, (str(self.flag),)

    for given, works in (({}, True), (mode, False)):
        path, flag = tmp_path / f"c{works}", tmp_path / f"flag{works}"
        make(path, **given)
        name, _ = place_of(path, given, "a")
        data = pairs(path, "index")[name]
        tag = data[-16:] if given else b""
        put(path, "index", {name: data[:17] + pickle.dumps(Evil(flag)) + tag})
        with Chest[Any, Any](path=path, **given) as chest:
            if works:
                chest["a"]
            else:
                with pytest.raises(TamperedError):
                    chest["a"]
        assert flag.exists() == works
    # A folder of chest 0.2 in its place: its list of keys would be unpickled.
    shutil.rmtree(path)
    path.mkdir()
    (path / ".keys").write_bytes(pickle.dumps([(Evil(flag), "x")]))
    with pytest.raises(WrongKeyError):
        Chest(path=path, **mode)
    assert not flag.exists()


def test_forged_notes_are_not_followed(tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any]) -> None:
    path = made(tmp_path / "c", **mode)
    victim = tmp_path / "c" / "somebodys"
    victim.write_bytes(b"a file")
    note = struct.pack("<HH", 2, 0) + b"sx" + b"somebodys"
    put(path, "pending", {struct.pack(">Q", 1): note})
    with pytest.raises(TamperedError, match="a note") as caught:
        Chest(path=path, **mode)
    assert caught.value.path == str(path)
    assert victim.exists()
    drop(path, "pending", struct.pack(">Q", 1))
    with Chest[Any, Any](path=path, **mode) as chest:
        assert len(chest) == len(CONTENT)


# --- opening


def test_settings_are_authenticated(tmp_path: Path, mode: dict[str, Any]) -> None:
    path = tmp_path / "c"
    make(path, {"a": 1}, **mode)
    meta = pairs(path, "meta")
    cipher = b"" if mode.get("encrypt") != "aes-gcm" else b"chacha20-poly1305"
    seal = meta[b"seal"]
    forged: list[tuple[bytes, bytes]] = [
        (b"serializer", b"dill"),
        (b"format", b"2"),
        (b"folds", b"1" if meta[b"folds"] == b"0" else b"0"),
        (b"seal", seal[:-1] + bytes([seal[-1] ^ 1])),
        (b"seal", seal[:49] + cipher + seal[-16:] if cipher != seal[49:-16] else seal[:49] + b"aes-gcm" + seal[-16:]),
    ]
    for name, setting in forged:
        put(path, "meta", {name: setting})
        with pytest.raises(TamperedError, match="settings"):
            Chest(path=path, **mode)
        put(path, "meta", meta)
    for setting in (b"", b"1", b"2" + seal[1:], seal[:49] + b"rot13" + seal[-16:]):
        put(path, "meta", {b"seal": setting})
        with pytest.raises(CorruptError):
            Chest(path=path, **mode)
        put(path, "meta", meta)
    drop(path, "meta", b"seal")
    with pytest.raises(WrongKeyError, match="without a key"):
        Chest(path=path, **mode)
    put(path, "meta", meta)
    with Chest[str, Any](path=path, **mode) as chest:
        assert chest["a"] == 1


def test_a_wrong_key_a_missing_one_and_one_too_many_are_said_at_once(
    tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any]
) -> None:
    made(tmp_path / "sealed", **mode)
    made(tmp_path / "open")
    before = all_bytes(tmp_path / "sealed")
    with pytest.raises(WrongKeyError, match="not the key") as caught:
        Chest(path=tmp_path / "sealed", key=OTHER)
    assert caught.value.path == str(tmp_path / "sealed")
    with pytest.raises(WrongKeyError, match="give the key="):
        Chest(path=tmp_path / "sealed")
    with pytest.raises(WrongKeyError, match="without a key"):
        Chest(path=tmp_path / "open", **mode)
    assert all_bytes(tmp_path / "sealed") == before
    with Chest[Any, Any](path=tmp_path / "sealed", key=MINE) as chest:  # how it is encrypted is remembered
        assert chest._store._envelope is not None
        assert chest._store._envelope.hides == ("encrypt" in mode)
        assert len(chest) == len(CONTENT)


def test_a_chest_that_is_only_signed_is_not_taken_for_encrypted(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    make(tmp_path / "signed", key=MINE)
    make(tmp_path / "aes", key=MINE, encrypt=True)
    with pytest.raises(WrongKeyError, match="not encrypted"):
        Chest(path=tmp_path / "signed", key=MINE, encrypt=True)
    with pytest.raises(WrongKeyError, match="aes-gcm"):
        Chest(path=tmp_path / "aes", key=MINE, encrypt="chacha20-poly1305")
    Chest(path=tmp_path / "aes", key=MINE, encrypt=True).close()


def test_an_empty_chest_can_still_be_sealed(tmp_path: Path, mode: dict[str, Any]) -> None:
    Chest(path=tmp_path / "c").close()
    make(tmp_path / "c", **mode)
    with pytest.raises(WrongKeyError):
        Chest(path=tmp_path / "c")


def test_nonsense_is_refused(tmp_path: Path) -> None:
    def opened(**given: Any) -> None:
        Chest(path=tmp_path / "c", **given)

    for key in ("text", 5, [b"x"]):
        with pytest.raises(TypeError, match="bytes"):
            opened(key=key)
    for key in (b"", b"too short"):
        with pytest.raises(ValueError, match=r"os\.urandom"):
            opened(key=key)
        with pytest.raises(ValueError, match=r"os\.urandom"):
            opened(key=lambda key=key: key)
    with pytest.raises(TypeError, match="must return bytes"):
        opened(key=lambda: "text")
    with pytest.raises(ValueError, match="needs a key"):
        opened(encrypt=True)
    for cipher in ("rot13", 1, None):
        with pytest.raises(ValueError, match="choose"):
            opened(key=MINE, encrypt=cipher)
    with pytest.raises(ValueError, match="open="):
        opened(key=MINE, open=gzip.open)
    if sys.modules.get("cryptography"):
        with pytest.raises(ValueError, match="key_to_filename"):
            opened(key=MINE, encrypt=True, key_to_filename=str)


def test_encryption_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"chest\[crypto\]"):
        Chest(path=tmp_path / "c", key=MINE, encrypt=True)
    with Chest[str, Any](path=tmp_path / "c", key=MINE) as chest:  # signing needs nothing
        chest["a"] = 1


# --- the key


def test_a_function_is_asked_for_the_key_once_for_each_opening(tmp_path: Path, mode: dict[str, Any]) -> None:
    asked: list[int] = []

    def ask() -> bytes:
        asked.append(1)
        return MINE

    for n in range(1, 3):
        with Chest[str, Any](path=tmp_path / "c", **{**mode, "key": ask}) as chest:
            chest["large"] = np.arange(20_000)
            chest.flush()
            assert chest["large"][5] == 5
        assert len(asked) == n


def test_the_key_shows_nowhere(tmp_path: Path, mode: dict[str, Any]) -> None:
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        chest["a"] = 1
        chest.flush()
        shown = [repr(chest), str(chest), repr(vars(chest)), repr(chest._given), repr(chest._store._envelope)]
        with pytest.raises(ChestError, match="function") as caught:
            pickle.dumps(chest)
        shown += [str(caught.value), repr(caught.value)]
        with pytest.raises(WrongKeyError) as wrong:
            Chest(path=tmp_path / "c", key=OTHER)
        shown += [str(wrong.value), repr(vars(wrong.value))]
    for text in shown:
        assert MINE.decode() not in text
        assert OTHER.decode() not in text
    assert MINE not in all_bytes(tmp_path / "c")


def test_a_chest_is_sent_to_others_where_the_key_comes_from_a_function(tmp_path: Path, mode: dict[str, Any]) -> None:
    with Chest[Any, Any](path=tmp_path / "c", **{**mode, "key": key_of_somebody}) as chest:
        chest["a"] = [1]
        data = pickle.dumps(chest)
        assert MINE not in data
        with pickle.loads(data) as again:
            assert again["a"] == [1]


def _in_a_child(chest: Chest[Any, Any]) -> None:
    assert chest["a"] == [1]
    chest["from the child"] = np.arange(10_000)
    chest["small one"] = 1
    chest.close()


def test_a_forked_child_goes_on_with_it(tmp_path: Path, mode: dict[str, Any]) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        chest["a"] = [1]
        chest.flush()
        child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(chest,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        chest["small two"] = 2
        chest.flush()
        assert chest["from the child"][7] == 7
    if "encrypt" in mode:
        bodies = [data[17:45] for data in pairs(tmp_path / "c", "index").values()]
        assert len(set(bodies)) == 4  # session and nonce


# --- a sealed chest is a chest


@pytest.mark.parametrize(("compression", "loose"), [(None, 100), ("gzip", 0), (None, None)])
def test_everything_comes_back(tmp_path: Path, mode: dict[str, Any], memory: Any, compression: Any, loose: Any) -> None:
    path = tmp_path / "c"
    make(path, available_memory=memory, compression=compression, loose=loose, **mode)
    with Chest[Any, Any](path=path, available_memory=memory, loose=loose, **mode) as chest:
        assert list(chest) == list(CONTENT)
        assert list(map(type, chest)) == list(map(type, CONTENT))
        assert list(reversed(chest)) == list(CONTENT)[::-1]
        for key, value in CONTENT.items():
            assert key in chest
            assert same(chest[key], value) or isinstance(key, Custom)
        assert chest[Custom(7)] == [Custom(8)]
        value = chest["large"]
        value[5] = -1
        del value
        del chest["a"]
        chest["a"] = "behind"
    with Chest[Any, Any](path=path, available_memory=memory, loose=loose, **mode) as chest:
        assert chest["large"][5] == -1
        assert chest.popitem() == ("a", "behind")
        assert chest.popitem() == (Custom(7), [Custom(8)])
        chest.drop()
    assert not path.exists()


def test_what_was_only_read_is_not_written_again(tmp_path: Path, made: Callable[..., Path], mode: dict[str, Any]) -> None:
    made(tmp_path / "c", **mode)
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        for key in CONTENT:
            chest[key]
        chest.flush()
        assert chest.stats().writes == 0


def test_processes_transactions_and_changes(tmp_path: Path, mode: dict[str, Any]) -> None:
    with Chest[Any, Any](path=tmp_path / "c", **mode) as one, Chest[Any, Any](path=tmp_path / "c", **mode) as two:
        changes = two.changes(timeout=0)
        waiting = threading.Thread(target=lambda: two.wait(("a", MARK), timeout=30))
        waiting.start()
        with one.transaction():
            one["x"] = np.arange(20_000)
            one["a", MARK] = 1
            one["gone"] = 1
            del one["gone"]
        waiting.join()
        assert set(changes) >= {"x", ("a", MARK)}
        assert two["x"][9] == 9
        with contextlib.suppress(ZeroDivisionError), one.transaction():
            one["x"] = np.arange(20_000) * 2
            one["a", MARK] = 1 // 0
        assert two["x"][9] == 9
        one["x"] = np.arange(20_000) * 3
        one.flush()
        assert two["x"][9] == 27
        two["y"] = 1
        two.flush()
        assert one.popitem() == ("y", 1)


def test_scratch_chests_have_a_key_too(mode: dict[str, Any]) -> None:
    with Chest[Any, Any](CONTENT, available_memory=0, **mode) as chest:
        assert same(chest["large"], CONTENT["large"])
        with chest.copy() as copy:
            assert same(copy["words"], CONTENT["words"])
            assert (MARK.encode() in all_bytes(Path(copy.path))) == ("encrypt" not in mode)


def test_from_chests_with_other_keys_values_are_copied(tmp_path: Path, mode: dict[str, Any]) -> None:
    content = {"a": [1], "large": np.arange(10_000)}
    make(tmp_path / "open", content)
    make(tmp_path / "other", content, **{**mode, "key": OTHER})
    make(tmp_path / "mine", {"b": 1}, **mode)
    givens: dict[str, dict[str, Any]] = {"open": {}, "other": {**mode, "key": OTHER}, "mine": mode}
    for source in givens:
        for target in givens:
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            shutil.copytree(tmp_path / target, tmp_path / "new")
            with (
                Chest[Any, Any](path=tmp_path / source, **givens[source]) as old,
                Chest[Any, Any](path=tmp_path / "new", **givens[target]) as new,
            ):
                new.update(old)
                assert all(same(new[key], old[key]) for key in old)
                if source != target and "large" in old:
                    assert not Path(old.key_to_filename("large")).samefile(new.key_to_filename("large"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_encrypted_chest_shows_nothing(tmp_path: Path, mode: dict[str, Any], compression: Any) -> None:
    if compression:
        pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    make(tmp_path / "c", compression=compression, **mode)
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        chest["words"] = [MARK] * 30_000
        chest.flush()
        chest["another " + MARK] = np.zeros(10_000)
        del chest["b"]
    data = all_bytes(tmp_path / "c")
    hidden = [MARK.encode(), b"large", b"small", b"Custom", b"numpy", b"pickle,"]
    if "encrypt" in mode:
        assert [word for word in hidden if word in data] == []
        assert all(name.startswith("0") for name in os.listdir(tmp_path / "c") if name != ".keys")
    else:
        assert MARK.encode() in data
        assert b"large" in data


def test_files_of_a_signed_chest_are_plain_pickles_and_those_of_an_encrypted_one_are_not(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    make(tmp_path / "c", **mode)
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        large = Path(chest.key_to_filename("large"))
        if "encrypt" not in mode:
            with large.open("rb") as file:
                assert same(pickle.load(file), CONTENT["large"])
            assert large.name == "large"
            assert pickle.loads(Path(chest.key_to_filename("a")).read_bytes()) == CONTENT["a"]
        else:
            assert large.read_bytes()[:8] == b"CHESTe1\n"
            with pytest.raises(ChestError, match="encrypted") as caught:
                chest.key_to_filename("a")
            assert caught.value.key == "a"
            assert not Path(chest.key_to_filename("nothing")).exists()
            kinds = [record.kind & KIND for record in chest._store.index.get_many([b"sa", b"sb"])[1] if record]
            assert kinds == [PACKED, PACKED]


def test_other_serializers_are_sealed_too(tmp_path: Path, mode: dict[str, Any]) -> None:
    values = {"large": [{"n": n, "text": MARK} for n in range(5000)], "small": [MARK]}
    make(tmp_path / "c", values, serializer="json", **mode)
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest:
        assert {key: chest[key] for key in values} == values
        file = Path(chest.key_to_filename("large"))
    data = bytearray(file.read_bytes())
    data[50_000] ^= 1
    file.write_bytes(data)
    with Chest[Any, Any](path=tmp_path / "c", **mode) as chest, pytest.raises(TamperedError, match="'large'"):
        chest["large"]


@pytest.mark.parametrize("limit", [10**9, 0, 300_000], ids=["all-in-memory", "all-spilled", "mixed"])
def test_a_sealed_and_compressed_chest_equals_a_dict_after_every_step(limit: int) -> None:
    pytest.importorskip("cryptography")
    given = {"key": MINE, "encrypt": True, "compression": "gzip"}
    machine = type("Machine", (ChestMachine,), {"limit": limit, "spills": 0, "given": given})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=500 if FULL else 6, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


class TestSignedIndex(IndexContract):
    """An index whose content is signed is an index."""

    def make_index(self, path: Path) -> Index:
        return SealedIndex(LmdbIndex.open(str(path / "index"), sync=False), Seal(MINE, bytes(32), ""), str(path))


# --- the construction


def test_subkeys_are_those_of_hkdf() -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.hashes import SHA512
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    for purpose in (b"", b"chest 1 files", b"x" * 300):
        assert derive(MINE, b"salt" * 8, purpose) == HKDF(SHA512(), 32, b"salt" * 8, purpose).derive(MINE)


def _seal(mode: dict[str, Any], key: bytes = MINE, salt: bytes = bytes(32)) -> Seal:
    return Seal(key, salt, mode.get("encrypt", ""))


def test_a_message_is_bound_to_all_that_it_is_for(mode: dict[str, Any]) -> None:
    seal = _seal(mode)
    closed = seal.close(RECORD, 1, b"name", b"data")
    assert seal.open(RECORD, 1, b"name", closed) == b"data"
    assert _seal(mode).open(RECORD, 1, b"name", closed) == b"data"
    attempts = [
        (seal, KEY, 1, b"name", closed),
        (seal, NOTE, 1, b"name", closed),
        (seal, RECORD, 2, b"name", closed),
        (seal, RECORD, 1, b"nam", closed),
        (seal, RECORD, 1, b"named", closed[1:]),
        (_seal(mode, OTHER), RECORD, 1, b"name", closed),
        (_seal(mode, salt=b"\1" * 32), RECORD, 1, b"name", closed),
        *((seal, RECORD, 1, b"name", closed[:n]) for n in range(len(closed))),
        *((seal, RECORD, 1, b"name", closed[:n] + bytes([closed[n] ^ 1]) + closed[n + 1 :]) for n in range(len(closed))),
        (seal, RECORD, 1, b"name", closed + b"\0"),
    ]
    for who, purpose, kind, name, data in attempts:
        with pytest.raises(TamperedError):
            who.open(purpose, kind, name, data)


def test_no_nonce_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setattr(_sealing, "_MESSAGES", 10)
    seal = Seal(MINE, bytes(32), "aes-gcm")
    closed = [seal.close(RECORD, 0, b"name", b"data") for _ in range(1000)]
    assert len({data[:28] for data in closed}) == 1000
    assert len({data[:16] for data in closed}) == 100  # sessions, each with a key of its own
    assert all(seal.open(RECORD, 0, b"name", data) == b"data" for data in closed)


def _written(seal: Seal, name: bytes, data: bytes) -> tuple[bytes, bytes]:
    out: list[bytes] = []
    writer = seal.writer(name, lambda part: out.append(bytes(part)))
    for start in range(0, len(data), 300_000):
        writer.write(data[start : start + 300_000])
    said = writer.close()
    return b"".join(out), said


def _read(seal: Seal, name: bytes, stored: bytes, said: bytes) -> bytes:
    return b"".join(bytes(part) for part in seal.read(memoryview(stored), name, said, private_memory))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK // 2])
def test_files_of_all_sizes_come_back(mode: dict[str, Any], size: int) -> None:
    data = os.urandom(size)
    seal = _seal(mode)
    stored, said = _written(seal, b"name", data)
    assert _read(seal, b"name", stored, said) == data
    assert seal.plain_size(len(stored)) == size
    if size > 100:
        assert (data in stored) == ("encrypt" not in mode)


def test_chunks_that_are_missing_moved_doubled_or_of_another_file_are_noticed(mode: dict[str, Any]) -> None:
    seal = _seal(mode)
    data = os.urandom(3 * CHUNK + 1000)
    stored, said = _written(seal, b"name", data)
    again, said_again = _written(seal, b"name", data)
    head, step = (40, CHUNK + 16) if "encrypt" in mode else (0, CHUNK)
    chunks = [stored[start : start + step] for start in range(head, len(stored), step)]
    others = [again[start : start + step] for start in range(head, len(again), step)]
    a, b, c, d = chunks
    for wrong in (
        [a, b, c],
        [a, b, c, b""],
        [a, b],
        [],
        [a, c, b, d],
        [a, b, b, c, d],
        [a, b, d],
        [a, b, c, d, d],
        [a, b, c, d, a],
        [d],
        [b, c, d],
        [a, b, c, d + b"\0"],
        [a, b, c, d[:-1]],
    ):
        with pytest.raises(TamperedError):
            _read(seal, b"name", stored[:head] + b"".join(wrong), said)
    if "encrypt" in mode:
        assert not {chunk[:64] for chunk in chunks} & {chunk[:64] for chunk in others}
        with pytest.raises(TamperedError):
            _read(seal, b"name", stored[:head] + a + others[1] + c + d, said)
        with pytest.raises(TamperedError):
            _read(seal, b"name", again, said)
        assert _read(seal, b"name", again, said_again) == data
    for name, key in ((b"other", seal), (b"name", _seal(mode, OTHER))):
        with pytest.raises(TamperedError):
            _read(key, name, stored, said)
    with pytest.raises(TamperedError):
        _read(seal, b"name", stored, said[:-1])


def test_a_file_that_is_changed_while_it_is_read_is_noticed(mode: dict[str, Any]) -> None:
    """Whatever is handed on lies in memory of its own by then."""
    seal = _seal(mode)
    data = os.urandom(2 * CHUNK + 5)
    stored, said = _written(seal, b"name", data)
    shared = bytearray(stored)
    found = []
    with pytest.raises(TamperedError) if "encrypt" in mode else contextlib.nullcontext():
        for part in seal.read(memoryview(shared), b"name", said, private_memory):
            for at in range(0, len(shared), 1000):
                shared[at] ^= 1
            found.append(bytes(part))
    assert data.startswith(b"".join(found))
    assert found


def test_signatures_of_files_are_hmac_sha256() -> None:
    """Written down once more, from the description of the format."""
    salt = bytes(range(32))
    stored, said = _written(Seal(MINE, salt, ""), b"sx", b"content")
    key = derive(MINE, salt, b"chest 1 files")
    assert stored == b"content"
    assert said == hmac.digest(key, b"1f\0\2\0sx" + b"content", "sha256")


def test_the_kinds_of_records_are_the_same_with_a_key(tmp_path: Path) -> None:
    make(tmp_path / "c", {"a": [1], "large": CONTENT["large"]}, key=MINE)
    with Chest[Any, Any](path=tmp_path / "c", key=MINE) as chest:
        assert [r.kind for r in chest._store.index.get_many([b"sa", b"slarge"])[1] if r] == [LOOSE, BLOB]
