"""Chest: a dictionary that spills to disk.

The public face. How values move between memory and disk stands in ``_keeper``, what is on disk in ``_store``.
"""

from __future__ import annotations

import builtins
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

from . import _compression, _fs, _lifetime, _scratch, _views
from ._keys import key_to_filename
from ._processes import refuse_gone
from ._sealing import check_arguments
from ._sizing import nbytes, parse_memory
from ._upkeep import Stats, Upkeep
from .errors import ChestError, ReadOnlyError, UnsafePathWarning
from .serializers import resolve

__all__ = ["Chest", "Stats", "key_to_filename", "nbytes"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_OF_FOLDER = ("write_through", "network", "read_only", "trusted")  # settings that are not about values


@contextmanager
def _open_many(filenames: Iterable[str], mode: str = "rb") -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(builtins.open(name, mode)) for name in filenames]


class Chest(Upkeep[K, V]):
    """A dictionary that keeps what fits in memory and the rest in a folder, and finds everything again next time.

    All of ``dict``'s interface holds: insertion order, any hashable key, values changed in place. Any number of threads may
    use one chest, and any number of chests one folder.

    Durability: a value is written when it leaves memory, at ``flush``, ``sync`` and ``close``, and at the interpreter's exit.
    When one of these returns, what it wrote survives ``kill -9`` and a power cut. A chest without a path is scratch: never
    synced, and gone when it is closed, collected, or its process has died.

    Cost: a hit is a dictionary look-up; a miss reads the index, and maps a file if the value is large.

    Args:
        data: what it holds at the start: a mapping or pairs.
        path: its folder, created if need be; None for scratch.
        available_memory: bytes that values may hold in memory: a number, ``"500 MB"``, ``"2 GiB"``, or ``"25%"`` of the
            machine's (or the cgroup's) memory. 1 GB if None; 0 keeps nothing.
        dump, load: a pair like ``pickle.dump`` and ``pickle.load``.
        key_to_filename: the name of a key's file, below the folder; every value becomes a file then.
        on_miss, on_overflow: called with the key when a value is read from disk, or has to leave memory unwritten.
        open, open_many: like ``builtins.open`` (``gzip.open``, for instance), and the same for many files; every value
            becomes a file then.
        mode: ``"b"`` or ``"t"``: whether ``dump`` writes bytes or text. Text in a binary file is encoded as UTF-8.
        serializer: instead of ``dump`` and ``load``: a name (``"pickle"``, ``"json"``, ``"cloudpickle"``, ``"dill"``,
            ``"joblib"``, ``"marshal"``; ``"safe"``, of which nothing is ever run), or anything that has both. The chest
            remembers it.
        allow: names of the classes and functions, and of modules whose classes, pickles may ask for when they are loaded;
            ``"numpy"``, ``"pandas"``, ``"pyarrow"``, ``"polars"`` and ``"torch"`` stand for what these packages' values need.
            Not remembered. None: pickles may run anything.
        loose: up to this number of keys small values also have a readable file of their own; None: every value is a file.
        verify: ``"auto"`` checks everything but the inside of buffers above 1 MiB when a value is loaded, ``"always"`` that
            too, which reads all of them.
        write_through: every set, every deletion and every change in place that is noticed is committed before the call returns
            (0.4 ms or so each). Others see it at once.
        network: accept a network file system, where the index is damaged sooner or later.
        compression: ``"zstd"``, ``"lz4"``, ``"blosc2"`` (best for arrays of numbers), ``"gzip"``, or a pair of one and a level:
            values are compressed where a sample says that it pays. They are then decompressed into memory, not mapped.
        key: 32 random bytes, or a function that returns them (called once for each opening): all that is read is
            authenticated first, and large values are read whole for that. The key is nowhere in the chest.
        encrypt: True, ``"aes-gcm"`` or ``"chacha20-poly1305"``: nothing can be read without the key, names of keys neither.
        read_only: nothing in the folder changes, whatever happens; it may lie on a medium that cannot be written, or belong
            to somebody else. Writing is a ``ReadOnlyError``. Values may be changed in memory: ``sync``, ``flush`` and ``close``
            (which lets go of the folder all the same) raise then, and until then such values stay in memory.
        trusted: do not warn (``UnsafePathWarning``) where other users can write to the folder: whoever can may run code in the
            name of those who read it, since that is what a pickle allows. With ``serializer="safe"`` or a ``key`` it does not,
            and nothing warns.

    Raises:
        PathError, NetworkPathError, SerializerMismatchError, FormatError, CorruptError: the folder cannot be used.
        WrongKeyError: the chest was made with another key, with none, or needs one.
        MissingExtraError: ``compression`` or ``encrypt`` needs a package that is not installed.
        ValueError, TypeError: nonsense in an argument.
    """

    def __init__(
        self,
        data: Mapping[K, V] | Iterable[tuple[K, V]] | None = None,
        path: str | os.PathLike[str] | None = None,
        available_memory: float | str | None = None,
        dump: Callable[[Any, Any], Any] | None = None,
        load: Callable[[Any], Any] | None = None,
        key_to_filename: Callable[[Any], str] | None = None,
        on_miss: Callable[[Any], Any] | None = None,
        on_overflow: Callable[[Any], Any] | None = None,
        open: Callable[..., Any] | None = None,
        open_many: Callable[..., AbstractContextManager[list[Any]]] | None = None,
        mode: str = "b",
        *,
        serializer: Any = None,
        loose: int | None = 100,
        verify: str = "auto",
        write_through: bool = False,
        network: bool = False,
        allow: Iterable[str] | None = None,
        key: bytes | Callable[[], bytes] | None = None,
        encrypt: bool | str = False,
        compression: str | tuple[str, int] | None = None,
        read_only: bool = False,
        trusted: bool = False,
    ) -> None:
        limit = parse_memory(available_memory)
        allow = allow if allow is None or isinstance(allow, str) else list(allow)
        codec = resolve(serializer, dump, load, mode, allow)
        if verify not in ("auto", "always"):
            raise ValueError(f"verify is {verify!r}: choose 'auto' or 'always'")
        if loose is not None and (type(loose) is not int or loose < 0):
            raise ValueError(f"loose is {loose!r}: give a number of keys, or None for a file for every value")
        if read_only and (path is None or data is not None or write_through):
            raise ValueError("read_only goes with the path of a chest, and with neither data nor write_through")
        if open is builtins.open:
            open = None
        secret, _ = check_arguments(key, encrypt)
        _compression.parse(compression)
        if open is not None and (compression is not None or key is not None):
            raise ValueError(
                "a chest with open= has no compression or key: give open= up, compression= does what gzip.open did"
            )
        if key_to_filename is not None and encrypt:
            raise ValueError("key_to_filename= would show the keys of an encrypted chest: leave it out")
        _lifetime.close_those_left()
        self._scratch = path is None or isinstance(path, _scratch.Shared)
        self.path = (
            _scratch.make_scratch()
            if path is None
            else _scratch.join_scratch(path)
            if isinstance(path, _scratch.Shared)
            else os.path.abspath(os.fspath(path))
        )
        self._given: dict[str, Any] = {  # all settings that do not change: what is not here does not reach other processes
            "dump": dump,
            "load": load,
            "key_to_filename": key_to_filename,
            "open": open,
            "open_many": open_many,
            "mode": mode,
            "serializer": serializer,
            "loose": loose,
            "verify": verify,
            "write_through": write_through,
            "network": network,
            "allow": allow,
            "key": secret,
            "encrypt": encrypt,
            "compression": compression,
            "read_only": read_only,
            "trusted": trusted,
        }
        try:
            with ExitStack() as opened:
                store = self._open_store(codec)
                opened.callback(store.close)
                super().__init__(store, limit)
                opened.pop_all()
        except BaseException:
            if self._scratch:
                _scratch.remove_scratch(self.path)
            raise
        self._write_through = write_through
        self._plain = on_miss is None
        self._on_miss = on_miss
        self._on_overflow = on_overflow
        self.open: Callable[..., Any] = open or builtins.open
        self.open_many: Callable[..., AbstractContextManager[list[Any]]] = open_many or _open_many
        self.mode = mode
        self._begun()
        self._guarded = key is not None or (codec is not None and codec.name == "safe")
        others = "" if trusted or self._scratch or self._guarded else _fs.who_else_writes(self.path)
        if others:
            warnings.warn(
                f"{others}: whoever can write there can run code in the name of those who read the chest. Take that right away "
                "from others (chmod go-w), or pass trusted=True if they may.",
                UnsafePathWarning,
                stacklevel=2,
            )
        if data is not None:
            self.update(data)

    def _has_company(self) -> bool:
        return not self._scratch or self._shared

    def _twin(self) -> Chest[K, V]:
        given = {name: setting for name, setting in self._given.items() if name not in _OF_FOLDER}
        if (given["serializer"], given["dump"], given["load"]) == (None, None, None):
            given["serializer"] = self._store.codec.name  # what the folder remembered
        return type(self)(available_memory=self.available_memory, **given)

    # --- memory and disk

    @property
    def available_memory(self) -> int:
        """Bytes that values may hold in memory; can be set, to whatever the argument takes."""
        return self._tier.limit

    @available_memory.setter
    def available_memory(self, limit: float | str | None) -> None:
        with self.lock:
            self._tier.limit = parse_memory(limit)
            self._raise(self._shrink())

    @property
    def memory_usage(self) -> int:
        """Bytes that values hold in memory, with their bookkeeping."""
        return self._tier.usage

    @property
    def inmem(self) -> Mapping[K, V]:
        """The values that are in memory now, to be read."""
        with self.lock:
            return MappingProxyType({key: self._handed(entry) for key, entry in self._here()._entries.items()})

    @staticmethod
    def _handed(entry: Any) -> Any:
        entry.lent = True
        return entry.value

    @property
    def dump(self) -> Callable[[Any, Any], Any]:
        return self._store.codec.dump

    @property
    def load(self) -> Callable[[Any], Any]:
        return self._store.codec.load

    def _raise(self, error: ChestError | None) -> None:
        if error is not None:
            raise error

    def _no_transaction(self, method: str) -> None:
        """None is open: other threads' have ended (the lock is given away until then)."""
        if self._here() is not self:
            raise ChestError(
                f"{method}() within a transaction of the chest at {self.path}: it is written when the block ends, not before.",
                path=self.path,
            )
        while self._transactions:
            self._none_open.wait(1)  # an interrupt may have kept the last one from telling

    def flush(self) -> None:
        """Write everything and empty memory. On return all that was set would survive a power cut.

        Raises:
            SerializeError, WriteError: values that could not be written, by key; they stay in memory, all others are written.
            DiskFullError, FailedError: nothing more could be written.
        """
        with self.lock:
            self._no_transaction("flush")
            try:
                self._tier.retry()
                self._sync(leaving=True)
            finally:
                self._empty()

    def sync(self) -> None:
        """Write everything and keep it in memory. Durable on return; raises what ``flush`` raises."""
        with self.lock:
            self._no_transaction("sync")
            self._tier.retry()
            self._sync()

    def shrink(self) -> None:
        """Let values leave memory until what remains fits into ``available_memory``."""
        with self.lock:
            self._writable() if not self._store.read_only else self._usable()
            self._raise(self._shrink())

    def move_to_disk(self, key: K) -> None:
        """Let one value leave memory. Raises KeyError if it is not in memory, or why it could not be written."""
        with self.lock:
            self._writable() if not self._store.read_only else self._usable()
            self._no_transaction("move_to_disk")
            entry = self._entries[key]
            self._tier.retry()
            self._raise(self._evict([entry]))
            if key in self._entries:
                self._sync()  # says why

    def get_from_disk(self, key: K) -> None:
        """Bring one value into memory. Raises KeyError."""
        self.prefetch([key])

    def prefetch(self, keys: Any) -> None:
        """Bring values into memory, as far as they fit: of one key, or of a list (or set, view, generator) of keys."""
        if isinstance(keys, (str, bytes, tuple)) or not isinstance(keys, Iterable):
            keys = [keys]
        keeper = self._here()
        rest = iter(keys)
        while batch := list(islice(rest, _views.BATCH)):
            found = keeper._bring(batch, lent=False)
            for key in batch:
                if key not in found:
                    raise KeyError(key)

    def key_to_filename(self, key: K) -> str:
        """The path of a file with the key's value as it was last written; made now if the value lies in the index.

        For a key that is not there (yet), the path that it would have. Plain ``pickle.load`` reads it, or the ``load`` that
        belongs to the chest's serializer. Unwritten changes are written first.
        """
        with self.lock:
            self._usable()
            self._no_transaction("key_to_filename")
            entry = self._in_memory(key)
            if entry is not None and self._find_change(entry):
                failed: dict[Any, ChestError] = {}
                self._raise(self._write([entry], failed))
                self._raise(failed.get(entry.key))
            name = self._store.name(key, create=True)
            assert name is not None
            path = None if key in self._tombs else self._store.file_of(key, name)
            self._take_commits()
            return path or os.path.join(self.path, *self._store.label(key, name).split("/"))

    def write_keys(self) -> None:
        """As ``sync``: keys and values are written together."""
        self.sync()

    # --- lifetime

    def close(self) -> None:
        """Write everything and let go of the folder; a scratch folder is removed. A second call does nothing.

        If values cannot be written, this raises as ``flush`` does and the chest stays open: nothing is lost.
        """
        self._forked = False
        with self.lock if not self._closed else ExitStack():
            if self._closed:
                return
            self._no_transaction("close")
            lasts = not self._scratch or (self._shared and _scratch.is_shared(self.path))
            try:
                if lasts and (self._failed is None or self._untold or self._store.read_only):
                    self.sync()
            except ReadOnlyError:  # it cannot be written later either
                self._end()
                raise
            self._end()
        if self._scratch:
            _scratch.remove_scratch(self.path)

    def _end(self) -> None:
        """Let go of everything, written or not."""
        self._closed = True
        for place in (self._dirty, self._unsure, self._tombs, self._lent, self._pinned, self._found):
            place.clear()
        self._tier.clear()
        self._generation = memoryview(bytes(8)).cast("Q")
        self._store.close()
        _lifetime.forget(self)

    def drop(self) -> None:
        """Remove the chest from the disk for good, and close it. Files that are not its own stay."""
        with self.lock:
            self._usable()
            if self._store.read_only:
                self._writable()
            self._no_transaction("drop")
            if not self._scratch:
                for label in self._store.labels():
                    self._store.blobs.unlink(label)
            self._end()
        if self._scratch:
            _scratch.remove_scratch(self.path)
        else:
            shutil.rmtree(os.path.join(self.path, ".keys"), ignore_errors=True)
            try:
                os.rmdir(self.path)
            except OSError:
                return  # it holds something else too

    def __enter__(self) -> Chest[K, V]:
        self._usable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._closed or sys.is_finalizing():  # what can be done at exit was done before
            return
        if not self._scratch and (self._dirty or self._tombs):
            warnings.warn(f"{self} was not closed: its values are written now", ResourceWarning, stacklevel=2, source=self)
        if self._store.index.busy():
            _lifetime.close_later(self)
        else:
            self.close()

    def __reduce__(self) -> Any:
        """Everything is written; what is sent is the path and the settings, with which the receiver opens the folder.

        A scratch chest stays scratch: its folder goes when the last process that opened it has let go.
        """
        settings, extras = self._sent()
        return _opened_again, (type(self), self.path, self._scratch, settings), extras or None


def _opened_again(cls: type[Chest[Any, Any]], path: str, scratch: bool, settings: dict[str, Any]) -> Chest[Any, Any]:
    """A chest that was pickled, in the process that it was sent to."""
    chest = cls.__new__(cls)
    if not scratch:
        refuse_gone(path)
    Chest.__init__(chest, path=_scratch.Shared(path) if scratch else path, **settings)
    chest._shared = True
    return chest
