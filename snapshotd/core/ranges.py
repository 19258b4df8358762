"""Byte ranges of shards: which holder gives which, and what must be decoded for what nobody holds.

A trainer of another world, or of another layout, wants pieces of many shards. What this slot holds
it reads; what others hold is read there, spread over those who hold the same; of a lost shard only
the grains that are touched are decoded, each from k blocks of its stripe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from snapshotd.core.protection import Slots
from snapshotd.core.recovery import (
    BlockInput,
    BlockPlan,
    Decode,
    Missing,
    codes_of,
    find_shard,
    inputs_of,
)
from snapshotd.core.stripes import block_extent, stripe, stripe_of_block
from snapshotd.errors import CallerError
from snapshotd.metadata import DataHolding, Home, ParityHolding, ParityPlace, Version
from snapshotd.wire.protocol import TRANSFER_BYTES, grain_bytes

#: (offset, length) of ranges of an image, ascending; no two overlap or touch.
Spans = tuple[tuple[int, int], ...]

#: What one of several holders is asked for at a time.
SHARE_BYTES = 8 * TRANSFER_BYTES


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [offset, offset + length) of a shard's image, and where they go in another image."""

    shard: int
    offset: int
    length: int
    to: int


@dataclass(frozen=True, slots=True)
class Held:
    """Ranges of a shard that a slot holds."""

    home: Home
    holding: DataHolding
    spans: Spans


@dataclass(frozen=True, slots=True)
class Degraded:
    """Ranges of a shard that nobody holds: `spans[i]` are the whole grains wanted of `blocks[i]`.

    Offsets count from the start of the block; `decode.blocks` are those that are touched.
    """

    decode: Decode
    spans: tuple[Spans, ...]


Part = Held | Degraded


@dataclass(frozen=True, slots=True)
class Plan:
    """Where all wanted ranges come from; `missing` says which shards cannot be had, and why."""

    parts: tuple[Part, ...]
    missing: tuple[str, ...]


def check_ranges(ranges: Sequence[Range], image_bytes: int, shard_bytes: Mapping[int, int]) -> None:
    """Refuse ranges that no image can be made of.

    Args:
        ranges: in any order.
        image_bytes: length of the image to be made.
        shard_bytes: image length of every shard there is.

    Raises:
        CallerError: names the first one that is wrong.
    """
    for r in ranges:
        size = shard_bytes.get(r.shard)
        if size is None:
            raise CallerError(
                f"a range is of shard {r.shard}, and the version has {len(shard_bytes)} shards",
                "Ask for shards of Restored.decision.saved_world ranks",
            )
        if r.length < 1 or r.offset + r.length > size:
            raise CallerError(
                f"a range of {r.length} bytes at {r.offset} of shard {r.shard}, whose image has "
                f"{size} bytes",
                "Ask for bytes that ManifestsGathered says are there",
            )
        if r.to + r.length > image_bytes:
            raise CallerError(
                f"a range of {r.length} bytes goes to {r.to} of an image of {image_bytes} bytes",
                "Make the image longer",
            )
    end = 0
    for r in sorted(ranges, key=lambda r: r.to):
        if r.to < end:
            raise CallerError(
                f"two ranges go to byte {r.to} of the image",
                "Give each byte of the image one source",
            )
        end = r.to + r.length


def shard_sizes(slots: Slots, job: str, version: Version) -> dict[int, int]:
    """Image length of every shard of a version, as its holders and its parity tell."""
    found: dict[int, int] = {}
    for facts in slots.values():
        for p in facts.parity:
            if (p.job, p.version) == (job, version):
                found.update(zip(p.place.shards, p.shard_bytes, strict=True))
    for facts in slots.values():
        for d in facts.data:
            if (d.job, d.version) == (job, version):
                found[d.shard] = d.image_bytes
    return found


