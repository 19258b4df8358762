"""Gathers byte ranges of shards into memory: own bytes, those of other slots, decoded ones.

Executes the plans of `core.ranges`. What fails is planned again with what is known by then, without
whoever failed where others can do; what has come is not fetched twice. A task holds at most a
chunk of each block it reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Final

from snapshotd.coding.codec import Codec
from snapshotd.coding.digest import check_range
from snapshotd.core.protection import Slots
from snapshotd.core.ranges import (
    Degraded,
    Held,
    Part,
    Range,
    Spans,
    clipped,
    plan,
    shard_sizes,
    united,
    without,
)
from snapshotd.core.recovery import BlockPlan, Copy, Decode, Local, Missing, find_shard
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError, SnapshotdError
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.rows import (
    ATTEMPTS,
    Gathering,
    Row,
    Tally,
    by_shard,
    calls,
    copy_in,
    noting,
    strides,
    until_done,
)
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.metadata import DataHolding, Home, ParityPlace, Version
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.channels import Peer
from snapshotd.rpc.ranges import Sound, chunked
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import segment_pb2 as seg

log = logging.getLogger(__name__)

#: Streams, decodes, records at a time.
AT_ONCE: Final = 8


class Gatherer:
    """Reads ranges for one slot."""

    def __init__(
        self,
        home: Home,
        vault: Vault,
        client: BlocksClient,
        codec: Codec,
        conduct: Conduct,
        slots: Callable[[], Slots],
        attempts: int = ATTEMPTS,
    ) -> None:
        self._home = home
        self._vault = vault
        self._client = client
        self._codec = codec
        self._conduct = conduct
        self._slots = slots
        self._attempts = attempts

    async def gather(
        self,
        job: str,
        version: Version,
        ranges: Sequence[Range],
        image: memoryview,
        attempts: int | None = None,
    ) -> Tally:
        """Fill ranges of `image` with ranges of shards; the rest of it stays as it is.

        Raises:
            SnapshotdError: some bytes cannot be had; says which and why.
        """
        spans, targets = await asyncio.to_thread(by_shard, ranges)
        work = Gathering(job, version, image, targets)

        async def attempt(avoid: set[Home]) -> str:
            left = {s: without(some, united(work.came[s])) for s, some in spans.items()}
            found = plan(
                self._slots(), job, version, {s: some for s, some in left.items() if some},
                self._home, avoid,
            )  # fmt: skip
            failed = await self._carry_out(work, found.parts, avoid)
            return "; ".join([*found.missing, *failed])

        await until_done(attempt, attempts or self._attempts)
        return work.tally

    async def attempt(self, job: str, version: Version, shards: Collection[int]) -> None:
        """Read a byte of each shard, of one that must be decoded a byte of each block.

        Raises:
            SnapshotdError: it cannot be had.
        """
        slots, ranges = self._slots(), []
        for shard in shards:
            match find_shard(slots, job, shard, version, self._home):
                case Decode() as decode:
                    starts = [block.extent.offset for block in decode.blocks]
                case Missing(reason):
                    raise PeerError(f"shard {shard} is missing: {reason}")
                case Local(holding) | Copy(_, holding):
                    starts = [0] if holding.image_bytes else []
            ranges += [(shard, start) for start in starts]
        tried = [Range(shard, start, 1, to) for to, (shard, start) in enumerate(ranges)]
        # Twice: without whoever did not answer, it may do.
        await self.gather(job, version, tried, memoryview(bytearray(len(tried))), attempts=2)

    async def sizes(self, job: str, version: Version, shards: Collection[int]) -> dict[int, int]:
        """Image lengths of some shards.

        Raises:
            SnapshotdError: nobody tells.
        """
        found: dict[int, int] = {}

        async def attempt(avoid: set[Home]) -> str:  # noqa: ARG001  # nobody is asked
            found.update(shard_sizes(self._slots(), job, version))
            missing = sorted(set(shards) - set(found))
            return f"shards {missing[:16]} are missing: nobody holds them" if missing else ""

        await until_done(attempt, self._attempts)
        return found

    async def records(
        self, job: str, version: Version, shards: Collection[int]
    ) -> dict[int, seg.SealRecord]:
        """What was sealed of shards, wherever it is told.

        Raises:
            SnapshotdError: nobody tells.
        """
        some = asyncio.Semaphore(AT_ONCE)

        async def record(shard: int) -> seg.SealRecord:
            async with some:
                return await self._record(job, version, shard)

        tasks = [asyncio.create_task(record(shard)) for shard in shards]
        try:
            return dict(zip(shards, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()

    async def _record(self, job: str, version: Version, shard: int) -> seg.SealRecord:
        found: list[seg.SealRecord] = []

        async def attempt(avoid: set[Home]) -> str:
            slots = self._slots()
            some = {h: f for h, f in slots.items() if h not in avoid}
            origin = find_shard(some, job, shard, version, self._home)
            if not isinstance(origin, Local | Copy | Decode):
                origin = find_shard(slots, job, shard, version, self._home)
            home = self._home
            try:
                match origin:
                    case Local():
                        found.append(_sealed(self._vault.segment(job, version, shard).record))
                    case Copy(home, holding):
                        found.append(await self._record_at(home, holding))
                    case Decode():
                        home = origin.record_at
                        found.append(await self.record_of(origin))
                    case _:
                        return f"shard {shard} is missing: {origin.reason}"
            except SnapshotdError as error:
                avoid.add(home)
                return str(error)
            return ""

        await until_done(attempt, self._attempts)
        return found[0]

    async def _carry_out(
        self, work: Gathering, parts: Sequence[Part], avoid: set[Home]
    ) -> list[str]:
        """All parts of a plan, some at a time; why those failed that did."""
        some = asyncio.Semaphore(AT_ONCE)
        failed: list[str] = []

        async def one(part: Part) -> None:
            async with some:
                try:
                    await self._part(work, part, avoid)
                except SnapshotdError as error:
                    failed.append(str(error))

        tasks = [asyncio.create_task(one(part)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            # They write into memory that is given back when this ends.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return failed

    async def _part(self, work: Gathering, part: Part, avoid: set[Home]) -> None:
        match part:
            case Held(home, holding, spans) if home == self._home:
                await self._local(work, holding, spans)
            case Held(home, holding, spans):
                await self._copied(work, home, holding, spans, avoid)
            case Degraded(decode, spans):
                with noting(decode.record_at, avoid):
                    record = await self.record_of(decode)
                for block, some in zip(decode.blocks, spans, strict=True):
                    await self._decoded(work, decode, block, some, record, avoid)

    # -- what this slot holds

    async def _local(self, work: Gathering, holding: DataHolding, spans: Spans) -> None:
        with self._vault.reading(holding.job, holding.version, holding.shard) as segment:
            record = segment.record
            with segment.image(holding.image_bytes) as image:
                sound = Sound(image, record)
                for some in strides(spans):
                    work.tally.local += await to_the_end(
                        copy_in, work, holding.shard, image, sound, some
                    )

    # -- what others hold

    async def _copied(
        self,
        work: Gathering,
        home: Home,
        holding: DataHolding,
        spans: Spans,
        avoid: set[Home],
    ) -> None:
        for some in calls(spans):
            row = self._row(work, home, holding.shard, some, avoid, holding.content_digest)
            try:
                for pieces in chunked(some):
                    chunk = await row.take(sum(count for _, count in pieces))
                    at = 0
                    for offset, count in pieces:
                        data = chunk[at : at + count]
                        work.tally.copied += work.put(holding.shard, offset, data)
                        at += count
            finally:
                self._end(work, row, home)
        self._conduct.praise(home.node)

    def _row(
        self,
        work: Gathering,
        home: Home | None,
        what: int | ParityPlace,
        spans: Spans,
        avoid: set[Home],
        content_digest: bytes = b"",
    ) -> Row:
        """Begin to read. Raises PeerError: there is nobody to read from."""
        count = sum(length for _, length in spans)
        if home is None or count == 0:
            return Row(None, None, 0, self._conduct, avoid)
        with noting(home, avoid):
            peer = self._peer(home)
        reader = self._client.read_ranges(peer, work.job, work.version, what, spans, content_digest)
        return Row(reader, home, count, self._conduct, avoid)

    def _end(self, work: Gathering, row: Row, home: Home | None) -> None:
        row.cancel()
        if home is not None and home.node != self._home.node:
            work.tally.received += row.received

    def _peer(self, home: Home) -> Peer:
        """Where a slot listens. Raises PeerError: it is not live, or cut off."""
        self._conduct.check(home.node)
        facts = self._slots().get(home)
        if facts is None or not facts.address:
            raise PeerError(f"{home} is not live")
        return Peer(home.node, facts.address, facts.plane)

    async def _record_at(self, home: Home, holding: DataHolding) -> seg.SealRecord:
        with self._conduct.blaming(home.node):
            record = await self._client.record(
                self._peer(home), holding.job, holding.version, holding.shard
            )
            if _sealed(record).content_digest != holding.content_digest:
                raise Misbehaved(
                    Misdeed.WRONG_RECORD, f"{home} serves other bytes of a shard than it says"
                )
        return _sealed(record)

    # -- what nobody holds

    async def record_of(self, decode: Decode) -> seg.SealRecord:
        """The lost shard's own record, kept beside every parity block of its group.

        Raises:
            PeerError: it is not to be had. Misbehaved: there is none.
        """
        at, place = decode.record_at, decode.record_place
        if at == self._home:
            parity = self._vault.segment(decode.job, decode.version, place).record
        else:
            with self._conduct.blaming(at.node):
                peer = self._peer(at)
                parity = await self._client.record(peer, decode.job, decode.version, place)
        lost = decode.shard, decode.content_digest, decode.image_bytes
        for record in parity.group if isinstance(parity, seg.ParityRecord) else ():
            if (record.shard, record.content_digest, record.image_bytes) == lost:
                return record
        with self._conduct.blaming(at.node):
            raise Misbehaved(Misdeed.WRONG_RECORD, f"{at} has no record of shard {decode.shard}")

    async def _decoded(
        self,
        work: Gathering,
        decode: Decode,
        block: BlockPlan,
        spans: Spans,
        record: seg.SealRecord,
        avoid: set[Home],
    ) -> None:
        """Decode whole grains of one block, verify them, and take of them what is wanted."""
        out = memoryview(bytearray(TRANSFER_BYTES))
        for some in calls(spans):
            rows: dict[int, Row] = {}
            with ExitStack() as cleanup:
                for each in block.inputs:
                    what = each.place if each.place is not None else each.shard
                    assert what is not None, "an input is a shard's block or a parity block"
                    row = self._row(work, each.home, what, clipped(some, each), avoid)
                    rows[each.index] = row
                    cleanup.callback(self._end, work, row, each.home)
                for pieces in chunked(some):
                    count = sum(length for _, length in pieces)
                    chunks = await asyncio.gather(*(row.take(count) for row in rows.values()))
                    have = dict(zip(rows, chunks, strict=True))
                    with out[:count] as data:
                        await to_the_end(
                            self._codec.decode_into,
                            decode.data,
                            decode.parity,
                            have,
                            [block.index],
                            [data],
                        )
                        self._take(work, decode, block, pieces, data, record, avoid)
        for node in {each.home.node for each in block.inputs if each.home}:
            self._conduct.praise(node)

    def _take(
        self,
        work: Gathering,
        decode: Decode,
        block: BlockPlan,
        pieces: Sequence[tuple[int, int]],
        data: memoryview,
        record: seg.SealRecord,
        avoid: set[Home],
    ) -> None:
        """Each data block was checked where it lies; so wrong bytes come from parity."""
        at = 0
        for offset, count in pieces:
            start = block.extent.offset + offset
            with data[at : at + count] as grains:
                try:
                    check_range(grains, start, record.image_bytes, record.grain_digests)
                except DamagedBytes as error:
                    for each in block.inputs:
                        if each.place is not None and each.home is not None:
                            what = f"{each.home} served parity that is not the code of its group"
                            self._conduct.strike(each.home.node, Misdeed.WRONG_STRIPE, what)
                            avoid.add(each.home)
                    raise DamagedBytes(f"decoded wrongly: {error.what}") from error
                work.tally.decoded += work.put(decode.shard, start, grains)
            at += count


def _sealed(record: seg.SealRecord | seg.ParityRecord) -> seg.SealRecord:
    assert isinstance(record, seg.SealRecord), "a shard has one"
    return record
