from __future__ import annotations

import ctypes
import mmap
import platform
import threading
from contextlib import suppress
from importlib import metadata
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.coding import choice, isal
from snapshotd.coding.choice import choose_codec
from snapshotd.coding.codec import MAX_BLOCKS, Codec, ZfecCodec
from snapshotd.coding.isal import IsalCodec, libraries
from snapshotd.coding.known_answers import known_answer_test
from snapshotd.errors import ConfigError, SnapshotdError, TooFewBlocks

ZFEC = ZfecCodec()
#: Every ISA-L that is here: what pyeclib brings, and the system's.
ISAL = []
for path, origin in libraries():
    with suppress(OSError):
        ISAL.append(IsalCodec(path, origin))
CODECS = pytest.mark.parametrize("codec", [ZFEC, *ISAL], ids=lambda codec: codec.name)


@st.composite
def stripes(draw: st.DrawFn, max_n: int) -> tuple[int, int, list[bytes]]:
    n = draw(st.integers(1, max_n))
    k = draw(st.integers(1, n))
    length = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4097]))
    seed = draw(st.randoms(use_true_random=False))
    return k, n - k, [seed.randbytes(length) for _ in range(k)]


def views(blocks: list[bytes]) -> list[memoryview]:
    return [memoryview(block) for block in blocks]


def all_blocks(codec: Codec, k: int, m: int, data: list[bytes]) -> dict[int, memoryview]:
    parity = codec.encode(k, m, views(data), range(m))
    assert all(len(row) == len(data[0]) for row in parity)
    return dict(enumerate(views(data + parity)))


@CODECS
@given(case=stripes(6))
def test_every_loss_pattern_of_a_small_stripe_is_decoded(
    codec: Codec,
    case: tuple[int, int, list[bytes]],
) -> None:
    k, m, data = case
    blocks = all_blocks(codec, k, m, data)
    for count in range(m + 1):
        for lost in combinations(range(k + m), count):
            have = {index: block for index, block in blocks.items() if index not in lost}
            assert codec.decode(k, m, have, range(k)) == data, lost


@CODECS
@settings(max_examples=50)
@given(case=stripes(60), random=st.randoms(use_true_random=False))
def test_sampled_losses_of_a_large_stripe_are_decoded(codec, case, random) -> None:
    k, m, data = case
    kept = random.sample(sorted(all_blocks(codec, k, m, data).items()), k)
    want = random.sample(range(k), random.randint(1, k))
    assert codec.decode(k, m, dict(kept), want) == [data[index] for index in want]


@CODECS
def test_the_largest_stripe_there_is(codec: Codec) -> None:
    k, m = 200, MAX_BLOCKS - 200
    data = [bytes([i]) * 3 for i in range(k)]
    have = {i: b for i, b in all_blocks(codec, k, m, data).items() if i >= m}
    assert codec.decode(k, m, have, range(k)) == data


@CODECS
def test_one_row_alone_is_that_row_of_all(codec: Codec) -> None:
    data = views([b"abc", b"def", b"ghi"])
    rows = codec.encode(3, 3, data, [0, 1, 2])
    assert codec.encode(3, 3, data, [2]) == [rows[2]]
    assert codec.encode(3, 3, data, [2, 0]) == [rows[2], rows[0]]
    assert codec.encode(3, 3, data, []) == []


@CODECS
def test_no_parity_encodes_to_nothing_and_decodes_what_is_there(codec: Codec) -> None:
    assert codec.encode(2, 0, views([b"ab", b"cd"]), []) == []
    have = dict(enumerate(views([b"ab", b"cd"])))
    assert codec.decode(2, 0, have, [1, 0]) == [b"cd", b"ab"]


@CODECS
def test_a_block_that_is_there_needs_no_others(codec: Codec) -> None:
    assert codec.decode(3, 1, {1: memoryview(b"xy")}, [1]) == [b"xy"]


@CODECS
def test_results_do_not_share_memory_with_arguments(codec: Codec) -> None:
    source = bytearray(b"ab")
    result = codec.decode(1, 1, {0: memoryview(source)}, [0])
    source[:] = b"zz"
    assert result == [b"ab"]


