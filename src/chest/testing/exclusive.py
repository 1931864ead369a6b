"""What the transactions of every index do, and what it tells of changes, as tests."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..abc import Index
from .index import all_items, check, put, raises

__all__ = ["TransactionContract"]


def elsewhere(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    assert found, "it waits, or has failed"
    return found[0]


class TransactionContract:
    """A part of ``IndexContract``; ``index(tmp_path)`` gives an index and closes it."""

    @abstractmethod
    def index(self, folder: Path) -> AbstractContextManager[Index]: ...

    def test_what_is_committed_in_a_transaction_takes_place_at_its_end(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1, b"old"), put("gone", 2)])
            version, generation = index.version(), index.generation[0]
            with index.transaction() as inside:
                first = inside.commit([put("a", 1, b"new"), put("b", 3, kind=1)], [b"gone"], notes=lambda _: [b"note"])
                second = inside.commit([put("c", 4), put("b", 3, b"again")], meta={b"m": b"1"})
                assert first.before == second.before == version < first.version == second.version
                assert all_items(inside) == [(1, b"a"), (3, b"b"), (4, b"c")]
                assert (len(inside), inside.last_seq(), inside.notes()) == (3, 4, [b"note"])
                record = inside.get(b"b")
                assert record is not None
                assert record.body == b"again"
                for outside in (lambda: all_items(index), lambda: elsewhere(lambda: all_items(index))):
                    assert outside() == [(1, b"a"), (2, b"gone")]
                assert index.generation[0] == generation
            assert index.version() == first.version
            assert index.generation[0] != generation
            assert (index.meta(b"m"), index.notes()) == (b"1", [b"note"])
            assert all_items(index) == [(1, b"a"), (3, b"b"), (4, b"c")]
            check(index)

    def test_a_transaction_that_raises_has_not_happened(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1, b"old")])
            version, generation = index.version(), index.generation[0]

            def fail() -> None:
                with index.transaction() as inside:
                    inside.commit([put("a", 1, b"new"), put("b", 2)], notes=lambda _: [b"note"])
                    raise ZeroDivisionError

            with raises(ZeroDivisionError):
                fail()
            assert (index.version(), index.generation[0], index.notes()) == (version, generation, [])
            assert all_items(index) == [(1, b"a")]
            assert index.changed_since(version) in ((version, []), (version, None))
            assert index.commit([put("c", 2)]).before == version
            check(index)

    def test_a_transaction_that_writes_nothing_is_no_commit(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            version = index.version()
            with index.transaction() as inside:
                assert inside.get(b"a") is None
            assert index.version() == version

    def test_nobody_else_commits_during_a_transaction(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            with index.transaction() as inside:
                other = threading.Thread(target=lambda: index.commit([put("theirs", 1)]))
                other.start()
                inside.commit([put("ours", 1)])
                assert all_items(inside) == [(1, b"ours")]
            other.join(30)
            assert not other.is_alive()
            assert all_items(index) == [(1, b"ours"), (2, b"theirs")]

    def test_increments_in_transactions_of_many_threads_are_all_there(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("n", 1, b"0")])

            def work() -> None:
                for _ in range(20):
                    with index.transaction() as inside:
                        record = inside.get(b"n")
                        assert record is not None
                        inside.commit([put("n", 1, b"%d" % (int(record.body) + 1))])

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            record = index.get(b"n")
            assert record is not None
            assert record.body == b"80"

    def test_it_tells_what_changed_or_that_it_does_not_know(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            version = index.version()
            index.commit([put("a", 1), put("b", 2, typed=b"B")])
            index.commit([put("c", 3)], [b"b", b"missing"])
            with index.transaction() as inside:
                inside.commit([put("d", 4)])
                inside.commit([put("e", 5)])
            newest, changed = index.changed_since(version)
            assert newest == index.version()
            if changed is not None:
                assert set(changed) >= {(b"a", b""), (b"b", b"B"), (b"c", b""), (b"d", b""), (b"e", b"")}
                assert {name for name, _ in changed} <= {b"a", b"b", b"c", b"d", b"e"}
            assert index.changed_since(newest) in ((newest, []), (newest, None))
