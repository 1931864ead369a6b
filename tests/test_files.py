"""Blobs as files: the contract of all blobs, names and labels, what crashes leave, and what lies in the way."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chest import Chest, _fs
from chest.engines import _labels, _mapping
from chest.engines._files import AT_A_TIME, FileBlobs
from chest.engines._labels import parts_of
from chest.errors import CorruptError, DiskFullError, FailedError, PathError
from chest.testing.blobs import BlobsContract


class TestFileBlobs(BlobsContract):
    def make_blobs(self, folder: Path) -> FileBlobs:
        return FileBlobs(str(folder))


class TestUnsyncedFileBlobs(BlobsContract):
    def make_blobs(self, folder: Path) -> FileBlobs:
        return FileBlobs(str(folder), sync=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def blobs(root: Path) -> Iterator[FileBlobs]:
    blobs = FileBlobs(str(root), sync=False)
    yield blobs
    blobs.close()


def write(blobs: FileBlobs, data: bytes = b"data") -> str:
    return blobs.write(lambda file: file.write(data))[0]


def listed(root: Path) -> list[str]:
    """Every file below the root but the owners'."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.name.startswith("owner-"))


# --- writing


def test_files_are_made_for_their_owner_alone(root: Path, blobs: FileBlobs) -> None:
    name = write(blobs)
    assert os.stat(blobs.path(name, "")).st_mode & 0o777 == 0o600
    assert os.stat(root / ".keys").st_mode & 0o777 == os.stat(root / ".keys" / "new").st_mode & 0o777 == 0o700


def test_nothing_is_made_before_something_is_written(root: Path, blobs: FileBlobs) -> None:
    with contextlib.suppress(FileNotFoundError):
        blobs.read("x", "x")
    blobs.sweep(list)
    blobs.sync()
    assert listed(root) == os.listdir(root) == []