def wanted(ranges: Iterable[Range]) -> dict[int, Spans]:
    """The bytes of each shard that some range wants, each once."""
    by_shard: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for r in ranges:
        by_shard[r.shard].append((r.offset, r.length))
    return {shard: united(spans) for shard, spans in sorted(by_shard.items())}


def united(spans: Iterable[tuple[int, int]]) -> Spans:
    """Ranges in order, those that touch or overlap as one."""
    found: list[tuple[int, int]] = []
    for offset, length in sorted(spans):
        last = sum(found[-1]) if found else -1
        if offset > last:
            found.append((offset, length))
        elif offset + length > last:
            found[-1] = (found[-1][0], offset + length - found[-1][0])
    return tuple(found)


def without(spans: Spans, done: Spans) -> Spans:
    """What is left of ranges."""
    left: list[tuple[int, int]] = []
    others = iter(done)
    start, length = next(others, (0, 0))
    for offset, count in spans:
        at, end = offset, offset + count
        while length and start < end:
            if start > at:
                left.append((at, start - at))
            at = max(at, start + length)
            if start + length > end:
                break
            start, length = next(others, (0, 0))
        if at < end:
            left.append((at, end - at))
    return tuple(left)


def gaps(ranges: Iterable[Range], image_bytes: int) -> Iterator[tuple[int, int]]:
    """Where no range goes in the image: (offset, length)."""
    end = 0
    for r in sorted(ranges, key=lambda r: r.to):
        if r.to > end:
            yield end, r.to - end
        end = r.to + r.length
    if image_bytes > end:
        yield end, image_bytes - end


class Targets:
    """Where the bytes of one shard go: any of them may be wanted in several places."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._ranges = sorted(ranges, key=lambda r: r.offset)
        self._starts = [r.offset for r in self._ranges]
        self._ends = list(accumulate((r.offset + r.length for r in self._ranges), max))

    def of(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(from, to, count): `count` bytes at `from` of [offset, offset + length) go to `to`."""
        end = offset + length
        for i in range(bisect_right(self._ends, offset), len(self._ranges)):
            r = self._ranges[i]
            if r.offset >= end:
                return
            start, stop = max(r.offset, offset), min(r.offset + r.length, end)
            if start < stop:
                yield start - offset, r.to + start - r.offset, stop - start


def plan(
    slots: Slots,
    job: str,
    version: Version,
    spans: Mapping[int, Spans],
    home: Home,
    avoid: Collection[Home] = (),
) -> Plan:
    """Where ranges of some shards come from.

    Args:
        slots: facts of all slots.
        job: whose shards.
        version: which generation of them.
        spans: what is wanted, by shard.
        home: who wants it: what it holds itself costs nothing.
        avoid: who has just failed; asked only for what nobody else gives.
    """
    others = {h: f for h, f in slots.items() if h not in avoid or h == home}
    load: Counter[Home] = Counter()
    parts: list[Part] = []
    missing = []
    for shard, some in spans.items():
        found = _parts(others, job, version, shard, some, home, load)
        if not found and len(others) < len(slots):
            found = _parts(slots, job, version, shard, some, home, load)
        if not found:
            origin = find_shard(slots, job, shard, version, home)
            reason = origin.reason if isinstance(origin, Missing) else "it has just gone"
            missing.append(f"shard {shard} is missing: {reason}")
        parts += found
    return Plan(tuple(parts), tuple(missing))


def _parts(
    slots: Slots,
    job: str,
    version: Version,
    shard: int,
    spans: Spans,
    home: Home,
    load: Counter[Home],
) -> list[Part]:
    holders = {
        where: d
        for where, facts in sorted(slots.items())
        for d in facts.data
        if (d.job, d.shard, d.version) == (job, shard, version) and facts.address
    }
    if home in holders:
        return [Held(home, holders[home], spans)]
    if holders:
        return _spread(holders, spans, load)
    for sample, rows in codes_of(slots, job, shard, version):
        found = _degraded(slots, job, version, shard, spans, home, sample, rows, load)
        if found is not None:
            return [found]
    return []


