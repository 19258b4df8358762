"""Coding and checksums: the codec against bare ISA-L, and where digests are cheapest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapshotd.coding.choice import choose_codec
from snapshotd.coding.codec import Codec, ZfecCodec
from snapshotd.coding.digest import chunk_digests
from snapshotd.wire.protocol import TRANSFER_BYTES
from tests.bench.harness import Scale, Table, Timing, gb_per_s, timed
from tests.bench.limits import raw_isal, tmpfs

SHAPES = ((3, 1), (6, 2), (12, 4))
CHUNKS_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
#: zfec is slow; it is timed on so much less.
ZFEC_SHARE = 16


def run(scale: Scale) -> Iterator[Table]:
    codec = choose_codec("isal").codec
    yield _against_the_limit(codec, scale)
    yield _chunk_sizes(codec, scale)
    yield _digests(codec, scale)
    yield _copies(scale)


@dataclass(slots=True)
class Stripe:
    """`scale.bytes` of data in k blocks, whole chunks each, and m parity blocks in tmpfs."""

    k: int
    m: int
    data: np.ndarray
    parity: np.ndarray

    @property
    def length(self) -> int:
        return int(self.data.shape[1])

    @property
    def bytes(self) -> int:
        return self.data.nbytes

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[list[memoryview], list[memoryview]]]:
        """Data and parity, step by step."""
        for at in range(0, self.length, chunk_bytes):
            part = slice(at, at + chunk_bytes)
            yield (
                [memoryview(b[part]) for b in self.data],
                [memoryview(b[part]) for b in self.parity],
            )


def _stripes(scale: Scale) -> Iterator[Stripe]:
    for k, m in SHAPES:
        length = max(scale.bytes // k // TRANSFER_BYTES, 1) * TRANSFER_BYTES
        random = np.random.default_rng(k)
        data = random.integers(0, 256, size=(k, length), dtype=np.uint8)
        yield Stripe(k, m, data, tmpfs(m * length).reshape(m, length))


def _encoding(codec: Codec, stripe: Stripe, chunk_bytes: int, share: int = 1) -> Callable[[], None]:
    """A call codes the stripe, or the first part of it."""
    steps = list(stripe.chunks(chunk_bytes))
    steps = steps[: max(len(steps) // share, 1)]
    rows = range(stripe.m)

    def encode() -> None:
        for data, parity in steps:
            codec.encode_into(stripe.k, stripe.m, data, rows, parity)

    return encode


def _decoding(codec: Codec, stripe: Stripe, chunk_bytes: int) -> Callable[[], None]:
    """A call decodes as many lost data blocks as there is parity: as much arithmetic as coding."""
    lost = range(min(stripe.k, stripe.m))
    steps = []
    target = np.zeros((len(lost), stripe.length), np.uint8)
    for number, (data, parity) in enumerate(stripe.chunks(chunk_bytes)):
        have = {i: b for i, b in enumerate([*data, *parity]) if i not in lost}
        part = slice(number * chunk_bytes, (number + 1) * chunk_bytes)
        steps.append((have, [memoryview(block[part]) for block in target]))

    def decode() -> None:
        for have, out in steps:
            codec.decode_into(stripe.k, stripe.m, have, lost, out)

    return decode


def _against_the_limit(codec: Codec, scale: Scale) -> Table:
    table = Table(
        f"the code, in chunks of {TRANSFER_BYTES >> 10} KiB: {codec.name}",
        "GB/s of data and CPU time of one thread; raw: bare ec_encode_data; decode: m blocks lost",
    )
    zfec = ZfecCodec()
    for stripe in _stripes(scale):
        chunk = TRANSFER_BYTES
        works = {
            "raw": raw_isal(stripe.k, stripe.m, chunk, stripe.data, stripe.parity),
            "encode": _encoding(codec, stripe, chunk),
            "decode": _decoding(codec, stripe, chunk),
        }
        rates = _rates(timed(works, scale.repeats), stripe.bytes)
        slow = timed({"zfec": _encoding(zfec, stripe, chunk, ZFEC_SHARE)}, 2)["zfec"]
        coded = stripe.k * chunk * max(stripe.length // chunk // ZFEC_SHARE, 1)
        table.add(
            k_m=f"{stripe.k}, {stripe.m}",
            raw=rates["raw"],
            encode=rates["encode"],
            encode_of_raw=rates["encode"] / rates["raw"],
            decode=rates["decode"],
            decode_of_encode=rates["decode"] / rates["encode"],
            zfec=gb_per_s(coded, slow.best_cpu_s),
        )
    return table


def _chunk_sizes(codec: Codec, scale: Scale) -> Table:
    table = Table("chunk sizes", "GB/s of data and CPU time of one thread: codec (of bare ISA-L)")
    for stripe in _stripes(scale):
        row: dict[str, str] = {"k_m": f"{stripe.k}, {stripe.m}"}
        for chunk in CHUNKS_BYTES:
            works = {
                "raw": raw_isal(stripe.k, stripe.m, chunk, stripe.data, stripe.parity),
                "encode": _encoding(codec, stripe, chunk),
            }
            rates = _rates(timed(works, scale.repeats), stripe.bytes)
            share = rates["encode"] / rates["raw"]
            row[f"{chunk >> 10} KiB"] = f"{rates['encode']:.1f} ({share:.2f})"
        table.add(**row)
    return table


def _digests(codec: Codec, scale: Scale) -> Table:
    """Ways to parity in a segment with its digests."""
    table = Table(
        "parity in its segment, with digests",
        "GB/s of data and CPU time of one thread; none: not digested; in cache: each chunk behind "
        "its coding; small: the same in parts of 128 KiB; apart: in a pass of their own; copied: "
        "coded elsewhere, digested, copied in, and read again to seal, as it once was",
    )
    for stripe in _stripes(scale):
        works = {
            "none": _encoding(codec, stripe, TRANSFER_BYTES),
            "in_cache": lambda s=stripe: _in_cache(codec, s, TRANSFER_BYTES),
            "small": lambda s=stripe: _in_cache(codec, s, 128 << 10),
            "apart": lambda s=stripe: _apart(codec, s),
            "copied": lambda s=stripe: _copied(codec, s),
        }
        rates = _rates(timed(works, scale.repeats), stripe.bytes)
        table.add(k_m=f"{stripe.k}, {stripe.m}", **rates)
    return table


def _copies(scale: Scale) -> Table:
    """Ways to bytes that came in, in their segment, with digests."""
    table = Table(
        "bytes copied into a segment, with digests",
        "GB/s and CPU time of one thread; in cache: each chunk behind its copy; apart: in a pass "
        "of their own",
    )
    source, target = np.ones(scale.bytes, np.uint8), tmpfs(scale.bytes)
    parts = [slice(at, at + TRANSFER_BYTES) for at in range(0, scale.bytes, TRANSFER_BYTES)]
    chunks = [(memoryview(target[part]), memoryview(source[part])) for part in parts]

    def copy(digested: bool) -> None:
        for stored, chunk in chunks:
            stored[:] = chunk
            if digested:
                chunk_digests(stored, scale.bytes)

    def apart() -> None:
        copy(digested=False)
        chunk_digests(memoryview(target), scale.bytes)

    works = {"none": lambda: copy(False), "in_cache": lambda: copy(True), "apart": apart}
    table.add(**_rates(timed(works, scale.repeats), scale.bytes))
    return table


def _in_cache(codec: Codec, stripe: Stripe, chunk_bytes: int) -> None:
    for data, parity in stripe.chunks(chunk_bytes):
        codec.encode_into(stripe.k, stripe.m, data, range(stripe.m), parity)
        _digest(parity, stripe)


def _apart(codec: Codec, stripe: Stripe) -> None:
    for data, parity in stripe.chunks(TRANSFER_BYTES):
        codec.encode_into(stripe.k, stripe.m, data, range(stripe.m), parity)
    _digest([memoryview(row) for row in stripe.parity], stripe)


def _copied(codec: Codec, stripe: Stripe) -> None:
    for data, parity in stripe.chunks(TRANSFER_BYTES):
        for target, row in zip(
            parity, codec.encode(stripe.k, stripe.m, data, range(stripe.m)), strict=True
        ):
            _digest([memoryview(row)], stripe)
            target[:] = row
    _digest([memoryview(row) for row in stripe.parity], stripe)


def _digest(blocks: Sequence[memoryview], stripe: Stripe) -> None:
    for block in blocks:
        chunk_digests(block, stripe.length)


def _rates(timings: dict[str, Timing], count_bytes: int) -> dict[str, float]:
    return {name: gb_per_s(count_bytes, t.best_cpu_s) for name, t in timings.items()}
