"""Private, writable views of files: copy-on-write, and without a descriptor that stays open as long as they live.

Python's own ``mmap`` has the second from 3.13 on only (``trackfd=False``). Below that the C library is asked: with a
descriptor for each of them a process could hold no more than some thousand mapped arrays.
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["map_privately", "read_ahead"]

# Without it the kernel refuses a private mapping larger than memory and swap, though few of its pages are ever written.
_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
_TRACKFD: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_MOST = 1 << 46  # bytes of a mapping

use_libc = os.name == "posix" and not _TRACKFD and sys.maxsize > 2**32


def map_privately(fd: int, size: int) -> memoryview:
    """The bytes of a file. What is written to them stays in memory; pages that are never touched are never read.

    Costs 10 us. The file may be closed, renamed and removed meanwhile, but must not become shorter.
    """
    by_libc = _by_libc() if use_libc else None
    if by_libc is not None:
        return by_libc(fd, size)
    if os.name != "posix":
        return memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_COPY))
    flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    return memoryview(mmap.mmap(fd, size, flags=flags, prot=prot, **_TRACKFD))


def read_ahead(view: memoryview) -> None:
    """The system begins to read what a view of ``map_privately`` shows, and goes on by itself, where it has such a call."""
    mapping: Any = view.obj
    if isinstance(mapping, mmap.mmap):
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_WILLNEED)
    elif hasattr(mapping, "read_ahead"):
        mapping.read_ahead()


@functools.cache
def _by_libc() -> Callable[[int, int], memoryview] | None:
    """What maps by way of the C library, None where that cannot be."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        new, unmap, advise, address_of = libc.mmap, libc.munmap, libc.madvise, ctypes.addressof
        failed, will_need = ctypes.c_void_p(-1).value, mmap.MADV_WILLNEED
        array: Any = ctypes.c_ubyte * _MOST
    except (ImportError, OSError, AttributeError, OverflowError):
        return None

    # One type for mappings of all sizes, as long as any may be, of which views show what there is: a type takes longer
    # to make than a mapping. Every view keeps the object alive, and with it the mapping; at the process's end the kernel
    # removes both.
    class Mapping(array):  # type: ignore[misc]  # a class that is made above
        mapped_bytes = 0

        def read_ahead(self) -> None:
            advise(address_of(self), self.mapped_bytes, will_need)  # a hint: whether it is taken does not matter

        def __del__(self) -> None:
            unmap(address_of(self), self.mapped_bytes)

    flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE

    def by_libc(fd: int, size: int) -> memoryview:
        address = new(None, size, prot, flags, fd, 0)
        if address == failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        mapping = Mapping.from_address(address)
        mapping.mapped_bytes = size
        return memoryview(mapping).cast("B")[:size]

    return by_libc
