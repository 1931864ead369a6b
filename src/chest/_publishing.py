"""The names under which values lie in a folder: files renamed to what shows their keys, readable copies of small values.

All of it is for people. Nothing is found by these names, and what a crash leaves undone the next opener finishes, by the notes
that stand in the commit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from . import errors
from ._envelope import open_body
from ._hot import read_key
from ._reading import Reader
from ._records import BLOB, KIND, LOOSE, PACKED, Ref, unpack_note
from .abc import OrderItem, Put, Record, Row
from .errors import ChestError, FailedError, short

__all__ = ["Publisher"]


class Publisher(Reader):
    """The part of a store that is about the names in its folder."""

    def settle(self) -> int:
        """Do what commits left to be done: rename new files to the names of their keys, unlink what was replaced."""
        commit, left = self.index.settle(self._finish, ready=self.blobs.sync)
        if commit is not None:
            self.commits.append((commit.before, commit.version))
        return left

    def _finish(self, note: bytes, get: Callable[[bytes], Record | None]) -> bool:
        # Runs while nobody else can commit: what the record says now is what the folder must look like.
        name, blob, old = unpack_note(note)
        record = get(name)
        ref = Ref.unpack(record.body) if record is not None and record.kind & KIND == BLOB else None
        if blob:
            if ref is not None and ref.blob == blob:
                if not self.blobs.publish(blob, ref.label, replace=old == ref.label, sync=False):
                    return False
            else:
                self.blobs.remove([blob])
        if old and (ref is None or ref.label != old):  # a readable copy is written after this
            self.blobs.unlink(old)
        return True

    # --- readable copies

    def _write_copies(self, copies: Sequence[tuple[bytes, str]], *, needed: bool = False) -> None:
        """Small values lie under their labels, too, for people to look at.

        Not before nobody else can commit, and only those that are still small: another process may have published a value
        file there meanwhile, which a late copy would replace.
        """
        if not copies:
            return
        with self.index.transaction() as index:  # writes nothing
            for name, label in copies:
                record = index.get(name)
                try:
                    if record is not None and record.kind & KIND == LOOSE:
                        self.blobs.write_copy(label, open_body(record.kind, record.body))
                except FailedError:
                    raise
                except OSError:
                    if needed:  # else it is a convenience, and no reason to fail what is committed
                        raise

    def _make_loose(self, items: list[Any], puts: list[Row]) -> list[tuple[bytes, str]]:
        """While there are few keys, small values get a readable copy: their puts are marked, name and label returned."""
        copies: list[tuple[bytes, str]] = []
        room = 0 if self._files_only else self._loose - len(self.index)
        if room > 0:
            for number, (name, seq, kind, body, typed, fresh) in enumerate(puts):
                if len(copies) >= room:
                    break
                if kind & KIND == PACKED:
                    key = items[number].key
                    label = self.label(key, name)
                    if self._free_label(key, name) == label:
                        copies.append((name, label))
                        puts[number] = name, seq, kind | LOOSE, body, typed, fresh
        return copies

    # --- files

    def file_of(self, key: Hashable, name: bytes) -> str | None:
        """The path of a file that holds the key's newest value, written now if it lies in the index only."""
        record = self.index.get(name)
        if record is None:
            return None
        if record.kind & KIND == BLOB:
            return self.path_of(record)
        if self._envelope is not None and self._envelope.hides:
            raise ChestError(
                f"the value of {short(key)} lies in the index of an encrypted chest, which writes no readable copies: read it "
                "with the chest.",
                key=key,
                path=self.path,
            )
        label = self.label(key, name)
        path = os.path.join(self.path, *label.split("/"))
        if record.kind & KIND == LOOSE:
            try:
                with open(path, "rb") as file:
                    if file.read() == open_body(record.kind, record.body):
                        return path
            except OSError:
                pass
        elif self.blobs.exists(label):
            raise errors.PathError(
                f"{path} is in the way: a file that is none of this chest's lies under the name of {short(key)}. Move it away.",
                key=key,
                path=path,
            )
        else:
            # Recorded first: a copy that no record knows of would outlive its value.
            with self.index.transaction() as index:
                newest = index.get(name)
                same = newest is not None and newest.version == record.version
                commit = index.commit([Put(name, record.seq, record.kind | LOOSE, record.body)]) if same else None
            if commit is None:
                return self.file_of(key, name)
            self.commits.append((commit.before, commit.version))
        self._write_copies([(name, label)], needed=True)
        return path

    def path_of(self, record: Record) -> str:
        """Where the value file of a record lies, "" if it has none."""
        if record.kind & KIND != BLOB:
            return ""
        ref = Ref.unpack(record.body)
        return str(self.blobs.path(ref.blob, ref.label))

    def labels(self) -> Iterable[str]:
        """The labels of all files that belong to values."""
        after = None
        while items := self.index.page(after):
            after = items[-1].seq
            for item, record in zip(items, self.index.get_many([i.name for i in items])[1], strict=True):
                if record is None:
                    continue
                if record.kind & KIND == BLOB:
                    yield Ref.unpack(record.body).label
                elif record.kind & KIND == LOOSE:
                    yield self.label(self.key(item), item.name)

    def key(self, item: OrderItem) -> Any:
        """The key of an item of the order, with the type it was first set with."""
        return read_key(item[1], item[2], self.codec.decode)

    def close(self) -> None:
        self.blobs.close()
        self.index.close()
