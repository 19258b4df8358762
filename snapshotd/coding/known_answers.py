"""What the code computes, written down: whatever implements it is held to these bytes at start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import xxhash

from snapshotd.coding.codec import Codec
from snapshotd.errors import SnapshotdError

#: Parity rows of `_known_blocks(k)` by (k, m), in hex, as zfec 1.6 computes them.
_KNOWN_PARITY: Final[Mapping[tuple[int, int], tuple[str, ...]]] = {
    (1, 1): ("0718293a4b5c6d7e8fa0b1",),
    (2, 1): ("4546ebfc0912b2a5cd9e73",),
    (3, 1): ("83c4bf94e8d798830b4147",),
    (2, 2): (
        "4546ebfc0912b2a5cd9e73",
        "83a4b0abcfc0ced50bdc28",
    ),
    (4, 2): (
        "11c073c15f114c23992dac",
        "33e61fdbb516c36fbb47d9",
    ),
    (8, 3): (
        "370aba8d77925d5fbf0ad7",
        "3fbf2221998196d0b7fed6",
        "faa142dfebc8f1fe729f1f",
    ),
}


#: xxh3-128 of the parity rows of `_long_blocks(k)`, one behind the other, by (k, m), as zfec 1.6
#: computes them. Vector instructions work on long blocks only, in kernels of up to six rows.
_KNOWN_LONG_PARITY: Final[Mapping[tuple[int, int], str]] = {
    (1, 1): "26f19b0433c206b6b4b30e32753ef428",
    (2, 1): "0a74720502f658be70b8b4f537c4fc29",
    (3, 1): "2433e2664cc99b57e9995f1313168caa",
    (5, 3): "4bb24f7df5d17c174dca1a16c534a308",
    (6, 2): "4935f89078a0144b6c4494805f49d845",
    (12, 4): "9b51e36d3d52fbc2cebb19f1785ff3d5",
    (24, 8): "d5f786de683ef4d7b87affd23867e27e",
}


def known_answer_test(codec: Codec) -> None:
    """Prove at start that a codec computes the code that is already at rest in other nodes.

    Raises:
        SnapshotdError: it does not; nothing it codes can be trusted.
    """
    for (k, m), rows in _KNOWN_PARITY.items():
        parity = bytes.fromhex("".join(rows))
        _prove(codec, m, _short_blocks(k), xxhash.xxh3_128_hexdigest(parity))
    for (k, m), digest in _KNOWN_LONG_PARITY.items():
        _prove(codec, m, _long_blocks(k), digest)


def _prove(codec: Codec, m: int, blocks: list[memoryview], digest: str) -> None:
    """The parity of blocks has a digest, and gives the blocks back after the hardest loss.

    That is: as many of the first data blocks as there is parity.
    """
    k = len(blocks)
    rows = codec.encode(k, m, blocks, range(m))
    if xxhash.xxh3_128_hexdigest(b"".join(rows)) != digest:
        raise _wrong_codec(codec, k, m, "parity")
    lost = min(k, m)
    have = dict(enumerate(blocks[lost:], lost)) | {
        k + row: memoryview(rows[row]) for row in range(lost)
    }
    if codec.decode(k, m, have, range(lost)) != blocks[:lost]:
        raise _wrong_codec(codec, k, m, "decoded blocks")


def _short_blocks(k: int) -> list[memoryview]:
    """Blocks of 11 bytes: longer than a machine word, and no multiple of one."""
    return [memoryview(bytes((7 + 31 * i + 17 * j) % 256 for j in range(11))) for i in range(k)]


def _long_blocks(k: int) -> list[memoryview]:
    """Blocks of 4,099 bytes: many vectors, and a rest."""
    return [memoryview(hashlib.shake_128(bytes([i])).digest(4099)) for i in range(k)]


def _wrong_codec(codec: Codec, k: int, m: int, what: str) -> SnapshotdError:
    return SnapshotdError(
        f"erasure code {codec.name} computes wrong {what} for k = {k}, m = {m}",
        "reinstall the package that implements it; nothing is coded with it",
    )