@CODECS
def test_too_few_blocks_says_how_many_and_which(codec: Codec) -> None:
    blocks = all_blocks(codec, 3, 2, [b"a", b"b", b"c"])
    with pytest.raises(TooFewBlocks, match=r"2 blocks .* 3 are needed .* \[0, 1\].* \[0, 1, 3\]"):
        codec.decode(3, 2, {2: blocks[2], 4: blocks[4]}, [0, 1, 2])


@CODECS
@pytest.mark.parametrize(("k", "m"), [(0, 1), (-1, 1), (1, -1), (200, 57)])
def test_impossible_stripes_are_refused(codec: Codec, k: int, m: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        codec.encode(k, m, [], [])
    with pytest.raises(ValueError, match="expected"):
        codec.decode(k, m, {}, [])


@CODECS
def test_arguments_that_do_not_fit_are_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="1 data blocks given"):
        codec.encode(2, 1, views([b"a"]), [0])
    with pytest.raises(ValueError, match=r"unlike lengths: \[1, 2\]"):
        codec.encode(2, 1, views([b"a", b"bb"]), [0])
    with pytest.raises(ValueError, match="parity rows"):
        codec.encode(1, 1, views([b"a"]), [1])
    with pytest.raises(ValueError, match="blocks given"):
        codec.decode(1, 1, {2: memoryview(b"a")}, [0])
    with pytest.raises(ValueError, match="data blocks wanted"):
        codec.decode(1, 1, {1: memoryview(b"a")}, [1])
    with pytest.raises(ValueError, match="2 blocks are wanted into 1 targets"):
        codec.encode_into(1, 2, views([b"a"]), [0, 1], [memoryview(bytearray(1))])
    with pytest.raises(ValueError, match=r"unlike lengths: \[1, 2\]"):
        codec.encode_into(1, 1, views([b"a"]), [0], [memoryview(bytearray(2))])
    with pytest.raises(ValueError, match="read-only"):
        codec.decode_into(1, 1, {1: memoryview(b"a")}, [0], [memoryview(b"b")])


@CODECS
def test_known_answers_hold(codec: Codec) -> None:
    known_answer_test(codec)
    assert codec.name.startswith(("zfec 1.", "ISA-L "))


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


# -- ISA-L, and which of them runs


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64"}, reason="no wheel for it")
def test_isal_is_here_where_its_wheel_is() -> None:
    assert [codec for codec in ISAL if "pyeclib" in codec.name], "the wheel is a dependency"


