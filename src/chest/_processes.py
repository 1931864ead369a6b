"""A chest in another process than the one that opened it: pickled, or inherited by a forked child.

Pickling is simple: everything is written, and the receiver opens the path.

For a fork the rule is that of two processes which opened the folder by path: a child sees what was committed. What its parent
had set and not written is the parent's to write; the child does not see it, and so cannot write it a second time. It begins
with nothing in memory, and opens the folder anew when the chest is first used. Until then the chest is as good as closed, and
costs nothing: what the parent had in memory is not even freed, which would copy page after page of it.
"""

from __future__ import annotations

import copy
import importlib
import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from types import ModuleType
from typing import Any, TypeVar

from . import _lifetime, _scratch
from ._hot import MemoryTier
from ._opening import open_folder
from ._sharing import Sharing
from ._store import Store
from .errors import PathError
from .serializers import Codec

__all__ = ["Portable", "refuse_gone"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Module(str):
    """The name of a module, which cannot be pickled itself: it is imported again."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return importlib.import_module, (str(self),)


class Portable(Sharing[K, V]):
    """The part of a chest that is about being in another process than the one that opened it."""

    path: str
    _scratch: bool
    _shared = False  # another process, or another chest of this one, was given it
    _forked = False  # inherited from a parent process, and not used since
    _before_fork: Any = None  # what the parent had, unused

    _given: dict[str, Any]  # all settings that do not change, as the constructor takes them
    _own: frozenset[str]  # the attributes that the constructor sets

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def sync(self) -> None: ...

    def _open_store(self, codec: Codec | None) -> Store:
        given = self._given
        return open_folder(
            self.path,
            codec,
            scratch=self._scratch,
            label=given["key_to_filename"],
            opener=given["open"],
            loose=given["loose"],
            verify=given["verify"] == "always",
            network=given["network"],
            allow=given["allow"],
            key=given["key"],
            encrypt=given["encrypt"],
            compression=given["compression"],
            read_only=given["read_only"],
        )

    def _begun(self) -> None:
        """All attributes are set."""
        self._own = frozenset([*vars(self), "_own", "_shared", "_forked", "_before_fork"])
        _lifetime.remember(self)

    # --- pickling

    def _sent(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything is written. The settings with which another process opens the folder, and what a subclass has added."""
        with self.lock:
            self._usable()
            self.sync()
            self._shared = True
            settings = {
                **self._given,
                "available_memory": self._tier.limit,
                "on_miss": self._on_miss,
                "on_overflow": self._on_overflow,
            }
        if isinstance(settings["serializer"], ModuleType):
            settings["serializer"] = _Module(settings["serializer"].__name__)
        return settings, {name: value for name, value in vars(self).items() if name not in self._own}

    # --- fork

    def _usable(self) -> None:
        if self._forked:
            self._reopen()
        super()._usable()

    def _inherited(self) -> None:
        """This process has just been forked. Nothing of the chest's state is reliable: another thread may have been at it."""
        if not self._closed:
            state = self._tier, self._store, self._dirty, self._unsure, self._tombs, self._lent, self._generation, self.lock
            self._before_fork = vars(self).copy(), state  # which need not be among its `vars`
        elif not self._forked:
            return
        self._shared = self._forked = self._closed = True
        self.lock = threading.RLock()
        self._none_open = threading.Condition(self.lock)
        self._transaction, self._transactions, self._found = None, set(), {}
        self._tier = MemoryTier(self._tier.limit)
        self._entries = self._tier.entries
        self._dirty, self._tombs, self._unsure, self._pinned = {}, {}, {}, {}
        self._lent = OrderedDict()
        self._failed = None

    def _reopen(self) -> None:
        with self.lock:
            if not self._forked:  # another thread was faster
                return
            if self._scratch:
                _scratch.join_scratch(self.path)
            try:
                refuse_gone(self.path)
                store = self._open_store(self._store.codec)
            except BaseException:
                if self._scratch:
                    _scratch.remove_scratch(self.path)
                raise
            settings = self._on_miss, self._on_overflow, self._write_through
            super().__init__(store, self._tier.limit, self.lock)
            self._on_miss, self._on_overflow, self._write_through = settings
            self._forked = False
            self._before_fork = None
            _lifetime.remember(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A scratch chest with the same settings and with values of its own."""
        twin = memo[id(self)] = self._twin()
        donor = twin._donor(self)
        if donor is not None:
            twin._adopt(donor, True)
        else:
            for key, value in self.items():
                twin[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
        return twin


def refuse_gone(path: str) -> None:
    """Raises PathError where there is no chest: to make an empty one would be no help to whoever was sent a full one."""
    if not os.path.lexists(os.path.join(path, ".keys")):
        raise PathError(f"there is no chest at {path} any more (or not on this machine)", path=path)
