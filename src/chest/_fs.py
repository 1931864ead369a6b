"""What chest asks of the file system beyond ``open`` and ``read``: durability, what kind it is, and who is still alive.

**Owners.** A pid alone says little (it is reused), and an age says nothing. So each process that owns something in a
folder keeps one file there, ``owner-<pid>-<start time>-<boot id>``, under a lock that the kernel drops when the process
dies: whoever gets that lock knows that the owner is dead. The lock is ``lockf``, not ``flock``, which a forked child
would go on holding for a killed parent. A ``lockf`` belongs to the process and goes when *any* descriptor of the file
is closed by it: an owner's file is never opened a second time by the process itself; it is told by its name. Where
there is no ``lockf`` (Windows), every owner is taken for alive.

An owner's file gets this name only when it is locked already: there is no instant at which a living owner looks dead.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .errors import DiskFullError, NetworkPathError

_fcntl: Any
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None

__all__ = [
    "Owner",
    "as_disk_full",
    "dead_owners",
    "disk_is_full",
    "folder_bytes",
    "folds_case",
    "forget",
    "fsync_folder",
    "owners",
    "refuse_network",
    "start_writing_back",
    "who_else_writes",
    "write_all",
]

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_SMALLEST_ROOM = 1 << 20  # bytes; a disk with less left is taken for full where the error does not say

# --- durability


def fsync_folder(path: str) -> None:
    """The names in a folder are durable. Does nothing where folders cannot be opened (Windows)."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW)
    except PermissionError:
        if os.name == "nt":
            return
        raise
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems whose folders need no sync and know none
            raise
    finally:
        os.close(fd)


def start_writing_back(fd: int) -> None:
    """The system begins to write what it holds of a file, and goes on while the caller fills more of it.

    So a later sync waits less. Nothing is durable by that. Does nothing where the system has no such call (it is Linux's).

    Raises:
        OSError: the disk does not take it.
    """
    begin = _sync_file_range()
    if begin is not None:
        code = begin(fd)
        if code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(code, os.strerror(code))


@functools.cache
def _sync_file_range() -> Callable[[int], int] | None:
    """What begins to write back a file and returns an errno, None where there is no such thing."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # late: it takes milliseconds, and few programs need it

        call = ctypes.CDLL(None, use_errno=True).sync_file_range
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    except (ImportError, OSError, AttributeError):
        return None
    return lambda fd: ctypes.get_errno() if call(fd, 0, 0, 2) else 0  # all of it; 2: SYNC_FILE_RANGE_WRITE


def write_all(fd: int, data: bytes | bytearray | memoryview) -> int:
    """All of the data is in the file; its size in bytes. ``os.write`` may stop in the middle, and does beyond 2 GiB."""
    view = memoryview(data).cast("B")
    size = done = len(view)
    while done:
        done -= os.write(fd, view[size - done :])
    return size


def disk_is_full(path: str) -> bool:
    """Whether there is no room to speak of where ``path`` lies: for errors that do not say so themselves."""
    if not hasattr(os, "statvfs"):
        return shutil.disk_usage(path).free < _SMALLEST_ROOM
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize < _SMALLEST_ROOM or (found.f_files > 0 and found.f_favail == 0)


def as_disk_full(error: OSError, path: str) -> DiskFullError | None:
    """The error to raise instead if it says that the disk, or the user's share of it, is full; else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
    return DiskFullError(f"{what} ({path}). Nothing was lost: make room and try again.", path=path)


