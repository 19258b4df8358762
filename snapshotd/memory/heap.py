"""How the C library's heap treats what is freed."""

from __future__ import annotations

import ctypes
from typing import Final

#: Of malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

#: Longer than any message of blocks: below it, what is freed is used again.
MAPPED_BYTES: Final = 8 << 20
#: Freed memory that a process keeps at most, for each of its arenas.
KEPT_BYTES: Final = 32 << 20


def keep_freed() -> bool:
    """Keep what is freed for what comes next, in this process.

    A chunk on its way is a message of a megabyte, made and freed again. By default each is mapped
    anew or the heap's end is given back, and the kernel clears pages for it every time, which
    takes as long as all copying.

    Returns:
        Whether this C library can: glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
