"""What keeps a map from being resized, or a process from being forked, under a transaction.

It costs a transaction 0.1 us and no lock: the threads inside are written down in a list, whose ``append`` and
``remove`` are atomic. Whoever wants to be alone shuts the gate and waits until the list is empty.
"""

from __future__ import annotations

import contextlib
import threading
import time
from _thread import get_ident
from collections.abc import Iterator

__all__ = ["GATE", "Gate"]

_PAUSE = 50e-6  # seconds between two looks at who is inside


class Gate:
    """Lets any number of threads in, or one thread alone.

    Whoever enters does so with these lines, in this order; an interrupt cannot come between ``try`` and ``append``:

        try:
            gate.inside.append(ident)
            if gate.shut:
                gate.wait(ident)
            ...
        finally:
            gate.inside.remove(ident)
    """

    def __init__(self) -> None:
        self.inside: list[int] = []  # always the same list
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child nobody is inside but this thread, if it was; whoever held the locks is not here."""
        self.inside[:] = [ident for ident in self.inside if ident == get_ident()]
        self.shut = False
        self._key = threading.Lock()  # of those who shut it
        self._door = threading.Lock()  # what the others wait for

    def wait(self, ident: int) -> None:
        """Step outside until the gate is open again. Not if this thread was inside before: it is being waited for."""
        while self.shut and self.inside.count(ident) == 1:
            self.inside.remove(ident)
            try:
                with self._door:
                    pass
            finally:
                self.inside.append(ident)

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Nobody else comes in. For a thread that is inside, and needs what those who come in keep taking from it."""
        mine = self._key.acquire(blocking=False)
        while not mine and not self.shut:  # somebody is just about to shut the gate, or has just opened it
            time.sleep(_PAUSE)
            mine = self._key.acquire(blocking=False)
        if not mine:  # it stays shut until this thread has left
            yield
            return
        try:
            with self._shutting():
                yield
        finally:
            self._key.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread is inside, and none of this one's own transactions. Within, this thread is inside."""
        ident = get_ident()
        if ident in self.inside:
            raise RuntimeError("this thread is in the middle of a transaction (a signal handler or finalizer, perhaps)")
        with self._key, self._shutting():
            while self.inside:
                time.sleep(_PAUSE)
            try:
                self.inside.append(ident)  # a finalizer that runs now must not wait for this thread
                yield
            finally:
                self.inside.remove(ident)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The lines above, for what is not called often."""
        ident = get_ident()
        try:
            self.inside.append(ident)
            if self.shut:
                self.wait(ident)
            yield
        finally:
            self.inside.remove(ident)

    def seize(self, until: float) -> bool:
        """As ``alone``, from here to ``release``; or False where that would last beyond ``until`` (of ``time.monotonic``)."""
        if get_ident() in self.inside or not self._key.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        self._door.acquire()
        self.shut = True
        while self.inside:
            if time.monotonic() > until:
                self._open()
                return False
            time.sleep(_PAUSE)
        self.inside.append(get_ident())
        return True

    def release(self) -> None:
        """The end of what ``seize`` began."""
        self.inside.remove(get_ident())
        self._open()

    def _open(self) -> None:
        self.shut = False
        self._door.release()
        self._key.release()

    @contextlib.contextmanager
    def _shutting(self) -> Iterator[None]:
        with self._door:  # at most for an instant in the hands of one who has waited for it
            self.shut = True
            try:
                yield
            finally:
                self.shut = False


GATE = Gate()
