"""Brings a slot what the persistent tier has of a whole step: its own shard, or ranges of any.

A shard becomes a sealed segment like any other. Of what another number of ranks saved only the
grains that some range touches are read, and each is held against the record of its shard, which
the step's index names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

from snapshotd.coding.digest import check_range, chunk_digests
from snapshotd.core.ranges import Range, Spans, united, whole_grains, without
from snapshotd.errors import DamagedBytes, RequestError, SnapshotdError
from snapshotd.flow.errands import record_of, running
from snapshotd.flow.rows import ATTEMPTS, Gathering, Tally, by_shard, until_done
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.metadata import Home, Version
from snapshotd.tier.layout import image_path, job_path
from snapshotd.tier.reading import PIECE_BYTES
from snapshotd.wire.points import point
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1.segment_pb2 import SealRecord

#: What is asked of the store: shard, offset, length.
Piece = tuple[int, int, int]


class StoredShards:
    """Reads whole steps for one slot."""

    def __init__(self, vault: Vault, url: str) -> None:
        self._vault = vault
        self._url = url
        self._records: dict[tuple[str, Version], dict[int, SealRecord]] = {}
        #: Of each step where a trainer came upon damage: the range that it was in.
        self._suspects: dict[tuple[str, Version], Range] = {}

    def request(self, what: str, job: str, version: Version) -> dict[str, Any]:
        """How an errand for a step begins."""
        place = (version.epoch, version.step)
        return {"what": what, "url": self._url, "job": job, "version": place}

    # -- this slot's own shard

    async def fetch(self, job: str, shard: int, version: Version) -> None:
        """Have a shard of a whole step here, verified.

        Raises:
            DamagedBytes: it is not there whole. TierError: it could not be read. NoRoom.
        """
        request = {**self.request("read", job, version), "shard": shard}
        async with running(request) as errand:
            record = await record_of(errand)
            if await self._is_here(job, shard, version, record.content_digest):
                return
            segment = await self._vault.begin_data(job, shard, version, record.image_bytes)
            with ExitStack() as cleanup:
                cleanup.callback(self._vault.give_back, segment)
                point("smp.load.begun")
                digests = b""
                with segment.image(record.image_bytes) as image:
                    for at in range(0, record.image_bytes, TRANSFER_BYTES):
                        count = min(TRANSFER_BYTES, record.image_bytes - at)
                        chunk = await errand.bytes(count)
                        with image[at : at + count] as stored:
                            digests += await to_the_end(_filled, stored, chunk, len(image))
                        point("smp.load.chunk")
                holding = await self._vault.seal_data(
                    segment, record.world, record.image_bytes, record.manifest_bytes, digests
                )
                point("smp.load.sealed")
                if holding.content_digest != record.content_digest:
                    raise DamagedBytes(
                        f"shard {shard} at {version} came from {self._url} with digest "
                        f"{holding.content_digest.hex()}, its trainer sealed "
                        f"{record.content_digest.hex()}"
                    )
                self._vault.enter(segment)
                point("smp.load.entered")

    async def _is_here(self, job: str, shard: int, version: Version, digest: bytes) -> bool:
        """Whether these very bytes were brought already, for a decision that came to nothing."""
        try:
            with self._vault.reading(job, version, shard) as segment:
                await to_the_end(segment.verify)
                record = segment.record
                return isinstance(record, SealRecord) and record.content_digest == digest
        except (RequestError, DamagedBytes):
            return False

    # -- ranges of any shard

    async def attempt(self, job: str, version: Version, shards: Collection[int]) -> None:
        """Read records anew, and of each shard the first and the last grain.

        Also what was damaged when a trainer wanted it, if anything was: so a step whose damage only
        a trainer came upon is not decided on again.

        Raises:
            DamagedBytes: they are not there whole. TierError: they could not be read.
        """
        self._records.clear()
        suspect = self._suspects.get((job, version))
        wanted = {*shards, suspect.shard} if suspect else set(shards)
        records = await self._known(job, version, wanted)
        sizes = {s: r.image_bytes for s, r in records.items() if r.image_bytes}
        tried = [Range(s, at, 1, 0) for s, size in sizes.items() for at in (0, size - 1)]
        tried += [suspect] if suspect else []
        starts = accumulate((r.length for r in tried), initial=0)
        tried = [replace(r, to=to) for r, to in zip(tried, starts, strict=False)]
        room = memoryview(bytearray(sum(r.length for r in tried)))
        await self._gather(job, version, tried, room, attempts=1)
        self._suspects.pop((job, version), None)

    async def records(
        self, job: str, version: Version, shards: Collection[int]
    ) -> dict[int, SealRecord]:
        """What was sealed of shards. Raises DamagedBytes, PeerError: they cannot be had."""

        async def attempt(_avoid: set[Home]) -> str:
            return await _told(self._known(job, version, shards))

        await until_done(attempt, ATTEMPTS)
        return await self._known(job, version, shards)

    async def sizes(self, job: str, version: Version, shards: Collection[int]) -> dict[int, int]:
        """Image lengths of some shards. Raises DamagedBytes, PeerError: they cannot be had."""
        records = await self.records(job, version, shards)
        return {shard: record.image_bytes for shard, record in records.items()}

    async def gather(
        self, job: str, version: Version, ranges: Sequence[Range], image: memoryview
    ) -> Tally:
        """Fill ranges of `image` with ranges of shards; the rest of it stays as it is.

        Raises:
            DamagedBytes: some grain is not what was sealed. PeerError: the store does not answer.
        """
        return await self._gather(job, version, ranges, image, ATTEMPTS)

    async def _gather(
        self, job: str, version: Version, ranges: Sequence[Range], image: memoryview, attempts: int
    ) -> Tally:
        spans, targets = await asyncio.to_thread(by_shard, ranges)
        work = Gathering(job, version, image, targets)
        records = await self.records(job, version, spans)

        async def attempt(_avoid: set[Home]) -> str:
            left = {s: without(some, united(work.came[s])) for s, some in spans.items()}
            return await _told(self._read(work, records, left))

        await until_done(attempt, attempts)
        return work.tally

    async def _known(
        self, job: str, version: Version, shards: Collection[int]
    ) -> dict[int, SealRecord]:
        """Records of shards; they are kept until a step is tried again."""
        known = self._records.setdefault((job, version), {})
        missing = sorted(set(shards) - set(known))
        if missing:
            request = {**self.request("records", job, version), "shards": missing}
            async with running(request) as errand:
                for shard in missing:
                    known[shard] = await record_of(errand)
            point("smp.stored.known")
        return {shard: known[shard] for shard in shards}

    async def _read(
        self, work: Gathering, records: Mapping[int, SealRecord], left: Mapping[int, Spans]
    ) -> None:
        """Everything that is left, in one errand."""
        pieces = list(_pieces(records, left))
        if not pieces:
            return
        request = {**self.request("ranges", work.job, work.version), "spans": pieces}
        async with running(request) as errand:
            for shard, offset, length in pieces:
                for at in range(offset, offset + length, TRANSFER_BYTES):
                    chunk = await errand.bytes(min(TRANSFER_BYTES, offset + length - at))
                    await to_the_end(self._take, work, records[shard], at, chunk)

    def _take(self, work: Gathering, record: SealRecord, at: int, chunk: bytes) -> None:
        """Verify whole grains of a shard, and take of them what is wanted."""
        with memoryview(chunk) as grains:
            try:
                check_range(grains, at, record.image_bytes, record.grain_digests)
            except DamagedBytes as error:
                self._suspects[work.job, work.version] = Range(record.shard, at, len(chunk), 0)
                root = job_path(self._url, work.job)
                path = image_path(root, work.version, record.shard)
                raise DamagedBytes(f"{path}: {error.what}") from error
            work.tally.received += len(chunk)
            work.tally.stored += work.put(record.shard, at, grains)
        point("smp.stored.taken")


async def _told(work: Awaitable[object]) -> str:
    """Why something that may heal failed; empty where it did not. Raises DamagedBytes."""
    try:
        await work
    except DamagedBytes:
        raise
    except SnapshotdError as error:
        return str(error)
    return ""


def _pieces(records: Mapping[int, SealRecord], left: Mapping[int, Spans]) -> Iterator[Piece]:
    """The grains that ranges of images touch, cut as they are asked for."""
    for shard, spans in left.items():
        for offset, length in whole_grains(spans, records[shard].image_bytes):
            for at in range(offset, offset + length, PIECE_BYTES):
                yield shard, at, min(PIECE_BYTES, offset + length - at)


def _filled(stored: memoryview, chunk: bytes, image_bytes: int) -> bytes:
    """Put a chunk into its place; the digests of its grains, taken there."""
    stored[:] = chunk
    return chunk_digests(stored, image_bytes)
