"""A path becomes a store: what a folder may be, which serializer it remembers, what a crash has left in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import Any

from . import _fs
from ._records import BLOB, Ref
from ._store import Store
from .abc import Index
from .engines._files import FileBlobs
from .engines._legacy import LegacyIndex, finish_upgrade, read_pairs
from .engines._lmdb import LmdbIndex
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
    allow: Iterable[str] | None = None,
) -> Store:
    """The store in a folder, which is created if there is none.

    Raises:
        PathError: it cannot hold a chest.
        NetworkPathError: it lies on a network file system (and ``network`` does not allow that).
        SerializerMismatchError: it was written with another serializer.
        FormatError: it was written by a newer version.
        CorruptError: its index is damaged.
    """
    _make_folder(path)
    if not network:
        _fs.refuse_network(path)
    finish_upgrade(path)
    keys = os.path.join(path, ".keys")

    def create(folder: str) -> Index:
        return LmdbIndex.open(folder, sync=not scratch)

    index: Index
    if os.path.isfile(keys):
        given = codec is not None
        if codec is not None and codec.name == "safe":
            raise SerializerMismatchError(
                f"the chest at {path} was written by chest 0.2, with pickle or a serializer of its own, not with safe: open it "
                "without serializer= if you trust it, and copy what it holds.",
                path=path,
            )
        pickles = resolve("pickle", None, None, "b", allow)
        assert pickles is not None
        load = codec.load if codec and codec.files is None else None
        pairs, name = read_pairs(keys, opener, load, bool(codec and codec.text), pickles.loads)
        codec = codec if given else resolve(name, None, None, "b", allow)
        assert codec is not None
        index = LegacyIndex(path, pairs, lambda f: Ref(0, 0, "0", f).pack(), BLOB, create, _settings(path, codec))
    else:
        index = create(keys)
    blobs = None
    try:
        codec = _remembered(index, path, codec, allow)
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


def _remembered(index: Index, path: str, codec: Codec | None, allow: Iterable[str] | None) -> Codec:
    """The serializer to use: the given one if it is the chest's own, else the one that the chest remembers."""
    version = index.meta(b"format")
    if version is None:  # new
        if codec is None:
            codec = resolve("pickle", None, None, "b", allow)
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
        found = resolve(name, None, None, "b", allow)
        assert found is not None
        return found
    raise SerializerMismatchError(
        f"the chest at {path} was written with a serializer of its own ({name}): give it again, as dump= and load= or "
        "serializer=.",
        path=path,
    )
