"""Placement, stripes, and decode plans carried out on real bytes for every loss pattern."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.coding.codec import ZfecCodec
from snapshotd.core.placement import MAX_GROUP, form_groups
from snapshotd.core.protection import parity_homes
from snapshotd.core.recovery import BlockInput, Copy, Decode, Local, Missing, find_shard
from snapshotd.core.stripes import (
    block_extent,
    parity_bytes,
    places,
    stripe,
    stripe_of_block,
    stripes,
)
from snapshotd.errors import CallerError
from snapshotd.metadata import (
    DataHolding,
    Group,
    Home,
    Member,
    ParityHolding,
    ParityPlace,
    SlotFacts,
    Version,
)

JOB, VERSION = "job", Version(1, 7)
SHAPES = [(n, m) for n in range(2, 7) for m in range(1, n)]
CODEC = ZfecCodec()


def group_of(n: int, m: int) -> Group:
    return Group(tuple(Member(i, Home(f"n{i}", 0)) for i in range(n)), m)


@given(st.integers(1, 80), st.integers(2, 32), st.integers(0, 3), st.integers(1, 4))
def test_groups_hold_every_shard_once_and_share_no_node(
    nodes: int, size: int, parity: int, slots: int
) -> None:
    homes = {n * slots + s: Home(f"n{n:03d}", s) for n in range(nodes) for s in range(slots)}
    if nodes <= parity or nodes < 2 * size <= 2 * MAX_GROUP < 2 * nodes:
        return
    try:
        groups = form_groups(homes, size, parity)
    except CallerError:
        assert min(nodes, size) <= parity or size > MAX_GROUP // 2
        return
    assert sorted(s for g in groups for s in g.shards) == sorted(homes)
    for group in groups:
        assert len({m.home.node for m in group.members}) == group.size > parity
        assert group.size >= min(size, nodes)
    assert max(g.size for g in groups) - min(g.size for g in groups) <= 1


def test_too_small_and_too_large_groups_are_refused_with_the_remedy() -> None:
    homes = {i: Home(f"n{i}", 0) for i in range(2)}
    with pytest.raises(CallerError, match="at least 3 nodes"):
        form_groups(homes, 4, 2)
    many = {i: Home(f"n{i:02d}", 0) for i in range(33)}
    with pytest.raises(CallerError, match="limit of 32"):
        form_groups(many, 32, 1)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_each_member_gives_each_block_once_and_keeps_m_rows(n: int, m: int) -> None:
    layouts = [stripe(n, m, j) for j in range(n)]
    for layout in layouts:
        assert len(layout.sources) == n - m
        assert {s.position for s in layout.sources}.isdisjoint(layout.holders)
    given_blocks = [(s.position, s.block) for layout in layouts for s in layout.sources]
    assert sorted(given_blocks) == [(p, b) for p in range(n) for b in range(n - m)]
    for position, block in given_blocks:
        j = stripe_of_block(n, m, position, block)
        assert any((s.position, s.block) == (position, block) for s in layouts[j].sources)
    group = group_of(n, m)
    assert all(len(places(group, p)) == m for p in range(n))
    assert len(parity_homes(group)) == n * m


def test_no_parity_no_stripes() -> None:
    assert stripes(group_of(3, 0)) == ()
    assert places(group_of(3, 0), 0) == ()


@given(st.integers(0, 3 << 20), st.integers(1, 31))
def test_blocks_cover_the_image_without_gap(size: int, k: int) -> None:
    extents = [block_extent(size, k, b) for b in range(k)]
    assert extents[0].offset == 0
    assert sum(e.length for e in extents) == size
    assert all(a.offset + a.length == b.offset for a, b in pairwise(extents))


# -- recovery on real bytes


def protected(
    group: Group, images: list[bytes]
) -> tuple[dict[Home, SlotFacts], dict[tuple[Home, object], bytes]]:
    """All that a group holds when it protects `images`: facts, and the bytes behind them."""
    n, m = group.size, group.parity
    digests = tuple(xxhash.xxh3_128_digest(i) for i in images)
    sizes = tuple(map(len, images))
    content: dict[tuple[Home, object], bytes] = {}
    data = {m_.home: m_.shard for m_ in group.members}
    parity: dict[Home, list[ParityHolding]] = {m_.home: [] for m_ in group.members}
    for home, shard in data.items():
        content[home, shard] = images[shard]
    for place, home in parity_homes(group):
        length = parity_bytes(place, sizes)
        blocks = []
        for source in stripe(n, m, place.stripe).sources:
            extent = block_extent(sizes[source.position], n - m, source.block)
            piece = images[source.position][extent.offset : extent.offset + extent.length]
            blocks.append(memoryview(piece.ljust(length, b"\0")))
        content[home, place] = CODEC.encode(n - m, m, blocks, [place.row])[0]
        parity[home].append(ParityHolding(JOB, VERSION, place, length, digests, sizes))
    return {
        home: SlotFacts(
            0,
            "there",
            data=(DataHolding(JOB, shard, VERSION, sizes[shard], digests[shard]),),
            parity=tuple(parity[home]),
        )
        for home, shard in data.items()
    }, content


def rebuild(plan: Decode, content: dict[tuple[Home, object], bytes]) -> bytes:
    image = bytearray(plan.image_bytes)
    for block in plan.blocks:
        pieces = {i.index: read(i, content) for i in block.inputs}
        length = max(map(len, pieces.values()))
        have = {index: memoryview(p.ljust(length, b"\0")) for index, p in pieces.items()}
        (data,) = CODEC.decode(plan.data, plan.parity, have, [block.index])
        end = block.extent.offset + block.extent.length
        image[block.extent.offset : end] = data[: block.extent.length]
    return bytes(image)


def read(wanted: BlockInput, content: dict[tuple[Home, object], bytes]) -> bytes:
    if wanted.extent.length == 0:
        return b""
    assert wanted.home is not None
    key: int | ParityPlace | None = wanted.place if wanted.shard is None else wanted.shard
    end = wanted.extent.offset + wanted.extent.length
    return content[wanted.home, key][wanted.extent.offset : end]


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_loss_up_to_m_is_rebuilt_and_one_more_is_named(n: int, m: int) -> None:
    chance = random.Random(n * 10 + m)
    # Unequal on purpose: empty, shorter than a grain, not a multiple of one, many grains.
    sizes = [(0, 1, 4097, 30_000, 12_288, 50_001)[(i + m) % 6] for i in range(n)]
    images = [chance.randbytes(size) for size in sizes]
    slots, content = protected(group_of(n, m), images)
    homes = sorted(slots)
    for lost in (set(c) for r in range(m + 1) for c in combinations(homes, r)):
        left = {h: f for h, f in slots.items() if h not in lost}
        kept = {key: b for key, b in content.items() if key[0] not in lost}
        for shard, home in enumerate(homes):
            origin = find_shard(left, JOB, shard, VERSION, home)
            if home in lost:
                assert isinstance(origin, Decode)
                assert rebuild(origin, kept) == images[shard]
            else:
                assert isinstance(origin, Local)
    big = sizes.index(max(sizes))
    beyond = {homes[big], *[h for h in homes if h != homes[big]][:m]}
    left = {h: f for h, f in slots.items() if h not in beyond}
    origin = find_shard(left, JOB, big, VERSION, homes[big])
    assert isinstance(origin, Missing)
    assert "of the" in origin.reason or "no copy" in origin.reason


def test_a_copy_elsewhere_is_preferred_to_decoding_and_unreachable_slots_do_not_count() -> None:
    slots, _ = protected(group_of(3, 1), [b"a" * 5000, b"b" * 5000, b"c" * 5000])
    assert isinstance(find_shard(slots, JOB, 0, VERSION, Home("new", 0)), Copy)
    first = slots[Home("n0", 0)]
    slots[Home("n0", 0)] = SlotFacts(0, "", data=first.data, parity=first.parity)
    assert isinstance(find_shard(slots, JOB, 0, VERSION, Home("new", 0)), Decode)
