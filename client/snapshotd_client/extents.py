"""Which bytes of which storages a set of tensors covers.

Storages are captured, not tensors: tensors that overlap or touch in one storage share one
extent, so that aliases stay aliases and a small view of a huge storage stays small.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch


@dataclass(frozen=True, eq=False)
class Extent:
    """`nbytes` bytes of `storage` from byte `start`."""

    storage: torch.UntypedStorage
    start: int
    nbytes: int

    def bytes_view(self) -> torch.Tensor:
        """These bytes as uint8 [nbytes], on the storage's device, without a copy."""
        return storage_bytes(self.storage, self.start, self.nbytes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's first element stands: an extent, and bytes from its start."""

    extent: int
    offset: int


def storage_bytes(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.Tensor:
    """A uint8 view [nbytes] of `storage`, whatever dtype its tensors have."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, start, (nbytes,), (1,))


def tensor_at(
    storage: torch.UntypedStorage,
    offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    """A tensor over `storage` that starts at byte `offset`, a multiple of the element's size."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, offset // dtype.itemsize, tuple(shape), tuple(stride))


def byte_span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a non-empty strided tensor reaches."""
    start = tensor.storage_offset() * tensor.itemsize
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start), int(start + (reach + 1) * tensor.itemsize)


def merge(spans: Iterable[tuple[int, int]], alignment: int) -> list[tuple[int, int]]:
    """Unite spans that overlap or touch, starts rounded down to `alignment`; ascending."""
    merged: list[tuple[int, int]] = []
    for raw, end in sorted(spans):
        start = raw - raw % alignment
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def gather(tensors: Sequence[torch.Tensor]) -> tuple[list[Extent], list[Place]]:
    """Cover `tensors` (strided, with storage) by extents.

    Returns:
        The extents in order of the first tensor of each storage, and for each tensor its place;
        an empty tensor stands at (0, 0) and has no extent of its own.
    """
    storages = {i: t.untyped_storage() for i, t in enumerate(tensors) if t.numel()}
    order: dict[int, int] = {}
    for storage in storages.values():
        order.setdefault(storage._cdata, len(order))
    extents: list[Extent] = []
    places = [Place(0, 0)] * len(tensors)

    def rank(index: int) -> int:
        return order[storages[index]._cdata]

    for _, group in groupby(sorted(storages, key=rank), key=rank):
        members = list(group)
        # A start that suits the widest dtype suits every one that views this storage.
        alignment = max(tensors[i].itemsize for i in members)
        spans = merge((byte_span(tensors[i]) for i in members), alignment)
        first = len(extents)
        storage = storages[members[0]]
        extents += [Extent(storage, start, end - start) for start, end in spans]
        for i in members:
            start, _ = byte_span(tensors[i])
            which = bisect_right(spans, start, key=itemgetter(0)) - 1
            places[i] = Place(first + which, start - spans[which][0])
    return extents, places
