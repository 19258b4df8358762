"""Boxes of n dimensions, and the runs of bytes in which two memories hold the same one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]


class Box(NamedTuple):
    """Elements [offset, offset + shape) of a whole, in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def meet(self, other: Box) -> Box | None:
        """What both have; None where that is nothing."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, shape) if min(shape, default=1) > 0 else None

    def without(self, part: Box) -> list[Box]:
        """What is left, in boxes, when `part`, which lies within, is taken away."""
        left = []
        offset, shape = list(self.offset), list(self.shape)
        for dim in range(len(shape)):
            start, end = part.offset[dim], part.offset[dim] + part.shape[dim]
            for low, high in ((offset[dim], start), (end, offset[dim] + shape[dim])):
                if high > low:
                    left.append(
                        Box(
                            (*offset[:dim], low, *offset[dim + 1 :]),
                            (*shape[:dim], high - low, *shape[dim + 1 :]),
                        )
                    )
            offset[dim], shape[dim] = start, end - start
        return left


class Strided(NamedTuple):
    """A box as it lies in memory: element `box.offset` first, `strides` elements apart."""

    box: Box
    strides: tuple[int, ...]

    def element(self, at: Sequence[int]) -> int:
        """Where the element of the whole at `at` lies, in elements from the first."""
        moved = zip(at, self.box.offset, self.strides, strict=True)
        return sum((a - start) * stride for a, start, stride in moved)

    @property
    def reach(self) -> int:
        """Elements from the first to the last, both counted."""
        return (
            1 + sum((n - 1) * s for n, s in zip(self.box.shape, self.strides, strict=True))
            if self.box.elements
            else 0
        )


class Runs(NamedTuple):
    """Runs of `length` bytes each, at `source` of one memory and at `target` of the other."""

    source: Offsets
    target: Offsets
    length: int


def runs(box: Box, source: Strided, target: Strided, itemsize: int) -> Runs:
    """The runs in which two pieces of memory hold `box`, which lies in both and is not empty.

    As few as there can be: dimensions that follow each other in both are one.
    """
    dims = sorted(
        ((target.strides[dim], source.strides[dim], n) for dim, n in enumerate(box.shape) if n > 1),
        reverse=True,
    )
    run = 1
    while dims and dims[-1][:2] == (run, run):
        run *= dims.pop()[2]
    starts = [np.array([piece.element(box.offset)], dtype=np.int64) for piece in (source, target)]
    for to_stride, from_stride, n in dims:
        steps = np.arange(n, dtype=np.int64)
        for which, stride in enumerate((from_stride, to_stride)):
            starts[which] = (starts[which][:, None] + steps * stride).ravel()
    return Runs(starts[0] * itemsize, starts[1] * itemsize, run * itemsize)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(1, n)
    return tuple(reversed(strides))
