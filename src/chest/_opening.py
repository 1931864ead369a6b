"""A path becomes a store: what a folder may be, which serializer it remembers, what a crash has left in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import Any

from . import _compression, _fs
from ._envelope import Envelope
from ._records import BLOB, Ref
from ._sealed import SealedIndex
from ._sealing import Seal, check_arguments, checked
from ._store import Store
from .abc import Index
from .engines._files import FileBlobs
from .engines._legacy import NEW, OLD, LegacyIndex, finish_upgrade, read_pairs
from .engines._lmdb import LmdbIndex
from .engines._readonly import ReadOnlyIndex
from .errors import ChestError, FormatError, PathError, SerializerMismatchError, WrongKeyError
from .serializers import NAMES, Codec, resolve

__all__ = ["open_folder"]

FORMAT = 1

_SEAL = b"seal"
_SEALED = (b"format", b"serializer", b"folds")  # the settings that the seal covers


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
    key: Any = None,
    encrypt: Any = False,
    compression: Any = None,
    read_only: bool = False,
) -> Store:
    """The store in a folder, which is created if there is none.

    Raises:
        PathError: it cannot hold a chest.
        NetworkPathError: it lies on a network file system (and ``network`` does not allow that).
        SerializerMismatchError: it was written with another serializer.
        FormatError: it was written by a newer version.
        CorruptError: its index is damaged.
        WrongKeyError: it was made with another key, with none, or needs one.
    """
    ask, cipher = check_arguments(key, encrypt)
    secret = None if ask is None else checked(ask())
    method = _compression.parse(compression)
    if read_only:
        return _open_to_read(path, codec, label, opener, loose, verify, allow, secret, cipher)
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
        index, codec = _legacy(path, keys, codec, opener, folds, create, allow, secret)
    else:
        index = create(keys)
    blobs = None
    try:
        if index.meta(b"format") is None:
            _begin(index, path, codec, secret, cipher)
        index, seal, codec = _settled(index, path, codec, allow, secret, cipher)
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
            envelope=None if method is None and seal is None else Envelope(method, seal),
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
    allow: Iterable[str] | None,
    secret: bytes | None,
    cipher: str | None,
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
        index, codec = _legacy(path, keys, codec, opener, b"0", ReadOnlyIndex, allow, secret)
    else:
        index = ReadOnlyIndex(keys)
    try:
        if index.meta(b"format") is None:
            raise PathError(f"there is no chest at {path} yet: it has never been written to.", path=path)
        index, seal, codec = _settled(index, path, codec, allow, secret, cipher)
        blobs = FileBlobs(path, opener=opener, mode="t" if codec.text and opener else "b")
        return Store(
            path,
            index,
            blobs,
            codec,
            label=label,
            opener=opener,
            loose=loose,
            verify=verify,
            envelope=None if seal is None else Envelope(None, seal),
            read_only=True,
        )
    except BaseException:
        index.close()
        raise


def _legacy(
    path: str,
    keys: str,
    codec: Codec | None,
    opener: Callable[..., Any] | None,
    folds: bytes,
    create: Callable[[str], Index],
    allow: Iterable[str] | None,
    secret: bytes | None,
) -> tuple[LegacyIndex, Codec]:
    """The index of a folder of chest 0.2, and the serializer that reads it."""
    if secret is not None:  # before anything is unpickled
        raise WrongKeyError(f"{path} is a folder of chest 0.2, which has no key: open it without, and copy it.", path=path)
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
    codec = codec or resolve(name, None, None, "b", allow)
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


def _begin(index: Index, path: str, codec: Codec | None, secret: bytes | None, cipher: str | None) -> None:
    """A new chest has its settings, all in one commit, and of several openers the first one's."""
    codec = codec or resolve("pickle", None, None, "b")
    assert codec is not None
    settings = _settings(path, codec)
    if secret is not None:
        settings[_SEAL] = Seal.make(secret, cipher).signed_setting(dict(settings))
    with index.transaction() as alone:
        if alone.meta(b"format") is None:
            alone.commit(meta=settings)


def _unlocked(index: Index, path: str, secret: bytes | None, cipher: str | None) -> Seal | None:
    """The seal of a chest, None if it has none. Nothing that stands in the index is believed before."""
    settings = {name: index.meta(name) for name in _SEALED}
    setting = index.meta(_SEAL)
    if setting is None and secret is not None and not isinstance(index, ReadOnlyIndex):
        with index.transaction() as alone:  # an empty one can still be sealed
            setting = alone.meta(_SEAL)
            if setting is None and not len(alone) and not alone.notes():
                setting = Seal.make(secret, cipher).signed_setting(settings)
                alone.commit(meta={_SEAL: setting})
    if setting is None:
        if secret is not None:
            raise WrongKeyError(
                f"the chest at {path} was made without a key: open it without, and copy it into a new one that has a key "
                "(new.update(old)). If it was made with a key, somebody has exchanged it.",
                path=path,
            )
        return None
    seal = Seal.unlock(setting, settings, secret, path)
    if cipher is not None and (not seal.hides or cipher not in ("", seal.cipher)):
        raise WrongKeyError(
            f"the chest at {path} is {'encrypted by ' + seal.cipher if seal.hides else 'signed, and not encrypted'}: open it "
            "as such, and copy it into a new one if it is to be otherwise.",
            path=path,
        )
    return seal


def _settled(
    index: Index, path: str, codec: Codec | None, allow: Iterable[str] | None, secret: bytes | None, cipher: str | None
) -> tuple[Index, Seal | None, Codec]:
    """The index as it is to be read, its seal if it has one, and the serializer. The seal first: it covers the settings."""
    seal = _unlocked(index, path, secret, cipher)
    if seal is not None:
        index = SealedIndex(index, seal, path)
    return index, seal, _remembered(index, path, codec, allow)


def _remembered(index: Index, path: str, codec: Codec | None, allow: Iterable[str] | None) -> Codec:
    """The serializer to use: the given one if it is the chest's own, else the one that the chest remembers."""
    version = index.meta(b"format") or b""
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
