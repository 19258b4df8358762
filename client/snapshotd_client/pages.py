"""Asks the kernel for large pages under memory that is about to be filled for the first time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import torch

#: mmap.MADV_HUGEPAGE; a hint, and nothing more.
_MADV_HUGEPAGE: Final = 14
_HUGE_BYTES: Final = 2 << 20


def roomy(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, new and dense: its first touch in pages of 4 KiB outlasts a copy into it."""
    start = -(-tensor.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
    length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_BYTES * _HUGE_BYTES
    if tensor.device.type == "cpu" and length > 0:
        _madvise(start, length, _MADV_HUGEPAGE)  # refused where the kernel has none
    return tensor


def _c_madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise: Final = _c_madvise()
