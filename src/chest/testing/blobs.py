"""What every place for blobs does, as tests: subclass ``BlobsContract`` and say how one is made."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..abc import Blobs
from .index import raises

__all__ = ["BlobsContract"]


class BlobsContract:
    """Subclass it in a test file; ``make_blobs`` is the only thing to write. All tests take pytest's ``tmp_path``."""

    @abstractmethod
    def make_blobs(self, folder: Path) -> Blobs:
        """A handle on the blobs in a folder (the same ones each time, for one folder)."""

    @contextlib.contextmanager
    def blobs(self, folder: Path) -> Iterator[Blobs]:
        """A handle that is closed at the end."""
        blobs = self.make_blobs(folder)
        try:
            yield blobs
        finally:
            blobs.close()

    def write(self, blobs: Blobs, data: bytes) -> tuple[str, int]:
        """A blob with these bytes."""
        return blobs.write(lambda file: file.write(data))

    def test_what_is_written_comes_back(self, tmp_path: Path) -> None:
        for data in (b"", b"x", bytes(range(256)) * 1000, b"0" * 5_000_000):
            with self.blobs(tmp_path) as blobs:
                name, size = self.write(blobs, data)
                blobs.sync()
                assert size == len(data)
                assert blobs.read(name, "") == data
            with self.blobs(tmp_path) as blobs:
                assert blobs.read(name, "") == data

    def test_a_blob_may_be_written_in_pieces_of_any_kind(self, tmp_path: Path) -> None:
        def dump(file: Any) -> None:
            assert file.write(b"ab") in (2, None)
            assert file.write(bytearray(b"cd")) in (2, None)
            assert file.write(memoryview(b"efgh").cast("H")) in (4, None)

        with self.blobs(tmp_path) as blobs:
            name, size = blobs.write(dump)
            assert (bytes(blobs.read(name, "")), size) == (b"abcdefgh", 8)

    def test_every_blob_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        with self.blobs(tmp_path) as blobs, self.blobs(tmp_path) as other:
            names = [self.write((blobs, other)[n % 2], b"%d" % n)[0] for n in range(50)]
            assert len(set(names)) == 50
            assert [bytes(blobs.read(name, "")) for name in names] == [b"%d" % n for n in range(50)]

    def test_nothing_remains_of_a_blob_whose_writing_fails(self, tmp_path: Path) -> None:
        def dump(file: Any) -> None:
            file.write(b"x" * 100_000)
            raise ZeroDivisionError

        with self.blobs(tmp_path) as blobs:
            self.write(blobs, b"x")
            before = sorted(str(path) for path in tmp_path.rglob("*"))
            with raises(ZeroDivisionError):
                blobs.write(dump)
            assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    def test_what_is_not_there_is_not_found(self, tmp_path: Path) -> None:
        with self.blobs(tmp_path) as blobs:
            name, _ = self.write(blobs, b"x")
            blobs.remove([name])
            blobs.remove([name])
            for label in ("", "x", "a/b/c"):
                with raises(FileNotFoundError):
                    blobs.read(name, label)

    def test_changing_what_was_read_changes_nothing_that_is_stored(self, tmp_path: Path) -> None:
        with self.blobs(tmp_path) as blobs:
            name, _ = self.write(blobs, b"abc")
            view = blobs.read(name, "")
            if not view.readonly:
                view[0] = 0
            assert bytes(blobs.read(name, "")) == b"abc"

    def test_what_was_read_outlives_its_removal_and_the_closing(self, tmp_path: Path) -> None:
        with self.blobs(tmp_path) as blobs:
            name, _ = self.write(blobs, b"abc" * 100_000)
            view = blobs.read(name, "")
            blobs.remove([name])
        assert view == b"abc" * 100_000

    def test_closing_twice_does_nothing(self, tmp_path: Path) -> None:
        blobs = self.make_blobs(tmp_path)
        self.write(blobs, b"x")
        blobs.close()
        blobs.close()
