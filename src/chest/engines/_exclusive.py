"""One write transaction that stays open while a user's code runs, and the environment as it looks from inside of it.

It is the one exception to the rule that a transaction is begun and ended in one function call. It is not inside of the
gate: whoever resizes the map or forks takes the writers' lock first, which this thread holds.
"""

from __future__ import annotations

import contextlib
from _thread import get_ident
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lmdb

from ..errors import ChestError, FailedError
from ._environment import Environment
from ._gate import GATE

__all__ = ["Held", "exclusive"]

T = TypeVar("T")


class Held:
    """What ``LmdbIndex`` uses of an environment; all of it happens in the one transaction."""

    sync = False  # what is committed here is durable when the transaction is

    def __init__(self, env: Environment, txn: Any) -> None:
        self._env = env
        self._txn = txn
        self._wrote = False
        self._problem: Exception | None = None  # after an error within it, LMDB refuses to commit a transaction
        self.index, self.order, self.pending, self.meta = env.index, env.order, env.pending, env.meta
        self.changed = env.changed
        self.data = env.data
        self.n_users = 1
        self.generation = memoryview(txn.id().to_bytes(8, "little")).cast("Q")

    def begin(self, db: Any) -> _View:
        return _View(self._txn, db)

    def read(self, work: Callable[[Any], T]) -> T:
        try:
            return work(self._txn)
        except lmdb.Error as error:
            raise self._remember(error) from error

    def write(self, folder: str, work: Callable[[Any], tuple[T, bool]]) -> T:
        self._env.refuse_lost()
        if self._problem is not None:
            raise self._problem
        try:
            result, wrote = work(self._txn)
        except lmdb.Error as error:
            raise self._remember(error) from error
        self._wrote = self._wrote or wrote
        return result

    def _remember(self, error: lmdb.Error) -> Exception:
        if isinstance(error, lmdb.MapFullError):
            folder = self._env.folder
            self._problem = ChestError(
                f"the transaction is larger than the map of the index in {folder}. Nothing of it was written: the map grows "
                "when it ends, so try it again, or write less at a time.",
                path=folder,
            )
        else:
            self._problem = self._env.translated(error)
        self._problem.__cause__ = error
        return self._problem

    @property
    def wrote(self) -> bool:
        """Whether there is something to commit. Raises what has made that impossible."""
        self._env.refuse_lost()
        if self._problem is not None:
            raise self._problem
        return self._wrote


class _View:
    """A read transaction on one database, as ``LmdbIndex.get`` uses it."""

    __slots__ = ("_db", "_txn")

    def __init__(self, txn: Any, db: Any) -> None:
        self._txn = txn
        self._db = db

    def get(self, name: bytes) -> bytes | None:
        found: bytes | None = self._txn.get(name, db=self._db)
        return found

    def abort(self) -> None:
        pass


@contextlib.contextmanager
def exclusive(env: Environment, folder: str) -> Iterator[Held]:
    """Within the block nobody else commits. What was written is committed at its end, or given up if it raises.

    If this process dies in it, the next writer goes on from the last commit: LMDB's lock is robust.
    """
    ident = get_ident()
    if env.is_held():
        raise ChestError(
            f"this thread is inside a transaction of another chest on {folder}: use that one in there, or end it first.",
            path=folder,
        )
    with env._writer:
        env._reclaim(folder)
        env._writing = ident
        try:
            txn = _begin(env, folder)
            held = Held(env, txn)
            seen = env.map_size
            try:
                env._refuse_moved(folder)
                yield held
                if get_ident() != ident:
                    raise ChestError(
                        f"a transaction of the chest in {folder} was ended by another thread than the one that began it (a "
                        "generator does that, or an async framework): it is undone.",
                        path=folder,
                    )
                if held.wrote:
                    env._commit(txn)
                else:
                    txn.commit()  # writes nothing, and is not kept waiting as `abort` is
            except BaseException as error:
                if get_ident() != ident and not env.lost:  # LMDB's lock belongs to the thread
                    env.abandoned = txn, ident
                    raise
                env.give_up(txn)
                full = error.__cause__ if isinstance(error, ChestError) else error
                if isinstance(full, lmdb.MapFullError):
                    env._recover(full, seen, attempt=1)
                if isinstance(error, lmdb.Error):
                    raise env.translated(error) from error
                raise
        finally:
            env._writing = 0


def _begin(env: Environment, folder: str) -> Any:
    inside, ident = GATE.inside, get_ident()
    attempt = 0
    while True:
        if env.failed is not None:
            raise FailedError(env.failed, path=folder)
        seen = env.map_size
        try:
            inside.append(ident)
            if GATE.shut:
                GATE.wait(ident)
            return env.begin(write=True)
        except (lmdb.MapResizedError, lmdb.PanicError) as error:
            problem = error
        except lmdb.Error as error:
            raise env.translated(error) from error
        finally:
            inside.remove(ident)
        env._recover(problem, seen, attempt)
        attempt += 1
