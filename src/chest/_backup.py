"""A copy of a chest as of one instant, while others write.

A value file may be replaced or removed at any time, so the copy is made in two goes. In the first one nobody is kept
waiting: files are linked (or copied) as records tell, and what changes under one's hands is left out. In the second one the
index's lock for writers is held: what was changed since the first is taken, and the index is copied. So writers wait as
long as it takes to copy the index, and no longer.

A link is as good as a copy, because value files are never written to, only replaced.

The copy is made under another name beside its destination, and what is made there refuses to be opened until its index has
come, which is last. The folder of a process that has died in between is removed by the next backup to the same place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from typing import Any

from . import _fs
from ._records import BLOB, Ref
from ._store import Store
from .abc import Index, Record
from .engines._labels import below
from .engines._lmdb import LmdbIndex
from .engines._pages import renumber
from .errors import ChestError, PathError

__all__ = ["backup"]

_FEW = 1000  # keys read at a time


def backup(store: Store, index: LmdbIndex, dest: str, opened: Callable[[Index], Index]) -> None:
    """A chest lies at ``dest`` that holds what this one held at one instant; durable on return.

    ``opened`` gives the index as it is read, where it is sealed. What is copied is sealed as before: names count, not places.
    """
    dest = os.path.abspath(dest)
    parent, base = os.path.split(dest)
    if os.path.lexists(dest) and (os.path.islink(dest) or not os.path.isdir(dest) or os.listdir(dest)):
        raise PathError(f"{dest} is there already: give the backup a folder of its own.", path=dest)
    if os.path.realpath(dest).startswith(os.path.join(os.path.realpath(store.path), "")):
        raise PathError(f"{dest} lies within the chest: choose a place outside of it.", path=dest)
    try:
        os.makedirs(parent, 0o700, exist_ok=True)
        _sweep(parent, base)
        work, owner = _begin(parent, base)
        try:
            try:
                _fill(store, index, work, opened)
            finally:
                owner.release()
            os.rename(work, dest)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        _fs.fsync_folder(parent)
    except OSError as error:
        if isinstance(error, ChestError):
            raise
        raise _fs.as_disk_full(error, dest) or PathError(
            f"no backup can be made at {dest}: {error.strerror or error}. Choose another place.", path=dest
        ) from error


def _begin(parent: str, base: str) -> tuple[str, _fs.Owner]:
    """A folder that this process owns, to be filled."""
    while True:
        work = os.path.join(parent, f".{base}.backup-{os.urandom(8).hex()}")
        os.mkdir(work, 0o700)
        try:
            return work, _fs.Owner.claim(work)
        except FileNotFoundError:  # nobody's yet, it was swept
            continue


def _sweep(parent: str, base: str) -> None:
    """What dead processes have left of backups to the same place is gone."""
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if name.startswith(f".{base}.backup-") and stat.S_ISDIR(os.lstat(path).st_mode):
            if _fs.dead_owners(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # not empty: its owner is alive
                    os.rmdir(path)


def _fill(store: Store, index: LmdbIndex, work: str, opened: Callable[[Index], Index]) -> None:
    keys = os.path.join(work, ".keys")
    os.mkdir(keys, 0o700)
    generation = os.open(os.path.join(keys, "generation"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:  # with this and without an index, no chest is opened here
        _fs.write_all(generation, bytes(8))
        copy = _Copy(store, work)
        version = index.version()
        copy.take_all(opened(index))
        store.settle()
        data = os.path.join(keys, "data")
        fd = os.open(data, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with index.transaction() as held:
                copy.take_changed(opened(held), version)
                newest = held.version()
                index.copy_to(fd)
            newest = renumber(data, newest)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.lseek(generation, 0, os.SEEK_SET)
        _fs.write_all(generation, newest.to_bytes(8, "little"))
        os.fsync(generation)
    finally:
        os.close(generation)
    copy.make_durable()
    os.rename(data, os.path.join(keys, "data.mdb"))
    for folder in (keys, work):
        _fs.fsync_folder(folder)


class _Copy:
    """The value files of a copy: for each key the version that was taken, and where it lies. 200 bytes of memory each."""

    def __init__(self, store: Store, work: str) -> None:
        self._store = store
        self._work = work
        self._taken: dict[bytes, tuple[int, str]] = {}
        self._missed: set[bytes] = set()

    def take_all(self, index: Index) -> None:
        after = None
        while items := index.page(after, _FEW):
            after = items[-1].seq
            names = [item.name for item in items]
            for name, record in zip(names, index.get_many(names)[1], strict=True):
                if record is not None and record.kind & 3 == BLOB:
                    try:
                        self._take(name, record)
                    except (FileNotFoundError, ChestError):  # changed since, in all likelihood
                        self._missed.add(name)
                        continue
                    newest = index.get(name)
                    if newest is None or newest.version != record.version:
                        self._drop(name)
                        self._missed.add(name)

    def take_changed(self, index: Index, since: int) -> None:
        """Nobody else writes meanwhile: what is taken is what the index says."""
        newest, changed = index.changed_since(since)
        if newest == since or changed is not None:
            names = {name for name, _ in changed or ()}
            for name in names | self._missed:
                self._bring_up(name, index.get(name))
            return
        left = set(self._taken)
        after = None
        while items := index.page(after, _FEW):
            after = items[-1].seq
            names_here = [item.name for item in items]
            left.difference_update(names_here)
            for name, record in zip(names_here, index.get_many(names_here)[1], strict=True):
                self._bring_up(name, record)
        for name in left:
            self._drop(name)

    def _bring_up(self, name: bytes, record: Record | None) -> None:
        taken = self._taken.get(name)
        if record is None or record.kind & 3 != BLOB:
            if taken is not None:
                self._drop(name)
        elif taken is None or taken[0] != record.version:
            if taken is not None:
                self._drop(name)
            try:
                self._take(name, record)
            except FileNotFoundError as error:
                raise PathError(
                    f"the value file {error.filename} is missing, so the backup would not be whole: run check on the chest.",
                    path=str(error.filename),
                ) from error

    def _drop(self, name: bytes) -> None:
        _, label = self._taken.pop(name)
        with contextlib.suppress(FileNotFoundError), below(self._work, label) as (folder, last):
            os.unlink(last, dir_fd=folder)

    def _take(self, name: bytes, record: Record) -> None:
        blobs = self._store.blobs
        ref = Ref.unpack(record.body)
        source = blobs._open(ref.blob, ref.label)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode) or (ref.digest and found.st_size != ref.size):
                raise FileNotFoundError(2, "it is not what was written", blobs.path(ref.blob, ref.label))
            with below(self._work, ref.label, create=True) as (folder, last):
                self._link(source, found, blobs.path(ref.blob, ref.label), folder, last)
        finally:
            os.close(source)
        self._taken[name] = record.version, ref.label

    @staticmethod
    def _link(source: int, found: os.stat_result, path: str, folder: int | None, last: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(last, dir_fd=folder)
        with contextlib.suppress(OSError, NotImplementedError):
            os.link(path, last, dst_dir_fd=folder, follow_symlinks=False)
            new = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if (new.st_dev, new.st_ino) == (found.st_dev, found.st_ino):
                fd = os.open(last, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0), dir_fd=folder)
                try:
                    os.fsync(fd)  # a scratch chest has not
                finally:
                    os.close(fd)
                return
            os.unlink(last, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        target: Any = os.open(last, flags, 0o600, dir_fd=folder)
        try:
            os.lseek(source, 0, os.SEEK_SET)
            while part := os.read(source, 1 << 20):
                _fs.write_all(target, part)
            os.fsync(target)
        finally:
            os.close(target)

    def make_durable(self) -> None:
        """The names of all files are."""
        for folder, _, _ in os.walk(self._work):
            _fs.fsync_folder(folder)
