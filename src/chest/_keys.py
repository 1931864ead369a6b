"""Names of keys, under which an index finds them: the same bytes exactly when two keys are one key of a ``dict``.

The name of a key is its form (see ``_forms``) or, above the 511 bytes that LMDB has room for, ``h`` and a digest of it.
Beside the name travels ``typed``, the key that was set first as its serializer writes it (a pickle, unless that is
``safe``), wherever the name does not give back its type and value. An *opaque* key has no form, because only its class
knows what equals it: its name is ``o`` and 16 random bytes, and finding it again means loading all opaque keys into a
dictionary. It may equal a key that has a form (a ``pandas.Timestamp`` equals a ``datetime``); nothing here can know.

File names show the keys that are plain words. They are for people: nothing is found by them.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Hashable
from hashlib import blake2b
from typing import Any

from ._forms import MAX_DEPTH, WORD, TooDeepError, form_of, is_exact, object_of, tuple_form
from .errors import ChestError, CorruptError, KeyTypeError, LoadError, short

__all__ = [
    "OPAQUE_PREFIX",
    "Encoded",
    "decode",
    "encode",
    "key_to_filename",
    "name_of",
    "opaque_name",
    "pickled_key",
]

OPAQUE_PREFIX = b"o"

_MAX_NAME = 511  # LMDB's limit
_HASHED = ord("h")

_PLAIN_WORD = re.compile(rb"s[A-Za-z][A-Za-z0-9_]{0,199}").fullmatch
_LOWER_WORD = re.compile(rb"s[a-z][a-z0-9_]{0,199}").fullmatch
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))})
_MAX_FILENAME = 1000


Encoded = tuple[bytes, bytes]
"""A key as the index holds it: its name and ``typed``, which is empty where the name alone gives back type and value."""


def name_of(key: Hashable) -> bytes | None:
    """The name of a key, 1 to 511 bytes, the same exactly for keys that are equal; None if the key is opaque.

    Costs 0.1 to 0.2 us for text and integers, about 0.5 us for a pair of them, 1 us and more for the rest.

    Raises:
        TypeError: the key is not hashable.
        KeyTypeError: it is nested more than 100 deep.
    """
    kind = type(key)
    if kind is str:
        try:
            name = b"s" + key.encode()  # type: ignore[attr-defined]
        except UnicodeEncodeError:
            name = form_of(key)
    elif kind is int and -WORD < key < WORD:  # type: ignore[operator]
        return b"i%d" % key  # type: ignore[str-format]
    else:
        try:
            name = tuple_form(key) if kind is tuple else form_of(key)
        except TooDeepError:
            message = f"The key is nested more than {MAX_DEPTH} deep and cannot be written. Use a flatter one."
            raise KeyTypeError(message, key=key) from None
        if not name:
            hash(key)  # raises what dict raises
            return None
    return name if len(name) <= _MAX_NAME else b"h" + blake2b(name, digest_size=32).digest()


def encode(
    key: Hashable,
    typed_of: Callable[[Hashable], bytes] | None = None,
    loads: Callable[[bytes], Any] | None = None,
) -> Encoded | None:
    """Name and, where needed, pickle of a key; None if it is opaque (see ``opaque_name`` and ``pickled_key``).

    Args:
        key: the key.
        typed_of, loads: write and read keys in another way than pickle's (``typed_of`` raises what ``pickled_key`` raises).

    Raises:
        TypeError: the key is not hashable.
        KeyTypeError: it cannot be pickled, its pickle gives another key, or it is nested more than 100 deep.
    """
    name = name_of(key)
    if name is None:
        return None
    if type(key) is str or is_exact(key):
        return name, (typed_of or pickled_key)(key) if name[0] == _HASHED else b""
    typed = (typed_of or pickled_key)(key)
    try:
        if name_of((loads or pickle.loads)(typed)) == name:
            return name, typed
        problem = None
    except Exception as error:
        problem = error
    raise KeyTypeError(
        f"The key {short(key)} of type {type(key).__qualname__} cannot be written, because what is written does not give it "
        f"back{f' ({problem})' if isinstance(problem, ChestError) else ''}. Use plain text, numbers or tuples of them.",
        key=key,
    ) from problem


def decode(name: bytes, typed: bytes, loads: Callable[[bytes], Any] | None = None) -> Hashable:
    """The key that was encoded, of the type it had. ``loads`` reads ``typed`` in another way than pickle's.

    Raises:
        CorruptError: the two are no encoding of any key.
        LoadError: the pickle of the key needs what is not there any more, a class for instance.
    """
    if typed:
        return _loaded(name, typed, loads or pickle.loads)
    tag = name[:1]
    try:
        if tag == b"s":
            return name[1:].decode("utf-8", "surrogatepass")
        if tag == b"b":
            return name[1:]
        key: Hashable
        if tag == b"i":
            key = int(name[1:])
            if name == b"i%d" % key and -WORD < key < WORD:
                return key
        key = object_of(name)
        if name_of(key) == name:  # a form that encode would not have written is damage, whatever it looks like
            return key
        problem = None
    except Exception as error:
        problem = error
    raise CorruptError(f"Damaged index: {short(name)} is the name of no key. Run check on the chest.") from problem


def opaque_name() -> bytes:
    """A fresh name for an opaque key; no other key has it."""
    return OPAQUE_PREFIX + os.urandom(16)


def pickled_key(key: Hashable) -> bytes:
    """The key as a pickle of protocol 5.

    Raises:
        KeyTypeError: the key cannot be pickled.
    """
    try:
        return pickle.dumps(key, 5)
    except Exception as error:
        raise KeyTypeError(
            f"The key {short(key)} of type {type(key).__qualname__} cannot be written, because it cannot be pickled "
            f"({type(error).__name__}: {error}). Use text, numbers or tuples of them, or make its class picklable.",
            key=key,
        ) from error


def key_to_filename(key: Hashable, name: bytes | None = None, *, folds: bool = False) -> str:
    """The relative path, with ``/``, of the readable file of a key: ``x`` for ``'x'``, ``_a/b`` for ``('a', 'b')``.

    What is no plain ASCII word is ``0`` and 32 hexadecimal digits. Equal keys have one path, different keys different
    ones, and none is a folder on the way to another: words start with a letter, folders with ``_``, digests with ``0``.

    Args:
        key: the key.
        name: its name, where the caller has it; opaque keys pass the one they were given.
        folds: the file system does not tell upper from lower case: words with upper case letters become digests.

    Raises:
        TypeError: the key is not hashable.
        KeyTypeError: it is opaque, was passed without a name, and cannot be pickled.
    """
    if name is None:
        name = name_of(key)
        if name is None:
            return _hex(pickled_key(key))
    if isinstance(key, tuple) and name[0] in b"pth" and 2 <= tuple.__len__(key) <= 16:
        parts = [_part(name_of(member) or b"", folds) for member in tuple.__iter__(key)]
        path = "_" + "/_".join(parts[:-1]) + "/" + parts[-1]
        return path if len(path) <= _MAX_FILENAME else _hex(name)
    return _part(name, folds)


def _part(name: bytes, folds: bool) -> str:
    if (_LOWER_WORD if folds else _PLAIN_WORD)(name):
        word = name[1:].decode("ascii")
        if word.lower() not in _DEVICES:
            return word
    return _hex(name)


def _hex(data: bytes) -> str:
    return "0" + blake2b(data, digest_size=16).hexdigest()


def _loaded(name: bytes, typed: bytes, loads: Callable[[bytes], Any]) -> Hashable:
    try:
        key: Hashable = loads(typed)
    except (pickle.UnpicklingError, EOFError, CorruptError) as error:
        raise CorruptError(
            f"Damaged index: the key named {short(name)} is nothing that was written there. Run check on the chest."
        ) from error
    except LoadError as error:
        raise type(error)(f"The key named {short(name)} cannot be loaded: {error}") from error
    except Exception as error:
        raise LoadError(
            f"The key named {short(name)} cannot be loaded ({type(error).__name__}: {error}). "
            "Make its class importable under the name it had when the key was set."
        ) from error
    try:
        hash(key)
    except Exception as error:
        raise CorruptError(
            f"Damaged index: the key named {short(name)} is a {type(key).__qualname__}, which is not hashable. "
            "Run check on the chest."
        ) from error
    return key
