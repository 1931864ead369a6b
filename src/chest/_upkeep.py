"""What keeps a chest in good order: checking it, giving room back, making a copy of it while others write."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TypeVar

from ._processes import Portable
from ._repairing import Problem, check

__all__ = ["Upkeep"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Upkeep(Portable[K, V]):
    """The part of a chest that is about its folder as a whole."""

    def check(self) -> Iterator[Problem]:
        """What is wrong with the folder, as ``chest.check`` finds it: of all that was committed, beside whoever writes.

        What is unwritten in memory is not looked at. Nothing is written.
        """
        self._usable()
        return check(self.path)
