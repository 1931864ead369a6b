"""Chest: a dictionary that spills to disk.

>>> from chest import Chest
>>> with Chest(path="my-chest", available_memory="500 MB") as c:  # doctest: +SKIP
...     c["x"] = [1, 2, 3]
"""

from __future__ import annotations

from . import errors
from ._repairing import Problem, check
from .core import Chest, Stats, key_to_filename, nbytes
from .errors import *  # noqa: F403 - the whole tree is public, and stands in errors.__all__
from .errors import UnsafePathWarning

__version__ = "1.0.0.dev0"

__all__ = ["Chest", "Problem", "Stats", "UnsafePathWarning", "check", "errors", "key_to_filename", "nbytes"]
__all__ += [name for name in errors.__all__ if name != "short"]
