"""What every index does, as tests: subclass ``IndexContract`` and say how one is made."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from ..abc import Commit, Index, Put, Record
from ..errors import ClosedError

__all__ = ["IndexContract", "raises"]


@contextlib.contextmanager
def raises(*kinds: type[BaseException]) -> Iterator[None]:
    """The block raises one of these."""
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"nothing was raised, instead of {' or '.join(kind.__name__ for kind in kinds)}")


def put(name: str, seq: int, body: bytes = b"body", *, kind: int = 0, typed: bytes = b"", fresh: bool = False) -> Put:
    """A put, with what matters to a test in front."""
    return Put(name.encode(), seq, kind, body, typed, fresh)


def all_items(index: Index, limit: int = 1000, *, reverse: bool = False) -> list[tuple[int, bytes]]:
    """Every key in insertion order."""
    found: list[tuple[int, bytes]] = []
    after = None
    while page := index.page(after, limit, reverse=reverse):
        after = page[-1].seq
        found += [(item.seq, item.name) for item in page]
    return found


def check(index: Index) -> None:
    """Records and order say the same, in one snapshot or another."""
    items = all_items(index)
    assert items == sorted(items), "the order is not in order"
    assert all_items(index, reverse=True) == items[::-1]
    records = index.get_many([name for _, name in items])[1]
    assert [None if record is None else record.seq for record in records] == [seq for seq, _ in items]
    assert len(index) == len(items)
    assert index.names(b"") == sorted(name for _, name in items)
    assert index.last_seq() == (items[-1][0] if items else 0)


class IndexContract:
    """Subclass it in a test file; ``make_index`` is the only thing to write. All tests take pytest's ``tmp_path``."""

    @abstractmethod
    def make_index(self, folder: Path) -> Index:
        """A handle on the index in a folder (the same one each time, for one folder), created if there is none."""

    @contextlib.contextmanager
    def index(self, folder: Path) -> Iterator[Index]:
        """A handle that is checked and closed at the end."""
        index = self.make_index(folder)
        try:
            yield index
            check(index)
        finally:
            index.close()

    # --- records

    def test_an_empty_index_holds_nothing(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            assert len(index) == 0
            assert index.get(b"x") is None
            assert index.get_many([b"x", b"y"])[1] == [None, None]
            assert index.get_many([])[1] == []
            assert index.page() == index.page(reverse=True) == []
            assert index.names(b"") == index.notes() == []
            assert index.last_seq() == 0
            assert index.meta(b"x") is None
            assert index.nbytes() >= 0

    def test_syncing_changes_nothing_that_can_be_seen(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.sync()
            commit = index.commit([put("x", 1)])
            index.sync()
            index.sync()
            assert index.version() == commit.version
            assert index.get(b"x") == Record(commit.version, 1, 0, b"body")

    def test_what_is_put_comes_back(self, tmp_path: Path) -> None:
        bodies = [b"", b"\0", b"x" * 65_536, bytes(range(256))]
        with self.index(tmp_path) as index:
            commit = index.commit([put(f"k{n}", n + 1, body, kind=n * 85) for n, body in enumerate(bodies)])
            for n, body in enumerate(bodies):
                assert index.get(f"k{n}".encode()) == Record(commit.version, n + 1, n * 85, body)
            assert len(index) == len(bodies)

    def test_names_may_have_511_bytes_of_any_kind(self, tmp_path: Path) -> None:
        names = [b"\0", b"\xff" * 511, b"a" * 511, b"a" * 510 + b"b", b"\0\0", b"A", b"a"]
        with self.index(tmp_path) as index:
            index.commit([Put(name, n + 1, 0, name) for n, name in enumerate(names)])
            for name in names:
                record = index.get(name)
                assert record is not None
                assert record.body == name
            assert [item.name for item in index.page()] == names

    def test_a_name_that_is_empty_or_too_long_is_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            for name in (b"", b"x" * 512):
                with raises(ValueError):
                    index.commit([put("good", 1), Put(name, 2, 0, b"")])
                assert len(index) == 0

    def test_a_name_that_occurs_twice_is_refused(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            with raises(ValueError):
                index.commit([put("x", 1), put("x", 2)])
            with raises(ValueError):
                index.commit([put("x", 1)], [b"x"])
            assert len(index) == 0

    def test_a_key_that_is_set_again_keeps_its_place_and_its_type(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            first = index.commit([put("a", 1, typed=b"int"), put("b", 2)])
            second = index.commit([put("a", 9, b"new", kind=3, typed=b"float")])
            assert index.get(b"a") == Record(second.version, 1, 3, b"new")
            assert index.get(b"b") == Record(first.version, 2, 0, b"body")
            assert [(item.seq, item.name, item.typed) for item in index.page()] == [(1, b"a", b"int"), (2, b"b", b"")]

    def test_a_fresh_key_moves_to_its_new_place(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1, typed=b"int"), put("b", 2)])
            index.commit([put("a", 3, typed=b"float", fresh=True)])
            assert [(item.seq, item.name, item.typed) for item in index.page()] == [(2, b"b", b""), (3, b"a", b"float")]

    def test_fresh_means_nothing_where_there_is_no_such_key(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1, fresh=True)])
            assert all_items(index) == [(1, b"a")]

    def test_deleted_keys_are_gone_and_absent_ones_are_no_error(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1), put("b", 2), put("c", 3)])
            index.commit([put("d", 4)], [b"b", b"nothing"])
            assert index.get(b"b") is None
            assert [name for _, name in all_items(index)] == [b"a", b"c", b"d"]
            index.commit([put("b", 5)])
            assert [name for _, name in all_items(index)] == [b"a", b"c", b"d", b"b"]

    def test_get_many_keeps_the_order_of_the_names(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            commit = index.commit([put("a", 1, b"A"), put("b", 2, b"B")])
            version, found = index.get_many([b"b", b"x", b"a", b"b"])
            assert version == commit.version == index.version()
            assert [None if record is None else record.body for record in found] == [b"B", None, b"A", b"B"]

    def test_names_with_a_prefix_are_sorted(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put(name, n + 1) for n, name in enumerate(["b2", "a", "b", "c", "b1", "ba"])])
            assert index.names(b"b") == [b"b", b"b1", b"b2", b"ba"]
            assert index.names(b"bb") == index.names(b"z") == []

    def test_settings_last(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit(meta={b"format": b"1", b"empty": b""})
            index.commit(meta={b"format": b"2"})
        with self.index(tmp_path) as index:
            assert index.meta(b"format") == b"2"
            assert index.meta(b"empty") == b""
            assert index.meta(b"other") is None

    def test_everything_is_there_after_reopening(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            commit = index.commit([put("a", 1, typed=b"t"), put("b", 2, kind=1)], notes=lambda _: [b"note"])
        with self.index(tmp_path) as index:
            assert index.version() == commit.version
            assert index.get(b"b") == Record(commit.version, 2, 1, b"body")
            assert index.page(None, 1)[0].typed == b"t"
            assert index.notes() == [b"note"]
            assert index.last_seq() == 2

    def test_a_closed_index_says_so(self, tmp_path: Path) -> None:
        index = self.make_index(tmp_path)
        index.close()
        index.close()
        for use in (lambda: index.get(b"x"), index.version, lambda: index.commit([put("a", 1)]), index.page):
            with raises(ClosedError):
                use()

    # --- order

    def test_pages_go_through_the_order_in_both_directions(self, tmp_path: Path) -> None:
        seqs = [1, 2, 5, 9, 300, 70_000]
        with self.index(tmp_path) as index:
            index.commit([put(f"k{seq}", seq) for seq in reversed(seqs)])
            for limit in (1, 2, 3, 6, 10):
                assert [seq for seq, _ in all_items(index, limit)] == seqs
                assert [seq for seq, _ in all_items(index, limit, reverse=True)] == seqs[::-1]
            assert [item.seq for item in index.page(5)] == [9, 300, 70_000]
            assert [item.seq for item in index.page(6)] == [9, 300, 70_000]
            assert [item.seq for item in index.page(0)] == seqs
            assert [item.seq for item in index.page(5, reverse=True)] == [2, 1]
            assert [item.seq for item in index.page(6, reverse=True)] == [5, 2, 1]
            assert [item.seq for item in index.page(10**9, reverse=True)] == seqs[::-1]
            assert index.page(70_000) == index.page(1, reverse=True) == index.page(None, 0) == []

    def test_large_keys_come_back_whole(self, tmp_path: Path) -> None:
        typed = bytes(range(256)) * 4096
        with self.index(tmp_path) as index:
            index.commit([put(f"k{n}", n + 1, typed=typed + b"%d" % n) for n in range(8)])
            found = []
            after = None
            while page := index.page(after):
                found += page
                after = page[-1].seq
            assert [item.typed for item in found] == [typed + b"%d" % n for n in range(8)]

    def test_what_stays_is_seen_once_while_others_write_between_the_pages(self, tmp_path: Path) -> None:
        for reverse in (False, True):
            folder = tmp_path / str(reverse)
            folder.mkdir()
            with self.index(folder) as index, self.index(folder) as other:
                index.commit([put(f"k{n}", n) for n in range(1, 101)])
                seen: list[bytes] = []
                after, step = None, 0
                while page := index.page(after, 7, reverse=reverse):
                    after = page[-1].seq
                    seen += [item.name for item in page]
                    if step < 12:  # or a new key would always be waiting at the end
                        gone = f"k{1 + step * 2}".encode()
                        other.commit([put(f"new{step}", 200 + step), put("k50", 999)], [gone])
                        step += 1
                stays = {f"k{n}".encode() for n in range(1, 101)} - {f"k{1 + n * 2}".encode() for n in range(step)}
                assert len(seen) == len(set(seen))
                assert stays <= set(seen)

    def test_two_who_counted_alike_do_not_overwrite_each_other(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index, self.index(tmp_path) as other:
            index.commit([put("x", 1), put("y", 2)])
            other.commit([put("a", 1), put("b", 2), put("c", 3)])
            assert [name for _, name in all_items(index)] == [b"x", b"y", b"a", b"b", b"c"]
            assert other.last_seq() == 5

    def test_new_keys_keep_their_order_when_only_one_place_is_taken(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("x", 5), put("y", 20)])
            index.commit([put("a", 3), put("b", 5), put("c", 6), put("d", 50)])
            assert all_items(index) == [(3, b"a"), (5, b"x"), (20, b"y"), (21, b"b"), (22, b"c"), (50, b"d")]

    def test_one_place_given_twice_in_a_commit_is_no_loss(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1), put("b", 1), put("c", 1)])
            assert len(index) == 3
            assert sorted(name for _, name in all_items(index)) == [b"a", b"b", b"c"]

    def test_a_place_that_this_commit_frees_can_be_taken(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1), put("b", 2)])
            index.commit([put("c", 1), put("b", 3, fresh=True)], [b"a"])
            assert all_items(index) == [(1, b"c"), (3, b"b")]

    # --- commits

    def test_commits_are_numbered_and_tell_what_they_built_upon(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index, self.index(tmp_path) as other:
            first = index.commit([put("a", 1)])
            second = index.commit([put("b", 2)])
            assert first.before < first.version == second.before < second.version == index.version()
            theirs = other.commit([put("c", 3)])
            third = index.commit([put("d", 4)])
            assert third.before == theirs.version > second.version

    def test_a_commit_of_nothing_is_none(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1)])
            version, generation = index.version(), index.generation[0]
            for commit in (index.commit(), index.commit([], [b"absent"]), index.commit(notes=lambda _: [])):
                assert commit == Commit(version, version)
            assert (index.version(), index.generation[0]) == (version, generation)

    def test_a_commit_that_fails_changes_nothing(self, tmp_path: Path) -> None:
        def fail(_: object) -> list[bytes]:
            raise ZeroDivisionError

        with self.index(tmp_path) as index:
            index.commit([put("a", 1), put("b", 2)], notes=lambda _: [b"n"])
            version, generation = index.version(), index.generation[0]
            with raises(ZeroDivisionError):
                index.commit([put("a", 1, b"new"), put("c", 3)], [b"b"], notes=fail, meta={b"m": b"1"})
            assert [name for _, name in all_items(index)] == [b"a", b"b"]
            record = index.get(b"a")
            assert record is not None
            assert record.body == b"body"
            assert index.meta(b"m") is None
            assert (index.version(), index.generation[0], index.notes()) == (version, generation, [b"n"])

    def test_the_generation_moves_with_every_commit_of_anybody(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index, self.index(tmp_path) as other:
            for step in range(1, 20):
                seen = index.version()
                assert index.generation[0] == seen
                (other if step % 2 else index).commit([put("a", 1, b"%d" % step)], notes=lambda _: [b"n"])
                assert index.generation[0] != seen
            seen = index.version()
            other.settle(lambda note, get: True)
            assert index.generation[0] == index.version() != seen

    # --- notes

    def test_notes_are_told_what_a_commit_replaces_outside_of_the_index(self, tmp_path: Path) -> None:
        told: list[dict[bytes, Record]] = []

        def notes(replaced: dict[bytes, Record]) -> list[bytes]:
            told.append(replaced)
            return []

        with self.index(tmp_path) as index:
            first = index.commit([put(name, n + 1, kind=n) for n, name in enumerate("abcdefg")])  # e is of kind 4: as a is
            index.commit([put(name, 9) for name in "abefgx"], [b"c", b"y"], notes=notes)
            kinds = {b"b": 1, b"c": 2, b"f": 5, b"g": 6}
            want = {name: Record(first.version, kind + 1, kind, b"body") for name, kind in kinds.items()}
            assert told[-1] == want

    def test_notes_stay_until_they_are_settled_oldest_first(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            index.commit([put("a", 1)], notes=lambda _: [b"1", b"2"])
            index.commit(notes=lambda _: [b"3", b""])
            assert index.notes() == [b"1", b"2", b"3", b""]
            seen: list[bytes] = []

            def finish(note: bytes, get: Callable[[bytes], Record | None]) -> bool:
                seen.append(note)
                return note in (b"1", b"3")

            before = index.version()
            commit, left = index.settle(finish)
            assert (seen, left, index.notes()) == ([b"1", b"2", b"3", b""], 2, [b"2", b""])
            assert commit == Commit(index.version(), before)
            index.commit(notes=lambda _: [b"4"])
            assert index.notes() == [b"2", b"", b"4"]

    def test_settling_reads_the_newest_records(self, tmp_path: Path) -> None:
        found: list[Record | None] = []

        def finish(note: bytes, get: Callable[[bytes], Record | None]) -> bool:
            found.extend([get(b"a"), get(b"gone")])
            return True

        with self.index(tmp_path) as index:
            index.commit([put("a", 1), put("gone", 2)], notes=lambda _: [b"n"])
            last = index.commit([put("a", 1, b"new")], [b"gone"])
            index.settle(finish)
            assert found == [Record(last.version, 1, 0, b"new"), None]

    def test_settling_nothing_is_no_commit(self, tmp_path: Path) -> None:
        with self.index(tmp_path) as index:
            version = index.version()
            assert index.settle(lambda note, get: True) == (None, 0)
            index.commit(notes=lambda _: [b"n"])
            version = index.version()
            assert index.settle(lambda note, get: False) == (None, 1)
            assert index.version() == index.generation[0] == version

    def test_notes_are_kept_if_settling_them_raises(self, tmp_path: Path) -> None:
        def finish(note: bytes, get: Callable[[bytes], Record | None]) -> bool:
            if note == b"2":
                raise ZeroDivisionError
            return True

        with self.index(tmp_path) as index:
            index.commit(notes=lambda _: [b"1", b"2"])
            with raises(ZeroDivisionError):
                index.settle(finish)
            assert b"2" in index.notes()
            assert index.settle(lambda note, get: True)[1] == 0

    # --- threads

    def test_threads_that_write_and_read_at_once_lose_nothing(self, tmp_path: Path) -> None:
        n_threads, n_commits = 4, 25
        problems: list[BaseException] = []
        stop = threading.Event()

        def write(index: Index, me: int) -> None:
            for step in range(n_commits):
                seq = index.last_seq() + 1
                pair = [put("left", seq, b"%d %d" % (me, step)), put("right", seq + 1, b"%d %d" % (me, step))]
                index.commit([put(f"{me} {step}", seq + 2), *pair])

        def read(index: Index) -> None:
            while not stop.is_set():
                left, right = index.get_many([b"left", b"right"])[1]
                assert (left is None) == (right is None)
                assert left is None or right is None or (left.version, left.body) == (right.version, right.body)
                index.get(b"left")
                index.page(None, 5, reverse=True)

        def guarded(run: Callable[[], None]) -> None:
            try:
                run()
            except BaseException as error:
                problems.append(error)

        with self.index(tmp_path) as index, self.index(tmp_path) as other:
            handles = [index, other]
            writers = [threading.Thread(target=guarded, args=(lambda n=n: write(handles[n % 2], n),)) for n in range(n_threads)]
            readers = [threading.Thread(target=guarded, args=(lambda n=n: read(handles[n]),)) for n in range(2)]
            for thread in writers + readers:
                thread.start()
            for thread in writers:
                thread.join()
            stop.set()
            for thread in readers:
                thread.join()
            assert not problems, problems
            assert len(index) == n_threads * n_commits + 2
