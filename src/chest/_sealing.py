"""Signing and encryption: what a key makes of messages and files, so that nothing else can pass for them.

From the user's key and the salt of the chest HKDF-SHA-512 derives one key for each purpose. Small messages (records, keys,
notes) are signed by keyed BLAKE2b, which is the fastest for them, and files by HMAC-SHA-256, which is twice as fast as that
for much data on processors of today. Either covers what the message is for and whose it is.

Encrypted messages carry the random number of a *session* (an opening of the chest), from which their key is derived, and a
random nonce of 96 bits. A session ends after 2^28 messages: that two of them have one nonce is then as unlikely as 1 in
2^41; and a forked process that goes on with a session still draws other nonces.

Encrypted files have a key of their own, derived from a random salt, and are cut into chunks of a MiB (the STREAM
construction): the nonce of each is its number and whether it is the last. So a chunk that is missing, added, moved or from
another file is noticed, and none is handed on before it was authenticated.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

from .errors import ChestError, CorruptError, MissingExtraError, TamperedError, WrongKeyError

__all__ = ["CIPHERS", "FILE", "FILE_MAGIC", "KEY", "NOTE", "RECORD", "TAG", "Seal", "Secret", "check_arguments", "checked"]

CIPHERS = ("aes-gcm", "chacha20-poly1305")
RECORD, KEY, NOTE, FILE = b"r", b"k", b"n", b"f"  # what messages are for

MIN_KEY = 16
TAG = 16
CHUNK = 1 << 20

_SALT = 32
_SESSION = 16
_NONCE = 12
_MESSAGES = 1 << 28  # of a session
_CIPHER = 1 + _SALT + TAG  # where it begins in the setting
_HEAD = struct.Struct("<ccBH")  # in front of what a message's tag covers: "1", purpose, kind, length of the name
FILE_MAGIC = b"CHESTe1\n"
_FILE_HEAD = len(FILE_MAGIC) + _SALT
_TAMPERED = "it was not written with this chest's key, or was changed since"


class Secret:
    """A key that was given as bytes. It shows itself nowhere, and is not sent to other processes."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self) -> bytes:
        return self._key

    def __repr__(self) -> str:
        return "<a key>"

    def __reduce__(self) -> Any:
        raise ChestError(
            "a chest whose key was given as bytes cannot be pickled, because the key would be: give key= as a function "
            "that returns it (importable by whoever receives the chest)."
        )


def check_arguments(key: Any, encrypt: Any) -> tuple[Callable[[], bytes] | None, str | None]:
    """The key as a function, and the cipher that was asked for: "" for any.

    Raises:
        TypeError, ValueError: nonsense.
        MissingExtraError: encryption needs a package that is not installed.
    """
    if type(encrypt) is not bool and encrypt not in CIPHERS:
        raise ValueError(f"encrypt is {encrypt!r}: choose True, False, {' or '.join(map(repr, CIPHERS))}")
    if key is None:
        if encrypt:
            raise ValueError("encrypt needs a key: give key=, 32 random bytes or a function that returns them")
        return None, None
    if isinstance(key, (bytes, bytearray)):
        key = Secret(checked(key))
    elif not callable(key):
        raise TypeError(f"key must be bytes, or a function that returns them, not {type(key).__name__}")
    if encrypt:
        _aead(encrypt if isinstance(encrypt, str) else CIPHERS[0])
    return key, None if encrypt is False else "" if encrypt is True else encrypt


def checked(key: Any) -> bytes:
    """What a user's function gave as the key, if it can be one. Raises TypeError, ValueError."""
    if not isinstance(key, (bytes, bytearray)):
        raise TypeError(f"the function given as key= must return bytes, not {type(key).__name__}")
    if len(key) < MIN_KEY:
        raise ValueError(
            f"the key has {len(key)} bytes, and needs {MIN_KEY} at least: os.urandom(32) makes one. A password is none: "
            "derive one from it, by hashlib.scrypt for instance."
        )
    return bytes(key)


def _aead(cipher: str) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers import aead
    except ImportError as error:
        raise MissingExtraError("an encrypted chest needs the package cryptography: pip install 'chest[crypto]'") from error
    return aead.AESGCM if cipher == "aes-gcm" else aead.ChaCha20Poly1305


def derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    """HKDF-SHA-512 (RFC 5869): 32 bytes."""
    return hmac.digest(hmac.digest(salt, key, "sha512"), purpose + b"\1", "sha512")[:32]


