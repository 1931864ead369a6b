"""A disk whose power can be cut, and the processes that write to it until then.

The disk is an ``ext4`` file system in a file. ``EXT4_IOC_SHUTDOWN`` without a flush of the journal stops it at once: what the
kernel has not written is lost, and mounting it again replays the journal, as after a power cut. The kernel alone would
write little of its own accord in so short a life. So its write-back is played: random ranges of random files are written
out of turn, and now and then the journal is, by a sync of a file that is none of the chest's.

Not shown by this: torn sectors, disks that lie, other file systems.

As a script, the roles of the processes below:

    python cutter.py write CONTROL PATH SEED ...    what writer.py does, with a fault that CONTROL names (or "none")
    python cutter.py open PATH                      opens a chest, and closes it
    python cutter.py check PATH < runs              what the oracle says of it; in a process that holds nothing mapped
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import runpy
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
from oracle import Run, Wrong

HERE = Path(__file__).parent
READY = b"ready\n"
PATIENCE_S = 120.0  # for what takes a second

_SHUTDOWN, _NO_JOURNAL_FLUSH = 0x8004587D, 2
_WRITE_AND_WAIT = 7  # of sync_file_range


class NoPowerCutError(Exception):
    """This machine cannot do it; says why."""


def _run(*command: object) -> None:
    # A session of its own: an interrupt from the keyboard must not reach what cleans up after it.
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, start_new_session=True)
    except FileNotFoundError as error:
        raise NoPowerCutError(f"there is no {command[0]}") from error
    if done.returncode:
        raise NoPowerCutError(f"{' '.join(map(str, command[:3]))}: {done.stderr.strip().partition(chr(10))[0]}")


class CutDisk:
    """An ext4 file system below ``root``, and a chest on it that goes through several lives.

    Attributes:
        path: of the chest.
        runs: what its writers logged, life after life.
    """

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.image, self.mount = root / "image", root / "disk"
        self.path = self.mount / "chest"
        self.runs: list[Run] = []
        self._rng = rng
        # Without auto_da_alloc, and with data behind the journal or not: what the kernel does for careless programs is off.
        self._options = "loop,noauto_da_alloc,data=" + rng.choice(["ordered", "writeback"])
        self._errors = root / "errors"  # of the processes; those after a cut are of no interest
        self._children: list[subprocess.Popen[bytes]] = []
        self._n_writers = 0

    def make(self) -> None:
        """The disk is there, and is mounted. ``close`` must be called whatever comes of it."""
        self.mount.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(96 << 20)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", self.image)
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", self._options, self.image, self.mount)

    # --- lives

    def live_and_lose_power(self, control: str = "none") -> None:
        """Let one to three processes write until the power is cut, and mount the disk again."""
        rng = self._rng
        configurations = [self._configure(control != "none") for _ in range(rng.choice([1, 1, 2, 3]))]
        commands = [["write", control, str(self.path), *map(str, numbers)] for numbers in configurations]
        # None: while they open the chest, or create it.
        lines = rng.choice([0, *[rng.randrange(1, 60) for _ in range(9)]])
        logs = self._run_until_cut(commands, lines, rng.choice([0, 300, 3000]))
        for (seed, first, writers, memory, in_place, _), log in zip(configurations, logs, strict=True):
            self.runs.append(Run(seed, range(first, first + writers), bool(in_place), memory < 10**9, log))

    def _configure(self, plain: bool) -> tuple[int, int, int, int, int, int]:
        """The arguments of a writing process. ``plain``: of one thread, and with many spills."""
        rng = self._rng
        writers = 1 if plain else rng.choice([1, 1, 3])
        memory = rng.choice([600_000, 0] if plain else [10**9, 10**9, 600_000, 0])
        first = self._n_writers
        self._n_writers += writers
        return rng.randrange(1 << 30), first, writers, memory, int(writers == 1), 0

    def recover_and_lose_power(self) -> None:
        """The power is cut while the chest is opened."""
        self._run_until_cut([["open", str(self.path)]], 0, 20_000)

    def _run_until_cut(self, commands: list[list[str]], lines: int, microseconds: int) -> list[str]:
        """Their logs, up to the cut or to what an error after it has let them write."""
        with self._errors.open("wb") as errors:
            for command in commands:
                self._children.append(_start(command, stderr=errors))
        logs = [b"" for _ in commands]
        with selectors.DefaultSelector() as ready:
            for number, child in enumerate(self._children):
                assert child.stdout is not None
                ready.register(child.stdout, selectors.EVENT_READ, number)
            deadline = time.monotonic() + PATIENCE_S
            while not all(log.startswith(READY) for log in logs) or sum(log.count(b"\n") - 1 for log in logs) < lines:
                for key, _ in ready.select(0.005):
                    part = os.read(key.fd, 65536)
                    assert part, f"it ended by itself: {logs[key.data][-500:]!r} {self._errors.read_text()[-1500:]}"
                    logs[key.data] += part
                assert b"WRONG" not in b"".join(logs), [log[-500:] for log in logs]
                assert time.monotonic() < deadline, f"{lines} lines are not reached: {[log[-200:] for log in logs]}"
                self._write_back()
            until = time.perf_counter_ns() + 1000 * self._rng.randrange(microseconds + 1)
            while time.perf_counter_ns() < until:
                pass
        self._cut()
        for number, child in enumerate(self._children):
            assert child.stdout is not None
            child.kill()
            logs[number] += child.stdout.read()
        self._reap()
        self._unmount()
        self._mount()
        found = []
        for log in logs:
            text = log.decode()
            if "WRONG Wrong" in text:  # a wrong value was read; other errors are what a dead disk gives
                raise Wrong(text[-500:])
            found.append("".join(line for line in text.splitlines(True) if line.startswith(("begin", "ack"))))
        return found

    def _write_back(self) -> None:
        """What the kernel might do at any time: write some of what it holds."""
        rng = self._rng
        with contextlib.suppress(OSError):  # files come and go
            if not rng.randrange(12):
                fd = os.open(self.mount / "other", os.O_WRONLY | os.O_CREAT, 0o600)
                with _closing(fd):
                    os.write(fd, b"x")
                    os.fsync(fd)
                return
            path = self.path / ".keys" / "data.mdb"
            if rng.randrange(2):
                folder = rng.choice([self.path, self.path / ".keys" / "new"])
                path = folder / rng.choice(os.listdir(folder) or [""])
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with _closing(fd):
                size = max(1, os.fstat(fd).st_size)
                start, length = rng.randrange(size), rng.choice([4096, size])
                _LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(length), _WRITE_AND_WAIT)

    def _cut(self) -> None:
        import fcntl

        fd = os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY)
        with _closing(fd):
            try:
                fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_JOURNAL_FLUSH))
            except OSError as error:
                raise NoPowerCutError(f"EXT4_IOC_SHUTDOWN: {error.strerror}") from error

    def check(self) -> None:
        """Everything holds that must.

        Raises:
            Wrong: it does not.
        """
        child = _start(["check", str(self.path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self._children.append(child)
        runs = json.dumps([(*run[:1], run.writers.start, run.writers.stop, *run[2:]) for run in self.runs])
        try:
            _, errors = child.communicate(runs.encode(), timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise Wrong("opening and reading the chest does not come to an end") from error
        finally:
            self._reap()
        if child.returncode:
            raise Wrong(f"the check ended with {child.returncode}: {errors.decode(errors='replace')[-1500:]}")

    # --- the end

    def _reap(self) -> None:
        while self._children:
            with self._children[-1] as child:  # closes its pipes, and waits
                child.kill()
            self._children.pop()

    def _unmount(self, patience_s: float = 10.0) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return _run("umount", self.mount)
            except NoPowerCutError:  # somebody looks at all the disks of the machine just now
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """No process, no mount, no loop device and no image is left, whatever has happened before."""
        with contextlib.ExitStack() as stack:  # each of these is done, whatever becomes of those before it
            stack.callback(self.image.unlink, missing_ok=True)
            stack.callback(self._detach)
            stack.callback(self._unmount_somehow)
            stack.callback(self._reap)

    def _unmount_somehow(self) -> None:
        for _ in range(3):  # an interrupt may have come between the mount and the note of it
            if not os.path.ismount(self.mount):
                return
            try:
                self._unmount(0.5)
            except NoPowerCutError:
                _run("umount", "--lazy", self.mount)

    def _detach(self) -> None:
        """The loop device goes with the mount; this is for one whose mount has failed half way."""
        if self.image.exists() and (devices := self.devices()):
            _run("losetup", "--detach", *devices)

    def devices(self) -> list[str]:
        """The loop devices of the image."""
        command = ["losetup", "--associated", str(self.image), "--noheadings", "--output", "NAME"]
        try:
            return subprocess.run(command, capture_output=True, text=True, start_new_session=True).stdout.split()
        except FileNotFoundError:
            return []


_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _start(arguments: list[str], **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "cutter.py"), *arguments]
    return subprocess.Popen(command, cwd=HERE, env=oracle.environment(), stdout=subprocess.PIPE, bufsize=0, **more)


# --- faults that must be caught


def _no_file_sync() -> None:
    from chest.engines._files import FileBlobs

    durably = FileBlobs._durably

    def only_folders(self: FileBlobs, sync: Callable[[Any], None], what: Any) -> None:
        if sync is not os.fsync:
            durably(self, sync, what)

    FileBlobs._durably = only_folders  # type: ignore[method-assign]


def _no_index_sync() -> None:
    from chest.engines._lmdb import LmdbIndex

    with_sync = LmdbIndex.open

    def without(folder: str, **more: Any) -> LmdbIndex:
        return with_sync(folder, **{**more, "sync": False})

    LmdbIndex.open = without  # type: ignore[method-assign]


def _index_sync_at_flush() -> None:
    """The commits of spills are not synced, and a flush syncs all that was committed: what looks right and is not."""
    from chest import Chest

    _no_index_sync()
    sync = Chest.sync

    def sync_all(self: Chest[Any, Any]) -> None:
        sync(self)
        self._store.index._env.sync_to_disk()  # type: ignore[attr-defined]

    Chest.sync = sync_all  # type: ignore[method-assign]


def _newest_commit_not_synced() -> None:
    """The pages of a commit are synced, as ever, but not what makes them count."""
    from chest.engines._lmdb import LmdbIndex

    LmdbIndex.sync = lambda self: None  # type: ignore[method-assign]


def _no_folder_sync() -> None:
    from chest import _fs

    _fs.fsync_folder = lambda path: None


def _early_names() -> None:
    """Files get their final names before the commit that refers to them."""
    from chest._store import Store

    commit = Store._commit

    def publish_first(self: Store, batch: Any, deletes: Any, written: Any) -> None:
        from chest._records import BLOB, Ref

        for _, _, kind, body, _, _ in batch.puts:
            if kind == BLOB:
                ref = Ref.unpack(body)
                self.blobs.publish(ref.blob, ref.label, replace=True)
        commit(self, batch, deletes, written)

    Store._commit = publish_first  # type: ignore[method-assign]


CONTROLS: dict[str, Callable[[], None]] = {
    "no sync of value files": _no_file_sync,
    "no sync of the index": _no_index_sync,
    "the index synced at flush only": _index_sync_at_flush,
    "no sync after the newest commit": _newest_commit_not_synced,
    "no sync of folders": _no_folder_sync,
    "files renamed before the commit": _early_names,
}


# --- roles


def _write(control: str, *arguments: str) -> None:
    if control != "none":
        CONTROLS[control]()
    sys.argv = ["writer.py", *arguments]
    _ready()
    runpy.run_path(str(HERE / "writer.py"), run_name="__main__")


def _open(path: str) -> None:
    from chest import Chest

    _ready()
    try:
        Chest(path=path).close()
    finally:
        os._exit(0)  # it is to be cut off, and what it says then is of no interest


def _check(path: str) -> None:
    runs = [Run(seed, range(first, last), *rest) for seed, first, last, *rest in json.load(sys.stdin)]
    oracle.check_folder(Path(path), runs)


def _ready() -> None:
    os.write(1, READY)


if __name__ == "__main__":
    role: Any = {"write": _write, "open": _open, "check": _check}[sys.argv[1]]
    role(*sys.argv[2:])