def _spread(holders: Mapping[Home, DataHolding], spans: Spans, load: Counter[Home]) -> list[Part]:
    """Ranges over those who hold the same shard, each asked for about as much as the others."""
    shares: dict[Home, list[tuple[int, int]]] = defaultdict(list)
    for offset, length in spans if len(holders) > 1 else ():
        for at in range(offset, offset + length, SHARE_BYTES):
            count = min(SHARE_BYTES, offset + length - at)
            chosen = min(holders, key=lambda h: load[h])
            shares[chosen].append((at, count))
            load[chosen] += count
    if len(holders) == 1:
        (only,) = holders
        shares[only] = list(spans)
        load[only] += sum(length for _, length in spans)
    return [Held(h, holders[h], united(some)) for h, some in shares.items()]


def _degraded(
    slots: Slots,
    job: str,
    version: Version,
    shard: int,
    spans: Spans,
    home: Home,
    sample: ParityHolding,
    rows: Mapping[ParityPlace, Home],
    load: Counter[Home],
) -> Degraded | None:
    """The decode of no more grains than the ranges touch; None where blocks are lacking."""
    shards, m = sample.place.shards, sample.place.parity
    n, position = len(shards), shards.index(shard)
    k, size = n - m, sample.shard_bytes[position]
    grains = whole_grains(spans, size)
    blocks: list[BlockPlan] = []
    chosen: list[Spans] = []
    for block in range(k):
        extent = block_extent(size, k, block)
        some = _within(grains, extent.offset, extent.length)
        if not some:
            continue
        j = stripe_of_block(n, m, position, block)
        inputs = inputs_of(slots, job, version, sample, rows, j, position)
        if len(inputs) < k:
            return None
        best = _least_loaded(inputs, k, home, load)
        sources = stripe(n, m, j).sources
        index = next(i for i, s in enumerate(sources) if s.position == position)
        blocks.append(BlockPlan(index, extent, best))
        chosen.append(some)
        for each in best:
            if each.home is not None:
                load[each.home] += sum(length for _, length in clipped(some, each))
    place, where = min(rows.items(), key=lambda item: (item[1] != home, item[0]))
    decode = Decode(
        job, shard, version, size, sample.content_digests[position], k, m, tuple(blocks), where,
        place,
    )  # fmt: skip
    return Degraded(decode, tuple(chosen))


def _least_loaded(
    inputs: Sequence[BlockInput], k: int, home: Home, load: Counter[Home]
) -> tuple[BlockInput, ...]:
    """As many as decoding takes: empty and own blocks first, then of who has least to do."""

    def cost(wanted_input: BlockInput) -> tuple[bool, int]:
        free = wanted_input.home is None or wanted_input.home == home
        return (not free, 0 if wanted_input.home is None else load[wanted_input.home])

    return tuple(sorted(sorted(inputs, key=cost)[:k], key=lambda i: i.index))


def whole_grains(spans: Spans, image_bytes: int) -> Spans:
    """The grains of an image that ranges of it touch."""
    grain = grain_bytes(image_bytes)
    starts = ((offset - offset % grain, offset + length) for offset, length in spans)
    ends = ((start, min(-(-end // grain) * grain, image_bytes)) for start, end in starts)
    return united((start, end - start) for start, end in ends)


def _within(spans: Spans, offset: int, length: int) -> Spans:
    """The part of ranges that lies in [offset, offset + length), counted from there."""
    end = offset + length
    cut = ((max(at, offset), min(at + count, end)) for at, count in spans)
    return tuple((start - offset, stop - start) for start, stop in cut if start < stop)


def clipped(spans: Spans, source: BlockInput) -> Spans:
    """Ranges of a lost block as ranges of the image that another block of the stripe stands in.

    What lies behind that block's end is zeros; in the row of all ranges, they come last.
    """
    there = _within(spans, 0, source.extent.length)
    return tuple((source.extent.offset + at, count) for at, count in there)