@st.composite
def losses(draw: st.DrawFn) -> tuple[int, int, list[bytes], list[int], list[int]]:
    """A stripe, the rows wanted of it, and the blocks that are left of it."""
    n = draw(st.one_of(st.integers(2, 20), st.integers(2, MAX_BLOCKS)))
    k = draw(st.integers(1, n - 1))
    length = draw(st.one_of(st.integers(0, 300), st.integers(0, 70_000 // k)))
    seed = draw(st.randoms(use_true_random=False))
    # Members of unlike size: their blocks are padded with zeros, some of them from the first byte.
    sizes = [length - min(length, draw(st.sampled_from([0, 0, 1, 33, length]))) for _ in range(k)]
    data = [seed.randbytes(size).ljust(length, b"\0") for size in sizes]
    rows = seed.sample(range(n - k), seed.randint(1, n - k))
    left = seed.sample(range(n), k)
    return k, n - k, data, rows, left


@pytest.mark.parametrize("codec", ISAL, ids=lambda codec: codec.name)
@settings(max_examples=200)
@given(losses())
def test_isal_computes_what_zfec_computes(codec: Codec, case) -> None:
    k, m, data, rows, left = case
    parity = ZFEC.encode(k, m, views(data), range(m))
    assert codec.encode(k, m, views(data), rows) == [parity[row] for row in rows]
    every = dict(enumerate(views(data + parity)))
    have = {index: every[index] for index in left}
    assert codec.decode(k, m, have, range(k)) == data


@CODECS
def test_blocks_are_read_and_written_where_they_lie(codec: Codec) -> None:
    """Of any kind of buffer, at any offset; nothing around the targets is touched."""
    length, k, m = 1003, 3, 2
    source = bytearray(bytes(range(256)) * 20)
    blocks = [memoryview(source)[at : at + length] for at in (1, 1200, 2411)]
    blocks[1] = memoryview(bytes(blocks[1]))
    blocks[2] = memoryview((ctypes.c_char * length).from_buffer(source, 2411)).cast("B")
    target = bytearray(b"#" * (2 * length + 3))
    out = [memoryview(target)[1 : 1 + length], memoryview(target)[2 + length : -1]]
    codec.encode_into(k, m, blocks, [1, 0], out)
    expected = ZFEC.encode(k, m, blocks, [1, 0])
    assert target == b"#" + expected[0] + b"#" + expected[1] + b"#"
    lost = memoryview(bytearray(length))
    have = {0: blocks[0], 1: blocks[1], 3: out[1]}
    codec.decode_into(k, m, have, [2], [lost])
    assert lost == blocks[2]
    for view in (*blocks, *out):
        view.release()
    target.clear()  # nothing holds it


def test_isal_refuses_blocks_that_are_not_contiguous() -> None:
    for codec in ISAL:
        with pytest.raises(BufferError, match="contiguous"):
            codec.encode(1, 1, [memoryview(b"abcd")[::2]], [0])


def test_threads_may_share_a_codec() -> None:
    codec = choose_codec().codec
    wrong = []

    def work(seed: int) -> None:
        for k in range(1, 20):
            data = [bytes([seed + i]) * 5000 for i in range(k)]
            if codec.encode(k, 2, views(data), [0, 1]) != ZFEC.encode(k, 2, views(data), [0, 1]):
                wrong.append((seed, k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def hide_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has neither the wheel nor the system's library."""

    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(isal.metadata, "distribution", absent)
    monkeypatch.setattr(isal, "_SONAME", "libisal-that-is-not-here.so")


@CODECS
def test_blocks_too_long_to_be_counted_are_refused(codec: Codec) -> None:
    with mmap.mmap(-1, 1 << 31) as untouched, memoryview(untouched) as block:
        with pytest.raises(ValueError, match="2147483648 bytes, at most 2147483647"):
            codec.encode_into(1, 1, [block], [0], [block])
        with pytest.raises(ValueError, match="at most"):
            codec.decode_into(1, 1, {1: block}, [0], [block])


@pytest.mark.skipif(not ISAL, reason="no ISA-L is here")
def test_the_fastest_that_proves_itself_is_chosen() -> None:
    chosen = choose_codec()
    assert (type(chosen.codec), chosen.note) == (IsalCodec, "")
    assert choose_codec("isal").codec.name == chosen.codec.name
    chosen = choose_codec("zfec")
    assert (type(chosen.codec), chosen.note) == (ZfecCodec, "")


def test_without_isal_zfec_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_isal(monkeypatch)
    chosen = choose_codec()
    assert isinstance(chosen.codec, ZfecCodec)
    assert "libisal-that-is-not-here" in chosen.note
    assert "install pyeclib" in chosen.note
    with pytest.raises(ConfigError, match=r"libisal-that-is-not-here.*Install pyeclib.*auto"):
        choose_codec("isal")


@pytest.mark.skipif(not ISAL, reason="no ISA-L is here")
def test_the_next_one_is_taken_and_the_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("libisal-that-is-broken.so", "from the wheel"), *libraries()]
    monkeypatch.setattr(choice, "libraries", lambda: found)
    chosen = choose_codec("isal")
    assert isinstance(chosen.codec, IsalCodec)
    assert "libisal-that-is-broken" in chosen.note
    assert chosen.codec.name in chosen.note


def test_a_library_of_another_kind_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_isal(monkeypatch)
    monkeypatch.setattr(isal, "_SONAME", "libc.so.6")
    chosen = choose_codec()
    assert isinstance(chosen.codec, ZfecCodec)
    assert "ec_init_tables" in chosen.note


@pytest.mark.skipif(not ISAL, reason="no ISA-L is here")
def test_an_isal_that_computes_another_code_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = isal._generator
    monkeypatch.setattr(isal, "_generator", lambda *stripe: real(*stripe)[::-1])
    chosen = choose_codec()
    assert isinstance(chosen.codec, ZfecCodec)
    assert "wrong parity" in chosen.note
    with pytest.raises(ConfigError, match="wrong parity"):
        choose_codec("isal")
