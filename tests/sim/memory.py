"""A slot's simulated memory: real bytes, real digests, real parity, real decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import xxhash

from snapshotd.coding.codec import ZfecCodec
from snapshotd.core.instructions import Encode
from snapshotd.core.recovery import BlockInput, Decode
from snapshotd.core.stripes import Extent, block_extent, parity_bytes, stripe
from snapshotd.metadata import DataHolding, Home, ParityHolding, ParityPlace, Version

CODEC = ZfecCodec()

Holding = DataHolding | ParityHolding
#: Job, version, and shard or place: what a slot can hold only one of.
Key = tuple[str, Version, int | ParityPlace]

#: (home, key) -> what is held there; LostBytes where it is not, or cannot be reached.
Reader = Callable[[Home, Key], "Block"]


class LostBytes(Exception):
    """A read of what is not there."""


@dataclass(frozen=True, slots=True)
class Block:
    """Sealed bytes, and the checksum taken when they were sealed."""

    holding: Holding
    image: bytes
    check: bytes

    def flipped(self, chosen: float) -> Block:
        """The same with one bit changed."""
        bit = int(chosen * (len(self.image) * 8 - 1))
        image = bytearray(self.image)
        image[bit // 8] ^= 1 << bit % 8
        return replace(self, image=bytes(image))


Memory = dict[Key, Block]


def digest(image: bytes) -> bytes:
    return xxhash.xxh3_128_digest(image)


def sealed(holding: Holding, image: bytes) -> Block:
    return Block(holding, image, digest(image))


def sound(block: Block) -> bool:
    """Whether the bytes are what was sealed: asked before they are adopted, served, staged."""
    return digest(block.image) == block.check


def key_of(holding: Holding) -> Key:
    what = holding.shard if isinstance(holding, DataHolding) else holding.place
    return (holding.job, holding.version, what)


def data_holding(job: str, shard: int, version: Version, image: bytes, world: int) -> DataHolding:
    return DataHolding(job, shard, version, len(image), digest(image), world)


def _padded(image: bytes, extent: Extent, length: int) -> memoryview:
    """A block as the code sees it: its bytes, then zeros."""
    return memoryview(image[extent.offset : extent.offset + extent.length].ljust(length, b"\0"))


def records(task: Encode, record: Callable[[Home, Key], DataHolding]) -> list[DataHolding]:
    """What every member of the group has sealed: LostBytes where it is not what the task says."""
    found = []
    for member, image_bytes in zip(task.group.members, task.shard_bytes, strict=True):
        held = record(member.home, (task.job, task.version, member.shard))
        if held.image_bytes != image_bytes:
            raise LostBytes("of another size")
        found.append(held)
    return found


def encode(
    task: Encode, sealed: Sequence[DataHolding], early: Mapping[int, bytes], read: Reader
) -> dict[ParityHolding, bytes]:
    """Gather one stripe and compute the rows asked for.

    Args:
        task: what is to be coded.
        sealed: the records of the group's shards, in group order.
        early: images that were read before they were sealed, by position in the group.
        read: for all others.
    """
    n, m = task.group.size, task.group.parity
    places = [ParityPlace(task.group.shards, m, task.stripe, row) for row in task.rows]
    images = [b""] * n
    for position in {s.position for s in stripe(n, m, task.stripe).sources}:
        held = sealed[position]
        image = early.get(position)
        if image is None:
            image = read(task.group.members[position].home, key_of(held)).image
        if not as_recorded(image, held):
            raise LostBytes("of other bytes")
        images[position] = image
    digests = tuple(held.content_digest for held in sealed)
    length = parity_bytes(places[0], task.shard_bytes)
    return {
        ParityHolding(
            task.job, task.version, place, length, digests, task.shard_bytes, sealed[0].world
        ): row_of(place, images)
        for place in places
    }


def as_recorded(image: bytes, record: DataHolding) -> bool:
    """Whether what was read is what was sealed."""
    return digest(image) == record.content_digest


def row_of(place: ParityPlace, images: Sequence[bytes]) -> bytes:
    """A row of parity of images in group order; those of the stripe's holders do not count."""
    n, m = len(place.shards), place.parity
    length = parity_bytes(place, [len(image) for image in images])
    blocks = [
        _padded(image, block_extent(len(image), n - m, source.block), length)
        for source in stripe(n, m, place.stripe).sources
        for image in [images[source.position]]
    ]
    (row,) = CODEC.encode(n - m, m, blocks, [place.row])
    return bytes(row)


def decode(plan: Decode, read: Reader) -> bytes:
    """Carry out a decode plan; what comes out is not verified yet."""
    image = bytearray(plan.image_bytes)
    for block in plan.blocks:
        got = {i.index: _input(plan, i, read) for i in block.inputs}
        length = max(map(len, got.values()))
        have = {index: memoryview(b.ljust(length, b"\0")) for index, b in got.items()}
        (data,) = CODEC.decode(plan.data, plan.parity, have, [block.index])
        end = block.extent.offset + block.extent.length
        image[block.extent.offset : end] = data[: block.extent.length]
    return bytes(image)


def _input(plan: Decode, wanted: BlockInput, read: Reader) -> bytes:
    if wanted.extent.length == 0 or wanted.home is None:
        return b""
    what = wanted.place if wanted.place is not None else wanted.shard
    assert what is not None, "an input is a shard's block or a parity block"
    held = read(wanted.home, (plan.job, plan.version, what))
    return held.image[wanted.extent.offset : wanted.extent.offset + wanted.extent.length]
