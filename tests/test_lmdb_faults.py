"""The default index under damage and failing disks: an error that says so, never a wrong answer, never a signal."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from chest import _fs
from chest.engines import _datafile
from chest.engines._lmdb import LmdbIndex
from chest.errors import CorruptError, DiskFullError, FailedError
from chest.testing.index import all_items, check, put


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return str(tmp_path / "chest" / ".keys")


@pytest.fixture
def index(keys: str) -> Iterator[LmdbIndex]:
    index = LmdbIndex.open(keys, sync=False)
    yield index
    index.close()


def in_another_process(code: str, *args: str) -> str:
    source = "import sys\nfrom chest.abc import Put\nfrom chest.engines._lmdb import LmdbIndex\n" + code
    done = subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- damage


def mutate(index: LmdbIndex, db: str, key: bytes, at: int) -> None:
    with index._env.begin(write=True) as txn:
        database = getattr(index._env, db)
        data = bytearray(txn.get(key, db=database))
        data[at] ^= 1
        txn.put(key, bytes(data), db=database)


@pytest.mark.parametrize("at", [0, 8, 16, 17, 40, -1])
def test_a_flipped_bit_in_a_record_is_damage(index: LmdbIndex, at: int) -> None:
    index.commit([put("a", 1, b"b" * 50), put("b", 2)], notes=lambda _: [b"n"])
    mutate(index, "index", b"a", at)
    for read in (
        lambda: index.get(b"a"),
        lambda: index.get_many([b"b", b"a"]),
        lambda: index.settle(lambda note, get: get(b"a") is None),
    ):
        with pytest.raises(CorruptError, match="damaged"):
            read()
    assert index.get(b"b") is not None


def test_flipped_bits_in_order_notes_and_settings_are_damage(index: LmdbIndex) -> None:
    index.commit([put("a", 1)], notes=lambda _: [b"note"], meta={b"m": b"setting"})
    for db, key, at in (
        ("order", (1).to_bytes(8, "big"), 0),
        ("order", (1).to_bytes(8, "big"), 2),
        ("pending", (1).to_bytes(8, "big"), 0),
        ("meta", b"m", 0),
    ):
        mutate(index, db, key, at)
        with pytest.raises(CorruptError):
            {"order": index.page, "pending": index.notes, "meta": lambda: index.meta(b"m")}[db]()
        mutate(index, db, key, at)


def test_a_record_under_another_name_is_damage(index: LmdbIndex) -> None:
    index.commit([put("a", 1, b"A"), put("b", 2, b"B")])
    with index._env.begin(write=True) as txn:
        txn.put(b"a", txn.get(b"b", db=index._env.index), db=index._env.index)
    with pytest.raises(CorruptError):
        index.get(b"a")


def test_a_record_that_was_cut_short_is_damage(index: LmdbIndex) -> None:
    index.commit([put("a", 1)])
    for length in range(25):
        with index._env.begin(write=True) as txn:
            txn.put(b"a", txn.get(b"a", db=index._env.index)[:length], db=index._env.index)
        with pytest.raises(CorruptError):
            index.get(b"a")


def test_a_damaged_record_can_be_overwritten_and_deleted(index: LmdbIndex) -> None:
    index.commit([put("a", 1, kind=1), put("b", 2, kind=1), put("c", 3)])
    mutate(index, "index", b"a", 20)
    mutate(index, "index", b"b", 20)
    index.commit([put("a", 7, b"good")], [b"b"], notes=lambda replaced: [*replaced])
    check(index)
    assert all_items(index) == [(1, b"a"), (3, b"c")]
    assert index.notes() == []  # what a damaged record refers to is not known


@pytest.fixture
def filled(keys: str) -> str:
    index = LmdbIndex.open(keys, sync=False)
    index.commit([put(f"k{n}", n + 1, os.urandom(500)) for n in range(500)])
    index.commit([put(f"k{n}", n + 1, os.urandom(500)) for n in range(0, 500, 3)])
    index.close()
    return keys


@pytest.mark.parametrize("size", [1, 100, 4096, 8191, 8192, 3 * 4096, -4096, -1])
def test_a_truncated_file_is_damage_and_no_signal(filled: str, size: int) -> None:
    data = os.path.join(filled, "data.mdb")
    os.truncate(data, size if size > 0 else os.stat(data).st_size + size)
    with pytest.raises(CorruptError, match=r"data\.mdb"):
        LmdbIndex.open(filled)
    assert os.stat(data).st_size > 0


def test_a_file_that_lacks_pages_in_use_is_damaged_though_its_list_of_free_pages_is_whole(filled: str) -> None:
    index = LmdbIndex.open(filled, sync=False)
    for n in range(12):  # these move the roots of the trees to pages that were free
        index.commit([put("k1", 2, b"%d" % n)])
    index.close()
    data = os.path.join(filled, "data.mdb")
    os.truncate(data, os.stat(data).st_size - 20 * 4096)  # more than can be free
    with pytest.raises(CorruptError, match=r"data\.mdb"):
        LmdbIndex.open(filled)


def test_a_file_that_lacks_free_pages_only_is_whole(tmp_path: Path) -> None:
    """LMDB does not write pages that were allocated and freed in one transaction."""
    short = 0
    for seed in range(8):
        rng = random.Random(seed)
        folder = str(tmp_path / str(seed))
        index = LmdbIndex.open(folder, sync=False)
        names: set[str] = set()
        for _ in range(25):
            n = rng.choice([1, 3, 30, 300])
            if rng.random() < 0.5:
                new = {f"{rng.randrange(3000):05d}" for _ in range(n)}
                index.commit([put(name, 1, rng.randbytes(rng.choice([20, 1500, 20_000]))) for name in sorted(new)])
                names |= new
            else:
                gone = rng.sample(sorted(names), min(len(names), 2 * n))
                index.commit([], [name.encode() for name in gone])
                names -= set(gone)
            expected = (index._env._env.info()["last_pgno"] + 1) * 4096
            if os.stat(index._env.data).st_size < expected:
                short += 1
                assert _datafile.refuse_damaged(folder + "/../" + str(seed)) is False
        index.close()
        LmdbIndex.open(folder, sync=False).close()
    assert short, "no such file was made: the test shows nothing"


def test_what_is_no_index_is_refused_and_left_alone(keys: str) -> None:
    os.makedirs(keys)
    data = Path(keys, "data.mdb")
    for content in (b"hello", b"hello" * 10_000, bytes(8192), os.urandom(20_000)):
        data.write_bytes(content)
        with pytest.raises(CorruptError):
            LmdbIndex.open(keys)
        assert data.read_bytes() == content


def test_an_index_that_is_gone_is_not_taken_for_a_new_one(filled: str) -> None:
    os.unlink(os.path.join(filled, "data.mdb"))
    with pytest.raises(CorruptError, match="is gone"):
        LmdbIndex.open(filled)


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "generation"])
@pytest.mark.parametrize("what", ["link", "fifo", "folder"])
def test_anything_but_a_file_in_its_place_is_refused(filled: str, tmp_path: Path, name: str, what: str) -> None:
    path = Path(filled, name)
    path.rename(tmp_path / "elsewhere")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(CorruptError, match=name):
        LmdbIndex.open(filled)


def test_random_damage_to_the_meta_pages_is_an_error_or_harmless(filled: str) -> None:
    data = Path(filled, "data.mdb")
    whole = data.read_bytes()
    rng = random.Random(1)
    code = (
        "from chest.errors import ChestError\n"
        "try:\n"
        "    i = LmdbIndex.open(sys.argv[1], sync=False)\n"
        "    for n in range(500):\n"
        "        r = i.get(b'k%d' % n)\n"
        "        assert r is None or (r.seq, len(r.body)) == (n + 1, 500)\n"
        "except ChestError:\n"
        "    pass\n"
    )
    for _ in range(6):
        at = rng.choice([24, 28, 44, 136, 137, 4096 + 136, 4096 + 137, 4096 + 24])
        data.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        in_another_process(code, filled)


# --- the disk


class Failing:
    """A transaction whose commit fails as LMDB's does when the kernel could not write."""

    def __init__(self, txn: object, code: int) -> None:
        self._txn = txn
        self._error = lmdb.Error("mdb_txn_commit: Input/output error")
        self._error.code = code  # type: ignore[misc]

    def __enter__(self) -> object:
        return self._txn.__enter__()  # type: ignore[attr-defined]

    def __exit__(self, *exc_info: object) -> None:
        self._txn.__exit__(*exc_info)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._txn, name)

    def commit(self) -> None:
        self._txn.abort()  # type: ignore[attr-defined]
        raise self._error


