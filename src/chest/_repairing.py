"""``chest.check``: what is wrong with a chest's folder, and a damaged chest made whole as far as something of it is left.

There is one way for all damage (``_rebuilding``): a new index is made beside the old one and takes its place by a rename.
What cannot be used any more goes to ``.keys/aside-<date>``, and nothing is ever deleted.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import _fs
from ._aside import Aside
from ._checking import Checker
from ._problems import KINDS, Problem
from ._rebuilding import Rebuild, set_generation
from ._sealing import check_arguments, checked
from ._trust import Trust
from .engines._alone import alone
from .engines._environments import ENVIRONMENTS
from .engines._legacy import finish_upgrade
from .errors import PathError, short
from .serializers import resolve

__all__ = ["Problem", "check", "found_by"]

_REBUILT = frozenset({"index", "record", "order", "key", "missing", "value", "orphan", "note", "meta", "log"})


def check(
    path: str | os.PathLike[str],
    *,
    repair: bool = False,
    serializer: Any = None,
    key: bytes | Callable[[], bytes] | None = None,
    allow: Iterable[str] | None = None,
) -> Iterator[Problem]:
    """What is wrong with the chest in a folder: every checksum of every value, every reference, the index page by page.

    Problems come as they are found. Others may read and write meanwhile; what only looks wrong because a commit is under way
    is not reported. Nothing is written without ``repair``. Memory is bounded, however many keys there are; a value that is
    compressed or sealed is opened in memory. Reads everything: about 1 GB of values and 60,000 keys a second. Keys are
    unpickled where their type takes that (not with ``serializer="safe"``), values are not.

    Args:
        path: the chest's folder.
        repair: mend what can be mended before this returns, with the chest to itself: the problems are those that were found
            before. What can be used no more is moved to ``.keys/aside-<date>`` beside a ``log.txt``, nothing is deleted. May be
            killed and run again at any time.
        serializer: the chest's own, as ``Chest`` takes it; None for the one that the folder remembers. Give it where others
            can write to the folder: with ``"safe"`` nothing is unpickled, whatever the folder says.
        key: that of a signed or encrypted chest, as ``Chest`` takes it: everything is authenticated. Without it only checksums
            are looked at and whatever else needs no key, nothing is unpickled, and nothing can be repaired.
        allow: what pickled keys may name, as ``Chest`` takes it.

    Returns:
        The problems: of each its ``kind``, ``key``, ``path``, ``message``, and what ``repair`` does about it.

    Raises:
        PathError: there is no chest.
        WrongKeyError: the chest was made with another key; ``repair``, and it needs one that was not given.
        CorruptError: ``repair``, and of a sealed chest that is lost without which the key opens nothing.
        SerializerMismatchError: ``repair``, and the folder remembers another serializer.
        InUseError: ``repair``, and somebody has it open.
        DiskFullError: ``repair``, and there is no room for a second index. Nothing has changed.
    """
    path = os.path.abspath(os.fspath(path))
    ask, _ = check_arguments(key, False)
    allow = allow if allow is None or isinstance(allow, str) else list(allow)
    codec = resolve(serializer, None, None, "b", allow)
    guarded = ask is not None or (codec is not None and codec.name == "safe")
    trust = Trust(path, codec, allow=allow, secret=None if ask is None else checked(ask()), guarded=guarded)
    if not repair:
        return found_by(trust)
    try:
        return _repair(path, trust)
    except OSError as error:
        raise _fs.as_disk_full(error, path) or error from error


def found_by(trust: Trust) -> Iterator[Problem]:
    """What is wrong with a chest."""
    return (finding.problem for finding in Checker(trust.path, trust).problems())


def _repair(path: str, trust: Trust) -> Iterator[Problem]:
    keys = os.path.join(path, ".keys")
    if not os.path.isdir(path):
        raise PathError(f"there is no folder {path}: give the path of a chest.", path=path)
    if not os.path.islink(keys):
        finish_upgrade(path)
    found: Any = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the iterator lives
    problems = _Spooled(found, trust)
    aside = Aside(path)
    try:
        ENVIRONMENTS.refuse_open(keys)
        for name in ("", "lock.mdb"):
            place = os.path.join(keys, name) if name else keys
            if _make_way(aside, place, stat.S_ISREG if name else stat.S_ISDIR):
                what = f"{place} is no {'regular file' if name else 'folder'}"
                problems.add(Problem("index", None, place, what, KINDS["index"]))
        if os.path.isfile(keys) or not os.path.lexists(keys):
            first = list(Checker(path, trust).problems())  # raises where there is nothing
            if os.path.isfile(keys):  # of chest 0.2: nothing to repair it from
                found.close()
                return iter([finding.problem for finding in first])
            _refuse(trust)
            os.mkdir(keys, 0o700)
        with alone(keys):
            kinds = set()
            for finding in Checker(path, trust).problems():
                _refuse(trust)
                kinds.add(finding.problem.kind)
                problems.add(finding.problem)
                if finding.problem.kind in ("copy", "generation") and os.path.lexists(finding.problem.path):
                    _make_way(aside, finding.problem.path, stat.S_ISREG)
            _refuse(trust)
            if "format" not in kinds:
                for name in ("new", "data.mdb", "generation", "reserve"):
                    _make_way(aside, os.path.join(keys, name), stat.S_ISDIR if name == "new" else stat.S_ISREG)
                if kinds & _REBUILT:
                    Rebuild(path, aside, trust).run()
                elif "generation" in kinds:
                    set_generation(keys, 0)
        aside.close()
        found.seek(0)
        return problems
    except BaseException:
        found.close()
        aside.close()
        raise


def _refuse(trust: Trust) -> None:
    if trust.refusal is not None:
        raise trust.refusal


class _Spooled(Iterator[Problem]):
    """Problems in a temporary file, which is closed with the last of them, or when nobody wants the rest."""

    def __init__(self, file: Any, trust: Trust) -> None:
        self._file = file
        self._trust = trust

    def add(self, problem: Problem) -> None:
        try:
            data = self._trust.packed(problem)
        except Exception:
            data = self._trust.packed(problem._replace(key=short(problem.key)))
        self._file.write(len(data).to_bytes(8, "little") + data)

    def __next__(self) -> Problem:
        try:
            head = self._file.read(8)
        except ValueError:  # it is closed
            head = b""
        if not head:
            self._file.close()
            raise StopIteration
        return self._trust.unpacked(self._file.read(int.from_bytes(head, "little")))

    def __del__(self) -> None:
        self._file.close()


def _make_way(aside: Aside, path: str, is_right: Callable[[int], bool]) -> bool:
    """What lies there and is not of the right kind is set aside. A ``.keys`` of chest 0.2 is, which is never empty."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if is_right(found.st_mode) or (os.path.basename(path) == ".keys" and stat.S_ISREG(found.st_mode) and found.st_size):
        return False
    aside.move(path, "it lies in the place of something that belongs to the index")
    return True
