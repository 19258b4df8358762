"""A slot's simulated memory: real bytes by holding, real parity, real decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import xxhash

from snapshotd.coding.codec import ZfecCodec
from snapshotd.core.instructions import Encode
from snapshotd.core.recovery import BlockInput, Decode
from snapshotd.core.stripes import Extent, block_extent, parity_bytes, stripe
from snapshotd.metadata import DataHolding, Home, ParityHolding, ParityPlace, Version

CODEC = ZfecCodec()

#: The bytes of each holding of one slot.
Memory = dict[DataHolding | ParityHolding, bytes]

#: (home, holding) -> bytes; LostBytes where they are not there any more, or cannot be reached.
Reader = Callable[[Home, DataHolding | ParityHolding], bytes]


class LostBytes(Exception):
    """A read of what is not there."""


def digest(image: bytes) -> bytes:
    return xxhash.xxh3_128_digest(image)


def data_holding(job: str, shard: int, version: Version, image: bytes) -> DataHolding:
    return DataHolding(job, shard, version, len(image), digest(image))


def padded(image: bytes, extent: Extent, length: int) -> memoryview:
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
        image = read(task.group.members[source.position].home, task.members[source.position])
        blocks.append(padded(image, block_extent(len(image), n - m, source.block), length))
    rows = CODEC.encode(n - m, m, blocks, task.rows)
    return {
        ParityHolding(task.job, task.version, place, length, digests, sizes): row
        for place, row in zip(places, rows, strict=True)
    }


def decode(plan: Decode, fetch: Callable[[BlockInput], bytes]) -> bytes:
    """Carry out a decode plan.

    Args:
        plan: what to rebuild.
        fetch: the bytes of an input's extent.
    """
    image = bytearray(plan.image_bytes)
    for block in plan.blocks:
        got = {i.index: fetch(i) for i in block.inputs}
        length = max(map(len, got.values()))
        have = {index: memoryview(b.ljust(length, b"\0")) for index, b in got.items()}
        (data,) = CODEC.decode(plan.data, plan.parity, have, [block.index])
        end = block.extent.offset + block.extent.length
        image[block.extent.offset : end] = data[: block.extent.length]
    return bytes(image)


def fetch_from(
    memories: Mapping[Home, Memory], plan: Decode, reach: Callable[[Home], bool] = lambda _: True
) -> Callable[[BlockInput], bytes]:
    """Read the inputs of a plan out of other slots' memories; LostBytes where that fails."""

    def fetch(wanted: BlockInput) -> bytes:
        if wanted.extent.length == 0:
            return b""
        assert wanted.home is not None, "an input with bytes is somewhere"
        held = memories.get(wanted.home, {}) if reach(wanted.home) else {}
        for holding, image in held.items():
            if (holding.job, holding.version) == (plan.job, plan.version) and (
                holding.shard == wanted.shard
                if isinstance(holding, DataHolding)
                else holding.place == wanted.place
            ):
                extent = wanted.extent
                return image[extent.offset : extent.offset + extent.length]
        raise LostBytes

    return fetch