def fail_commits(monkeypatch: pytest.MonkeyPatch, index: LmdbIndex, code: int) -> None:
    begin = index._env.begin
    monkeypatch.setattr(
        index._env, "begin", lambda *a, **k: Failing(begin(*a, **k), code) if k.get("write") else begin(*a, **k)
    )


def test_after_a_failed_commit_nothing_more_is_written_and_everything_read(
    index: LmdbIndex, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.commit([put("a", 1)])
    other = LmdbIndex.open(keys, sync=False)
    with monkeypatch.context() as patch:
        fail_commits(patch, index, errno.EIO)
        with pytest.raises(FailedError, match="could not be written") as caught:
            index.commit([put("b", 2)])
        assert isinstance(caught.value.__cause__, lmdb.Error)
    for handle in (index, other):
        with pytest.raises(FailedError):
            handle.commit([put("b", 2)])
        assert handle.get(b"a") is not None
        assert len(handle) == 1
    # Whether the commit became visible is unknown: readers must go on looking.
    assert index.generation[0] != index.version()
    other.close()
    index.close()
    again = LmdbIndex.open(keys, sync=False)
    again.commit([put("b", 2)])
    assert len(again) == 2
    again.close()


def test_a_panic_makes_the_environment_readable_again_but_not_writable(
    index: LmdbIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.commit([put("a", 1)])
    env = index._env
    begin = env.begin

    def panic(*args: object, **options: object) -> object:
        raise lmdb.PanicError("mdb_txn_begin", -30795)

    env.begin = panic
    assert index.get(b"a") is not None
    assert env.begin is not begin
    with pytest.raises(FailedError):
        index.commit([put("b", 2)])
    assert len(index) == 1


def test_a_commit_on_a_full_disk_says_so_and_the_index_stays_usable(index: LmdbIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.commit([put("a", 1)])
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "disk_is_full", lambda path: True)
        fail_commits(patch, index, errno.EIO)
        with pytest.raises(DiskFullError) as caught:
            index.commit([put("b", 2)])
        assert caught.value.errno == errno.ENOSPC
    assert index.generation[0] == index.version()
    index.commit([put("b", 2)])
    assert len(index) == 2


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "tmpfs"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "chest-test", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs (needs root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_loses_nothing_and_room_mends_it(tmpfs: Path) -> None:
    keys = str(tmpfs / ".keys")
    index = LmdbIndex.open(keys)
    done = 0

    def fill() -> None:
        nonlocal done
        for done in range(1000):
            index.commit([put(f"k{done}", done + 1, bytes(60_000))])

    with pytest.raises(DiskFullError) as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert 50 < done < 140
    assert len(index) == done
    assert index.generation[0] == index.version()
    check(index)
    with pytest.raises(DiskFullError):
        LmdbIndex.open(str(tmpfs / "another" / ".keys"))
    for n in range(0, done, 2):
        index.commit([], [f"k{n}".encode()])
    index.commit([put("new", 5000, bytes(60_000))])
    check(index)
    assert index._env.failed is None
    index.close()
    again = LmdbIndex.open(keys)
    assert len(again) == done - (done + 1) // 2 + 1
    again.close()


def test_a_full_disk_does_not_leave_a_stump_that_looks_like_damage(tmpfs: Path) -> None:
    ballast = tmpfs / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    full = os.stat(ballast).st_size
    keys = str(tmpfs / "chest" / ".keys")
    for room in range(40):
        os.truncate(ballast, full - room * 4096)
        try:
            LmdbIndex.open(keys).close()
        except DiskFullError:
            continue
        break
    index = LmdbIndex.open(keys)
    index.close()
