from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.coding.codec import MAX_BLOCKS, ZfecCodec, known_answer_test
from snapshotd.errors import SnapshotdError, TooFewBlocks

CODEC = ZfecCodec()


@st.composite
def stripes(draw: st.DrawFn, max_n: int) -> tuple[int, int, list[bytes]]:
    n = draw(st.integers(1, max_n))
    k = draw(st.integers(1, n))
    length = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4097]))
    seed = draw(st.randoms(use_true_random=False))
    return k, n - k, [seed.randbytes(length) for _ in range(k)]


def views(blocks: list[bytes]) -> list[memoryview]:
    return [memoryview(block) for block in blocks]


def all_blocks(k: int, m: int, data: list[bytes]) -> dict[int, memoryview]:
    parity = CODEC.encode(k, m, views(data), range(m))
    assert all(len(row) == len(data[0]) for row in parity)
    return dict(enumerate(views(data + parity)))


@given(stripes(6))
def test_every_loss_pattern_of_a_small_stripe_is_decoded(
    case: tuple[int, int, list[bytes]],
) -> None:
    k, m, data = case
    blocks = all_blocks(k, m, data)
    for count in range(m + 1):
        for lost in combinations(range(k + m), count):
            have = {index: block for index, block in blocks.items() if index not in lost}
            assert CODEC.decode(k, m, have, range(k)) == data, lost


@settings(max_examples=50)
@given(stripes(60), st.randoms(use_true_random=False))
def test_sampled_losses_of_a_large_stripe_are_decoded(case, random) -> None:
    k, m, data = case
    kept = random.sample(sorted(all_blocks(k, m, data).items()), k)
    want = random.sample(range(k), random.randint(1, k))
    assert CODEC.decode(k, m, dict(kept), want) == [data[index] for index in want]


def test_the_largest_stripe_there_is() -> None:
    k, m = 200, MAX_BLOCKS - 200
    data = [bytes([i]) * 3 for i in range(k)]
    have = {i: b for i, b in all_blocks(k, m, data).items() if i >= m}
    assert CODEC.decode(k, m, have, range(k)) == data


def test_one_row_alone_is_that_row_of_all() -> None:
    data = views([b"abc", b"def", b"ghi"])
    rows = CODEC.encode(3, 3, data, [0, 1, 2])
    assert CODEC.encode(3, 3, data, [2]) == [rows[2]]
    assert CODEC.encode(3, 3, data, [2, 0]) == [rows[2], rows[0]]
    assert CODEC.encode(3, 3, data, []) == []


def test_no_parity_encodes_to_nothing_and_decodes_what_is_there() -> None:
    assert CODEC.encode(2, 0, views([b"ab", b"cd"]), []) == []
    have = dict(enumerate(views([b"ab", b"cd"])))
    assert CODEC.decode(2, 0, have, [1, 0]) == [b"cd", b"ab"]


def test_a_block_that_is_there_needs_no_others() -> None:
    assert CODEC.decode(3, 1, {1: memoryview(b"xy")}, [1]) == [b"xy"]


def test_results_do_not_share_memory_with_arguments() -> None:
    source = bytearray(b"ab")
    result = CODEC.decode(1, 1, {0: memoryview(source)}, [0])
    source[:] = b"zz"
    assert result == [b"ab"]


def test_too_few_blocks_says_how_many_and_which() -> None:
    blocks = all_blocks(3, 2, [b"a", b"b", b"c"])
    with pytest.raises(TooFewBlocks, match=r"2 blocks .* 3 are needed .* \[0, 1\].* \[0, 1, 3\]"):
        CODEC.decode(3, 2, {2: blocks[2], 4: blocks[4]}, [0, 1, 2])


@pytest.mark.parametrize(("k", "m"), [(0, 1), (-1, 1), (1, -1), (200, 57)])
def test_impossible_stripes_are_refused(k: int, m: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        CODEC.encode(k, m, [], [])
    with pytest.raises(ValueError, match="expected"):
        CODEC.decode(k, m, {}, [])


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1 data blocks given"):
        CODEC.encode(2, 1, views([b"a"]), [0])
    with pytest.raises(ValueError, match=r"unlike lengths: \[1, 2\]"):
        CODEC.encode(2, 1, views([b"a", b"bb"]), [0])
    with pytest.raises(ValueError, match="parity rows"):
        CODEC.encode(1, 1, views([b"a"]), [1])
    with pytest.raises(ValueError, match="blocks given"):
        CODEC.decode(1, 1, {2: memoryview(b"a")}, [0])
    with pytest.raises(ValueError, match="data blocks wanted"):
        CODEC.decode(1, 1, {1: memoryview(b"a")}, [1])


def test_known_answers_hold() -> None:
    known_answer_test(CODEC)
    assert CODEC.name.startswith("zfec 1.")


class _Flipped(ZfecCodec):
    def __init__(self, encode: bool) -> None:
        super().__init__()
        self._encode = encode

    def encode(self, k, m, blocks, rows):
        return self._spoil(super().encode(k, m, blocks, rows), self._encode)

    def decode(self, k, m, have, want):
        return self._spoil(super().decode(k, m, have, want), not self._encode)

    @staticmethod
    def _spoil(blocks: list[bytes], wanted: bool) -> list[bytes]:
        return [bytes([b[0] ^ 1]) + b[1:] for b in blocks] if wanted else blocks


@pytest.mark.parametrize(("encode", "what"), [(True, "parity"), (False, "decoded blocks")])
def test_a_wrong_codec_is_found_at_start(encode: bool, what: str) -> None:
    with pytest.raises(SnapshotdError, match=f"wrong {what}"):
        known_answer_test(_Flipped(encode))
