"""Which bytes of which shards make up an image, as `Fill` asks for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.boxes import Offsets


@dataclass(frozen=True, eq=False)
class Ranges:
    """The i-th of each is of one range; ascending in `to`, none overlapping there, none empty.

    Attributes:
        shards: where from.
        offsets: into the shard's image, bytes.
        lengths: bytes.
        to: into the image to be made, bytes.
    """

    shards: Offsets
    offsets: Offsets
    lengths: Offsets
    to: Offsets

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())

    def message(self, image_bytes: int) -> pb.Fill:
        """The question for an image of that length."""
        return pb.Fill(
            image_bytes=image_bytes,
            shards=self.shards.tolist(),
            offsets=self.offsets.tolist(),
            lengths=self.lengths.tolist(),
            to=self.to.tolist(),
        )


class RangesMaker:
    """Collects ranges in any order; what is filled twice is filled once, neighbours become one."""

    def __init__(self) -> None:
        self._rows: list[tuple[Offsets, Offsets, Offsets, Offsets]] = []

    def add(self, shard: int, offsets: Offsets, lengths: Offsets, to: Offsets) -> None:
        """Some ranges of one shard: arrays of the same length."""
        self._rows.append((np.full(len(to), shard, dtype=np.int64), offsets, lengths, to))

    def add_one(self, shard: int, offset: int, length: int, to: int) -> None:
        one = np.ones(1, dtype=np.int64)
        self.add(shard, one * offset, one * length, one * to)

    def ranges(self) -> Ranges:
        empty = np.empty(0, dtype=np.int64)
        columns = [
            np.concatenate([empty, *(row[i] for row in self._rows)]).astype(np.int64)
            for i in range(4)
        ]
        order = np.argsort(columns[3], kind="stable")
        shards, offsets, lengths, to = (column[order] for column in columns)
        if len(to):
            # Two tensors that share memory want the same bytes: the first has them filled.
            ends = np.maximum.accumulate(to + lengths)
            cut = np.clip(np.concatenate([[0], ends[:-1]]) - to, 0, lengths)
            offsets, lengths, to = offsets + cut, lengths - cut, to + cut
        kept = lengths > 0
        return _joined(shards[kept], offsets[kept], lengths[kept], to[kept])


def skeleton_ranges(
    manifests: Mapping[int, segment_pb2.Manifest], shards: Iterable[int]
) -> tuple[Ranges, dict[int, tuple[int, int]], int]:
    """What to read of some shards beside their tensors.

    Returns:
        the ranges; for each shard, in order, where its skeleton is in what they fill, and its
        length; and the length of it all, bytes.
    """
    maker, places, at = RangesMaker(), {}, 0
    for shard in sorted(shards):
        skeleton = manifests[shard].skeleton
        maker.add_one(shard, skeleton.image_offset, skeleton.bytes, at)
        places[shard] = (at, skeleton.bytes)
        at += skeleton.bytes
    return maker.ranges(), places, at


def _joined(shards: Offsets, offsets: Offsets, lengths: Offsets, to: Offsets) -> Ranges:
    if not len(to):
        return Ranges(shards, offsets, lengths, to)
    goes_on = (
        (shards[1:] == shards[:-1])
        & (offsets[1:] == offsets[:-1] + lengths[:-1])
        & (to[1:] == to[:-1] + lengths[:-1])
    )
    first = np.concatenate([[True], ~goes_on])
    starts = np.flatnonzero(first)
    return Ranges(shards[starts], offsets[starts], np.add.reduceat(lengths, starts), to[starts])
