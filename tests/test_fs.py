"""What chest asks of the file system: who is alive, what kind it is, and scratch folders that vanish with their owners."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chest import _fs, _scratch
from chest.errors import DiskFullError, NetworkPathError

needs_locks = pytest.mark.skipif(_fs._fcntl is None, reason="no fcntl: every owner is taken for alive")


class Child:
    """Another process, which does what ``code`` says, prints a line, and waits."""

    def __init__(self, code: str, *args: object) -> None:
        source = f"import sys\nfrom chest import _fs, _scratch\n{code}\nsys.stdin.read()\n"
        command = [sys.executable, "-c", source, *map(str, args)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(code: str, *args: object) -> Child:
        made.append(Child(code, *args))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.kill()


CLAIM = "owner = _fs.Owner.claim(sys.argv[1])\nprint(owner.token, flush=True)"


# --- owners


def test_a_living_owner_is_not_dead_and_a_released_one_is_gone(tmp_path: Path) -> None:
    owner = _fs.Owner.claim(str(tmp_path))
    assert _fs.owners(str(tmp_path)) == [owner.token]
    assert _fs.dead_owners(str(tmp_path)) == []
    _fs.forget(str(tmp_path), owner.token)
    assert _fs.owners(str(tmp_path)) == [owner.token]
    owner.release()
    owner.release()
    assert os.listdir(tmp_path) == []


@needs_locks
def test_another_processes_owner_is_alive_until_it_is_killed(tmp_path: Path, child: Callable[..., Child]) -> None:
    other = child(CLAIM, tmp_path)
    assert _fs.owners(str(tmp_path)) == [other.line]
    for _ in range(3):  # looking must not drop its lock
        assert _fs.dead_owners(str(tmp_path)) == []
        _fs.forget(str(tmp_path), other.line)
    other.kill()
    assert _fs.dead_owners(str(tmp_path)) == [other.line]
    _fs.forget(str(tmp_path), other.line)
    assert os.listdir(tmp_path) == []


@needs_locks
def test_looking_at_the_owners_does_not_drop_ones_own_lock(tmp_path: Path, child: Callable[..., Child]) -> None:
    owner = _fs.Owner.claim(str(tmp_path))
    second = _fs.Owner.claim(str(tmp_path))
    assert owner.token != second.token
    _fs.dead_owners(str(tmp_path))
    _fs.forget(str(tmp_path), owner.token)
    assert child("print(_fs.dead_owners(sys.argv[1]), flush=True)", tmp_path).line == "[]"
    second.release()
    assert child("print(_fs.dead_owners(sys.argv[1]), flush=True)", tmp_path).line == "[]"
    owner.release()


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_stand_for_its_parent(tmp_path: Path) -> None:
    owner = _fs.Owner.claim(str(tmp_path))
    pid = os.fork()
    if not pid:
        ok = _fs.dead_owners(str(tmp_path)) == []
        owner.release()
        ok = ok and _fs.owners(str(tmp_path)) == [owner.token]
        own = _fs.Owner.claim(str(tmp_path))
        ok = ok and own.token != owner.token
        own.release()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert _fs.owners(str(tmp_path)) == [owner.token]
    owner.release()


@needs_locks
def test_what_was_left_of_a_claim_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "owner-1-2-3-aaaa.new").write_bytes(b"")
    (dead,) = _fs.dead_owners(str(tmp_path))
    _fs.forget(str(tmp_path), dead)
    assert os.listdir(tmp_path) == []


def test_a_claim_in_a_folder_that_is_not_there_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _fs.Owner.claim(str(tmp_path / "none"))
    assert os.listdir(tmp_path) == []


@needs_locks
def test_a_claim_that_is_swept_in_the_middle_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, swept = os.rename, []

    def sweep_first(source: str, target: str) -> None:
        if not swept:
            swept.append(source)
            os.unlink(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", sweep_first)
    owner = _fs.Owner.claim(str(tmp_path))
    assert os.listdir(tmp_path) == [f"owner-{owner.token}"]
    owner.release()


def test_without_locks_every_owner_is_taken_for_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "_fcntl", None)
    owner = _fs.Owner.claim(str(tmp_path))
    (tmp_path / "owner-1-2-3").write_bytes(b"")
    assert _fs.dead_owners(str(tmp_path)) == []
    _fs.forget(str(tmp_path), "1-2-3")
    assert len(_fs.owners(str(tmp_path))) == 2
    owner.release()
    assert os.listdir(tmp_path) == ["owner-1-2-3"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_links_fifos_and_folders_in_place_of_an_owner_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "target").write_bytes(b"")
    (folder / "owner-1-1-1").symlink_to(tmp_path / "target")
    os.mkfifo(folder / "owner-2-2-2")
    (folder / "owner-3-3-3").mkdir()
    assert _fs.dead_owners(str(folder)) == []
    assert len(os.listdir(folder)) == 3


# --- scratch folders


def test_a_scratch_folder_is_private_and_goes_when_it_is_removed(tmp_path: Path) -> None:
    path = _scratch.make_scratch(str(tmp_path))
    assert os.path.basename(path).endswith(".chest")
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert _scratch.sweep_scratch(str(tmp_path)) == 0
    Path(path, "value").write_bytes(b"x")
    _scratch.remove_scratch(path)
    _scratch.remove_scratch(path)
    assert os.listdir(tmp_path) == []


def test_the_scratch_folder_of_a_dead_process_is_swept_and_that_of_a_living_one_stays(
    tmp_path: Path, child: Callable[..., Child]
) -> None:
    code = "p = _scratch.make_scratch(sys.argv[1])\nopen(p + '/value', 'w').close()\nprint(p, flush=True)"
    dead, alive = child(code, tmp_path), child(code, tmp_path)
    dead.kill()
    own = _scratch.make_scratch(str(tmp_path))
    if _fs._fcntl is not None:
        assert not os.path.exists(dead.line)  # the first one that a process makes sweeps
    assert os.path.exists(alive.line + "/value")
    assert _scratch.sweep_scratch(str(tmp_path)) == 0
    alive.process.send_signal(signal.SIGKILL)
    alive.end()
    assert _scratch.sweep_scratch(str(tmp_path)) == 1
    assert os.path.exists(own)
    _scratch.remove_scratch(own)
    assert os.listdir(tmp_path) == []


@needs_locks
def test_a_folder_with_one_living_owner_stays(tmp_path: Path, child: Callable[..., Child]) -> None:
    path = tmp_path / "x.chest"
    (path / ".keys").mkdir(parents=True)
    (path / ".keys" / "owner-1-2-3").write_bytes(b"")
    other = child(CLAIM, path / ".keys")
    assert _scratch.sweep_scratch(str(tmp_path)) == 0
    other.kill()
    assert _scratch.sweep_scratch(str(tmp_path)) == 1


def test_only_what_carries_the_mark_is_swept_and_no_link_is_followed(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name, inside in (("a.chest", "value"), ("b.chest", ".keys/data.mdb"), ("c", ".keys/owner-1-2-3")):
        file = place / name / inside
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    target = tmp_path / "target"
    (target / ".keys").mkdir(parents=True)
    (target / ".keys" / "owner-1-2-3").write_bytes(b"")
    (place / "d.chest").symlink_to(target)
    (place / "e.chest.dead").symlink_to(target)
    (place / "f.chest").mkdir()
    (place / "f.chest" / ".keys").symlink_to(target / ".keys")
    (place / "g.chest").write_bytes(b"x")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert _scratch.sweep_scratch(str(place)) == 0
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@needs_locks
def test_links_inside_of_a_dead_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    place, target = tmp_path / "place", tmp_path / "target"
    target.mkdir()
    (target / "value").write_bytes(b"x")
    keys = place / "a.chest" / ".keys"
    keys.mkdir(parents=True)
    (keys / "owner-1-2-3").write_bytes(b"")
    for folder in (keys, keys.parent):
        (folder / "link").symlink_to(target)
        (folder / "file-link").symlink_to(target / "value")
    assert _scratch.sweep_scratch(str(place)) == 1
    assert os.listdir(place) == []
    assert (target / "value").read_bytes() == b"x"


@needs_locks
def test_a_removal_that_was_cut_short_is_finished_by_the_next_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "a.chest" / ".keys"
    keys.mkdir(parents=True)
    for file in (keys / "owner-1-2-3", keys / "data.mdb", keys.parent / "x", keys.parent / "_y" / "z"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(_scratch.shutil, "rmtree", lambda path, ignore_errors: None)
        _scratch.sweep_scratch(str(tmp_path))
    assert os.listdir(tmp_path) == ["a.chest.dead"]
    assert (tmp_path / "a.chest.dead" / ".keys" / "owner-1-2-3").exists()
    assert _scratch.sweep_scratch(str(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to make another user's folder")
def test_another_users_folder_is_left_alone(tmp_path: Path) -> None:
    for name in ("a.chest", "b.chest.dead"):
        (tmp_path / name / ".keys").mkdir(parents=True)
        (tmp_path / name / ".keys" / "owner-1-2-3").write_bytes(b"")
        os.chown(tmp_path / name, 12345, 12345)
    assert _scratch.sweep_scratch(str(tmp_path)) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_remove_its_parents_scratch_folder(tmp_path: Path) -> None:
    path = _scratch.make_scratch(str(tmp_path))
    pid = os.fork()
    if not pid:
        _scratch.remove_scratch(path)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.path.isdir(path)
    _scratch.remove_scratch(path)
    assert not os.path.exists(path)


def test_what_is_no_scratch_folder_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "x.chest").mkdir()
    _scratch.remove_scratch(str(tmp_path / "x.chest"))
    assert (tmp_path / "x.chest").is_dir()


# --- kinds of file systems

MOUNTS = """\
22 27 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:50 / /net rw - nfs4 server:/x rw
41 40 0:51 / /net/with\\040space rw - xfs /dev/vdb rw
42 27 0:52 / /over rw - tmpfs tmpfs rw
43 42 0:53 / /over rw master:7 - {kind} x rw
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(_fs, "_MOUNTS", str(tmp_path / "mountinfo"))
    monkeypatch.setattr(_fs, "_kinds", {})

    def write(kind: str) -> None:
        (tmp_path / "mountinfo").write_text(MOUNTS.format(kind=kind))

    return write


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/netto/x", "ext4"),
        ("/net", "nfs4"),
        ("/net/x/y", "nfs4"),
        ("/net/with space/x", "xfs"),
        ("/over/x", "btrfs"),
    ],
)
def test_the_longest_mount_point_says_the_kind(
    mounts: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    mounts("btrfs")
    monkeypatch.setattr(_fs.os, "major", lambda device: 9999)  # as on btrfs, whose devices are not those of its mounts
    monkeypatch.setattr(_fs.os.path, "realpath", lambda p: path)
    assert _fs._file_system("/") == kind


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "afs", "ceph", "fuse", "fuse.sshfs", "virtiofs"]
)
def test_network_file_systems_are_refused_by_a_message_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(_fs, "_file_system", lambda path: kind)
    with pytest.raises(NetworkPathError, match=f"{kind} file system.*Redis") as caught:
        _fs.refuse_network("/somewhere")
    assert caught.value.path == "/somewhere"
    assert pickle.loads(pickle.dumps(caught.value)).path == "/somewhere"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "fuse.fuse-overlayfs", ""])
