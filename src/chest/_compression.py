"""Compression of serialized values: which methods there are, whether one pays for a value, and frames both ways.

What is compressed is the very file that would be written plain, as a row of frames of 2 MiB each: of Zstandard, LZ4 or gzip,
which the tools of these formats read, or chunks of Blosc2, which say their own length. Every frame says how long its content
is. So writing and reading need a few MiB beside the value, whatever its size.

Reading trusts nothing that a frame says: it fills memory of the size that the record says, and not beyond; that size is
believed only up to the ratio that the method can reach at all.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .errors import ChestError, CorruptError, MissingExtraError, short

__all__ = ["METHODS", "Compression", "Enough", "Frames", "Sample", "by_number", "inflate", "parse", "pieces", "private_memory"]

FRAME = 2 << 20  # bytes of content in one frame
PIECE = 1 << 20  # bytes that are read, or made, at a time
PAYS = 0.8  # what is not smaller than this is not worth the loss of the mapping, and the time

_SLICE = 16 << 10  # bytes of a sample
_SLICES = 4  # of one buffer
_BUFFERS = 16  # that are sampled: the largest
_STREAM = 8 << 20  # bytes outside of buffers that are looked through for samples
_STEP = 512 << 10  # from the beginning of one of these samples to the next


class Method(ABC):
    """One way to compress. ``number`` is what records say, ``ratio`` the best that its format can do."""

    number: int
    name: str
    levels: range
    level: int  # where none is given: the fastest, because somebody waits while values are spilled
    ratio: int

    @abstractmethod
    def check(self) -> None:
        """Raises MissingExtraError if its package is not installed."""

    @abstractmethod
    def compress(self, data: Any, level: int, itemsize: int = 1) -> bytes:
        """One frame."""

    @abstractmethod
    def inflate(self, parts: Iterable[Any], target: memoryview) -> int:
        """Fill the target from the frames; the number of bytes, which may be less than it has room for.

        Raises:
            CorruptError: they hold more than that, or are none.
        """


class _Streamed(Method):
    """A method whose library decompresses a piece at a time, as the standard library's do."""

    @abstractmethod
    def decompressor(self) -> Any:
        """A fresh one, for one frame."""

    def inflate(self, parts: Iterable[Any], target: memoryview) -> int:
        at, frame = 0, None
        for part in parts:
            for data in pieces(part):
                while True:
                    if frame is None:
                        if not data:
                            break
                        frame = self.decompressor()
                    out = frame.decompress(data, min(PIECE, len(target) - at + 1))  # one more than there may be: to notice
                    if len(out) > len(target) - at:
                        raise CorruptError("it holds more than was written")
                    target[at : at + len(out)] = out
                    at += len(out)
                    if not out and not data and not frame.eof and not frame.needs_input:
                        raise CorruptError("it comes to nothing")
                    if frame.eof:
                        data, frame = frame.unused_data, None
                    elif frame.needs_input:
                        break
                    else:
                        data = b""
        if frame is not None:
            raise CorruptError("its last frame is cut short")
        return at


class _Zstd(_Streamed):
    number, name, levels, level = 1, "zstd", range(-7, 23), 1
    ratio = 1 << 15  # a block of 128 KiB takes four bytes at least

    def check(self) -> None:
        _zstd()

    def compress(self, data: Any, level: int, itemsize: int = 1) -> bytes:
        frame: bytes = _zstd().compress(data, level)
        return frame

    def decompressor(self) -> Any:
        zstd = _zstd()
        # As much history as a frame of ours can have. A forged one may ask for 128 MiB.
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: (FRAME - 1).bit_length()})


class _Lz4(_Streamed):
    number, name, levels, level, ratio = 2, "lz4", range(13), 0, 256

    def check(self) -> None:
        _module("lz4.frame", self.name)

    def compress(self, data: Any, level: int, itemsize: int = 1) -> bytes:
        frame: bytes = _module("lz4.frame", self.name).compress(data, compression_level=level, store_size=True)
        return frame

    def decompressor(self) -> Any:
        return _module("lz4.frame", self.name).LZ4FrameDecompressor()


class _Gzip(_Streamed):
    number, name, levels, level, ratio = 3, "gzip", range(1, 10), 1, 1032

    def check(self) -> None:
        pass

    def compress(self, data: Any, level: int, itemsize: int = 1) -> bytes:
        import zlib

        deflate = zlib.compressobj(level, wbits=31)
        return deflate.compress(data) + deflate.flush()

    def decompressor(self) -> Any:
        return _Gunzip()