def folder_bytes(path: str) -> int:
    """The sizes of all files below a folder, added up. Links are not followed; what vanishes meanwhile counts 0."""
    total = 0
    todo = [path]
    while todo:
        with contextlib.suppress(FileNotFoundError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total


# --- what kind of file system

_MOUNTS = "/proc/self/mountinfo"
_NETWORK = re.compile(
    r"nfs4?|cifs|smb2|smb3|smbfs|9p|lustre|afs|ceph|gpfs|beegfs|pvfs2|orangefs|panfs|wekafs|coda|ncpfs|acfs|gfs2|ocfs2"
    r"|virtiofs|vboxsf|vmhgfs|prl_fs|fuse(?!blk)(\..*)?"
)
_LOCAL_FUSE = "fuse.fuse-overlayfs"  # the root of a container that runs without privileges
_kinds: dict[int, str] = {}  # by device number, since reading the mounts takes 70 us


def refuse_network(path: str) -> None:
    """The path lies on a file system of this machine, as far as can be told: the index is mapped and locked in memory.

    Linux only (elsewhere nothing is checked). The path need not exist yet. 3 us, 75 us for the first path on a device.

    Raises:
        NetworkPathError: it does not.
    """
    kind = _file_system(path)
    if _NETWORK.fullmatch(kind) and kind != _LOCAL_FUSE:
        raise NetworkPathError(
            f"{path} lies on a {kind} file system. The index of a chest is shared through this machine's memory: "
            "another machine could damage it there. Choose a folder on a disk of this machine, or keep the chest in "
            "Redis or an object store, which many machines can share.",
            path=path,
        )


def _file_system(path: str) -> str:
    """The type of the file system, "" if it cannot be told."""
    while True:
        try:
            device = os.stat(path).st_dev
            break
        except (FileNotFoundError, NotADirectoryError):
            parent = os.path.dirname(os.path.abspath(path))
            if parent == path:
                return ""
            path = parent
        except OSError:
            return ""
    if device in _kinds:
        return _kinds[device]
    try:
        with open(_MOUNTS, "rb", buffering=0) as file:
            mounts = file.read()
    except OSError:
        return ""
    at = mounts.find(b" %d:%d " % (os.major(device), os.minor(device)))
    if at >= 0:
        kind = _kinds[device] = _type_of(mounts[at : mounts.find(b"\n", at)])
        return kind
    # btrfs and overlay show other device numbers than their mounts have.
    path = os.path.realpath(path)
    best, kind = -1, ""
    for line in mounts.splitlines():
        point = os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ", 5)[4]))
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts on one point the later one is seen
            best, kind = len(point), _type_of(line)
    return kind


def _type_of(line: bytes) -> str:
    return line.partition(b" - ")[2].partition(b" ")[0].decode("ascii", "replace")


def folds_case(path: str) -> bool:
    """Whether the file system takes ``x`` and ``X`` for one name in this folder. Nothing is left behind."""
    with os.scandir(path) as entries:
        for number, entry in enumerate(entries):
            if entry.name.isascii() and entry.name.swapcase() != entry.name:
                return _is_one(path, entry.name)
            if number == 100:
                break
    try:
        fd, probe = tempfile.mkstemp(prefix=".chest-", dir=path)
    except OSError:
        folder, name = os.path.split(os.path.realpath(path))
        return bool(name) and _is_one(folder, name)
    try:
        os.close(fd)
        return _is_one(path, os.path.basename(probe))
    finally:
        os.unlink(probe)


def _is_one(folder: str, name: str) -> bool:
    other = name.swapcase()
    try:
        a, b = os.lstat(os.path.join(folder, name)), os.lstat(os.path.join(folder, other))
    except OSError:
        return False
    # Two names of one file (hard links) are two entries; a folded name is one.
    return os.path.samestat(a, b) and name != other and other not in os.listdir(folder)


def who_else_writes(path: str) -> str:
    """What lets other users write to a folder, in words; "" if nothing does, as far as can be told. Root does not count.

    A group with the number of the owner is taken for the owner's own.
    """
    if not hasattr(os, "geteuid"):
        return ""
    for folder in (path, os.path.join(path, ".keys")):
        try:
            found = os.lstat(folder)
        except OSError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            return f"{folder} belongs to another user ({found.st_uid})"
        if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode):
            return f"every user can write to {folder}"
        if found.st_mode & stat.S_IWGRP and found.st_gid != found.st_uid and not stat.S_ISLNK(found.st_mode):
            return f"the group {found.st_gid} can write to {folder}"
    return ""


# --- owners

