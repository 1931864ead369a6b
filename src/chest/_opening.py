"""A path becomes a store: what a folder may be, which serializer it remembers, what a crash has left in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from . import _compression, _fs
from ._envelope import Envelope
from ._records import BLOB, Ref
from ._sealed import SealedIndex
from ._sealing import Seal, check_arguments, checked
from ._store import Store
from .abc import Index
from .engines._files import FileBlobs
from .engines._legacy import LegacyIndex, finish_upgrade, read_pairs
from .engines._lmdb import LmdbIndex
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
    key: Any = None,
    encrypt: Any = False,
    compression: Any = None,
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
    _make_folder(path)
    if not network:
        _fs.refuse_network(path)
    finish_upgrade(path)
    keys = os.path.join(path, ".keys")

    def create(folder: str) -> Index:
        return LmdbIndex.open(folder, sync=not scratch)

    index: Index
    if os.path.isfile(keys):
        if secret is not None:  # before anything is unpickled
            raise WrongKeyError(f"{path} is a folder of chest 0.2, which has no key: open it without, and copy it.", path=path)
        given = codec is not None
        pairs, name = read_pairs(keys, opener, codec.load if codec and not codec.native else None, bool(codec and codec.text))
        codec = codec if given else resolve(name, None, None, "b")
        assert codec is not None
        index = LegacyIndex(path, pairs, lambda f: Ref(0, 0, "0", f).pack(), BLOB, create, _settings(path, codec))
    else:
        index = create(keys)
    blobs = None
    try:
        if index.meta(b"format") is None:
            _begin(index, path, codec, secret, cipher)
        seal = _unlocked(index, path, secret, cipher)
        if seal is not None:
            index = SealedIndex(index, seal, path)
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
    if setting is None and secret is not None:
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


def _remembered(index: Index, path: str, codec: Codec | None) -> Codec:
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
        found = resolve(name, None, None, "b")
        assert found is not None
        return found
    raise SerializerMismatchError(
        f"the chest at {path} was written with a serializer of its own ({name}): give it again, as dump= and load= or "
        "serializer=.",
        path=path,
    )
