from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.coding.digest import check_range, content_digest, grain_digests
from snapshotd.errors import DamagedBytes
from snapshotd.wire.protocol import DIGEST_BYTES, MIN_GRAIN_BYTES

GRAIN = MIN_GRAIN_BYTES


def image_of(length: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(length))


@pytest.mark.parametrize("length", [0, 1, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 5])
def test_digests_are_those_of_the_grains(length: int) -> None:
    image = image_of(length)
    digests = grain_digests(memoryview(image))
    expected = [
        xxhash.xxh3_128_digest(image[start : start + GRAIN]) for start in range(0, length, GRAIN)
    ]
    assert digests == b"".join(expected)
    assert content_digest(digests) == xxhash.xxh3_128_digest(digests)
    check_range(memoryview(image), 0, length, digests)


def test_a_large_image_has_larger_grains() -> None:
    assert len(grain_digests(memoryview(bytes(4 << 20)))) == 256 * DIGEST_BYTES


@given(st.integers(1, 5 * GRAIN), st.data())
def test_every_run_of_grains_verifies_alone_and_each_flip_is_named(length, data) -> None:
    image = bytearray(image_of(length))
    digests = grain_digests(memoryview(image))
    grains = -(-length // GRAIN)
    first = data.draw(st.integers(0, grains - 1))
    last = data.draw(st.integers(first, grains - 1))
    start, end = first * GRAIN, min((last + 1) * GRAIN, length)
    threads = data.draw(st.integers(1, 4))
    check_range(memoryview(image)[start:end], start, length, digests, threads)
    flipped = data.draw(st.integers(start, end - 1))
    image[flipped] ^= 1 << data.draw(st.integers(0, 7))
    named = flipped // GRAIN * GRAIN
    with pytest.raises(DamagedBytes, match=f"bytes {named} to "):
        check_range(memoryview(image)[start:end], start, length, digests, threads)


def test_an_empty_run_is_intact() -> None:
    digests = grain_digests(memoryview(image_of(10)))
    check_range(memoryview(b""), 0, 10, digests)
    check_range(memoryview(b""), 0, 0, b"")


@pytest.mark.parametrize("offset", [1, -GRAIN, GRAIN - 1])
def test_an_offset_within_a_grain_is_the_callers_mistake(offset: int) -> None:
    with pytest.raises(ValueError, match="multiple of the grain"):
        check_range(memoryview(b""), offset, GRAIN, b"\0" * DIGEST_BYTES)


def test_wrong_lengths_are_damage() -> None:
    image = image_of(2 * GRAIN)
    digests = grain_digests(memoryview(image))
    with pytest.raises(DamagedBytes, match="neither whole grains"):
        check_range(memoryview(image)[: GRAIN + 1], 0, len(image), digests)
    with pytest.raises(DamagedBytes, match="neither whole grains"):
        check_range(memoryview(image), GRAIN, len(image), digests)
    with pytest.raises(DamagedBytes, match="32 bytes of digests, not 31"):
        check_range(memoryview(image), 0, len(image), digests[:-1])
