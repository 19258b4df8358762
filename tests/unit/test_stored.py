"""Ranges of a step in the persistent tier: what is read, what is verified, what is remembered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from snapshotd.core.ranges import Range
from snapshotd.errors import DamagedBytes, PeerError
from snapshotd.flow import rows
from snapshotd.flow.stored import StoredShards
from snapshotd.flow.vault import Vault
from snapshotd.tier.store import Store
from snapshotd.wire.protocol import grain_bytes
from tests.unit.test_tier import BYTES, V1, image, write

GRAIN = grain_bytes(BYTES)
JOB = "a/b"


@pytest.fixture(autouse=True)
def _few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAUSE_S", 0.0)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    store = Store(str(tmp_path), JOB)
    write(store)
    store.publish(V1, 2, 0)
    return tmp_path


def shards(tier: Path) -> StoredShards:
    return StoredShards(cast("Vault", None), str(tier))


def gathered(stored: StoredShards, ranges: list[Range], length: int) -> tuple[bytes, Any]:
    made = bytearray(length)
    tally = asyncio.run(stored.gather(JOB, V1, ranges, memoryview(made)))
    return bytes(made), tally


def file_of(tier: Path, shard: int) -> Path:
    (path,) = tier.glob(f"*/data/*/shard-{shard:05d}.image")
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_only_the_grains_that_are_touched_are_read(tier: Path) -> None:
    stored = shards(tier)
    ranges = [Range(1, 5 * GRAIN - 3, 6, 20), Range(0, BYTES - 4, 4, 0), Range(1, 10, 2, 30)]
    made, tally = gathered(stored, ranges, 40)
    assert made == (
        bytes(image(0)[-4:]) + bytes(16) + bytes(image(1)[:6]) + bytes(4)
        + bytes(image(1)[:2]) + bytes(8)
    )  # fmt: skip
    last = BYTES % GRAIN
    assert (tally.stored, tally.received) == (12, 3 * GRAIN + last)
    assert asyncio.run(stored.sizes(JOB, V1, {0, 1})) == {0: BYTES, 1: BYTES}


def test_whole_images_come_in_several_pieces(tier: Path) -> None:
    made, tally = gathered(shards(tier), [Range(1, 0, BYTES, 0)], BYTES)
    assert made == image(1)
    assert tally.stored == tally.received == BYTES


def test_a_grain_that_differs_is_never_handed_out_and_is_tried_again_first(tier: Path) -> None:
    stored = shards(tier)
    flip(file_of(tier, 1), 7 * GRAIN + 1)
    asyncio.run(stored.attempt(JOB, V1, [0, 1]))
    wanted = [Range(1, 5 * GRAIN + 5, 3 * GRAIN, 0)]
    with pytest.raises(DamagedBytes, match=r"shard-00001\.image: bytes"):
        gathered(stored, wanted, 3 * GRAIN)
    # Also by a slot that is to try other shards; and no more once it is mended.
    for _ in range(2):
        with pytest.raises(DamagedBytes, match=r"shard-00001\.image: bytes"):
            asyncio.run(stored.attempt(JOB, V1, [0]))
    flip(file_of(tier, 1), 7 * GRAIN + 1)
    asyncio.run(stored.attempt(JOB, V1, [0]))
    assert gathered(stored, wanted, 3 * GRAIN)[0] == image(1)[: 3 * GRAIN]


@pytest.mark.parametrize("what", ["cut", "gone", "record", "index"])
def test_what_is_not_there_whole_is_found_before_it_is_decided_on(tier: Path, what: str) -> None:
    path = file_of(tier, 1)
    match what:
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "gone":
            path.unlink()
        case "record":
            path.with_suffix(".seal").write_bytes(b"nonsense")
        case _:
            next(tier.glob("*/steps/*.json")).unlink()
    with pytest.raises(DamagedBytes):
        asyncio.run(shards(tier).attempt(JOB, V1, [1]))


def test_a_store_that_does_not_answer_is_asked_again_and_then_said(
    tier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = shards(tier)
    stored.request = lambda *_: {"what": "dance", "url": str(tier), "job": JOB}  # type: ignore[method-assign]
    monkeypatch.setattr("snapshotd.flow.stored.ATTEMPTS", 2)
    with pytest.raises(PeerError, match=r"after 2 attempts .* there is no errand 'dance'"):
        asyncio.run(stored.records(JOB, V1, [0]))