PREFIX = "owner-"


def _boot_id() -> str:
    """Differs after each start of the machine, "0" where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(8)
    except OSError:
        return "0"


def _start_time() -> str:
    try:
        with open("/proc/self/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return str(time.time_ns())


_tokens: dict[int, str] = {}  # pid -> token, so that it is the same one each time


def _own_token() -> str:
    pid = os.getpid()
    token = _tokens.get(pid)
    if token is None:
        _tokens.clear()  # of the parent, in a forked child
        token = _tokens[pid] = f"{pid}-{_start_time()}-{_boot_id()}"
    return token


def _is_own(token: str) -> bool:
    own = _own_token()
    return token == own or token.startswith(own + "-")


def _try_lock(fd: int) -> bool:
    """Whether nobody else holds the file, which then is this process's."""
    if _fcntl is None:
        return False
    try:
        _fcntl.lockf(fd, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


class Owner:
    """This process, as the living owner of something in a folder, until ``release`` or its death.

    Attributes:
        token: names it; fit for file names, without dots.
        pid: the process it stands for: in a forked child it is the parent's, and releasing it does nothing there.
    """

    def __init__(self, folder: str, token: str, fd: int) -> None:
        self.folder = folder
        self.token = token
        self.pid = os.getpid()
        self._fd = fd
        self._released = False

    @classmethod
    def claim(cls, folder: str) -> Owner:
        """Own something in a folder. One claim per process and folder is enough; each is told apart by its token."""
        token = _own_token()
        if os.path.lexists(_owner_path(folder, token)):  # a second claim, or a container with the same pids
            token = f"{token}-{os.urandom(4).hex()}"
        while True:
            path = _owner_path(folder, f"{token}-{os.urandom(4).hex()}.new")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o600)
            try:
                if _fcntl is None:  # an open file cannot be renamed there
                    os.close(fd)
                    fd = -1
                else:
                    _fcntl.lockf(fd, _fcntl.LOCK_EX)
                os.rename(path, _owner_path(folder, token))
                return cls(folder, token, fd)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                if fd >= 0:
                    os.close(fd)
                # Not locked yet, it looked as if left behind, and was swept: once more.
                if not isinstance(error, FileNotFoundError) or not os.path.isdir(folder):
                    raise

    def release(self) -> None:
        """Own no longer; a second call does nothing. In a forked child this closes a descriptor, and nothing else."""
        if self._released:
            return
        self._released = True
        if self.pid == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(_owner_path(self.folder, self.token))
        if self._fd >= 0:
            os.close(self._fd)


def _owner_path(folder: str, token: str) -> str:
    return os.path.join(folder, PREFIX + token)


def owners(folder: str) -> list[str]:
    """The tokens of all owners in a folder, living and dead."""
    try:
        return [name[len(PREFIX) :] for name in os.listdir(folder) if name.startswith(PREFIX)]
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _seized(folder: str, token: str) -> Iterator[bool]:
    """Whether the owner is dead, which nobody else can find out meanwhile. Never for an owner of this process."""
    fd = -1
    if not _is_own(token) and _fcntl is not None:
        # Not blocking: what lies there may be anything. What is no file has no owner that could be asked.
        with contextlib.suppress(OSError):
            fd = os.open(_owner_path(folder, token), os.O_RDWR | os.O_NONBLOCK | _NOFOLLOW)
    try:
        yield fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode) and _try_lock(fd)
    finally:
        if fd >= 0:
            os.close(fd)


def dead_owners(folder: str) -> list[str]:
    """The tokens of owners that have died without releasing. They stay dead: a token is never used twice."""
    dead = []
    for token in owners(folder):
        with _seized(folder, token) as is_dead:
            if is_dead:
                dead.append(token)
    return dead


def forget(folder: str, token: str) -> None:
    """The file of a dead owner is gone; that of a living one stays."""
    with _seized(folder, token) as is_dead, contextlib.suppress(FileNotFoundError):
        if is_dead:
            os.unlink(_owner_path(folder, token))
