"""Serializers: how a value becomes bytes.

Anything with ``dump(value, file)`` and ``load(file)`` is one: ``pickle``, ``json``, ``cloudpickle``, ``joblib``, a class of
the user's. ``resolve`` brings whatever the user gave into one form, a ``Codec``, and gives it the name by which a chest
remembers it. The default, ``pickle``, writes value files that map (``_pickled``), and so does ``safe`` (``_safe``), of which
nothing is ever run; all others write what they write. Keys are pickled, except by ``safe``.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
from collections.abc import Callable, Hashable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import xxhash

from .. import _keys, _pickled
from ..errors import MissingExtraError

__all__ = ["NAMES", "Codec", "resolve"]

Dump = Callable[[Any, Any], Any]
Load = Callable[[Any], Any]

NAMES = ("pickle", "safe", "json", "marshal", "cloudpickle", "dill", "joblib")
"""Serializers that can be given, and are remembered, by name. Their modules have ``dump`` and ``load``."""


_GATHERED = 1 << 16  # bytes; larger writes go to the file as they are


_pickle_plain = functools.partial(pickle.dumps, protocol=5)


class Files(NamedTuple):
    """What writes and reads value files that map: ``dump``, ``load`` and ``probe`` of ``_pickled``, or the like."""

    dump: Callable[..., Any]
    load: Callable[..., Any]
    probe: Callable[..., Any]


class Codec:
    """A serializer in the one form that the store uses: values, small and as files, and keys.

    Attributes:
        name: what the chest remembers; a name of ``NAMES`` can be found again without the user's help.
        files: writes and reads value files that map; None where a file is what ``dump`` writes.
        dump, load: as the user gave them, or the module's.
        dumps, loads: from and to bytes, for values that are small.
        dumps_plain: the same as ``dumps``, for text, numbers and the like, and builtin containers of those.
        encode, decode, typed: ``encode``, ``decode`` and ``pickled_key`` of ``_keys``, or the like.
    """

    def __init__(
        self,
        name: str,
        dump: Dump,
        load: Load,
        *,
        text: bool = False,
        files: Files | None = None,
        small: tuple[Callable[[Any], bytes], Callable[[Any], Any]] | None = None,
        typed: Callable[[Hashable], bytes] | None = None,
        load_key: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.name = name
        self.dump = dump
        self.load = load
        self.files = files
        self._text = text
        # Attributes and not methods: one call less on the hot paths.
        self.dumps: Callable[[Any], bytes]
        self.loads: Callable[[Any], Any]
        self.dumps, self.loads = small or (self._dumps, self._loads)
        self.dumps_plain = _pickle_plain if self.dumps is _pickled.dumps else self.dumps
        self.typed: Callable[[Hashable], bytes] = typed or _keys.pickled_key
        self.encode: Callable[[Hashable], _keys.Encoded | None] = _keys.encode
        self.decode: Callable[[bytes, bytes], Hashable] = _keys.decode
        if load_key is not None:
            self.encode = functools.partial(_keys.encode, typed_of=self.typed, loads=load_key)
            self.decode = functools.partial(_keys.decode, loads=load_key)

    @property
    def text(self) -> bool:
        return self._text

    def _dumps(self, value: Any) -> bytes:
        sink = io.BytesIO()
        self.dump_to(value, sink)
        return sink.getvalue()

    def _loads(self, data: Any) -> Any:
        return self.load_from(io.BytesIO(data))

    def dump_to(self, value: Any, file: Any) -> None:
        """Serialize into a binary file, which is left open."""
        if self._text:
            below: Any = _Unclosed(file)
            wrapped = io.TextIOWrapper(below, encoding="utf-8", newline="", write_through=True)
            self.dump(value, wrapped)
            wrapped.flush()
            below.flush()
        else:
            whole = _EncodesText(file)
            self.dump(value, whole)
            whole.flush()

    def load_from(self, file: Any) -> Any:
        """Load from a binary file."""
        if self._text:
            return self.load(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        return self.load(file)

    def digest(self, value: Any) -> int:
        """xxh3 of what ``dump`` would write, without keeping it."""
        sink = _Hashes()
        self.dump_to(value, sink)
        return sink.digest()


class _EncodesText:
    """A binary file that takes text too, so that ``json.dump`` works without ``mode='t'``.

    Small writes are gathered: the files below are unbuffered, and ``json.dump`` writes every comma by itself.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._gathered = bytearray()

    def write(self, data: Any) -> int:
        if isinstance(data, str):
            data = data.encode("utf-8", "surrogatepass")
        size = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        if size >= _GATHERED:
            self.flush()
            self._write_all(data)
        else:
            self._gathered += data
            if len(self._gathered) >= _GATHERED:
                self.flush()
        return size

    def flush(self) -> None:
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write_all(gathered)

    def _write_all(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = self._file.write(view)
            if written is None:
                return
            view = view[written:]  # raw files may write less than asked for

    def __getattr__(self, name: str) -> Any:
        self.flush()
        return getattr(self._file, name)


class _Unclosed(io.RawIOBase):
    """What a text wrapper writes to: it may be thrown away without closing the file below."""

    def __init__(self, file: Any) -> None:
        self._below = _EncodesText(file)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._below.write(bytes(data))

    def flush(self) -> None:
        super().flush()
        self._below.flush()


class _Hashes:
    """A file that only remembers the hash of what was written to it."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def digest(self) -> int:
        return self._hash.intdigest()


class ViewFile(io.RawIOBase):
    """A readable, seekable binary file over a buffer, without a copy of it."""

    def __init__(self, view: Any) -> None:
        self._view = memoryview(view)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, len(self._view))[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        part = self._view[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"the serializer {name!r} needs the package {name}: pip install {name}") from error


def _named(name: str, allow: Iterable[str] | None = None) -> Codec:
    if name == "pickle":
        return _pickle_codec(allow)
    if name == "safe":
        return _safe_codec()
    if name not in NAMES:
        raise ValueError(f"no serializer is named {name!r}: choose one of {', '.join(NAMES)}, or give a module or object")
    module = _module(name)
    return _restricted(Codec(name, module.dump, module.load), allow)


def _pickle_codec(allow: Iterable[str] | None) -> Codec:
    if allow is None:
        files = Files(_pickled.dump, _pickled.load, _pickled.probe)
        return Codec("pickle", _pickled.dump, pickle.load, files=files, small=(_pickled.dumps, pickle.loads))
    from ._allowed import AllowedPickles

    allowed = AllowedPickles(allow)
    files = Files(_pickled.dump, allowed.load_file, _pickled.probe)
    small = _pickled.dumps, allowed.loads
    return Codec("pickle", _pickled.dump, allowed.load, files=files, small=small, load_key=allowed.loads)


def _safe_codec() -> Codec:
    from . import _safe as safe

    files = Files(safe.dump, safe.load_file, safe.probe)
    return Codec(
        "safe", safe.dump, safe.load, files=files, small=(safe.dumps, safe.loads), typed=safe.typed_key, load_key=safe.loads
    )


def _restricted(codec: Codec, allow: Iterable[str] | None) -> Codec:
    """A codec whose keys are read with the allow-list, where its values come from no pickle."""
    if allow is None or codec.name == "safe":
        return codec
    if codec.name not in _HARMLESS:
        raise ValueError(
            f"allow= says what pickles may name, and the serializer {codec.name} loads values in a way of its own: choose "
            "pickle, safe or json, or leave allow= out."
        )
    from ._allowed import AllowedPickles

    keys = AllowedPickles(allow)
    return Codec(codec.name, codec.dump, codec.load, text=codec.text, load_key=keys.loads)


_HARMLESS = ("json",)  # runs nothing that it loads; neither does marshal, but damage can crash it


def _describe(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    kind = type(function)
    module = getattr(function, "__module__", None) or kind.__module__
    return f"{module}.{getattr(function, '__qualname__', kind.__qualname__)}"


def _pair_name(dump: Any, load: Any) -> str:
    """``json`` for json.dump and json.load, ``pickle`` for all that the default can read, else both functions' names."""
    d, r = _describe(dump), _describe(load)
    if d in ("_pickle.dump", "pickle.dump") and r in ("_pickle.load", "pickle.load"):
        return "pickle"
    for name in NAMES:
        # cloudpickle.load *is* pickle.load
        theirs = (name, "_pickle", "pickle") if name == "cloudpickle" else (name,)
        if d.endswith(".dump") and r.endswith(".load") and d.split(".")[0] == name and r.split(".")[0] in theirs:
            return name
    return f"{d} with {r}"


def resolve(
    serializer: Any, dump: Dump | None, load: Load | None, mode: str, allow: Iterable[str] | None = None
) -> Codec | None:
    """The serializer that the user asked for, None if none was named.

    Raises:
        ValueError, TypeError: nonsense, with what would do; ``allow`` for a serializer that it cannot bound.
        MissingExtraError: the package of a named serializer is not installed.
    """
    if mode not in ("b", "t"):
        raise ValueError(f"mode is {mode!r}: choose 'b' (binary files) or 't' (text files)")
    text = mode == "t"
    if serializer is not None:
        if dump is not None or load is not None:
            raise TypeError("give either serializer= or the pair dump= and load=, not both")
        if isinstance(serializer, str):
            return _named(serializer, allow)
        if isinstance(serializer, ModuleType) and serializer.__name__ in NAMES:
            return _named(serializer.__name__, allow)
        if not callable(getattr(serializer, "dump", None)) or not callable(getattr(serializer, "load", None)):
            raise TypeError(f"serializer {serializer!r} needs the functions dump(value, file) and load(file)")
        name = serializer.__name__ if isinstance(serializer, (ModuleType, type)) else _describe(type(serializer))
        return _restricted(Codec(name, serializer.dump, serializer.load, text=text), allow)
    if dump is None and load is None:
        if allow is not None:
            _named("pickle", allow)  # nonsense is refused before a folder is touched
        return None
    if dump is None or load is None:
        default = _named("pickle")
        dump, load = dump or default.dump, load or default.load
    name = _pair_name(dump, load)
    if name == "pickle" and allow is not None:
        return _named(name, allow)
    return _restricted(Codec(name, dump, load, text=text), allow)
