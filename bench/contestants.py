"""What a contestant is: a library behind the same few functions, opened as its own documentation opens it.

A contestant is a function of a folder and a memory budget; it opens what is in the folder and returns a ``Handle``.
Where a library stores bytes only, the pickling that its user would write is added, so that all do the same work.
Settings are the defaults but where they would lose data (a size limit that evicts) or where a budget can be given.
The contestants themselves stand in ``stores`` and ``files``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

PEERS = Path(__file__).parent.parent / "build" / "peers"  # packages that cannot be installed beside chest


class Handle(NamedTuple):
    """An opened store. ``close`` returns when everything is as durable as the library makes it by itself.

    What is None the library cannot do, and is shown as "-".
    """

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]
    items: Callable[[], Iterable[tuple[Any, Any]]]
    close: Callable[[], None]
    delete: Callable[[Any], None] | None = None
    keys: Callable[[], Iterable[Any]] | None = None
    contains: Callable[[Any], bool] | None = None
    count: Callable[[], int] | None = None
    flush: Callable[[], None] = lambda: None  # after values were changed that `get` returned
    prefetch: Callable[[Any], None] | None = None


def handle(mapping: Any, close: Callable[[], None], **others: Any) -> Handle:
    """Of something that behaves like a dictionary; ``others`` says where it does not."""
    usual = {
        "get": mapping.__getitem__,
        "set": mapping.__setitem__,
        "delete": mapping.__delitem__,
        "keys": lambda: iter(mapping),
        "contains": mapping.__contains__,
        "close": close,
    }
    if "items" not in others:
        usual["items"] = mapping.items
    if "count" not in others:
        usual["count"] = mapping.__len__
    return Handle(**(usual | others))


class Contestant(NamedTuple):
    name: str
    open: Callable[[str, int], Handle]
    at_once: str  # what survives of which event as soon as `set` has returned: "nothing", "kill -9" or "power cut"
    closed: str  # the same once `close` has returned: "nothing", "kill -9" (and so a normal exit) or "power cut"
    closed_large: str = ""  # the same of values that it writes to files of their own, if it is less
    persists: bool = True  # can be opened again
    in_place: bool = False  # what was changed in place needs not be set again
    limit: bool = False  # no library but what the machine allows: shown, not competed with
    bounded: bool = False  # claims to keep its values below a number of bytes of memory
    most: int | None = None  # keys; with more it is not measured,
    why_most: str = ""  # because of this
    path: str = ""  # the folder of its packages, before all others

    def survives(self, large: bool) -> str:
        return f"{self.at_once} / {(large and self.closed_large) or self.closed}"


CONTESTANTS: dict[str, Contestant] = {}

Opener = Callable[[str, int], Handle]
A_FILE_EACH = {"most": 20_000, "why_most": "it makes a file for each key"}


def contestant(name: str, at_once: str, closed: str, **traits: Any) -> Callable[[Opener], Opener]:
    def register(function: Opener) -> Opener:
        CONTESTANTS[name] = Contestant(name, function, at_once, closed, **traits)
        return function

    return register


def dumps(value: Any) -> bytes:
    return pickle.dumps(value, protocol=5)
