"""Checksums of images: a digest for each grain, and one name for all the bytes.

An image is cut into grains of `grain_bytes(len(image))`; the last may be shorter. The digest of
a grain is its xxh3-128; the content digest is the xxh3-128 of all grain digests in order. So any
run of whole grains can be verified alone, by whoever holds the digests.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import xxhash

from snapshotd.errors import DamagedBytes
from snapshotd.wire.protocol import DIGEST_BYTES, grain_bytes


def grain_digests(image: memoryview) -> bytes:
    """Digests of all grains of an image, concatenated; b"" for an empty image.

    Args:
        image: contiguous bytes; read only, and not kept.
    """
    return _digests(image, grain_bytes(len(image)))


def chunk_digests(chunk: memoryview, image_bytes: int) -> bytes:
    """Digests of the grains of one chunk of an image that is computed piece by piece.

    Args:
        chunk: whole grains of the image, or its end.
        image_bytes: length of the whole image, which decides its grain.
    """
    return _digests(chunk, grain_bytes(image_bytes))


def content_digest(grain_digests: bytes) -> bytes:
    """The name of the bytes whose grains have these digests, DIGEST_BYTES long."""
    return xxhash.xxh3_128_digest(grain_digests)


def check_range(
    chunk: memoryview,
    offset: int,
    image_bytes: int,
    digests: bytes | bytearray,
    threads: int = 1,
) -> bytes:
    """Verify a run of grains of an image.

    Args:
        chunk: the bytes [offset, offset + len(chunk)) of the image: whole grains, or up to the
            image's end. May be empty.
        offset: where the run starts; a multiple of the image's grain.
        image_bytes: length of the whole image.
        digests: of all grains of the image, as `grain_digests` returns them.
        threads: how many may read it, each a part.

    Returns:
        The digests of the run.

    Raises:
        DamagedBytes: names the first grain that differs, or the length that is wrong.
        ValueError: `offset` is the caller's mistake.
    """
    grain = grain_bytes(image_bytes)
    if offset < 0 or offset % grain:
        raise ValueError(f"offset {offset} is not a multiple of the grain of {grain} bytes")
    _check_lengths(len(chunk), offset, image_bytes, len(digests))
    first = offset // grain
    found = _digests_at_once(chunk, grain, threads) if threads > 1 else _digests(chunk, grain)
    expected = digests[first * DIGEST_BYTES : first * DIGEST_BYTES + len(found)]
    if found != expected:
        index = _first_difference(found, expected)
        raise DamagedBytes(
            f"bytes {offset + index * grain} to "
            f"{min(offset + (index + 1) * grain, image_bytes) - 1} of an image of {image_bytes} "
            "bytes differ from what was sealed"
        )
    return found


def _digests(chunk: memoryview, grain: int) -> bytes:
    return b"".join(
        xxhash.xxh3_128_digest(chunk[start : start + grain])
        for start in range(0, len(chunk), grain)
    )


def _digests_at_once(chunk: memoryview, grain: int, threads: int) -> bytes:
    part = max(1, -(-len(chunk) // (grain * threads))) * grain
    parts = (chunk[start : start + part] for start in range(0, len(chunk), part))
    with ThreadPoolExecutor(threads) as pool:
        return b"".join(pool.map(_digests, parts, repeat(grain)))


def _check_lengths(chunk_bytes: int, offset: int, image_bytes: int, digest_bytes: int) -> None:
    """Lengths come from peers and from files, so a wrong one is damage, not a mistake."""
    grain = grain_bytes(image_bytes)
    expected = -(-image_bytes // grain) * DIGEST_BYTES
    if digest_bytes != expected:
        raise DamagedBytes(
            f"an image of {image_bytes} bytes has {expected} bytes of digests, not {digest_bytes}"
        )
    end = offset + chunk_bytes
    if end > image_bytes or (end % grain and end != image_bytes):
        raise DamagedBytes(
            f"a chunk of {chunk_bytes} bytes at offset {offset} of an image of {image_bytes} bytes "
            f"is neither whole grains of {grain} bytes nor ends where the image ends"
        )


def _first_difference(found: bytes, expected: bytes | bytearray) -> int:
    return next(
        start // DIGEST_BYTES
        for start in range(0, len(found), DIGEST_BYTES)
        if found[start : start + DIGEST_BYTES] != expected[start : start + DIGEST_BYTES]
    )
