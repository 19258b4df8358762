"""Answers a load plan: from this rank's own image where that has it, else from any shard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.boxes import Box, Strided, dense_strides
from snapshotd_client.catalog import Found
from snapshotd_client.dcp.described import Contents
from snapshotd_client.errors import StateMismatch
from snapshotd_client.extents import tensor_at
from snapshotd_client.filling import Ask, Taken, filled
from snapshotd_client.image import frozen_bytes
from snapshotd_client.layout import aligned
from snapshotd_client.ranges import RangesMaker, skeleton_ranges

#: So much is asked of the daemon at a time, if no single piece is larger.
_BATCH_BYTES: Final = 256 << 20


class _Order(NamedTuple):
    """A piece that the daemon is to bring: of which tensor, where from, where to."""

    found: Found
    box: Box
    dtype: torch.dtype
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.box.elements * self.dtype.itemsize


class Reads:
    """The reads of one rank.

    Args:
        contents: of the step.
        ask: asks the daemon.
        near: this rank's own shard.
        own: its image, where it is at hand; read-only.
        taken: counts on.
    """

    def __init__(
        self, contents: Contents, ask: Ask, near: int, own: memoryview | None, taken: Taken
    ) -> None:
        self._contents = contents
        self._ask = ask
        self._near = near
        self._own = frozen_bytes(own).untyped_storage() if own is not None else None
        self._taken = taken

    def answer(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Bring every item of a plan to where the planner wants it.

        Raises:
            StateMismatch: some of it is in no shard. Refused: the daemons cannot bring it.
        """
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        with torch.no_grad():
            orders = [
                order
                for item, target in zip(tensors, targets, strict=True)
                for order in self._begin(item, target)
            ]
            for batch in _batches(orders):
                self._bring(batch)
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        self._objects([i for i in plan.items if i.type == LoadItemType.BYTE_IO], planner)

    def _begin(self, item: ReadItem, target: torch.Tensor) -> list[_Order]:
        """Copy what is at hand; the rest is ordered."""
        name = item.storage_index.fqn
        start = item.storage_index.offset or (0,) * len(item.lengths)
        offset = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
        box = Box(offset, tuple(item.lengths))
        if tuple(target.shape) != box.shape:
            raise StateMismatch(
                [f"{name}: {list(target.shape)} is to take a piece of {list(box.shape)}"]
            )
        catalog = self._contents.catalog
        found = catalog.find(name, box, self._near)
        if found.lacking:
            raise StateMismatch([f"{name}: {found.lacking} elements of {box} are in no shard"])
        (form,) = catalog.forms[name]
        dtype, orders = getattr(torch, form.dtype), []
        for met, piece, parts in found.parts:
            place = _within(target, met, box)
            if self._own is not None and {part.source.shard for part in parts} == {self._near}:
                at = parts[0].source.image_offset
                held = tensor_at(self._own, at, dtype, piece.box.shape, piece.strides)
                place.copy_(_within(held, met, piece.box))
                nbytes = met.elements * dtype.itemsize
                self._taken.read += nbytes
                self._taken.local += nbytes
            else:
                orders.append(_Order(Found([(met, piece, parts)], (), 0), met, dtype, place))
        return orders

    def _bring(self, orders: Sequence[_Order]) -> None:
        maker, at, places = RangesMaker(), 0, []
        for order in orders:
            lies = Strided(order.box, dense_strides(order.box.shape))
            self._contents.catalog.read(maker, order.found, order.dtype.itemsize, lies, at)
            places.append(at)
            at = aligned(at + order.nbytes)
        ranges = maker.ranges()
        assert ranges.nbytes == sum(order.nbytes for order in orders), "all of it was found"
        with filled(self._ask, ranges, at, self._taken) as image:
            storage = frozen_bytes(image).untyped_storage()
            try:
                for order, place in zip(orders, places, strict=True):
                    shape = order.box.shape
                    order.target.copy_(
                        tensor_at(storage, place, order.dtype, shape, dense_strides(shape))
                    )
            finally:
                del storage  # which keeps the mapping open

    def _objects(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        maker, at, places = RangesMaker(), 0, []
        for item in items:
            shard, offset, length = self._contents.object(item.storage_index.fqn)
            if length:
                maker.add_one(shard, offset, length, at)
            places.append((at, length))
            at += length
        if at:
            with filled(self._ask, maker.ranges(), at, self._taken) as image:
                texts = [bytes(image[start : start + length]) for start, length in places]
        else:
            texts = [b""] * len(items)
        for item, text in zip(items, texts, strict=True):
            planner.load_bytes(item, io.BytesIO(text))


def _within(whole: torch.Tensor, part: Box, box: Box) -> torch.Tensor:
    """The part of a tensor that holds `box`."""
    for dim, (start, base, n) in enumerate(zip(part.offset, box.offset, part.shape, strict=True)):
        whole = whole.narrow(dim, start - base, n)
    return whole


def _batches(orders: Sequence[_Order]) -> list[list[_Order]]:
    batches: list[list[_Order]] = []
    held = _BATCH_BYTES
    for order in orders:
        if held + order.nbytes > _BATCH_BYTES:
            batches.append([])
            held = 0
        batches[-1].append(order)
        held += order.nbytes
    return batches


def skeletons(manifests: dict[int, segment_pb2.Manifest], ask: Ask, taken: Taken) -> list[bytes]:
    """Of all shards, in order."""
    ranges, places, total = skeleton_ranges(manifests, manifests)
    with filled(ask, ranges, total, taken) as image:
        return [bytes(image[at : at + length]) for at, length in places.values()]
