"""How many further nodes a group may lose before a shard of it is gone: never said too high."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from snapshotd.core.protection import Slots
from snapshotd.core.recovery import codes_of, holders_of
from snapshotd.core.stripes import block_extent, stripe, stripe_of_block
from snapshotd.metadata import ParityHolding, ParityPlace, Version

#: Nodes that hold a block, one entry for each copy of it.
_Block = frozenset[str]


def further_losses(slots: Slots, job: str, version: Version, shards: Iterable[int]) -> int:
    """Whichever so many nodes are lost, each of `shards` can still be had; -1 where one can not.

    Args:
        slots: facts of all slots of live nodes.
        job: whose shards.
        version: which generation of them.
        shards: of one group.
    """
    return min((_needed(slots, job, version, shard) - 1 for shard in shards), default=-1)


def _needed(slots: Slots, job: str, version: Version, shard: int) -> int:
    """How many nodes must be lost for a shard to be gone; at least so many."""
    copies = frozenset(h.node for h in holders_of(slots, job, shard, version))
    ways = [len(copies)]
    for sample, rows in codes_of(slots, job, shard, version):
        at = {place: frozenset({home.node}) for place, home in rows.items()}
        ways += [_to_break(slots, job, version, shard, copies, sample, at)]
    return max(ways)


def _to_break(
    slots: Slots,
    job: str,
    version: Version,
    shard: int,
    copies: _Block,
    sample: ParityHolding,
    rows: dict[ParityPlace, _Block],
) -> int:
    """Nodes whose loss takes all copies of a shard and makes one of its stripes undecodable."""
    shards, m = sample.place.shards, sample.place.parity
    n, position = len(shards), shards.index(shard)
    k = n - m
    fewest = n + len(copies)
    for block in range(k):
        if block_extent(sample.shard_bytes[position], k, block).length == 0:
            continue
        j = stripe_of_block(n, m, position, block)
        left = [b - copies for b in _blocks(slots, job, version, sample, rows, j, position)]
        fewest = min(fewest, len(copies) + _to_go_below(k, [b for b in left if b]))
    return fewest


def _blocks(
    slots: Slots,
    job: str,
    version: Version,
    sample: ParityHolding,
    rows: dict[ParityPlace, _Block],
    j: int,
    lost: int,
) -> Iterator[_Block]:
    """The other blocks of stripe j and where they are; empty ones are everywhere."""
    shards, m = sample.place.shards, sample.place.parity
    n = len(shards)
    everywhere = frozenset({""})
    for source in stripe(n, m, j).sources:
        if source.position == lost:
            continue
        size = sample.shard_bytes[source.position]
        digest = sample.content_digests[source.position]
        homes = holders_of(slots, job, shards[source.position], version, digest)
        empty = block_extent(size, n - m, source.block).length == 0
        yield everywhere if empty else frozenset(h.node for h in homes)
    for row in range(m):
        yield rows.get(ParityPlace(shards, m, j, row), frozenset())


def _to_go_below(k: int, blocks: list[_Block]) -> int:
    """Fewest nodes without which less than k blocks are left, each block counted as held once."""
    left = len(blocks)
    counts = Counter(node for block in blocks for node in block if node)
    for lost, (_, count) in enumerate(counts.most_common()):
        if left < k:
            return lost
        left -= count
    return len(counts) if left < k else len(counts) + 1
