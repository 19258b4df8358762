"""Ranges of shards: what is planned is what was wanted, byte for byte, and no more is moved."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.core.ranges import (
    Degraded,
    Held,
    Range,
    Spans,
    Targets,
    check_ranges,
    clipped,
    gaps,
    plan,
    shard_sizes,
    united,
    wanted,
    whole_grains,
    without,
)
from snapshotd.errors import CallerError
from snapshotd.metadata import Home, SlotFacts
from snapshotd.wire.protocol import TRANSFER_BYTES, grain_bytes
from tests.unit.test_core_layout import CODEC, JOB, VERSION, group_of, protected

SHAPES = [(3, 0), (2, 1), (4, 1), (4, 2), (5, 3)]
SIZES = (50_001, 12_288, 1, 30_000, 4_097)

some_spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)


def bytes_in(spans: Spans) -> set[int]:
    return {i for offset, length in spans for i in range(offset, offset + length)}


@given(some_spans, some_spans)
def test_spans_are_sets_of_bytes(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = united(one), united(other)
    assert bytes_in(a) == bytes_in(tuple(one))
    assert all(x[0] + x[1] < y[0] for x, y in pairwise(a))
    assert bytes_in(without(a, b)) == bytes_in(a) - bytes_in(b)
    assert without(a, ()) == a


@given(some_spans, st.integers(0, 70), st.integers(1, 30))
def test_targets_are_all_places_that_want_a_byte(
    spans: list[tuple[int, int]], offset: int, length: int
) -> None:
    ranges = [Range(0, at, count, 1000 * i) for i, (at, count) in enumerate(spans)]
    found = [
        (offset + start + i, to + i)
        for start, to, count in Targets(ranges).of(offset, length)
        for i in range(count)
    ]
    expected = [
        (r.offset + i, r.to + i)
        for r in ranges
        for i in range(r.length)
        if offset <= r.offset + i < offset + length
    ]
    assert sorted(found) == sorted(expected)


def test_gaps_are_where_no_range_goes() -> None:
    ranges = [Range(0, 0, 5, 10), Range(0, 0, 5, 2)]
    assert list(gaps(ranges, 20)) == [(0, 2), (7, 3), (15, 5)]
    assert list(gaps([], 3)) == [(0, 3)]
    assert list(gaps([], 0)) == []


@pytest.mark.parametrize(
    ("ranges", "why"),
    [
        ([Range(7, 0, 1, 0)], "of shard 7"),
        ([Range(0, 0, 0, 0)], "a range of 0 bytes"),
        ([Range(0, 90, 11, 0)], "whose image has 100 bytes"),
        ([Range(0, 0, 11, 40)], "of an image of 50 bytes"),
        ([Range(0, 0, 10, 0), Range(0, 50, 10, 9)], "two ranges go to byte 9"),
    ],
)
def test_ranges_that_make_no_image_are_refused(ranges: list[Range], why: str) -> None:
    with pytest.raises(CallerError, match=why):
        check_ranges(ranges, 50, {0: 100})
    check_ranges([Range(0, 0, 10, 0), Range(0, 0, 10, 10)], 50, {0: 100})


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int], list[Range], set[int], int]:
    """A group, ranges of its shards, which members are lost, and who asks."""
    n, m = draw(st.sampled_from(SHAPES))
    lost = draw(st.sets(st.integers(0, n - 1), max_size=m))
    ranges, to = [], 0
    for _ in range(draw(st.integers(0, 8))):
        shard = draw(st.integers(0, n - 1))
        size = SIZES[shard]
        offset = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, size - offset))
        ranges.append(Range(shard, offset, length, to))
        to += length + draw(st.integers(0, 2))
    return (n, m), ranges, lost, draw(st.integers(0, n - 1))


@given(cases())
def test_any_ranges_with_any_bearable_loss_are_what_was_saved(
    case: tuple[tuple[int, int], list[Range], set[int], int],
) -> None:
    (n, m), ranges, lost, me = case
    images = [bytes((i * 7 + s) % 251 for i in range(SIZES[s])) for s in range(n)]
    slots, content = protected(group_of(n, m), images)
    homes = sorted(slots)
    left = {h: f for h, f in slots.items() if homes.index(h) not in lost}
    home = homes[me]
    if m:
        assert shard_sizes(left, JOB, VERSION) == dict(enumerate(SIZES[:n]))
    image = bytearray(sum(r.length for r in ranges) + 20)
    spans = wanted(ranges)
    found = plan(left, JOB, VERSION, spans, home)
    assert not found.missing
    targets = {s: Targets(r for r in ranges if r.shard == s) for s in spans}

    def put(shard: int, offset: int, data: bytes) -> None:
        for start, to, count in targets[shard].of(offset, len(data)):
            image[to : to + count] = data[start : start + count]

    for part in found.parts:
        match part:
            case Held(where, holding, some):
                assert homes.index(where) not in lost
                for offset, length in some:
                    put(holding.shard, offset, images[holding.shard][offset : offset + length])
            case Degraded(decode, blocks):
                touched = whole_grains(spans[decode.shard], SIZES[decode.shard])
                assert sum(n for b in blocks for _, n in b) == sum(n for _, n in touched)
                for block, some in zip(decode.blocks, blocks, strict=True):
                    length = sum(count for _, count in some)
                    have = {}
                    for each in block.inputs:
                        what = each.place if each.place is not None else each.shard
                        source = content.get((each.home, what), b"")
                        row = b"".join(source[a : a + c] for a, c in clipped(some, each))
                        have[each.index] = memoryview(row.ljust(length, b"\0"))
                    (data,) = CODEC.decode(decode.data, decode.parity, have, [block.index])
                    at = 0
                    for offset, count in some:
                        put(decode.shard, block.extent.offset + offset, data[at : at + count])
                        at += count
    for r in ranges:
        assert image[r.to : r.to + r.length] == images[r.shard][r.offset : r.offset + r.length]


def test_who_holds_the_same_gives_about_as_much_as_the_others() -> None:
    slots, _ = protected(group_of(4, 1), [b"x" * 10] * 4)
    homes = sorted(slots)
    size = 100 * TRANSFER_BYTES
    held = replace(slots[homes[0]].data[0], image_bytes=size)
    three = {h: SlotFacts(0, "there", data=(held,)) for h in homes[1:]}
    found = plan(three, JOB, VERSION, {0: ((0, size),)}, homes[0])
    shares = {p.home: sum(n for _, n in p.spans) for p in found.parts if isinstance(p, Held)}
    assert sum(shares.values()) == size
    assert max(shares.values()) - min(shares.values()) <= 8 * TRANSFER_BYTES
    mine = plan({**three, homes[0]: three[homes[1]]}, JOB, VERSION, {0: ((0, 5),)}, homes[0])
    assert [p.home for p in mine.parts if isinstance(p, Held)] == [homes[0]]


def test_of_several_parities_those_with_least_to_do_are_read() -> None:
    images = [b"x" * 400_000] * 6
    slots, _ = protected(group_of(6, 3), images)
    homes = sorted(slots)
    left = {h: f for h, f in slots.items() if h != homes[0]}
    found = plan(left, JOB, VERSION, {0: ((0, 400_000),)}, homes[1])
    (part,) = found.parts
    assert isinstance(part, Degraded)
    load: dict[Home, int] = {}
    for block, some in zip(part.decode.blocks, part.spans, strict=True):
        for each in block.inputs:
            if each.home is not None and each.home != homes[1]:
                amount = sum(n for _, n in clipped(some, each))
                load[each.home] = load.get(each.home, 0) + amount
    assert max(load.values()) <= 2 * min(load.values())


def test_who_failed_is_avoided_and_asked_again_where_nobody_else_can() -> None:
    slots, _ = protected(group_of(4, 1), [b"x" * 10_000] * 4)
    homes = sorted(slots)
    spans: dict[int, Spans] = {2: ((0, 10),)}
    (part,) = plan(slots, JOB, VERSION, spans, homes[0], {homes[2]}).parts
    assert isinstance(part, Degraded)
    (part,) = plan(slots, JOB, VERSION, spans, homes[0], {homes[2], homes[3]}).parts
    assert isinstance(part, Held)
    none = plan({homes[0]: slots[homes[0]]}, JOB, VERSION, spans, homes[0])
    assert none.parts == ()
    assert "shard 2 is missing: stripe" in none.missing[0]


def test_grains_are_those_of_the_lost_shard() -> None:
    size = 10 * (1 << 20)
    grain = grain_bytes(size)
    assert whole_grains(((5, 1), (grain + 1, 2 * grain)), size) == ((0, 4 * grain),)
