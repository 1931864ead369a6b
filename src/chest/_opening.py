"""A path becomes a store: what a folder may be, which serializer it remembers, what a crash has left in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from . import _fs
from ._records import BLOB, Ref
from ._store import Store
from .abc import Index
from .engines._files import FileBlobs
from .engines._legacy import NEW, OLD, LegacyIndex, finish_upgrade, read_pairs
from .engines._lmdb import LmdbIndex
from .engines._readonly import ReadOnlyIndex
from .errors import ChestError, FormatError, PathError, SerializerMismatchError
from .serializers import NAMES, Codec, resolve

__all__ = ["open_folder"]

FORMAT = 1


def open_folder(
    path: str,
    codec: Codec | None,
    *,
    scratch: bool,
    label: Callable[[Any], str] | None,
    opener: Callable[..., Any] | None,
    loose: int | None,
    verify: bool,
    network: bool,
    read_only: bool = False,
) -> Store:
    """The store in a folder, which is created if there is none.

    Raises:
        PathError: it cannot hold a chest.
        NetworkPathError: it lies on a network file system (and ``network`` does not allow that).
        SerializerMismatchError: it was written with another serializer.
        FormatError: it was written by a newer version.
        CorruptError: its index is damaged.
    """
    if read_only:
        return _open_to_read(path, codec, label, opener, loose, verify)
    _make_folder(path)
    if not network:
        _fs.refuse_network(path)
    finish_upgrade(path)
    keys = os.path.join(path, ".keys")

    def create(folder: str) -> Index:
        return LmdbIndex.open(folder, sync=not scratch)

    index: Index
    if os.path.isfile(keys):
        folds = b"1" if _fs.folds_case(path) else b"0"
        index, codec = _legacy(path, keys, codec, opener, folds, create)
    else:
        index = create(keys)
    blobs = None
    try:
        codec = _remembered(index, path, codec)
        blobs = FileBlobs(path, sync=not scratch, opener=opener, mode="t" if codec.text and opener else "b")
        store = Store(
            path,
            index,
            blobs,
            codec,
            label=label,
            opener=opener,
            loose=loose,
            verify=verify,
            folds=index.meta(b"folds") == b"1",
        )
        if isinstance(index, LegacyIndex):
            store.before_writing = index.upgrade
        if index.notes():  # somebody died between a commit and what it left to be done
            store.settle()
        blobs.sweep(index.notes)
    except BaseException as error:
        if blobs is not None:
            blobs.close()
        index.close()
        if isinstance(error, OSError) and not isinstance(error, ChestError):
            raise _fs.as_disk_full(error, path) or PathError(
                f"{path} cannot hold a chest: {error.strerror or error}. Choose another path.", path=path
            ) from error
        raise
    return store


def _open_to_read(
    path: str,
    codec: Codec | None,
    label: Callable[[Any], str] | None,
    opener: Callable[..., Any] | None,
    loose: int | None,
    verify: bool,
) -> Store:
    """As ``open_folder``, for a folder in which nothing may change: what a crash has left stays, and is read past.

    A value file that has not got its own name yet is found under the other one; what a commit has left to be removed, nothing
    refers to.
    """
    keys = os.path.join(path, ".keys")
    if os.path.isdir(os.path.join(path, NEW)) and os.path.isfile(os.path.join(path, OLD)) and not os.path.lexists(keys):
        keys = os.path.join(path, NEW)  # an upgrade of a chest 0.2 that was interrupted when the index was whole
    index: Index
    if os.path.isfile(keys):
        index, codec = _legacy(path, keys, codec, opener, b"0", ReadOnlyIndex)
    else:
        index = ReadOnlyIndex(keys)
    try:
        if index.meta(b"format") is None:
            raise PathError(f"there is no chest at {path} yet: it has never been written to.", path=path)
        codec = _remembered(index, path, codec)
        blobs = FileBlobs(path, opener=opener, mode="t" if codec.text and opener else "b")
        return Store(path, index, blobs, codec, label=label, opener=opener, loose=loose, verify=verify, read_only=True)
    except BaseException:
        index.close()
        raise


def _legacy(
    path: str, keys: str, codec: Codec | None, opener: Callable[..., Any] | None, folds: bytes, create: Callable[[str], Index]
) -> tuple[LegacyIndex, Codec]:
    """The index of a folder of chest 0.2, and the serializer that reads it."""
    given = codec is not None
    pairs, name = read_pairs(keys, opener, codec.load if codec and not codec.native else None, bool(codec and codec.text))
    codec = codec if given else resolve(name, None, None, "b")
    assert codec is not None
    settings = {b"format": str(FORMAT).encode(), b"serializer": codec.name.encode(), b"folds": folds}
    return LegacyIndex(path, pairs, lambda f: Ref(0, 0, "0", f).pack(), BLOB, create, settings), codec


def _make_folder(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        try:
            os.makedirs(path, 0o700, exist_ok=True)
        except OSError as error:
            raise PathError(f"the folder {path} cannot be made: {error.strerror}. Choose another path.", path=path) from error
        return
    except OSError as error:
        raise PathError(f"{path} cannot hold a chest: {error.strerror}. Choose another path.", path=path) from error
    if not stat.S_ISDIR(mode):
        raise PathError(f"{path} is a file: a chest needs a folder. Choose another path.", path=path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PathError(f"the folder {path} cannot be written: a chest needs to. Choose another path.", path=path)


def _settings(path: str, codec: Codec) -> dict[bytes, bytes]:
    return {
        b"format": str(FORMAT).encode(),
        b"serializer": codec.name.encode(),
        b"folds": b"1" if _fs.folds_case(path) else b"0",
    }


def _remembered(index: Index, path: str, codec: Codec | None) -> Codec:
    """The serializer to use: the given one if it is the chest's own, else the one that the chest remembers."""
    version = index.meta(b"format")
    if version is None:  # new
        if codec is None:
            codec = resolve("pickle", None, None, "b")
        assert codec is not None
        index.commit(meta=_settings(path, codec))
        return codec
    if not version.isdigit() or int(version) > FORMAT:
        raise FormatError(
            f"the chest at {path} has format {version.decode(errors='replace')}, this version reads up to {FORMAT}: "
            "install a newer chest.",
            path=path,
        )
    name = (index.meta(b"serializer") or b"pickle").decode()
    if codec is not None:
        if codec.name == name:
            return codec
        raise SerializerMismatchError(
            f"the chest at {path} was written with the serializer {name}, not with {codec.name}: open it with that one"
            + (", or with none given." if name in NAMES else ", as dump= and load= or serializer=."),
            path=path,
        )
    if name in NAMES:
        found = resolve(name, None, None, "b")
        assert found is not None
        return found
    raise SerializerMismatchError(
        f"the chest at {path} was written with a serializer of its own ({name}): give it again, as dump= and load= or "
        "serializer=.",
        path=path,
    )