def test_file_systems_of_this_machine_are_not(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(_fs, "_file_system", lambda path: kind)
    _fs.refuse_network("/somewhere")


def test_the_device_number_says_the_kind_too(
    mounts: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts("cifs")
    monkeypatch.setattr(_fs.os, "major", lambda device: 0)
    monkeypatch.setattr(_fs.os, "minor", lambda device: 53)
    with pytest.raises(NetworkPathError):
        _fs.refuse_network(str(tmp_path / "not" / "there" / "yet"))


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "_MOUNTS", str(tmp_path / "none"))
    monkeypatch.setattr(_fs, "_kinds", {})
    _fs.refuse_network(str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/proc/self/mountinfo"), reason="no mountinfo")
def test_the_kinds_of_this_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fs, "_kinds", {})
    assert _fs._file_system("/proc/self") == "proc"
    assert _fs._file_system(tempfile.gettempdir())


def test_folding_is_found_out_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(2):
        before = os.listdir(tmp_path)
        assert _fs.folds_case(str(tmp_path)) is os.path.exists(str(tmp_path).swapcase())
        assert os.listdir(tmp_path) == before
        (tmp_path / f"Name{step}").write_bytes(b"")

    lstat = os.lstat
    monkeypatch.setattr(_fs.os, "lstat", lambda path: lstat(str(path).replace("nAME", "Name")))
    assert _fs.folds_case(str(tmp_path)) is True


def test_two_names_of_one_file_are_no_folding(tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"")
    os.link(tmp_path / "name", tmp_path / "NAME")
    assert _fs.folds_case(str(tmp_path)) is False


# --- durability and room


def test_short_writes_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(fd: int, data: memoryview) -> int:
        written.append(bytes(data[:7]))
        return len(written[-1])

    monkeypatch.setattr(_fs.os, "write", write)
    assert _fs.write_all(0, b"x" * 50) == 50
    assert b"".join(written) == b"x" * 50
    assert _fs.write_all(0, b"") == 0
    assert _fs.write_all(0, memoryview(b"abcd").cast("H")) == 4


def test_folders_are_synced_and_a_failing_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fs.fsync_folder(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        _fs.fsync_folder(str(tmp_path / "none"))

    def fail(fd: int, number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_fs.os, "fsync", lambda fd: fail(fd, errno.EINVAL))
    _fs.fsync_folder(str(tmp_path))
    monkeypatch.setattr(_fs.os, "fsync", lambda fd: fail(fd, errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        _fs.fsync_folder(str(tmp_path))


def test_a_full_disk_and_a_used_up_quota_have_an_error_of_their_own() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        found = _fs.as_disk_full(OSError(number, "x"), "/p")
        assert isinstance(found, DiskFullError)
        assert (found.errno, found.path) == (errno.ENOSPC, "/p")
    assert _fs.as_disk_full(OSError(errno.EIO, "x"), "/p") is None


def test_a_disk_is_full_when_bytes_or_files_run_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not _fs.disk_is_full(str(tmp_path))
    found = os.statvfs(tmp_path)

    class Found:
        f_bavail, f_frsize, f_files, f_favail = found.f_bavail, found.f_frsize, 100, 50

    monkeypatch.setattr(_fs.os, "statvfs", lambda path: Found)
    assert not _fs.disk_is_full("/x")
    Found.f_favail = 0
    assert _fs.disk_is_full("/x")
    Found.f_files = 0  # file systems that do not count them
    assert not _fs.disk_is_full("/x")
    Found.f_bavail = 1
    assert _fs.disk_is_full("/x")


def test_the_bytes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "y").write_bytes(b"y" * 20)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    link = os.lstat(tmp_path / "link").st_size
    assert _fs.folder_bytes(str(tmp_path)) == 30 + link
    assert _fs.folder_bytes(str(tmp_path / "none")) == 0


def test_a_file_that_the_disk_has_begun_with_is_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        _fs.start_writing_back(file.fileno())
        file.write(b"y")
    assert (tmp_path / "x").read_bytes() == b"x" * 100_000 + b"y"
    reading, writing = os.pipe()
    _fs.start_writing_back(writing)  # where there is nothing to begin with, nothing is wrong
    os.close(reading)
    os.close(writing)
    monkeypatch.setattr(_fs, "_sync_file_range", lambda: None)  # no Linux
    _fs.start_writing_back(0)
