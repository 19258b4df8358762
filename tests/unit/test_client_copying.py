"""Pieces of state go into an image side by side in its blocks, and what is said to stand does."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd_client import copying
from snapshotd_client.copying import Load, Piece, Target
from snapshotd_client.extents import Extent
from snapshotd_client.layout import aligned

TRANSFER, ROUND = 16, 200
BLANK = 0xFF
LARGE = 64  # bytes


@pytest.fixture(scope="module", autouse=True)
def _small_sizes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "TRANSFER_BYTES", TRANSFER)
        patch.setattr(copying, "ROUND_BYTES", ROUND)
        patch.setattr(copying, "_ALONE_ELEMENTS", LARGE // 8)
        patch.setattr(copying, "_BATCH_PIECES", 3)
        yield


def loaded(lengths: list[int], seed: int) -> tuple[Load, torch.Tensor]:
    """A load of pieces that stand where they would in an image; and the image that comes of it."""
    chance = random.Random(seed)
    image = torch.tensor([], dtype=torch.uint8)
    pieces, gaps = [], []
    for length in lengths:
        offset = aligned(image.numel())
        if gap := offset - image.numel():
            gaps.append((image.numel(), gap))
        whole = torch.tensor(chance.choices(range(1, 200), k=length + 8), dtype=torch.uint8)
        start = chance.randrange(9)
        pieces.append(Piece(offset, Extent(whole.untyped_storage(), start, length)))
        image = torch.cat([image, torch.zeros(gap, dtype=torch.uint8), whole[start:][:length]])
    chance.shuffle(pieces)
    return Load(pieces, gaps), image


LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(0, 3000), st.integers(0, 2000), st.integers())
def test_what_stands_in_every_block_is_final(
    lengths: list[int], block_bytes: int, more: int, seed: int
) -> None:
    load, whole = loaded(lengths, seed)
    image = torch.full((load.end + more,), BLANK, dtype=torch.uint8)
    block = min(block_bytes or load.end, load.end)
    inside = torch.arange(load.end) % block
    large = torch.zeros(load.end, dtype=torch.bool)
    for offset, source in load.large:
        large[offset : offset + source.numel()] = True
    blocks = -(-load.end // block)
    together = max(ROUND, min(load.end // 8, blocks * ROUND))
    step = -(-together // (blocks * TRANSFER)) * TRANSFER
    told = []

    def check(stands: int) -> None:
        told.append(stands)
        early = inside < stands
        assert image[: load.end][early].equal(whole[early])
        # Side by side: no block is further than one slice.
        late = large & (inside >= stands + step)
        assert (image[: load.end][late] == BLANK).all()

    target = Target(image)
    target.put(load, check, block_bytes)
    assert image[: load.end].equal(whole)
    assert (image[load.end :] == BLANK).all()
    assert told == sorted(told)
    assert told[-1] == block
    parts = len(load.order(block).large)
    assert parts <= len(load.large) + blocks * -(-block // step), "one more for each cut"


def test_one_block_is_filled_from_start_to_end() -> None:
    load, whole = loaded([500, 7, 300], 1)
    for block_bytes in (0, load.end, load.end + 1, 1 << 63):
        told: list[int] = []
        image = torch.zeros(load.end, dtype=torch.uint8)
        Target(image).put(load, told.append, block_bytes)
        assert image.equal(whole)
        assert told == [0, 0, 208, 416, 576, 624, 832, 876]


def test_three_blocks_are_filled_side_by_side() -> None:
    load, _ = loaded([600], 1)
    offsets = [part.offset for part in load.order(200).large]
    assert offsets == [0, 200, 400, 80, 280, 480, 160, 360, 560]


def test_the_order_is_kept_until_the_blocks_change() -> None:
    load, whole = loaded([600], 1)
    first = load.order(200)
    image = torch.zeros(600, dtype=torch.uint8)
    Target(image).put(load, block_bytes=200)
    assert load.order(200) is first
    Target(image).put(load, block_bytes=150)
    assert load.order(150) is not first
    assert image.equal(whole)


def test_an_empty_load_stands_at_once() -> None:
    told: list[int] = []
    Target(torch.zeros(5, dtype=torch.uint8)).put(Load([], ()), told.append, 4)
    assert told == [0]


def test_what_check_raises_ends_the_copy() -> None:
    load, _ = loaded([600], 1)
    image = torch.full((600,), BLANK, dtype=torch.uint8)

    def check(stands: int) -> None:
        if stands:
            raise KeyError(stands)

    with pytest.raises(KeyError, match="80"):
        Target(image).put(load, check, 200)
    copied = (image != BLANK).nonzero().flatten().tolist()
    assert copied == [*range(80), *range(200, 280), *range(400, 480)]
