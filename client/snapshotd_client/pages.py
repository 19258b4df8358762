"""Pages under memory that is about to be filled for the first time."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final

#: Advice that Python's mmap does not name. Linux 5.14 and later.
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
#: Less is not worth the call.
_LEAST_BYTES: Final = 128 << 10


def touch(address: int, nbytes: int) -> None:
    """Have pages under memory that is about to be filled, all at once: a fault for each is dearer.

    Not large ones: where memory is in pieces, the kernel takes long to bring 2 MiB together.
    """
    if nbytes >= _LEAST_BYTES:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        have(start, end - start)


def have(address: int, nbytes: int) -> None:
    """Have all pages of a part of a mapping in this process's tables, writable."""
    advise(address, nbytes, _MADV_POPULATE_WRITE)


def see(address: int, nbytes: int) -> None:
    """As `have`, to be read."""
    advise(address, nbytes, _MADV_POPULATE_READ)


def advise(address: int, nbytes: int, advice: int) -> None:
    """As mmap.madvise, but without the interpreter lock; a kernel that does not know it refuses."""
    _madvise(address, nbytes, advice)


def _c_madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise: Final = _c_madvise()
