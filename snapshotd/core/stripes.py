"""The layout of the code over a group: which block of which shard stands in which stripe.

A group of n members has n stripes. Stripe j keeps its m parity rows on members j, j+1, ...,
j+m-1 (mod n); each of the other k = n - m members gives it one block of its shard. So each shard
is cut into k blocks, each in another stripe, and every member carries m parity blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from snapshotd.metadata import Group, ParityPlace
from snapshotd.wire.protocol import grain_bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + length) of an image."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Source:
    """One data block of a stripe: position in the group, and which block of that shard."""

    position: int
    block: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """One stripe: `sources[i]` is data block i of the code, `holders[r]` keeps parity row r."""

    index: int
    sources: tuple[Source, ...]
    holders: tuple[int, ...]


@lru_cache(maxsize=4096)
def stripe(n: int, m: int, index: int) -> Stripe:
    """Stripe `index` (0 <= index < n) of a group of n members with m parity rows."""
    holders = tuple((index + row) % n for row in range(m))
    sources = tuple(
        Source(position, _block_of(n, m, position, index))
        for position in range(n)
        if position not in holders
    )
    return Stripe(index, sources, holders)


def stripes(group: Group) -> tuple[Stripe, ...]:
    """All stripes of a group; none where it has no parity."""
    return _stripes(group.size, group.parity)


@lru_cache(maxsize=256)
def _stripes(n: int, m: int) -> tuple[Stripe, ...]:
    return tuple(stripe(n, m, j) for j in range(n)) if m else ()


@lru_cache(maxsize=4096)
def stripe_of_block(n: int, m: int, position: int, block: int) -> int:
    """Stripe in which block `block` of the shard at `position` stands."""
    return [j for j in range(n) if (position - j) % n >= m][block]


def _block_of(n: int, m: int, position: int, index: int) -> int:
    """How many stripes before `index` already took a block of the shard at `position`."""
    return sum(1 for j in range(index) if (position - j) % n >= m)


def block_extent(image_bytes: int, k: int, block: int) -> Extent:
    """Where block `block` of k lies in an image; whole grains, the last ones shorter or empty.

    Args:
        image_bytes: length of the image.
        k: data blocks a stripe.
        block: 0 .. k-1.
    """
    grain = grain_bytes(image_bytes)
    length = -(-image_bytes // (k * grain)) * grain
    offset = min(block * length, image_bytes)
    return Extent(offset, min(length, image_bytes - offset))


def parity_bytes(place: ParityPlace, shard_bytes: Sequence[int]) -> int:
    """Length of the parity blocks of a stripe: that of its longest data block.

    Args:
        place: which stripe of which group.
        shard_bytes: image lengths of the group's shards, in group order.
    """
    n, k = len(place.shards), len(place.shards) - place.parity
    layout = stripe(n, place.parity, place.stripe)
    return max(block_extent(shard_bytes[s.position], k, s.block).length for s in layout.sources)


def places(group: Group, position: int) -> tuple[ParityPlace, ...]:
    """The parity blocks that the member at `position` must keep."""
    return tuple(
        ParityPlace(group.shards, group.parity, s.index, row)
        for s in stripes(group)
        for row, holder in enumerate(s.holders[: group.rows])
        if holder == position
    )
