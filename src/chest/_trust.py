"""What of a chest's folder can be believed by whoever checks it, and how it is read: with which serializer, with which key.

Nothing is decoded that may not be: without the key of a sealed chest nothing is unpickled, decompressed or looked up that
only the key can vouch for, and in a chest whose serializer cannot be told no key is decoded but those whose name gives them
back. What the caller says counts more than what the folder says.
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from . import _keys
from ._problems import Problem
from ._sealing import FILE_MAGIC, KEY, NOTE, RECORD, TAG, Seal
from ._valuefile import MARKS
from .abc import Record
from .errors import ChestError, CorruptError, SerializerMismatchError, WrongKeyError
from .serializers import NAMES, Codec, resolve

__all__ = ["SEAL", "SETTINGS", "Trust", "is_hidden_name"]

SETTINGS = (b"format", b"serializer", b"folds")  # those that a seal covers
SEAL = b"seal"


def is_hidden_name(name: bytes) -> bool:
    """Whether this is a name as only encrypted chests have them."""
    return len(name) == 33 and name[:1] == b"k"


class Trust:
    """See the module's head. ``settle`` is called once the settings are known, or nothing of them is left.

    Args:
        path: of the chest, for errors.
        codec: the serializer that the caller named.
        allow: the caller's allow-list, for pickled keys.
        secret: the key that the caller gave.
        seal: the seal of an open chest, instead of it.
        guarded: the caller has said how the chest is to be read, so that nobody who can write to the folder can run code in
            the name of whoever reads it: with the key, or the serializer ``safe``.

    Attributes:
        seal: of the chest, if it has one and the key is at hand.
        locked: the chest is sealed, and the key is not at hand: nothing may be decoded.
        dark: bodies of records, names and notes cannot be read.
        settings: the settings, all that can be believed of them.
        refusal: why nothing can be repaired.
    """

    def __init__(
        self,
        path: str,
        codec: Codec | None = None,
        *,
        allow: Any = None,
        secret: bytes | None = None,
        seal: Seal | None = None,
        guarded: bool = False,
    ) -> None:
        self.path = path
        self._codec = codec
        self._allow = allow
        self._secret = secret
        self._given = seal
        self.seal: Seal | None = None
        self.locked = self.dark = self.is_settled = False
        self.settings: dict[bytes, bytes] = {}
        self.refusal: ChestError | None = None
        self.is_guarded = guarded
        self._decode: Callable[[bytes, bytes], Hashable] | None = None

    @property
    def is_keyed(self) -> bool:
        """Whether the caller has given a key."""
        return self._secret is not None or self._given is not None

    @property
    def loads(self) -> Callable[[bytes], Any] | None:
        """What reads pickles that no seal covers; None where none may be read."""
        if self.is_keyed or (self._codec is not None and self._codec.name == "safe"):
            return None
        if self._allow is None:
            return pickle.loads
        from .serializers._allowed import AllowedPickles

        return AllowedPickles(self._allow).loads

    @property
    def hides(self) -> bool:
        """Whether the chest is encrypted, as far as is known."""
        return self.dark or (self.seal is not None and self.seal.hides)

    @property
    def serializer(self) -> str | None:
        """Its name, None if it cannot be told."""
        if self._codec is not None:
            return self._codec.name
        found = self.settings.get(b"serializer")
        return None if found is None else found.decode(errors="replace")

    # --- the settings

    def settle(self, settings: dict[bytes, bytes], damaged_seal: bytes | None = None) -> Iterator[tuple[str, str]]:
        """Kinds of problems and messages. Whatever is not a problem of the settings as such is not said.

        Args:
            settings: those whose checksums are right.
            damaged_seal: the setting of this name if its checksum is wrong.

        Raises:
            WrongKeyError: the caller gave another key than the chest's.
        """
        self.is_settled = True
        self.settings = {name: settings[name] for name in SETTINGS if name in settings}
        stored = settings.get(SEAL, damaged_seal)
        if stored is not None:
            yield from self._unlock(stored, damaged=SEAL not in settings)
        elif self.is_keyed:
            yield self._lose("its setting 'seal' is missing: it was made without a key, or somebody has taken that away")
        yield from self._choose()

    def _lose(self, why: str, *, dark: bool = True) -> tuple[str, str]:
        self.locked, self.dark = True, dark
        message = f"nothing of the chest can be believed, because {why}. It cannot be rebuilt: put the chest back from a backup"
        self.refusal = CorruptError(
            f"the chest at {self.path} cannot be repaired: {why}. Put it back from a backup.", path=self.path
        )
        return "seal", message

    def lose_all(self) -> tuple[str, str]:
        """Nothing that was met was written with this seal."""
        return self._lose("nothing in its index was written with its key: its setting 'seal' was exchanged, or the whole index")

    def lose_seal(self) -> tuple[str, str]:
        """Names were met that only an encrypted chest has."""
        return self._lose("it is encrypted, and its setting 'seal' is lost")

    def _unlock(self, stored: bytes, *, damaged: bool) -> Iterator[tuple[str, str]]:
        try:
            cipher = Seal.cipher_of(stored, self.path)
        except CorruptError:
            yield self._lose("its setting 'seal' is damaged, or a newer version wrote it")
            return
        if not self.is_keyed:
            self.locked, self.dark = True, bool(cipher)
            text = f"the chest at {self.path} is {'encrypted' if cipher else 'signed'}, and no key was given"
            self.refusal = WrongKeyError(f"{text}: give the key= it was made with.", path=self.path)
            yield "seal", f"{text}: only checksums were looked at, and whatever else needs no key. Give key= to check the rest"
            return
        seal = self._given
        if seal is None:
            try:
                seal = Seal.recognized(stored, self._secret or b"", self.path)
            except WrongKeyError:
                if not damaged:
                    raise
        if seal is None or stored[:-TAG] != seal.setting:
            yield self._lose("its setting 'seal' is damaged, or was exchanged")
            return
        self.seal = seal
        for candidate in self._candidates():
            if seal.has_signed({**dict.fromkeys(SETTINGS), **candidate}, stored):
                for name, value in self.settings.items():
                    if candidate.get(name) != value:
                        yield "meta", f"the setting {name!r} of the chest was not written with its key"
                self.settings = candidate
                return
        self.settings = {}
        yield self._lose("its settings were not written with its key", dark=False)

    def _candidates(self) -> Iterator[dict[bytes, bytes]]:
        """Settings that the seal may have covered, those that are there first."""
        yield self.settings
        serializers = dict.fromkeys([self.serializer or "pickle", *NAMES])
        for name, version, folds in itertools.product(serializers, (b"1",), (b"0", b"1")):
            yield {b"format": version, b"serializer": name.encode(), b"folds": folds}

    def _choose(self) -> Iterator[tuple[str, str]]:
        """The serializer by which keys are read."""
        remembered = self.settings.get(b"serializer")
        if self._codec is not None:
            if remembered is None or remembered == self._codec.name.encode():
                self._decode = self._codec.decode
            else:
                name = remembered.decode(errors="replace")
                yield "meta", f"the chest remembers the serializer {name}, and {self._codec.name} was asked for"
                self.refusal = self.refusal or SerializerMismatchError(
                    f"the chest at {self.path} remembers the serializer {name}, not {self._codec.name}: give that one if you "
                    "trust the folder, or put the chest back from a backup.",
                    path=self.path,
                )
        elif remembered is not None:
            self.use(remembered.decode(errors="replace"))

    def use(self, serializer: str) -> None:
        """Read keys as this serializer writes them. Raises MissingExtraError."""
        if serializer == "safe":
            codec = resolve(serializer, None, None, "b")
            assert codec is not None
            self._decode = codec.decode
        elif self._allow is not None:
            from .serializers._allowed import AllowedPickles

            self._decode = functools.partial(_keys.decode, loads=AllowedPickles(self._allow).loads)
        else:
            self._decode = _keys.decode

    # --- what stands in the index, under the names that it has there

    def record(self, name: bytes, record: Record) -> Record:
        """A record as it was before it was sealed. Raises TamperedError."""
        if self.seal is not None:
            return record._replace(body=self.seal.open(RECORD, record.kind, name, record.body))
        return record._replace(body=record.body[:-TAG]) if self.locked else record

    def key(self, name: bytes, typed: bytes) -> tuple[bytes, bytes]:
        """The true name and the typed key of an item of the order. Raises TamperedError."""
        if self.seal is None:
            return name, typed[:-TAG] if self.locked else typed
        typed = self.seal.open(KEY, 0, name, typed)
        if not self.seal.hides:
            return name, typed
        end = 2 + int.from_bytes(typed[:2], "little")
        return typed[2:end], typed[end:]

    def sealed_key(self, name: bytes) -> bytes:
        """What the order says of a key that its name alone gives back. None such can be made in an encrypted chest."""
        return b"" if self.seal is None else self.seal.close(KEY, 0, name, b"")

    def note(self, note: bytes) -> bytes:
        """A note as it was before it was sealed. Raises TamperedError."""
        return note if self.seal is None else self.seal.open(NOTE, 0, b"", note)

    def sealed_note(self, note: bytes) -> bytes:
        return note if self.seal is None else self.seal.close(NOTE, 0, b"", note)

    def decode(self, name: bytes, typed: bytes) -> Hashable:
        """The key with this true name.

        Raises:
            CorruptError: there is none.
            ChestError: it cannot be loaded, or may not be.
        """
        if typed and (self.locked or self._decode is None):
            raise ChestError(f"the key cannot be shown{' without the key of the chest' if self.locked else ''}")
        return (self._decode or _keys.decode)(name, typed)

    def gives(self, name: bytes, typed: bytes) -> bool:
        """Whether an item of the order gives back the key with this name. Where its class is not here, that is believed."""
        try:
            true, typed = self.key(name, typed)
            key = self.decode(true, typed)
            return true[:1] == _keys.OPAQUE_PREFIX or _keys.name_of(key) == true
        except CorruptError:
            return False
        except ChestError:
            return True

    # --- value files

    def owns(self, start: bytes) -> bool:
        """Whether content with a footer that begins so can be this chest's: two serializers write footers."""
        serializer = self.serializer
        return serializer is None or serializer == ("safe" if start.startswith(MARKS[1]) else "pickle")

    @staticmethod
    def is_encrypted(start: bytes) -> bool:
        return start.startswith(FILE_MAGIC)

    # --- problems in a file, for as long as a repair takes

    def packed(self, problem: Problem) -> bytes:
        """What this process keeps for itself. No key is pickled for that which the chest would not have pickled."""
        name = typed = b""
        if problem.key is not None:
            codec = self._key_codec()
            if codec is None:
                name, typed = _keys.encode(problem.key) or (_keys.OPAQUE_PREFIX, _keys.pickled_key(problem.key))
            else:
                name, typed = codec.encode(problem.key) or (_keys.OPAQUE_PREFIX, codec.typed(problem.key))
        return json.dumps([*problem._replace(key=None), name.hex(), typed.hex(), self.serializer == "safe"]).encode()

    def unpacked(self, data: bytes) -> Problem:
        *parts, name, typed, safe = json.loads(data)
        problem = Problem(*parts)
        if not name:
            return problem
        codec = self._key_codec() if safe else None
        decode = _keys.decode if codec is None else codec.decode
        return problem._replace(key=decode(bytes.fromhex(name), bytes.fromhex(typed)))

    def _key_codec(self) -> Codec | None:
        return resolve("safe", None, None, "b") if self.serializer == "safe" else None
