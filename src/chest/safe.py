"""The safe serializer: which classes it may write, and how to read what it wrote without a chest.

    from chest import Chest, safe

    safe.register(Colour)
    c = Chest(path="shared", serializer="safe")

What it holds and what it refuses stands in ``docs/explanation/safe.md``. Needs the extra ``chest[safe]``.
"""

from __future__ import annotations

from typing import Any

from .serializers._registry import register

__all__ = ["dump", "dumps", "load", "loads", "register"]


def dumps(value: Any) -> bytes:
    """The value as MessagePack. Raises TypeError, which says what cannot be written, and where in the value it lies."""
    from .serializers import _safe

    return _safe.dumps(value)


def loads(data: bytes) -> Any:
    """The value that ``dumps`` wrote. Raises CorruptError for anything else, LoadError for what this process lacks."""
    from .serializers import _safe

    return _safe.loads(data)


def dump(value: Any, file: Any) -> None:
    """The value stands in ``file``, opened for writing bytes, as a chest would write it there. Raises TypeError."""
    from .serializers import _safe

    _safe.dump(value, file)


def load(file: Any) -> Any:
    """The value of a file of a chest. Reads all of it; a chest would map what is large. Raises CorruptError, LoadError."""
    from .serializers import _safe

    return _safe.load(file)
