"""The record behind an image: built from its bytes when sealed, held against them ever after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import xxhash
from google.protobuf.message import DecodeError

from snapshotd.coding.digest import check_range, content_digest
from snapshotd.errors import DamagedBytes
from snapshotd.metadata import ParityPlace, Version
from snapshotd.wire.protocol import DIGEST_BYTES, grain_bytes
from snapshotd.wire.v1.segment_pb2 import ParityPlace as PlaceMessage
from snapshotd.wire.v1.segment_pb2 import ParityRecord, SealRecord, SegmentHeader
from snapshotd.wire.v1.segment_pb2 import Version as VersionMessage

#: Room for the numbers, tags and lengths of one SealRecord; they take less than 100 bytes.
_RECORD_FRAME_BYTES: Final = 256

#: Room for one shard number of a ParityPlace.
_VARINT_BYTES: Final = 10


def seal_record_bytes(job: str, image_bytes: int) -> int:
    """Upper bound of the length of a SealRecord."""
    return _RECORD_FRAME_BYTES + len(job.encode()) + _digest_bytes(image_bytes)


def parity_record_bytes(job: str, shard_bytes: Sequence[int], image_bytes: int) -> int:
    """Upper bound of the length of a ParityRecord.

    Args:
        job: name of the job.
        shard_bytes: image lengths of the group's shards.
        image_bytes: length of the parity block.
    """
    seals = sum(seal_record_bytes(job, count) + _VARINT_BYTES for count in shard_bytes)
    return _RECORD_FRAME_BYTES + seals + _digest_bytes(image_bytes)


def seal_record(
    header: SegmentHeader, digests: bytes, world: int, image_bytes: int, manifest_bytes: int
) -> SealRecord:
    """The record of a shard's image, from the digests of its grains."""
    _check_digests(digests, image_bytes)
    return SealRecord(
        job=header.job,
        world=world,
        shard=header.shard,
        version=header.version,
        image_bytes=image_bytes,
        manifest_bytes=manifest_bytes,
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


def parity_record(
    header: SegmentHeader, digests: bytes, group: Sequence[SealRecord], image_bytes: int
) -> ParityRecord:
    """The record of a parity block, from the digests of its grains."""
    _check_digests(digests, image_bytes)
    return ParityRecord(
        place=header.place,
        group=group,
        image_bytes=image_bytes,
        grain_digests=digests,
    )


def parse_record(header: SegmentHeader, record: bytes) -> SealRecord | ParityRecord:
    """The record a sealed segment's header speaks of.

    Raises:
        DamagedBytes: the bytes are not the ones the header was sealed with, or say otherwise.
    """
    if xxhash.xxh3_128_digest(record) != header.record_digest:
        raise DamagedBytes("its record differs from what was sealed")
    kind = ParityRecord if header.HasField("place") else SealRecord
    try:
        parsed: SealRecord | ParityRecord = kind.FromString(record)
    except DecodeError as error:
        raise DamagedBytes(f"its record is no {kind.DESCRIPTOR.name}: {error}") from error
    _check_agreement(header, parsed)
    return parsed


def check_image(record: SealRecord | ParityRecord, image: memoryview, threads: int = 1) -> None:
    """Hold an image against its record, every grain, in some threads.

    Raises:
        DamagedBytes: names the first bytes that differ.
    """
    check_range(image, 0, record.image_bytes, record.grain_digests, threads)
    if isinstance(record, SealRecord) and record.content_digest != content_digest(
        record.grain_digests
    ):
        raise DamagedBytes("its content digest is not that of its grain digests")


def version_message(version: Version) -> VersionMessage:
    return VersionMessage(epoch=version.epoch, step=version.step)


def place_message(place: ParityPlace) -> PlaceMessage:
    return PlaceMessage(
        shards=place.shards, parity=place.parity, stripe=place.stripe, row=place.row
    )


def _check_agreement(header: SegmentHeader, record: SealRecord | ParityRecord) -> None:
    if isinstance(record, SealRecord):
        agree = (record.job, record.shard, record.version, record.image_bytes) == (
            header.job,
            header.shard,
            header.version,
            header.image_bytes,
        )
    else:
        agree = (record.place, record.image_bytes) == (header.place, header.image_bytes)
    if not agree:
        raise DamagedBytes("its record and its header speak of different bytes")


def _check_digests(digests: bytes, image_bytes: int) -> None:
    if len(digests) != _digest_bytes(image_bytes):
        raise ValueError(f"{len(digests)} bytes of digests for an image of {image_bytes} bytes")


def _digest_bytes(image_bytes: int) -> int:
    return -(-image_bytes // grain_bytes(image_bytes)) * DIGEST_BYTES