class _Gunzip:
    """A decompressor of zlib with the interface of the others."""

    def __init__(self) -> None:
        import zlib

        self._inflate = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: Any, max_length: int) -> bytes:
        rest = self._inflate.unconsumed_tail
        out = self._inflate.decompress(rest + bytes(data) if rest else data, max_length)
        # Where the output is full there may be more, even of input that is used up.
        self.needs_input = not self._inflate.unconsumed_tail and len(out) < max_length
        return out


class _Blosc2(Method):
    """Chunks of Blosc2, numbers shuffled, with Zstandard inside. One thread: a pool of them would not survive a fork."""

    number, name, levels, level = 4, "blosc2", range(10), 1
    ratio = FRAME // 32

    _HEAD = struct.Struct("<4xiii")  # length of the content, of a block, of the chunk

    def check(self) -> None:
        _module("blosc2", self.name)

    def compress(self, data: Any, level: int, itemsize: int = 1) -> bytes:
        blosc2 = _module("blosc2", self.name)
        if not 1 < itemsize < 256:
            itemsize = 1
        shuffle = blosc2.Filter.SHUFFLE if itemsize > 1 else blosc2.Filter.NOFILTER
        chunk: bytes = blosc2.compress2(
            data, codec=blosc2.Codec.ZSTD, clevel=level, typesize=itemsize, filters=[shuffle], nthreads=1
        )
        return chunk

    def inflate(self, parts: Iterable[Any], target: memoryview) -> int:
        blosc2 = _module("blosc2", self.name)
        at, left = 0, bytearray()
        for part in parts:
            for data in pieces(part):
                left += data
                while len(left) >= self._HEAD.size:
                    length, block, whole = self._HEAD.unpack_from(left)
                    if not (0 < length <= FRAME and 0 <= block <= FRAME and 16 <= whole <= length + 32):
                        raise CorruptError("one of its chunks is none of Blosc2")
                    if length > len(target) - at:
                        raise CorruptError("it holds more than was written")
                    if whole > len(left):
                        break
                    chunk = bytes(left[:whole])
                    del left[:whole]
                    blosc2.decompress2(chunk, dst=target[at : at + length], nthreads=1)
                    at += length
        if left:
            raise CorruptError("its last chunk is cut short")
        return at


METHODS: dict[str, Method] = {method.name: method for method in (_Zstd(), _Lz4(), _Gzip(), _Blosc2())}
_NUMBERS = {method.number: method for method in METHODS.values()}


class Compression:
    """A method and its level."""

    __slots__ = ("level", "method")

    def __init__(self, method: Method, level: int) -> None:
        self.method = method
        self.level = level

    def compress(self, data: Any, itemsize: int = 1) -> bytes:
        return self.method.compress(data, self.level, itemsize)


def parse(compression: Any) -> Compression | None:
    """What the user asked for.

    Raises:
        ValueError: there is no such method or level.
        MissingExtraError: its package is not installed.
    """
    if compression is None:
        return None
    name, level = compression if isinstance(compression, tuple) and len(compression) == 2 else (compression, None)
    method = METHODS.get("gzip" if name == "zlib" else name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(
            f"compression is {short(compression)}: choose one of {', '.join(METHODS)}, or a pair of that and a level"
        )
    if level is not None and (type(level) is not int or level not in method.levels):
        raise ValueError(f"{method.name} has the levels {method.levels[0]} to {method.levels[-1]}, not {short(level)}")
    method.check()
    return Compression(method, method.level if level is None else level)


def by_number(number: int) -> Method:
    """The method that a record says. Raises CorruptError."""
    try:
        return _NUMBERS[number]
    except KeyError:
        raise CorruptError(f"it is compressed by method {number}, which this version of chest does not know") from None


def _module(name: str, method: str) -> Any:
    found = sys.modules.get(name)
    if found is not None:
        return found
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"values compressed by {method} need the package {name.partition('.')[0]}: pip install 'chest[compression]'"
        ) from error


@functools.cache
def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        return _module("compression.zstd", "zstd")
    try:
        return importlib.import_module("backports.zstd")
    except ImportError as error:
        raise MissingExtraError(
            "values compressed by zstd need the package backports.zstd: pip install 'chest[compression]'"
        ) from error


def pieces(data: Any) -> Iterator[Any]:
    """Its bytes, a MiB at a time."""
    if len(data) <= PIECE:
        yield data
    else:
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


