"""A slot's simulated memory: real bytes, real digests, real parity, real decoding."""

from __future__ import annotations

from collections.abc import Callable
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


def encode(task: Encode, read: Reader) -> dict[ParityHolding, bytes]:
    """Gather one stripe and compute the rows asked for."""
    n, m = task.group.size, task.group.parity
    sizes = tuple(d.image_bytes for d in task.members)
    digests = tuple(d.content_digest for d in task.members)
    places = [ParityPlace(task.group.shards, m, task.stripe, row) for row in task.rows]
    length = parity_bytes(places[0], sizes)
    blocks = []
    for source in stripe(n, m, task.stripe).sources:
        held = task.members[source.position]
        block = read(task.group.members[source.position].home, key_of(held))
        if block.holding != held:
            raise LostBytes  # other bytes of the shard than it was said to have
        extent = block_extent(len(block.image), n - m, source.block)
        blocks.append(_padded(block.image, extent, length))
    rows = CODEC.encode(n - m, m, blocks, task.rows)
    return {
        ParityHolding(
            task.job, task.version, place, length, digests, sizes, task.members[0].world
        ): bytes(row)
        for place, row in zip(places, rows, strict=True)
    }


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
