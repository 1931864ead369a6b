"""The default index, held to the contract of all indexes, and to what LMDB itself leaves to its callers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chest import _fs
from chest.abc import Put, Record
from chest.engines import _environment
from chest.engines._environments import ENVIRONMENTS
from chest.engines._gate import GATE, Gate
from chest.engines._lmdb import LmdbIndex
from chest.errors import ChestError, FailedError, NetworkPathError, PathError
from chest.testing.exclusive import TransactionContract
from chest.testing.index import IndexContract, check, put


class TestLmdbIndex(IndexContract, TransactionContract):
    def make_index(self, folder: Path) -> LmdbIndex:
        return LmdbIndex.open(str(folder / ".keys"), sync=False)


class TestSyncedLmdbIndex(IndexContract, TransactionContract):
    def make_index(self, folder: Path) -> LmdbIndex:
        return LmdbIndex.open(str(folder / ".keys"))


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return str(tmp_path / "chest" / ".keys")


@pytest.fixture
def index(keys: str) -> Iterator[LmdbIndex]:
    index = LmdbIndex.open(keys, sync=False)
    yield index
    index.close()


def test_room_is_kept_for_deletions_on_a_full_disk_and_made_again_by_the_next_opener(keys: str) -> None:
    reserve = os.path.join(keys, "reserve")
    for _ in range(2):
        index = LmdbIndex.open(keys)
        assert os.stat(reserve).st_blocks * 512 >= 256 << 10
        assert index.give_way()
        assert not os.path.exists(reserve)
        assert not index.give_way()
        index.close()
    index = LmdbIndex.open(keys, sync=False)  # scratch
    assert not os.path.exists(reserve)
    index.close()


def in_another_process(code: str, *args: str) -> str:
    source = "import sys\nfrom chest.abc import Put\nfrom chest.engines._lmdb import LmdbIndex\n" + code
    done = subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- against a model


NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
PUTS = st.lists(
    st.builds(
        Put,
        NAMES,
        st.integers(1, 9),
        st.integers(0, 2),
        st.binary(max_size=3),
        st.binary(max_size=3),
        st.booleans(),
    ),
    unique_by=lambda p: p.name,
    max_size=4,
)


@given(st.lists(st.tuples(PUTS, st.lists(NAMES, unique=True, max_size=3)), max_size=8))
def test_any_commits_give_what_a_dictionary_would(tmp_path_factory: pytest.TempPathFactory, commits: list) -> None:
    index = LmdbIndex.open(str(tmp_path_factory.mktemp("model")), sync=False)
    try:
        model: dict[bytes, tuple[int, bytes, bytes]] = {}
        for puts, deletes in commits:
            gone = [name for name in deletes if name not in {p.name for p in puts}]
            told: list[set[bytes]] = []

            def notes(replaced: dict, told: list = told) -> list[bytes]:
                told.append(set(replaced))
                return []

            index.commit(puts, gone, notes=notes)
            touched = {p.name for p in puts} | set(gone)
            assert told[-1] == {name for name in touched if name in model and model[name][0]}
            for name in gone:
                model.pop(name, None)
            for p in puts:
                typed = model[p.name][2] if p.name in model and not p.fresh else p.typed
                model[p.name] = (p.kind, p.body, typed)
        check(index)
        items = index.page()
        records = index.get_many([item.name for item in items])[1]
        assert model == {i.name: (r.kind, r.body, i.typed) for i, r in zip(items, records, strict=True) if r is not None}
    finally:
        index.close()


# --- one environment for all


def test_two_handles_of_one_process_share_one_environment(keys: str, index: LmdbIndex, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path(keys).parent)
    other = LmdbIndex.open(str(tmp_path / "link" / ".keys"), sync=False)
    assert other._env is index._env
    other.commit([put("a", 1)])
    other.close()
    assert index.get(b"a") is not None
    index.commit([put("b", 2)])


def test_the_last_handle_closes_the_environment(keys: str) -> None:
    first, second = LmdbIndex.open(keys, sync=False), LmdbIndex.open(keys, sync=False)
    env = first._env
    first.close()
    first.close()
    assert second.get(b"x") is None
    second.close()
    assert env not in ENVIRONMENTS._open.values()
    LmdbIndex.open(keys, sync=False).close()


def test_threads_that_open_and_close_at_once_share_it(keys: str) -> None:
    problems: list[BaseException] = []

    def use(n: int) -> None:
        try:
            for step in range(20):
                index = LmdbIndex.open(keys, sync=False)
                index.commit([put(f"{n} {step}", index.last_seq() + 1)])
                index.close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    index = LmdbIndex.open(keys, sync=False)
    assert len(index) == 80
    index.close()


def test_a_handle_that_asks_for_syncing_gets_it_in_an_environment_without(
    keys: str, index: LmdbIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(index._env, "sync_to_disk", lambda: synced.append(1))
    careful = LmdbIndex.open(keys, sync=True)
    index.commit([put("a", 1)])
    assert not synced
    careful.commit([put("b", 2)])
    assert synced
    careful.close()


def test_other_processes_commits_are_seen_at_once(keys: str, index: LmdbIndex) -> None:
    index.commit([put("a", 1)])
    seen = index.version()
    out = in_another_process(
        "i = LmdbIndex.open(sys.argv[1])\nc = i.commit([Put(b'b', 2, 0, b'B')])\nprint(c.before, c.version)\ni.close()",
        keys,
    )
    before, version = map(int, out.split())
    assert before == seen
    assert index.generation[0] == index.version() == version
    record = index.get(b"b")
    assert record is not None
    assert record.body == b"B"


def test_a_process_that_dies_in_a_commit_leaves_nothing_of_it(keys: str, index: LmdbIndex) -> None:
    index.commit([put("a", 1)])
    seen = index.version()
    in_another_process(
        "import os\n"
        "i = LmdbIndex.open(sys.argv[1], sync=False)\n"
        "env = i._env\n"
        "def die(txn):\n"
        "    txn.put(b'x', b'y', db=env.index)\n"
        "    env.generation[0] = txn.id()\n"
        "    os._exit(0)\n"
        "env.write(i._folder, die)\n",
        keys,
    )
    assert index.version() == seen
    assert index.generation[0] != seen  # readers look again, and are never wrong
    assert index.get(b"x") is None
    index.commit([put("b", 2)])
    assert index.generation[0] == index.version() != seen


def test_opening_brings_a_generation_back_that_a_crash_left_ahead(keys: str) -> None:
    index = LmdbIndex.open(keys, sync=False)
    index.commit([put("a", 1)])
    index._env.generation[0] += 1
    index.close()
    index = LmdbIndex.open(keys, sync=False)
    assert index.generation[0] == index.version()
    index.close()


def test_a_scratch_index_keeps_what_it_has_when_other_handles_come_and_go(keys: str, index: LmdbIndex) -> None:
    generation = index.generation
    for n in range(50):
        other = LmdbIndex.open(keys, sync=False)
        other.commit([put(f"k{n}", n + 1)])
        other.close()
        assert generation[0] == index.version()
    assert len(index) == 50


def test_ready_is_called_between_the_last_note_and_forgetting(index: LmdbIndex) -> None:
    log: list[str] = []
    index.commit(notes=lambda _: [b"1", b"2"])

    def finish(note: bytes, get: object) -> bool:
        log.append(note.decode())
        return True

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        index.settle(finish, ready=fail)
    assert index.notes() == [b"1", b"2"]
    index.settle(finish, ready=lambda: log.append("ready"))
    assert log == ["1", "2", "1", "2", "ready"]
    assert index.notes() == []


# --- the folder


def test_the_folder_is_made_for_its_owner_alone(index: LmdbIndex, keys: str) -> None:
    assert os.stat(keys).st_mode & 0o777 == 0o700
    for name in ("data.mdb", "lock.mdb", "generation"):
        assert os.stat(os.path.join(keys, name)).st_mode & 0o777 == 0o600


def test_the_lock_file_has_no_holes(index: LmdbIndex, keys: str) -> None:
    found = os.stat(os.path.join(keys, "lock.mdb"))
    assert found.st_blocks * 512 >= found.st_size > 60_000
    assert index._env._env.max_readers() >= 1024
    assert sorted(os.listdir(keys)) == ["data.mdb", "generation", "lock.mdb"]


def test_new_folders_are_synced_up_to_the_one_that_was_there(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(_fs, "fsync_folder", synced.append)
    LmdbIndex.open(keys).close()
    root = os.path.dirname(keys)
    assert synced == [keys, root, os.path.dirname(root)]
    LmdbIndex.open(keys).close()
    assert len(synced) == 3


def test_no_index_is_made_where_none_is_wanted(keys: str) -> None:
    with pytest.raises(PathError, match="no index"):
        LmdbIndex.open(keys, create=False)
    assert not os.path.exists(keys)


def test_a_path_that_cannot_hold_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file", tmp_path / "file" / ".keys"):
        with pytest.raises(PathError):
            LmdbIndex.open(str(path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PathError):
        LmdbIndex.open(str(tmp_path / ".keys"))


def test_a_network_file_system_is_refused_on_request(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "_file_system", lambda path: "nfs4")
    with pytest.raises(NetworkPathError, match="nfs4"):
        LmdbIndex.open(keys, network=False)
    assert not os.path.exists(keys)
    LmdbIndex.open(keys).close()


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "generation"])
def test_a_commit_into_a_file_that_was_removed_fails(keys: str, name: str) -> None:
    index = LmdbIndex.open(keys)
    index.commit([put("a", 1)])
    os.unlink(os.path.join(keys, name))
    with pytest.raises(FailedError, match=name):
        index.commit([put("b", 2)])
    assert index.get(b"a") is not None
    assert index.get(b"b") is None
    index.close()


def test_a_commit_into_a_folder_that_was_removed_fails_and_reading_goes_on(keys: str) -> None:
    import shutil

    for sync in (True, False):
        index = LmdbIndex.open(keys, sync=sync)
        index.commit([put("a", 1)])
        shutil.rmtree(keys)
        with pytest.raises(FailedError):
            index.commit([put("b", 2)])
        assert index.get(b"a") is not None
        again = LmdbIndex.open(keys, sync=sync)  # another one in the same place
        assert len(again) == 0
        again.commit([put("c", 1)])
        with pytest.raises(FailedError):
            index.commit([put("b", 2)])
        again.close()
        index.close()
        shutil.rmtree(keys)


def test_a_folder_that_was_renamed_can_be_used_under_its_new_name(keys: str, tmp_path: Path) -> None:
    index = LmdbIndex.open(keys)
    index.commit([put("a", 1)])
    os.rename(os.path.dirname(keys), tmp_path / "moved")
    assert index.get(b"a") is not None
    with pytest.raises(FailedError):
        index.commit([put("b", 2)])
    other = LmdbIndex.open(str(tmp_path / "moved" / ".keys"))
    assert other._env is index._env
    other.commit([put("c", 3)])
    assert index.get(b"c") is not None
    os.rename(tmp_path / "moved", os.path.dirname(keys))
    index.commit([put("d", 4)])  # back again
    assert len(index) == 3
    index.close()
    other.close()


def test_opening_and_closing_leaves_no_descriptors(keys: str) -> None:
    LmdbIndex.open(keys, sync=False).close()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(50):
        LmdbIndex.open(keys, sync=False).close()
    assert not before or len(os.listdir("/proc/self/fd")) <= before


# --- the map


def test_a_small_map_grows_under_readers_and_writers(keys: str) -> None:
    index = LmdbIndex.open(keys, sync=False, map_size=256 << 10)
    problems: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                items = index.page(None, 20, reverse=True)
                assert all(r is None or len(r.body) == 2000 for r in index.get_many([i.name for i in items])[1])
                for item in items:
                    index.get(item.name)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(50):
        index.commit([put(f"{n} {m}", n * 20 + m + 1, bytes(2000)) for m in range(20)])
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert index._env.map_size > 256 << 10
    assert len(index) == 1000
    check(index)
    assert GATE.inside == []
    index.close()


def test_a_map_that_another_process_outgrew_is_enlarged(keys: str) -> None:
    index = LmdbIndex.open(keys, sync=False, map_size=256 << 10)
    in_another_process(
        "i = LmdbIndex.open(sys.argv[1], sync=False)\n"
        "i.commit([Put(b'k%d' % n, n + 1, 0, bytes(2000)) for n in range(1000)])\n",
        keys,
    )
    record = index.get(b"k999")
    assert record is not None
    assert record.seq == 1000
    assert len(index) == 1000
    index.commit([put("new", 5000)])
    assert index._env.map_size >= 2_000_000
    index.close()


def test_settling_survives_a_full_map(keys: str) -> None:
    index = LmdbIndex.open(keys, sync=False, map_size=128 << 10)
    for n in range(60):
        index.commit([put(f"k{n}", n + 1, bytes(3000))], notes=lambda _: [b"n" * 200])
        assert index.settle(lambda note, get: True)[1] == 0
    check(index)
    index.close()


def test_little_address_space_means_a_smaller_map(keys: str) -> None:
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (450 << 20, 450 << 20))\n"
        "i = LmdbIndex.open(sys.argv[1], sync=False)\n"
        "print(i._env.map_size)\n"
        "i.commit([Put(b'a', 1, 0, b'b')])\n"
        "try:\n"
        "    for n in range(3000):\n"
        "        i.commit([Put(b'%d %d' % (n, m), n * 100 + m + 2, 0, bytes(60_000)) for m in range(100)])\n"
        "except MemoryError as error:\n"
        "    assert 'address space' in str(error)\n"
        "    assert i.get(b'a').body == b'b'\n"
        "    print('refused')\n"
    )
    size, refused = in_another_process(code, keys).split()
    assert 64 << 20 <= int(size) < 450 << 20
    assert refused == "refused"


def test_the_gate_lets_one_in_alone_and_makes_the_others_wait() -> None:
    gate = Gate()
    alone = threading.Event()
    go_on = threading.Event()
    log: list[str] = []

    def shut() -> None:
        with gate.alone():
            alone.set()
            go_on.wait()
            log.append("alone")

    def enter() -> None:
        ident = threading.get_ident()
        try:
            gate.inside.append(ident)
            if gate.shut:
                gate.wait(ident)
            log.append("inside")
        finally:
            gate.inside.remove(ident)

    first = threading.Thread(target=shut)
    first.start()
    alone.wait()
    second = threading.Thread(target=enter)
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert log == ["alone", "inside"]
    assert gate.inside == []


def test_the_gate_can_be_kept_shut_from_inside_while_others_wait_at_the_door() -> None:
    gate = Gate()
    calm, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with gate.calm():
            calm.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    with gate._door, gate._key:  # held for an instant by who has just waited, or has just been alone
        thread.start()
    calm.wait()
    assert gate.shut
    leave.set()
    thread.join()
    assert not gate.shut
    with gate.alone():
        pass


def test_a_gate_that_somebody_waits_to_have_alone_is_calm_already() -> None:
    gate = Gate()
    log: list[str] = []

    def shut() -> None:
        with gate.alone():
            log.append("alone")

    gate.inside.append(threading.get_ident())
    thread = threading.Thread(target=shut)
    thread.start()
    with gate.calm():
        assert gate.shut
        log.append("calm")
    gate.inside.remove(threading.get_ident())
    thread.join()
    assert log == ["calm", "alone"]


def test_who_is_inside_already_is_not_kept_waiting_and_cannot_be_alone() -> None:
    gate = Gate()
    ident = threading.get_ident()
    gate.inside += [ident, ident]
    gate.shut = True
    gate.wait(ident)
    with pytest.raises(RuntimeError), gate.alone():
        pass


def test_a_commit_inside_of_a_commit_is_refused_instead_of_waiting_for_itself(index: LmdbIndex) -> None:
    def notes(_: object) -> list[bytes]:
        assert index.busy()
        index.commit([put("b", 2)])
        return []

    with pytest.raises(ChestError, match="middle of a commit"):
        index.commit([put("a", 1)], notes=notes)
    assert not index.busy()
    index.commit([put("a", 1)])


def test_a_commit_frees_the_slots_of_dead_readers(keys: str) -> None:
    index = LmdbIndex.open(keys)
    index.commit([put("a", 1)])
    in_another_process(
        "import os\ni = LmdbIndex.open(sys.argv[1], sync=False)\nt = [i._env.begin() for _ in range(20)]\nos._exit(0)\n",
        keys,
    )
    index.commit([put("a", 1)])
    assert index._env._env.reader_check() == 0
    index.close()


def test_a_full_table_of_readers_is_cleared_of_the_dead(keys: str) -> None:
    index = LmdbIndex.open(keys, sync=False)
    index.commit([put("a", 1)])
    slots = index._env._env.max_readers()
    in_another_process(
        f"import os\ni = LmdbIndex.open(sys.argv[1], sync=False)\nt = [i._env.begin() for _ in range({slots})]\nos._exit(0)\n",
        keys,
    )
    assert index.get(b"a") is not None
    assert len(index) == 1
    index.close()


def test_no_thread_is_left_inside_of_the_gate() -> None:
    assert GATE.inside == []
    assert not GATE.shut


def test_limits_of_this_machine_do_not_stop_the_default_map() -> None:
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY and sys.maxsize > 2**32:
        assert _environment.MAP_SIZE == 256 << 30


def test_keys_that_are_known_keep_their_places_among_new_ones_and_are_noted(index: LmdbIndex) -> None:
    for name, start in (("a", 1), ("b", 200), ("c", 400)):
        index.commit([put(f"{name}{n}", start + n, kind=2) for n in range(100)])
    before = index.version()
    replaced: list[bytes] = []

    def notes(records: dict[bytes, Record]) -> list[bytes]:
        replaced.extend(records)
        return []

    mixed = [put(f"a{n}", 900 + n, b"new") for n in range(0, 100, 2)] + [put(f"d{n}", 600 + n) for n in range(50)]
    commit = index.commit(mixed, notes=notes)
    assert commit.before == before
    assert sorted(replaced) == sorted(f"a{n}".encode() for n in range(0, 100, 2))
    names = [f"{name}{n}" for name in "abc" for n in range(100)] + [f"d{n}" for n in range(50)]
    assert [item.name.decode() for item in index.page(None, 1000)] == names
    assert index.get(b"a2") == Record(commit.version, 3, 0, b"new")
    check(index)


def test_keys_are_found_that_the_same_transaction_has_put(index: LmdbIndex) -> None:
    index.commit([put(f"a{n}", n + 1) for n in range(100)])
    with index.transaction() as inside:
        inside.commit([put(f"b{n}", 200 + n) for n in range(100)])
        inside.commit([put(f"b{n}", 900 + n, b"new") for n in range(100)])
        inside.commit([put("c", 999)])
    assert len(index) == 201
    record = index.get(b"b5")
    assert record is not None
    assert (record.seq, record.body) == (205, b"new")
    check(index)