# --- writing


class Frames:
    """What is written to it comes out as frames, by ``put``."""

    def __init__(self, compression: Compression, put: Callable[[Any], Any]) -> None:
        self._compress = compression.compress
        self._put = put
        self._held = bytearray()
        self._itemsize = 1
        self._left = 0  # bytes of the buffer that is being written
        self._frame = FRAME

    def next_buffer(self, length: int, itemsize: int) -> None:
        """The next bytes, this many, are numbers of this size."""
        self._flush()
        self._itemsize, self._left = itemsize, length
        self._frame = FRAME - FRAME % itemsize if 1 < itemsize < 256 else FRAME

    def write(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            room = self._frame - len(self._held)
            part = view[: min(room, self._left) if self._left else room]
            self._held += part
            view = view[len(part) :]
            if len(self._held) == self._frame:
                self._flush()
            if self._left:
                self._left -= len(part)
                if not self._left:
                    self._flush()
                    self._itemsize, self._frame = 1, FRAME

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, bytearray()
            self._put(self._compress(held, self._itemsize))


# --- does it pay?


class Enough(Exception):
    """The sample is large enough."""


class Sample:
    """A file that keeps slices of what is written to it, to find out how small all of it would become.

    Args:
        stops: whoever writes to it may be interrupted (by ``Enough``) when there is no need for more.
    """

    def __init__(self, compression: Compression, *, stops: bool) -> None:
        self._compression = compression
        self._stops = stops
        self._stream: list[bytes] = []
        self._n_stream = 0
        self._next = 0
        self._buffers: list[tuple[int, int, list[bytes]]] = []

    def next_buffer(self, view: memoryview, itemsize: int) -> bool:
        """What comes next is this, numbers of this size. It need not be written."""
        n = len(view)
        step = max(1, (n - _SLICE) // (_SLICES - 1))
        starts = {min(number * step, max(0, n - _SLICE)) for number in range(_SLICES)}
        slices = [bytes(view[start : start + _SLICE]) for start in sorted(start - start % itemsize for start in starts)]
        self._buffers.append((n, itemsize, slices))
        if len(self._buffers) > _BUFFERS:
            self._buffers.remove(min(self._buffers, key=lambda buffer: buffer[0]))
        return True

    def write(self, data: bytes) -> None:
        start, end = self._n_stream, self._n_stream + len(data)
        while self._next < end and self._next < _STREAM:
            at = max(0, self._next - start)
            self._stream.append(data[at : at + _SLICE])
            self._next += max(len(self._stream[-1]), 1) if self._next < _STEP // 4 else _STEP
        self._n_stream = end
        if self._stops and end >= _STREAM and not self._buffers:
            raise Enough

    def pays(self) -> bool:
        """Whether the whole would become small enough, by what the slices do."""
        before = after = 0.0
        parts = [(self._n_stream, 1, [b"".join(self._stream)]), *self._buffers]
        for weight, itemsize, slices in parts:
            size = sum(map(len, slices))
            if size:
                before += weight
                after += weight * sum(len(self._compression.compress(s, itemsize)) for s in slices) / size
        return after <= PAYS * before


# --- reading


def private_memory(size: int) -> memoryview:
    """Zeros that are this process's own, at the beginning of a page. Taken when they are written to.

    Raises:
        MemoryError: there is no room for it.
    """
    if os.name != "posix" or not size:
        return memoryview(bytearray(size))
    try:
        # Not the default of Python's, which would share it with forked children.
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))
    except (OSError, OverflowError) as error:
        raise MemoryError(f"there is no room for {size} bytes") from error


def inflate(method: Method, parts: Iterable[Any], size: int, stored: int) -> memoryview:
    """The plain bytes, ``size`` of them, in private memory, from ``stored`` compressed ones.

    Raises:
        CorruptError: they are not, or cannot be; then no more memory was taken than what they held, and ``size`` at most.
        MissingExtraError: the method's package is not installed.
    """
    method.check()
    if size > stored * method.ratio:
        raise CorruptError(f"{stored} bytes compressed by {method.name} cannot have been {size}")
    target = private_memory(size)
    try:
        n = method.inflate(parts, target)
    except (ChestError, MemoryError, OSError):
        raise
    except Exception as error:  # each library has its own
        raise CorruptError(f"it cannot be decompressed by {method.name}: {short(error, 200)}") from error
    if n != size:
        raise CorruptError(f"{n} bytes were compressed instead of {size}")
    return target
