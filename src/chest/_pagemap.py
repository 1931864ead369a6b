"""Has the memory of a value changed that is mapped from its file? The kernel knows, page by page.

A page of a private mapping is a page of the file until it is written to, and a copy from then on. Linux tells which pages
are copies; as they may hold what they held before, they are compared. Where nobody tells, everything is hashed.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any

import xxhash

__all__ = ["HASH_BELOW", "address_of", "is_untouched", "outline_of", "same_payload", "written_pages"]

USE_PAGEMAP = sys.platform == "linux"  # ask the kernel which pages of a mapping were written
USE_PAGEMAP_SCAN = True  # ... by the ioctl of Linux 6.7 where there is one

_PAGE = mmap.PAGESIZE
_FEW_REGIONS, _REGIONS = 1 << 4, 1 << 10  # asked for at once: at first, and when there are more
_SCAN_ARGUMENT = struct.Struct("12Q")
_READ_ONLY = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
_WRITTEN = bytes(bool(top & 0x40) or top & 0xA0 == 0x80 for top in range(256))  # in swap; present and no file's page
HASH_BELOW = 1 << 18  # hashing this much takes no longer than asking the kernel

_Ranges = list[tuple[int, int]]
_Way = Callable[[int, int, int], _Ranges]


def written_pages(address: int, length: int) -> _Ranges | None:
    """Which pages of a private mapping of a file were written to since it was mapped: never too few of them.

    Ranges ``(start, stop)`` in bytes from ``address`` (which need not be the start of a page), ascending and apart,
    whole pages but for the two ends; None where the system does not tell. Takes 20 us, and with ``PAGEMAP_SCAN`` 1 ms
    for each GiB that is in memory. Reads nothing of the mapping.
    """
    start, stop = address // _PAGE * _PAGE, -(-(address + length) // _PAGE) * _PAGE
    ways: list[_Way] = [_scan, _read] if USE_PAGEMAP_SCAN else [_read]
    for way in ways if USE_PAGEMAP else []:
        found = (_ask(way, start, stop) if length else []) if _works(way) else None
        if found is not None:
            return [(max(a - address, 0), min(b - address, length)) for a, b in found]
    return None


def _ask(way: _Way, start: int, stop: int) -> _Ranges | None:
    try:
        # Opened each time: what a parent opened would show a forked child the parent's memory.
        file = os.open("/proc/self/pagemap", _READ_ONLY)
        try:
            return way(file, start, stop)
        finally:
            os.close(file)
    except OSError:
        return None


def _scan(file: int, start: int, stop: int) -> _Ranges:
    import fcntl  # on Linux only

    ranges: _Ranges = []
    room = _FEW_REGIONS
    while start < stop:
        regions = array("Q", bytes(24 * room))
        # FILE inverted and required (no page of the file), and one of the others.
        wanted = (_FILE, _FILE, _PRESENT | _SWAPPED, _PRESENT | _SWAPPED)
        argument = bytearray(_SCAN_ARGUMENT.pack(96, 0, start, stop, 0, regions.buffer_info()[0], room, 0, *wanted))
        n = fcntl.ioctl(file, _PAGEMAP_SCAN, argument, True)
        for a, b in zip(regions[: 3 * n : 3], regions[1 : 3 * n : 3], strict=True):
            ranges.append((ranges.pop()[0] if ranges and ranges[-1][1] == a else a, b))
        (start,), before = struct.unpack_from("Q", argument, 32), start
        if start <= before:
            raise OSError("the scan stands still")
        room = _REGIONS
    return ranges


def _read(file: int, start: int, stop: int) -> _Ranges:
    n = (stop - start) // _PAGE
    entries = os.pread(file, 8 * n, start // _PAGE * 8)
    if len(entries) != 8 * n:
        raise OSError("the page map is too short")
    top = entries[7 if sys.byteorder == "little" else 0 :: 8].translate(_WRITTEN)
    return [(start + run.start() * _PAGE, start + run.end() * _PAGE) for run in re.finditer(b"\1+", top)]


@functools.cache
def _works(way: _Way) -> bool:
    """Whether ``way`` tells a written page from one that was read, tried on a small file.

    A sandbox that imitates Linux may offer the page map and fill it with zeros: every change would be lost.
    """
    import tempfile

    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(3 * _PAGE)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
                start = address_of(mapping)
                mapping[_PAGE] = mapping[0] + 1
                return _ask(way, start, start + 3 * _PAGE) == [(start + _PAGE, start + 2 * _PAGE)]
    except OSError:
        return False


def address_of(view: memoryview | mmap.mmap) -> int:
    """Where the bytes of a contiguous buffer lie; they stay there while the view lives."""
    import ctypes  # late: it takes milliseconds, and few programs need it

    buffer = (ctypes.c_void_p * 16)()  # a Py_buffer has 11 words, and the address is the first
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), buffer, 0)
    try:
        return buffer[0] or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(buffer)


Outline = tuple[Any, tuple[int, ...], tuple[int, ...], int]


def outline_of(value: Any) -> Outline | None:
    """What can change of a plain array beside its elements; None for everything else. Takes 0.5 us."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray:
        return None
    dtype, flags = value.dtype, value.flags
    return (dtype, value.shape, value.strides, flags.num) if dtype.kind in "biufc" and flags.c_contiguous else None


def is_untouched(value: Any, outline: Outline, address: int) -> bool:
    """Whether an array certainly is as it was mapped to this address, with this outline, neither reshaped nor written to.

    False where the kernel does not tell, or where asking it takes longer than looking. The same outline pickles to the same
    stream: that is not made.
    """
    found = outline_of(value)
    return (
        found == outline
        and found[0] is outline[0]  # equal types may have different metadata
        and value.nbytes > HASH_BELOW
        and address_of(value) == address
        and written_pages(address, value.nbytes) == []
    )


def same_payload(view: memoryview, checksum: int, stored: memoryview | None = None, *, private: bool = False) -> bool:
    """Whether one buffer of a value still holds what is stored.

    ``checksum`` is the xxh3_64 of what is stored, ``stored`` the same freshly mapped. ``private`` says that the view
    lies in a copy-on-write mapping of just that: then only the pages that were written are read. Else 60 us per MiB.
    """
    view = view.cast("B") if view.nbytes else memoryview(b"")  # (an empty view cannot be cast)
    if stored is not None and len(stored) != len(view):
        return False
    pages = written_pages(address_of(view), len(view)) if private and len(view) > HASH_BELOW else None
    if pages is not None and (stored is not None or not pages):
        digest = xxhash.xxh3_64_intdigest  # twice as fast as comparing views item by item
        return stored is None or all(digest(view[a:b]) == digest(stored[a:b]) for a, b in pages)
    return xxhash.xxh3_64_intdigest(view) == checksum