class Seal:
    """What one chest's key does.

    Attributes:
        hides: whether the chest is encrypted.
        setting: what the chest remembers of it, without the signature of the other settings.
    """

    def __init__(self, key: bytes, salt: bytes, cipher: str) -> None:
        self.hides = bool(cipher)
        self.cipher = cipher
        self._aead = _aead(cipher) if cipher else None
        derived = {purpose: derive(key, salt, b"chest 1 " + purpose) for purpose in _PURPOSES}
        self._messages = blake2b(key=derived[b"messages"], digest_size=TAG)
        self._settings = blake2b(key=derived[b"settings"], digest_size=TAG)
        self._names = blake2b(key=derived[b"names"], digest_size=32)
        self._labels = blake2b(key=derived[b"labels"], digest_size=16)
        self._files = derived[b"files"]
        self._cipher_of = lru_cache(64)(partial(_session_cipher, self._aead, derived[b"sessions"]))
        self._session = b""
        self._left = 0
        check = blake2b(b"check", key=derived[b"check"], digest_size=TAG).digest()
        self.setting = b"1" + salt + check + cipher.encode()

    # --- the chest

    @classmethod
    def make(cls, key: bytes, cipher: str | None) -> Seal:
        """A seal for a new chest."""
        return cls(key, os.urandom(_SALT), "" if cipher is None else cipher or CIPHERS[0])

    @classmethod
    def unlock(cls, setting: bytes, settings: dict[bytes, bytes | None], key: bytes | None, path: str) -> Seal:
        """The seal of a chest that remembers ``setting``.

        Raises:
            WrongKeyError: there is no key, or it is another one.
            TamperedError: the settings were changed.
            CorruptError: ``setting`` is none.
        """
        if key is None:
            raise WrongKeyError(f"the chest at {path} is signed or encrypted: give the key= it was made with.", path=path)
        seal = cls.recognized(setting, key, path)
        if not seal.has_signed(settings, setting):
            raise TamperedError(
                f"the settings of the chest at {path} were not written with its key: put it back from a backup.", path=path
            )
        return seal

    @staticmethod
    def cipher_of(setting: bytes, path: str) -> str:
        """What a chest that remembers ``setting`` is encrypted by, "" if it is only signed. Raises CorruptError."""
        cipher = setting[_CIPHER:-TAG].decode("ascii", "replace")
        if setting[:1] != b"1" or len(setting) < _CIPHER + TAG or cipher not in ("", *CIPHERS):
            raise CorruptError(
                f"the chest at {path} is sealed in a way that this version does not know: install a newer chest, or put it "
                "back from a backup.",
                path=path,
            )
        return cipher

    @classmethod
    def recognized(cls, setting: bytes, key: bytes, path: str) -> Seal:
        """As ``unlock``, whatever the other settings are."""
        seal = cls(key, setting[1 : 1 + _SALT], cls.cipher_of(setting, path))
        if not hmac.compare_digest(seal.setting[1 + _SALT : _CIPHER], setting[1 + _SALT : _CIPHER]):
            raise WrongKeyError(f"this is not the key that the chest at {path} was made with: give that one.", path=path)
        return seal

    def has_signed(self, settings: dict[bytes, bytes | None], setting: bytes) -> bool:
        """Whether a chest that remembers ``setting`` had these other settings."""
        return hmac.compare_digest(self.signed_setting(settings), setting)

    def signed_setting(self, settings: dict[bytes, bytes | None]) -> bytes:
        """``setting``, and a signature of it and the other settings of the chest."""
        tag = self._settings.copy()
        for part in (self.setting, *(part for name in sorted(settings) for part in (name, settings[name]))):
            tag.update(b"-" if part is None else b"+%d:" % len(part) + part)
        return self.setting + tag.digest()

    # --- names

    def name(self, name: bytes) -> bytes:
        """What stands in the index for a name."""
        if not self.hides or name[:1] == b"o":  # a random one says nothing, and its first byte is how it is found
            return name
        hashed = self._names.copy()
        hashed.update(name)
        return b"k" + hashed.digest()

    def label(self, name: bytes) -> str:
        """The file name of a key, which says nothing."""
        hashed = self._labels.copy()
        hashed.update(name)
        return "0" + hashed.hexdigest()

    # --- small messages

    def close(self, purpose: bytes, kind: int, name: bytes, data: bytes) -> bytes:
        """The message, signed or encrypted. Costs 1 or 3 us. ``name`` is the one in the index."""
        head = _HEAD.pack(b"1", purpose, kind, len(name)) + name
        if not self.hides:
            tag = self._messages.copy()
            tag.update(head)
            tag.update(data)
            return data + tag.digest()
        if self._left <= 0:
            self._session, self._left = os.urandom(_SESSION), _MESSAGES
        self._left -= 1
        session, nonce = self._session, os.urandom(_NONCE)
        sealed: bytes = session + nonce + self._cipher_of(session).encrypt(nonce, data, head)
        return sealed

    def open(self, purpose: bytes, kind: int, name: bytes, data: bytes) -> bytes:
        """The message that was closed. Raises TamperedError."""
        head = _HEAD.pack(b"1", purpose, kind, len(name)) + name
        if not self.hides:
            tag = self._messages.copy()
            tag.update(head)
            tag.update(data[:-TAG])
            if len(data) < TAG or not hmac.compare_digest(tag.digest(), data[-TAG:]):
                raise TamperedError(_TAMPERED)
            return data[:-TAG]
        start = _SESSION + _NONCE
        if len(data) < start + TAG:
            raise TamperedError(_TAMPERED)
        return self._decrypt(self._cipher_of(data[:_SESSION]), data[_SESSION:start], data[start:], head)

    def _with_key(self, key: bytes) -> Any:
        assert self._aead is not None
        return self._aead(key)

    @staticmethod
    def _decrypt(cipher: Any, nonce: bytes, data: bytes, head: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            plain: bytes = cipher.decrypt(nonce, data, head)
        except InvalidTag:
            raise TamperedError(_TAMPERED) from None
        return plain

    # --- files

    def writer(self, name: bytes, put: Callable[[Any], Any]) -> Signer | Encrypter:
        """Something with ``write`` and ``close``; the latter gives what the record must say, to ``read``."""
        head = _HEAD.pack(b"1", FILE, 0, len(name)) + name
        if not self.hides:
            return Signer(self._files, head, put)
        salt = os.urandom(_SALT)
        return Encrypter(self._with_key(derive(self._files, salt, b"file")), salt, head, put)

    def plain_size(self, stored: int) -> int:
        """Bytes of a file without what the seal adds to it."""
        if not self.hides:
            return stored
        n_chunks = max(1, -(-(stored - _FILE_HEAD) // (CHUNK + TAG)))
        return stored - _FILE_HEAD - n_chunks * TAG

    def read(self, view: memoryview, name: bytes, said: bytes, memory: Callable[[int], memoryview]) -> Iterator[Any]:
        """What was written, in private memory, in parts of which each is authenticated before it is handed on.

        The file may be changed by others while it is read: each byte of it is read once.

        Args:
            view: all of the file.
            name: whose it is, in the index.
            said: what the writer's ``close`` gave.
            memory: private memory of a size.

        Raises:
            TamperedError: from within the iteration, too.
        """
        head = _HEAD.pack(b"1", FILE, 0, len(name)) + name
        if not self.hides:
            yield self._verified(view, head, said, memory)
            return
        if len(said) != _SALT or bytes(view[:_FILE_HEAD]) != FILE_MAGIC + said:
            raise TamperedError(_TAMPERED)
        cipher = self._with_key(derive(self._files, said, b"file"))
        size = len(view)
        starts = range(_FILE_HEAD, max(size, _FILE_HEAD + 1), CHUNK + TAG)
        for number, start in enumerate(starts):
            chunk = bytes(view[start : start + CHUNK + TAG])
            if len(chunk) < TAG:
                raise TamperedError(_TAMPERED)
            yield self._decrypt(cipher, _nonce(number, number == len(starts) - 1), chunk, head)

    def _verified(self, view: memoryview, head: bytes, said: bytes, memory: Callable[[int], memoryview]) -> memoryview:
        private = memory(len(view))
        tag = hmac.new(self._files, head, "sha256")
        for start in range(0, len(view), CHUNK):
            part = private[start : start + CHUNK]
            part[:] = view[start : start + CHUNK]
            tag.update(part)
        if not hmac.compare_digest(tag.digest(), said):
            raise TamperedError(_TAMPERED)
        return private


_PURPOSES = (b"messages", b"settings", b"names", b"labels", b"files", b"sessions", b"check")


def _session_cipher(aead: Any, key: bytes, session: bytes) -> Any:
    return aead(derive(key, session, b"session"))


class Signer:
    """Signs what passes through it, which is written as it is."""

    def __init__(self, key: bytes, head: bytes, put: Callable[[Any], Any]) -> None:
        self._tag = hmac.new(key, head, "sha256")
        self._put = put

    def write(self, data: bytes) -> None:
        self._tag.update(data)
        self._put(data)

    def close(self) -> bytes:
        return self._tag.digest()


class Encrypter:
    """Encrypts what passes through it, a chunk at a time. The last one is held back until it is known to be the last."""

    def __init__(self, cipher: Any, salt: bytes, head: bytes, put: Callable[[Any], Any]) -> None:
        self._cipher = cipher
        self._salt = salt
        self._head = head
        self._put = put
        self._number = 0
        self._held = bytearray()
        put(FILE_MAGIC + salt)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if len(self._held) == CHUNK:
                self._chunk(last=False)
            part = view[: CHUNK - len(self._held)]
            self._held += part
            view = view[len(part) :]

    def close(self) -> bytes:
        self._chunk(last=True)
        return self._salt

    def _chunk(self, *, last: bool) -> None:
        self._put(self._cipher.encrypt(_nonce(self._number, last), bytes(self._held), self._head))
        self._number += 1
        self._held.clear()


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