def test_two_of_a_process_have_one_owner_who_goes_with_the_last(root: Path) -> None:
    first, second = FileBlobs(str(root)), FileBlobs(str(root) + "/.")
    names = [write(first), write(second), write(first)]
    (owner,) = _fs.owners(str(root / ".keys" / "new"))
    assert all(name.startswith(owner + "-") for name in names)
    first.close()
    assert _fs.owners(str(root / ".keys" / "new")) == [owner]
    write(first)  # one that is used again joins again
    second.close()
    assert _fs.owners(str(root / ".keys" / "new")) == [owner]
    first.close()
    assert _fs.owners(str(root / ".keys" / "new")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_writes_under_a_name_of_its_own(root: Path, blobs: FileBlobs) -> None:
    write(blobs)
    (owner,) = _fs.owners(str(root / ".keys" / "new"))
    pid = os.fork()
    if not pid:
        name = write(blobs, b"child")
        ok = not name.startswith(owner) and len(_fs.owners(str(root / ".keys" / "new"))) == 2
        blobs.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert _fs.owners(str(root / ".keys" / "new")) == [owner]


def test_each_file_is_synced_and_its_folder_once_a_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync = os.fsync

    def spy(fd: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{fd}") if os.path.isdir("/proc/self/fd") else "?")
        fsync(fd)

    blobs = FileBlobs(str(root))
    write(blobs)
    blobs.sync()
    monkeypatch.setattr(os, "fsync", spy)
    names = [write(blobs) for _ in range(3)]
    blobs.sync()
    blobs.sync()
    if os.path.isdir("/proc/self/fd"):
        new = str(root / ".keys" / "new")
        assert log == [*(os.path.join(new, name) for name in names), new]
    log.clear()
    blobs.publish(names[0], "a/b")
    blobs.publish(names[1], "c", sync=False)
    assert len(log) == 3  # all folders of the first rename: the label's may be new
    blobs.sync()
    assert len(log) == 5  # the root and new/ for the second one
    if os.path.isdir("/proc/self/fd"):
        log.clear()
        blobs.unlink("a/b")  # and the folder with it: that, too, is durable after the next sync
        blobs.unlink("c")
        blobs.unlink("c")
        blobs.sync()
        assert set(log) == {str(root)}
    blobs.close()


def test_unsynced_ones_never_sync(root: Path, blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("synced"))
    blobs.publish(write(blobs), "x")
    blobs.sync()
    blobs.write_copy("y", b"x")


def test_after_a_failed_sync_nothing_is_written_and_everything_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FileBlobs(str(root))
    kept = write(blobs)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(FailedError, match="failed"):
            write(blobs)
    for use in (lambda: write(blobs), blobs.sync, lambda: blobs.link(blobs.path(kept, ""))):
        with pytest.raises(FailedError):
            use()
    assert blobs.read(kept, "") == b"data"
    assert len(listed(root)) == 1
    blobs.close()


@pytest.mark.parametrize("sync", [True, False])
def test_the_disk_begins_with_a_large_file_before_all_of_it_is_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    began: list[int] = []
    monkeypatch.setattr(_fs, "start_writing_back", lambda fd: began.append(os.fstat(fd).st_size))
    blobs = FileBlobs(str(root), sync=sync)
    part = AT_A_TIME // 2

    def dump(file: Any) -> None:
        for _ in range(5):
            file.write(bytes(part))

    assert blobs.write(dump)[1] == 5 * part
    assert began == ([2 * part, 4 * part] if sync else [])
    blobs.close()


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, FailedError), (errno.ENOSPC, DiskFullError)])
def test_a_disk_that_fails_as_it_begins_has_failed(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    monkeypatch.setattr(_fs, "_sync_file_range", lambda: lambda fd: code)
    blobs = FileBlobs(str(root))
    with pytest.raises(error):
        write(blobs, bytes(AT_A_TIME))
    assert listed(root) == []
    if error is FailedError:
        with pytest.raises(FailedError):
            write(blobs)
    blobs.close()


def test_a_full_disk_leaves_no_part_of_a_file(root: Path, blobs: FileBlobs) -> None:
    def dump(file: Any) -> None:
        file.write(b"x" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError) as caught:
        blobs.write(dump)
    assert caught.value.errno == errno.ENOSPC
    assert listed(root) == []
    write(blobs)


def test_a_disk_that_is_really_full_can_be_gone_on_with(tmp_path: Path) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "x", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs (needs root)")
    blobs = FileBlobs(str(tmp_path))
    try:
        small = write(blobs, b"x" * 3_000_000)
        with pytest.raises(DiskFullError):
            write(blobs, b"x" * 9_000_000)
        assert len(listed(tmp_path)) == 1
        blobs.remove([small])
        assert blobs.read(write(blobs, b"x" * 6_000_000), "") == b"x" * 6_000_000
    finally:
        blobs.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_short_writes_are_gone_on_with(blobs: FileBlobs) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs resource limits on files")
    code = (
        "import sys, resource, signal, pickle\n"
        "from chest.engines._files import FileBlobs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "b = FileBlobs(sys.argv[1], sync=False)\n"
        "try:\n"
        "    b.write(lambda f: f.write(pickle.PickleBuffer(bytes(3000))))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
        "b.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, blobs.root], capture_output=True, text=True)
    # The first write stops at 1,000 bytes. Who takes that for success has lost the rest.
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert listed(Path(blobs.root)) == []


@pytest.mark.parametrize("mode", ["b", "t"])
def test_a_custom_opener_writes_the_files(root: Path, mode: str) -> None:
    blobs = FileBlobs(str(root), opener=gzip.open, mode=mode)
    name, size = blobs.write(lambda file: file.write("hello" * 100 if mode == "t" else b"hello" * 100))
    blobs.sync()
    view = blobs.read(name, "")
    assert len(view) == size < 500
    assert gzip.decompress(bytes(view)) == b"hello" * 100
    assert os.stat(blobs.path(name, "")).st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        blobs.write(lambda file: file.write(5))
    assert len(listed(root)) == 1
    blobs.close()


def test_a_root_that_has_gone_is_an_error_that_says_so(root: Path, blobs: FileBlobs) -> None:
    write(blobs)
    root.rename(root.parent / "moved")
    with pytest.raises(PathError, match="moved, removed"):
        write(blobs)


@pytest.mark.parametrize("name", [".keys", ".keys/new"])
def test_a_link_in_place_of_a_folder_of_ours_is_not_written_through(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(tmp_path / "elsewhere")
    blobs = FileBlobs(str(root))
    with pytest.raises(PathError):
        write(blobs)
    assert os.listdir(tmp_path / "elsewhere") == []
    blobs.close()


def test_a_file_is_linked_or_copied_and_stays_as_it_is(root: Path, blobs: FileBlobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    name = blobs.link(str(source))
    assert os.path.samefile(source, blobs.path(name, ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EXDEV, "x")))
        copied = blobs.link(str(source))
    assert not os.path.samefile(source, blobs.path(copied, ""))
    blobs.publish(name, "a")
    blobs.unlink("a")
    assert source.read_bytes() == blobs.read(copied, "") == b"x" * 3_000_000
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CorruptError):
        blobs.link(str(tmp_path / "link"))
    assert len(listed(root)) == 1


# --- reading


def test_a_blob_is_found_before_and_after_it_is_published(root: Path, blobs: FileBlobs) -> None:
    name = write(blobs)
    assert blobs.path(name, "a/b") == str(root / ".keys" / "new" / name)
    assert blobs.read(name, "a/b") == b"data"
    assert blobs.publish(name, "a/b")
    assert blobs.path(name, "a/b") == str(root / "a" / "b")
    assert blobs.read(name, "a/b") == b"data"


@pytest.mark.parametrize("label", ["a", "a~1", "_a/b"])
def test_under_its_label_a_blob_is_found_when_it_has_that_size(root: Path, blobs: FileBlobs, label: str) -> None:
    name = write(blobs)
    with pytest.raises(FileNotFoundError):
        blobs.read_published(label, 4)
    blobs.publish(name, label)
    view = blobs.read_published(label, 4)
    assert view == b"data"
    assert not view.readonly
    assert blobs.read_published(label, 5) is None
    os.truncate(root / label, 0)
    assert blobs.read_published(label, 0) is None


@pytest.mark.parametrize("libc", [True, False])
def test_views_are_private_and_writable_and_hold_no_descriptor(
    root: Path, blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch, libc: bool
) -> None:
    monkeypatch.setattr(_mapping, "use_libc", libc and os.name == "posix")
    name = write(blobs, b"abc" * 5000)
    n_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    views = [blobs.read(name, "") for _ in range(20)]
    if n_before and (libc or sys.version_info >= (3, 13)):
        assert len(os.listdir("/proc/self/fd")) == n_before
    views[0][:3] = b"xyz"
    assert [bytes(view[:3]) for view in views] == [b"xyz"] + [b"abc"] * 19
    assert Path(blobs.path(name, "")).read_bytes() == b"abc" * 5000
    assert (views[0].format, views[0].itemsize, views[0].readonly, views[0].nbytes) == ("B", 1, False, 15_000)
    blobs.read_ahead(views[0])  # changes nothing but when the disk reads
    blobs.read_ahead(views[1][5000:])
    blobs.read_ahead(memoryview(b""))
    assert [bytes(view[:3]) for view in views] == [b"xyz"] + [b"abc"] * 19


def test_what_is_prefetched_is_read_ahead_and_what_is_looked_at_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    with Chest[Any, Any](path=tmp_path / "c") as chest:
        chest.update({"a": np.arange(100_000), "b": np.arange(100_000), "small": [1], "c": b"x" * 100_000})
        chest.flush()
        ahead: list[int] = []
        read_ahead = FileBlobs.read_ahead
        monkeypatch.setattr(FileBlobs, "read_ahead", lambda self, view: ahead.append(view.nbytes) or read_ahead(self, view))
        assert chest["a"][7] == chest.get_many(["b"])["b"][7] == 7
        assert ahead == []
        chest.flush()
        chest.prefetch(["a", "b", "small", "c"])
        assert len(ahead) == 2  # bytes are copied when they are read
        assert min(ahead) > 800_000
        assert chest["a"][7] == 7


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_a_mapping_lives_as_long_as_any_part_of_it(root: Path, blobs: FileBlobs) -> None:
    def is_mapped() -> bool:
        return name in Path("/proc/self/maps").read_text()

    name = write(blobs, b"abc" * 5000)
    part = blobs.read(name, "")[6000:]
    assert is_mapped()
    assert part == b"abc" * 3000
    del part
    assert not is_mapped()


def test_only_regular_files_are_read_and_no_link_is_followed(root: Path, blobs: FileBlobs, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_bytes(b"secret")
    (root / "link").symlink_to(secret / "file")
    (root / "way").symlink_to(secret)
    (root / "folder" / "deep").mkdir(parents=True)
    (root / "folder" / "way").symlink_to(secret)
    os.mkfifo(root / "fifo")
    (root / "file").write_bytes(b"x")
    for label in ("link", "way/file", "folder", "folder/deep", "folder/way/file", "fifo", "file/x"):
        with pytest.raises(CorruptError):
            blobs.read("none", label)
        size = os.stat(root / label).st_size if label != "file/x" else 1
        with contextlib.suppress(OSError, CorruptError):
            assert blobs.read_published(label, size) is None
    name = write(blobs)
    os.unlink(blobs.path(name, ""))
    os.symlink(secret / "file", root / ".keys" / "new" / name)
    with pytest.raises(CorruptError):
        blobs.read(name, "")


@pytest.mark.parametrize(
    "label",
    ["..", "../x", "a/../../x", "a/./b", "/etc/passwd", "a//b", "a/", "\0", "a\0b", ".keys/data.mdb", ".KEYS/x", "\ud800"],
)
def test_a_label_that_leads_elsewhere_is_refused_everywhere(root: Path, blobs: FileBlobs, label: str) -> None:
    (root.parent / "x").write_bytes(b"outside")
    name = write(blobs)
    for use in (
        lambda: blobs.read("none", label),
        lambda: blobs.read_published(label, 7),
        lambda: blobs.publish(name, label, replace=True),
        lambda: blobs.unlink(label),
        lambda: blobs.write_copy(label, b"inside"),
        lambda: blobs.exists(label),
        lambda: blobs.path("none", label),
    ):
        with pytest.raises(CorruptError, match="must stay below"):
            use()
    assert (root.parent / "x").read_bytes() == b"outside"
    assert blobs.read(name, "") == b"data"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "x\0", ".hidden", "a.b"])
def test_a_name_that_is_none_is_refused(root: Path, blobs: FileBlobs, name: str) -> None:
    for use in (lambda: blobs.read(name, ""), lambda: blobs.remove([name]), lambda: blobs.publish(name, "x")):
        with pytest.raises(CorruptError):
            use()


@given(st.text(max_size=12) | st.lists(st.sampled_from(["a", "..", ".", "", ".keys", "\0", "/"])).map("/".join))
def test_no_label_at_all_leads_out_of_the_folder(label: str) -> None:
    try:
        parts = parts_of(label)
    except CorruptError:
        return
    path = os.path.normpath(os.path.join("/root/chest", *parts))
    assert path.startswith("/root/chest/")
    assert not path.startswith("/root/chest/.keys")
    assert path == "/root/chest/" + label


# --- publishing


def test_publishing_gives_a_blob_its_label_and_may_be_repeated(root: Path, blobs: FileBlobs) -> None:
    name = write(blobs)
    for _ in range(3):
        assert blobs.publish(name, "_a/b")
        assert listed(root) == ["_a/b"]
    assert os.stat(root / "_a").st_mode & 0o777 == 0o700


def test_a_blob_that_is_gone_needs_no_publishing(root: Path, blobs: FileBlobs) -> None:
    name = write(blobs)
    blobs.remove([name])
    assert blobs.publish(name, "x")
    assert listed(root) == []


def test_what_lies_there_is_replaced_on_request_only(root: Path, blobs: FileBlobs) -> None:
    (root / "x").write_bytes(b"old")
    name = write(blobs)
    assert not blobs.publish(name, "x")
    assert (root / "x").read_bytes() == b"old"
    assert blobs.read(name, "x") == b"data"
    assert blobs.publish(name, "x", replace=True)
    assert (root / "x").read_bytes() == b"data"


@pytest.mark.parametrize("replace", [True, False])
def test_a_label_that_cannot_be_leaves_the_blob_where_it_is(
    root: Path, blobs: FileBlobs, tmp_path: Path, replace: bool
) -> None:
    (root / "folder" / "inside").mkdir(parents=True)
    (root / "file").write_bytes(b"x")
    (root / "way").symlink_to(tmp_path)
    name = write(blobs)
    for label in ("folder", "file/x", "way/x", "x" * 300, "y" * 300 + "/x"):
        assert not blobs.publish(name, label, replace=replace)
        assert blobs.read(name, label) == b"data"
    assert not (tmp_path / "x").exists()


def test_a_link_under_the_label_is_replaced_not_followed(root: Path, blobs: FileBlobs, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"untouched")
    (root / "x").symlink_to(tmp_path / "target")
    assert blobs.publish(write(blobs), "x", replace=True)
    assert not (root / "x").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"untouched"


def test_unlinking_removes_files_and_links_and_empty_folders_only(root: Path, blobs: FileBlobs, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    for label in ("a/b/c", "a/d", "e"):
        blobs.write_copy(label, b"x")
    (root / "link").symlink_to(tmp_path / "target")
    (root / "way").symlink_to(tmp_path)
    (root / "folder").mkdir()
    for label in ("a/b/c", "a/b/c", "link", "folder", "none", "none/x", "way/target", "e/x"):
        blobs.unlink(label)
    assert listed(root) == ["a/d", "e"]
    assert not (root / "a" / "b").exists()
    assert (root / "folder").is_dir()
    assert (tmp_path / "target").read_bytes() == b"x"
    blobs.unlink("a/d")
    assert not (root / "a").exists()
    assert root.is_dir()


def test_a_copy_appears_whole_and_replaces_what_was_there(root: Path, blobs: FileBlobs) -> None:
    blobs.write_copy("a/b", b"one")
    blobs.write_copy("a/b", b"two")
    blobs.write_copy("c", b"")
    assert (root / "a" / "b").read_bytes() == b"two"
    assert listed(root) == ["a/b", "c"]
    with pytest.raises(OSError, match=r"in the way|[Dd]irector"):
        blobs.write_copy("a", b"x")
    with pytest.raises(OSError, match="in the way"):
        blobs.write_copy("c/d", b"x")
    assert listed(root) == ["a/b", "c"]


def test_whether_anything_lies_under_a_label_is_told(root: Path, blobs: FileBlobs, tmp_path: Path) -> None:
    blobs.write_copy("a/b", b"")
    (root / "dangling").symlink_to(tmp_path / "none")
    (root / "way").symlink_to(tmp_path)
    assert [blobs.exists(label) for label in ("a", "a/b", "dangling", "way/x", "a/b/c")] == [True] * 5
    assert [blobs.exists(label) for label in ("b", "a/c", "b/c", "x" * 300)] == [False] * 4


def test_without_descriptors_of_folders_links_are_not_followed_either(
    root: Path, blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_labels, "_HAS_DIR_FD", False)
    (root / "way").symlink_to(tmp_path)
    (root / "file").write_bytes(b"x")
    name = write(blobs)
    assert not blobs.publish(name, "way/x")
    assert not blobs.publish(name, "file/x")
    assert blobs.publish(name, "_a/b/c")
    assert blobs.read(name, "_a/b/c") == b"data"
    with pytest.raises(CorruptError):
        blobs.read("none", "way/x")
    blobs.unlink("_a/b/c")
    assert listed(root) == ["file"]


# --- what crashes leave

CRASH = (
    "import os, sys\n"
    "from chest.engines._files import FileBlobs\n"
    "b = FileBlobs(sys.argv[1])\n"
    "print(*[b.write(lambda f: f.write(b'crashed'))[0] for _ in range(3)])\n"
    "sys.stdout.flush()\n"
    "if sys.argv[2] == 'wait': sys.stdin.read()\n"
    "os._exit(0)\n"
)


def crashed(root: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CRASH, str(root), "now"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(_fs._fcntl is None, reason="no fcntl")
def test_what_a_dead_process_wrote_and_nobody_mentions_is_swept(root: Path, blobs: FileBlobs) -> None:
    own = write(blobs)
    first, second, third = crashed(root)
    assert blobs.sweep(lambda: [b"\0\1" + first.encode() + b"label", second]) == 1
    assert blobs.read(first, "") == blobs.read(second, "") == b"crashed"
    with pytest.raises(FileNotFoundError):
        blobs.read(third, "")
    assert len(_fs.owners(str(root / ".keys" / "new"))) == 1
    assert blobs.sweep(list) == 2  # their owner is forgotten, and they are known even so
    assert blobs.read(own, "") == b"data"
    assert blobs.sweep(lambda: pytest.fail("nothing to ask about")) == 0


@pytest.mark.skipif(_fs._fcntl is None, reason="no fcntl")
def test_what_a_living_process_writes_is_left_alone(root: Path, blobs: FileBlobs) -> None:
    command = [sys.executable, "-c", CRASH, str(root), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        names = other.stdout.readline().split()
        assert len(names) == 3
        assert blobs.sweep(list) == 0
        other.kill()
        other.wait()
        assert blobs.sweep(list) == 3


@pytest.mark.skipif(_fs._fcntl is None, reason="no fcntl")
def test_what_was_committed_just_before_its_writer_left_is_kept(root: Path, blobs: FileBlobs) -> None:
    """The notes are read after the owners: a commit before the end of its process is in them."""
    other = FileBlobs(str(root), sync=False)
    name = write(other)
    for owned in (root / ".keys" / "new").glob("owner-*"):
        owned.rename(owned.with_name("owner-1-2-3"))  # as if another process had written it, which is dead now
    (root / ".keys" / "new" / name).rename(root / ".keys" / "new" / "1-2-3-abcd")
    asked = []

    def notes() -> list[bytes]:
        asked.append(_fs.dead_owners(str(root / ".keys" / "new")))
        return [b"1-2-3-abcd"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fs, "_own_token", lambda: "9-9-9")
        dead = _fs.dead_owners
        order: list[str] = []
        patch.setattr(_fs, "dead_owners", lambda folder: order.append("owners") or dead(folder))
        assert blobs.sweep(lambda: order.append("notes") or notes()) == 0
    assert order[:2] == ["owners", "notes"]
    assert (root / ".keys" / "new" / "1-2-3-abcd").exists()
    other.close()


def test_files_that_are_none_of_ours_are_not_swept(root: Path, blobs: FileBlobs) -> None:
    write(blobs)
    for name in ("README.txt", ".hidden", "x" * 250):
        (root / ".keys" / "new" / name).write_bytes(b"")
    before = listed(root)
    assert blobs.sweep(list) == 0
    assert listed(root) == before
