"""What a segment holds, sealed, by what its record says of itself, or still filled."""

from __future__ import annotations

from typing import Protocol

from snapshotd.core.stripes import parity_bytes
from snapshotd.errors import DamagedBytes, RequestError
from snapshotd.memory.segment import Segment
from snapshotd.metadata import DataHolding, ParityHolding, ParityPlace, Version
from snapshotd.rpc.checks import check_job, check_seal
from snapshotd.rpc.convert import place_from, version_from
from snapshotd.rpc.serving import Image, Record, What
from snapshotd.wire.v1 import segment_pb2 as seg

#: Job, version, and shard or place: what names the bytes of a segment.
Key = tuple[str, Version, What]


class Growing(Image, Protocol):
    """What peers may read of a buffer that is filled."""

    @property
    def segment(self) -> Segment: ...

    def spoil(self, reason: str) -> None:
        """Bytes have changed that stood."""


def key_of(holding: DataHolding | ParityHolding) -> Key:
    what: What = holding.shard if isinstance(holding, DataHolding) else holding.place
    return (holding.job, holding.version, what)


def describe(segment: Segment) -> DataHolding | ParityHolding:
    """The holding a sealed segment is.

    Raises:
        DamagedBytes: its record contradicts itself. RequestError: it speaks of what cannot be.
    """
    record: Record = segment.record
    check_job(segment.header.job)  # told to all others, who would refuse the rest with it
    if isinstance(record, seg.SealRecord):
        return DataHolding(
            record.job,
            record.shard,
            version_from(record.version),
            record.image_bytes,
            record.content_digest,
            record.world,
        )
    place = place_from(record.place)
    job, version = segment.header.job, version_from(segment.header.version)
    check_parity_record(record, job, version, place, record.image_bytes)
    return ParityHolding(
        job,
        version,
        place,
        record.image_bytes,
        tuple(r.content_digest for r in record.group),
        tuple(r.image_bytes for r in record.group),
        record.group[0].world,
    )


def check_parity_record(
    record: seg.ParityRecord, job: str, version: Version, place: ParityPlace, image_bytes: int
) -> None:
    """A record must describe the very block it came with. Raises DamagedBytes."""
    for sealed in record.group:
        try:
            check_seal(sealed)
        except RequestError as error:
            raise DamagedBytes(error.what) from error
        if (sealed.job, version_from(sealed.version)) != (job, version):
            raise DamagedBytes(f"the record of parity {place} describes another snapshot")
    sizes = [r.image_bytes for r in record.group]
    if len(sizes) != len(place.shards) or [r.shard for r in record.group] != list(place.shards):
        raise DamagedBytes(f"the record of parity {place} describes other shards")
    if parity_bytes(place, sizes) != image_bytes:
        raise DamagedBytes(f"parity {place} has {image_bytes} bytes, its record says otherwise")
