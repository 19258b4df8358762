"""Copies and compares tensors bit by bit, whatever their layout."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from snapshotd_client.leaves import local_piece

#: Of the cores that this process may use; memory gives no more to more of them.
_MOST_THREADS: Final = 4


def copy_exact(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values of the same dtype and shape into `target`, in place and off the graph."""
    with torch.no_grad():
        to, like = local_piece(target).detach(), local_piece(source).detach()
        for dim, stride in enumerate(to.stride()):
            # Elements of an expanded dimension are one: torch refuses to write it many times.
            if stride == 0 and to.shape[dim] > 1:
                to, like = to.narrow(dim, 0, 1), like.narrow(dim, 0, 1)
        to.copy_(like)


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements of `tensor` are one in memory by a zero stride."""
    piece = local_piece(tensor)
    return any(s == 0 and n > 1 for n, s in zip(piece.shape, piece.stride(), strict=True))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit of the elements agree: NaN equals the same NaN."""
    left, right = local_piece(a), local_piece(b)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    mine, other = _dense(left), _dense(right)
    # torch.equal on bytes takes ten times as long.
    return memcmp(mine.data_ptr(), other.data_ptr(), mine.nbytes) == 0


def all_same_bits(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[bool]:
    """`same_bits` of each pair, in order, computed in some threads."""
    with ThreadPoolExecutor(thread_count()) as pool:
        yield from pool.map(lambda pair: same_bits(*pair), pairs)


def thread_count() -> int:
    """How many threads of this process may move bytes at once."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in the order of its shape, in the CPU's memory; itself where it is that."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def __c_memcmp() -> Callable[[int, int, int], int]:
    """Lets go of the interpreter lock, as ctypes does."""
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return function


memcmp: Final = __c_memcmp()
