"""Every error that chest raises, in one tree.

    ChestError
    ├── KeyTypeError (TypeError)       a key that cannot be written
    ├── ClosedError (ValueError)       the chest is closed
    ├── FailedError (OSError)          the disk failed under the chest: it is readable, it writes no more
    ├── WriteError                     a value could not be written: it stays in memory
    │   └── SerializeError (TypeError) ... because its serializer refused it
    ├── DiskFullError (OSError)        ENOSPC: nothing was lost, make room and go on
    ├── LoadError                      a whole value that its serializer cannot load (a missing class, for instance)
    │   ├── CorruptError               damage: what is on disk is not what was written
    │   │   └── TamperedError          ... with the chest's key: damage, or somebody's doing
    │   └── NotAllowedError            its pickle needs what the allow-list does not name
    ├── WrongKeyError (ValueError)     the chest was made with another key, with none, or needs one
    ├── SerializerMismatchError (ValueError)  the chest was written with another serializer
    ├── PathError (OSError)            the path cannot hold a chest
    │   └── NetworkPathError           ... because it lies on a network file system
    ├── ReadOnlyError (TypeError)      the chest was opened with read_only=True
    ├── InUseError (OSError)           somebody else has the chest open, and what was asked for needs it alone
    ├── FormatError                    written by a newer chest
    └── MissingExtraError (ImportError)

    UnsafePathWarning (UserWarning)    others can write to the folder, and so run code in the name of whoever reads it

A missing key is a plain ``KeyError`` and an unhashable one a plain ``TypeError``, as in ``dict``. Nothing here derives
from ``KeyError``: ``Mapping.get`` would answer damage with its default. ``.key`` and ``.path`` are for programs, the
sentence is for people and ends in what to do. All of them survive pickling.
"""

from __future__ import annotations

import errno
import pickle
from typing import Any

__all__ = [
    "ChestError",
    "ClosedError",
    "CorruptError",
    "DiskFullError",
    "FailedError",
    "FormatError",
    "InUseError",
    "KeyTypeError",
    "LoadError",
    "MissingExtraError",
    "NetworkPathError",
    "NotAllowedError",
    "PathError",
    "ReadOnlyError",
    "SerializeError",
    "SerializerMismatchError",
    "TamperedError",
    "WriteError",
    "WrongKeyError",
    "short",
]


def short(key: object, limit: int = 80) -> str:
    """The key as it is shown in messages: its ``repr``, cut to ``limit`` characters; never raises."""
    try:
        text = repr(key)
    except Exception:
        text = f"<{type(key).__name__} whose repr fails>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class ChestError(Exception):
    """Root of the errors of chest.

    Attributes:
        key: the key concerned, None where there is none (or where it is None itself: see the message).
        path: the file or folder concerned, as text, or None.
    """

    def __init__(self, message: str = "", *, key: Any = None, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.path = path

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.key)
            key = self.key
        except Exception:  # such a key may be what the error is about
            key = short(self.key)
        return _rebuild, (type(self), self.message, key, self.path)


def _rebuild(cls: type[ChestError], message: str, key: Any, path: str | None) -> ChestError:
    return cls(message, key=key, path=path)


class KeyTypeError(ChestError, TypeError):
    """The key is hashable but cannot be written (it cannot be pickled)."""


class ClosedError(ChestError, ValueError):
    """The chest is closed."""


class FailedError(ChestError, OSError):
    """The disk failed under this chest. What is in memory stays readable; nothing is written any more; open it again."""


class WriteError(ChestError):
    """A value could not be written. It stays in memory, and other values go on being written."""


class SerializeError(WriteError, TypeError):
    """The serializer refused the value. It stays in memory, and other values go on being written."""


class DiskFullError(ChestError, OSError):
    """The disk is full (``errno`` is ENOSPC). Nothing was lost: make room and try again."""

    def __init__(self, message: str = "", *, key: Any = None, path: str | None = None) -> None:
        super().__init__(message, key=key, path=path)
        self.errno = errno.ENOSPC


class LoadError(ChestError):
    """The bytes of a value are as they were written, but its serializer cannot make a value of them."""


class CorruptError(LoadError):
    """What is on disk is not what was written."""


class NotAllowedError(LoadError):
    """A pickle asks for a class or function that ``Chest(allow=...)`` does not name. Nothing of it was run."""


class TamperedError(CorruptError):
    """What is on disk was not written with the chest's key, or not for this place: it is damaged, or somebody's doing."""


class WrongKeyError(ChestError, ValueError):
    """The chest was made with another key, or with none, or it was made with one and none was given."""


class SerializerMismatchError(ChestError, ValueError):
    """The chest was written with another serializer than the one it is opened with."""


class PathError(ChestError, OSError):
    """The path cannot hold a chest: it is a file, is not writable, or has gone."""


class NetworkPathError(PathError):
    """The path is on a network file system, where the index would be damaged sooner or later."""


class ReadOnlyError(ChestError, TypeError):
    """The chest was opened with ``read_only=True``: nothing is written. Values that were changed stay as they are in memory."""


class InUseError(ChestError, OSError):
    """Somebody else has the chest open, and what was asked for needs it alone: close it there and try again."""


class UnsafePathWarning(UserWarning):
    """Others can write to a chest's folder. A pickle runs what its author likes: they could act in the reader's name."""


class FormatError(ChestError):
    """The folder was written by a version of chest that this one cannot read."""


class MissingExtraError(ChestError, ImportError):
    """A package is missing that the asked-for feature needs; the message names the extra to install."""
