"""Where the bytes of a shard can come from, given what every live slot holds.

In order of cost: this slot's own segment, a copy at another slot, decoding from the group. Plans
are frozen data; `snapshotd.flow.stage` executes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from snapshotd.core.protection import Slots
from snapshotd.core.stripes import Extent, block_extent, parity_bytes, stripe, stripe_of_block
from snapshotd.metadata import DataHolding, Home, ParityHolding, ParityPlace, Tier, Version


@dataclass(frozen=True, slots=True)
class Local:
    """The shard is in this slot's memory."""

    holding: DataHolding


@dataclass(frozen=True, slots=True)
class Copy:
    """The whole shard is in another slot's memory."""

    home: Home
    holding: DataHolding


@dataclass(frozen=True, slots=True)
class BlockInput:
    """One block to read for decoding: index in the code (0..n-1), where, and which bytes.

    Exactly one of `shard` and `place` is set; an input without bytes is all zeros.
    """

    index: int
    home: Home | None
    extent: Extent
    shard: int | None = None
    place: ParityPlace | None = None


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of the lost shard: data block `index` of a stripe, decoded from k inputs."""

    index: int
    extent: Extent
    inputs: tuple[BlockInput, ...]


@dataclass(frozen=True, slots=True)
class Decode:
    """Rebuild a shard block by block from the others of its group."""

    job: str
    shard: int
    version: Version
    image_bytes: int
    content_digest: bytes
    data: int
    parity: int
    blocks: tuple[BlockPlan, ...]
    record_at: Home
    record_place: ParityPlace


@dataclass(frozen=True, slots=True)
class Missing:
    """The shard cannot be had; `reason` says what was found and what is lacking."""

    reason: str


Origin = Local | Copy | Decode | Missing


def find_shard(slots: Slots, job: str, shard: int, version: Version, home: Home | None) -> Origin:
    """The cheapest way to bring one shard of one version to `home`."""
    copies = [
        (where, d)
        for where, facts in sorted(slots.items())
        for d in facts.data
        if (d.job, d.shard, d.version) == (job, shard, version) and facts.address
    ]
    for where, holding in copies:
        if where == home:
            return Local(holding)
    if copies:
        return Copy(*copies[0])
    return _decode(slots, job, shard, version)


def survey(
    slots: Slots, job: str, world: int, version: Version, homes: Mapping[int, Home]
) -> tuple[Origin, ...]:
    """The origin of every shard of one version, in shard order."""
    return tuple(find_shard(slots, job, shard, version, homes.get(shard)) for shard in range(world))


def candidates(slots: Slots, job: str) -> list[Version]:
    """All versions of which anything is held, newest first."""
    held = {d.version for f in slots.values() for d in f.data if d.job == job}
    coded = {p.version for f in slots.values() for p in f.parity if p.job == job}
    return sorted(held | coded, reverse=True)


def world_of(slots: Slots, job: str, version: Version) -> int:
    """How many ranks saved a version, as its holders tell; 0 where none does."""
    found = 0
    for facts in slots.values():
        held: tuple[DataHolding | ParityHolding, ...] = (*facts.data, *facts.parity)
        told = (h.world for h in held if h.job == job and h.version == version)
        found = max(found, *told, 0)
    return found


def tier_of(origins: tuple[Origin, ...]) -> Tier:
    """One tier for the whole job: LOCAL only when every shard is."""
    return Tier.LOCAL if all(isinstance(o, Local) for o in origins) else Tier.GROUP


def _decode(slots: Slots, job: str, shard: int, version: Version) -> Origin:
    """Plan a decode with the first code that gives enough blocks, or say what is lacking."""
    shortfalls = []
    for sample, rows in codes_of(slots, job, shard, version):
        planned = _decode_with(slots, job, shard, version, sample, rows)
        if isinstance(planned, Decode):
            return planned
        shortfalls.append(planned.reason)
    return Missing("; ".join(shortfalls) or "no copy and no parity of it is left")


def codes_of(
    slots: Slots, job: str, shard: int, version: Version
) -> Iterator[tuple[ParityHolding, dict[ParityPlace, Home]]]:
    """Each distinct code that covers the shard: a sample holding, and where its rows are."""
    found: dict[tuple[object, ...], tuple[ParityHolding, dict[ParityPlace, Home]]] = {}
    for where, facts in sorted(slots.items()):
        for p in facts.parity:
            if p.job == job and p.version == version and shard in p.place.shards and facts.address:
                key = (p.place.shards, p.place.parity, p.content_digests)
                found.setdefault(key, (p, {}))[1].setdefault(p.place, where)
    yield from found.values()


def _decode_with(
    slots: Slots,
    job: str,
    shard: int,
    version: Version,
    sample: ParityHolding,
    rows: Mapping[ParityPlace, Home],
) -> Decode | Missing:
    shards, m = sample.place.shards, sample.place.parity
    n = len(shards)
    position = shards.index(shard)
    size = sample.shard_bytes[position]
    blocks = []
    for block in range(n - m):
        extent = block_extent(size, n - m, block)
        if extent.length == 0:
            continue
        j = stripe_of_block(n, m, position, block)
        inputs = inputs_of(slots, job, version, sample, rows, j, position)
        if len(inputs) < n - m:
            return Missing(
                f"stripe {j} of shards {list(shards)} has {len(inputs)} of the "
                f"{n - m} blocks that decoding needs"
            )
        sources = stripe(n, m, j).sources
        index = next(i for i, s in enumerate(sources) if s.position == position)
        blocks.append(BlockPlan(index, extent, inputs[: n - m]))
    place, home = min(rows.items())
    return Decode(
        job, shard, version, size, sample.content_digests[position], n - m, m, tuple(blocks),
        home, place,
    )  # fmt: skip


def inputs_of(
    slots: Slots,
    job: str,
    version: Version,
    sample: ParityHolding,
    rows: Mapping[ParityPlace, Home],
    j: int,
    lost: int,
) -> tuple[BlockInput, ...]:
    """The other blocks of stripe j than `lost` that can be had: data first, then parity rows."""
    shards, m = sample.place.shards, sample.place.parity
    n = len(shards)
    found = []
    for index, source in enumerate(stripe(n, m, j).sources):
        if source.position == lost:
            continue
        extent = block_extent(sample.shard_bytes[source.position], n - m, source.block)
        shard = shards[source.position]
        home = _holder(slots, job, shard, version, sample.content_digests[source.position])
        if home is not None or extent.length == 0:
            found.append(BlockInput(index, home, extent, shard=shard))
    for row in range(m):
        place = ParityPlace(shards, m, j, row)
        if place in rows:
            length = parity_bytes(place, sample.shard_bytes)
            found.append(BlockInput(n - m + row, rows[place], Extent(0, length), place=place))
    return tuple(found)


def _holder(slots: Slots, job: str, shard: int, version: Version, digest: bytes) -> Home | None:
    return next(holders_of(slots, job, shard, version, digest), None)


def holders_of(
    slots: Slots, job: str, shard: int, version: Version, digest: bytes | None = None
) -> Iterator[Home]:
    """Every slot that serves the shard, of these very bytes where a digest is given."""
    for where, facts in sorted(slots.items()):
        for d in facts.data if facts.address else ():
            if (d.job, d.shard, d.version) == (job, shard, version) and (
                digest is None or d.content_digest == digest
            ):
                yield where
