"""What a trainer is lent to read of the restored version: manifests, and an image to its order.

Both lie in segments in state WRITING: within the budget, and worth nothing after a crash. They go
back at the first claim, when the trainer leaves or dies, and when it asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, Protocol

from snapshotd.core.ranges import Range, check_ranges, gaps
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import (
    CallerError,
    DamagedBytes,
    NoRoom,
    PeerError,
    RequestError,
    SnapshotdError,
)
from snapshotd.flow.ranges import Gatherer
from snapshotd.flow.rows import Tally
from snapshotd.flow.stored import StoredShards
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import Decision, Tier, Version
from snapshotd.rpc.checks import checked_size, malformed
from snapshotd.rpc.trainers import refused
from snapshotd.wire.points import point
from snapshotd.wire.protocol import HEADER_BYTES, TRANSFER_BYTES, ErrorCode
from snapshotd.wire.v1 import segment_pb2 as seg
from snapshotd.wire.v1 import trainer_pb2 as pb

#: For the first orders, where a daemon was started again meanwhile.
ORDERS_S = 5.0
#: Until generations that nobody needs have given way.
GIVE_WAY_S = 0.5

_ZEROS = bytes(TRANSFER_BYTES)


class Source(Protocol):
    """Something that has all shards of a version: the memory of the slots, or the tier.

    What cannot be had raises a SnapshotdError, and for bytes that are wrong DamagedBytes.
    """

    async def attempt(self, job: str, version: Version, shards: Collection[int]) -> None:
        """Try that shards can be read."""

    async def sizes(self, job: str, version: Version, shards: Collection[int]) -> dict[int, int]:
        """Image lengths of shards."""

    async def records(
        self, job: str, version: Version, shards: Collection[int]
    ) -> dict[int, seg.SealRecord]:
        """What was sealed of shards."""

    async def gather(
        self, job: str, version: Version, ranges: Sequence[Range], image: memoryview
    ) -> Tally:
        """Fill ranges of `image` with ranges of shards; the rest of it stays as it is."""


class Lending:
    """Serves `Manifests` and `Fill` of one slot's trainer."""

    def __init__(
        self,
        machine: SlotMachine,
        vault: Vault,
        gatherer: Gatherer,
        stored: StoredShards | None = None,
    ) -> None:
        self._machine = machine
        self._vault = vault
        self._gatherer = gatherer
        self._stored = stored
        self._heard = asyncio.Event()
        self._lent: dict[str, Segment] = {}
        self._working: dict[str, asyncio.Task[pb.ToTrainer]] = {}

    async def answer(self, message: pb.ToDaemon) -> pb.ToTrainer:
        """The answer to a request of either kind; an earlier one of its kind is given up."""
        kind = message.WhichOneof("body") or ""
        work = self._fill(message.fill) if kind == "fill" else self._manifests(message.manifests)
        return await self._instead(kind, work)

    async def _instead(self, kind: str, work: Coroutine[Any, Any, pb.ToTrainer]) -> pb.ToTrainer:
        before = self._working.pop(kind, None)
        task = self._working[kind] = asyncio.get_running_loop().create_task(work)
        if before is not None:
            before.cancel()
        self._take_back(kind)
        try:
            return await task
        except DamagedBytes as error:
            return pb.ToTrainer(refused=refused(_damaged(error)))
        except SnapshotdError as error:
            return pb.ToTrainer(refused=refused(error))
        finally:
            task.cancel()
            if self._working.get(kind) is task:
                del self._working[kind]

    def heard(self) -> None:
        """Orders have come."""
        self._heard.set()

    async def attempt(self, decision: Decision, shards: Collection[int]) -> None:
        """Try that shards can be read. Raises SnapshotdError: they cannot."""
        assert decision.restore is not None, "there is nothing to try of a fresh start"
        await self._source(decision).attempt(decision.job, decision.restore, shards)

    def _source(self, decision: Decision) -> Source:
        """What has the shards. Raises PeerError: this slot cannot read there."""
        if decision.tier is not Tier.PERSISTENT or not decision.saved_world:
            return self._gatherer
        if self._stored is None:
            raise PeerError(
                f"{self._machine.home} has no persistent tier configured",
                "Set the same persist.url on all nodes",
            )
        return self._stored

    def give_back(self) -> None:
        """Nothing is lent any more, and nothing is being gathered."""
        for task in self._working.values():
            task.cancel()
        for kind in list(self._lent):
            self._take_back(kind)

    def _take_back(self, kind: str) -> None:
        segment = self._lent.pop(kind, None)
        if segment is not None:
            self._vault.give_back(segment)

    async def _fill(self, request: pb.Fill) -> pb.ToTrainer:
        began_s = time.monotonic()
        decision, version = await self._restored()
        ranges = await asyncio.to_thread(_ranges_from, request)
        shards = _checked_shards(decision, {r.shard for r in ranges})
        source = self._source(decision)
        sizes = await source.sizes(decision.job, version, shards)
        try:
            await asyncio.to_thread(check_ranges, ranges, request.image_bytes, sizes)
        except CallerError as error:
            raise RequestError(ErrorCode.MALFORMED, error.what, error.remedy) from error
        segment = await self._room(decision.job, version, request.image_bytes)
        try:
            with segment.image(request.image_bytes) as image:
                await to_the_end(_clear, image, ranges)
                point("smp.fill.begun")
                tally = await source.gather(decision.job, version, ranges, image)
        except BaseException:
            self._vault.give_back(segment)
            raise
        self._lent["fill"] = segment
        point("smp.fill.gathered")
        filled = pb.Filled(
            path=str(segment.path),
            image_offset=HEADER_BYTES,
            bytes_local=tally.local,
            bytes_copied=tally.copied,
            bytes_decoded=tally.decoded,
            bytes_stored=tally.stored,
            bytes_received=tally.received,
            seconds=time.monotonic() - began_s,
        )
        return pb.ToTrainer(filled=filled)

    async def _manifests(self, request: pb.Manifests) -> pb.ToTrainer:
        decision, version = await self._restored()
        asked = request.shards or range(decision.saved_world or decision.world)
        shards = sorted(_checked_shards(decision, set(asked)))
        source = self._source(decision)
        records = await source.records(decision.job, version, shards)
        told = [(records[s].manifest_bytes, records[s].image_bytes) for s in shards]
        offsets = list(accumulate((length for length, _ in told), initial=0))
        ranges = [
            Range(shard, 0, length, to)
            for shard, (length, _), to in zip(shards, told, offsets, strict=False)
            if length
        ]
        segment = await self._room(decision.job, version, offsets[-1])
        try:
            with segment.image(offsets[-1]) as image:
                await source.gather(decision.job, version, ranges, image)
            point("smp.manifests.gathered")
        except BaseException:
            self._vault.give_back(segment)
            raise
        self._lent["manifests"] = segment
        pieces = [
            pb.ManifestsGathered.Piece(
                shard=shard, offset=HEADER_BYTES + to, bytes=length, image_bytes=image_bytes
            )
            for shard, (length, image_bytes), to in zip(shards, told, offsets, strict=False)
        ]
        gathered = pb.ManifestsGathered(path=str(segment.path), pieces=pieces)
        return pb.ToTrainer(manifests_gathered=gathered)

    async def _room(self, job: str, version: Version, image_bytes: int) -> Segment:
        """Memory to lend. Raises NoRoom: also without spare generations there is none."""
        try:
            return await self._vault.lend(job, version, image_bytes)
        except NoRoom:
            self._machine.lends()
            self._vault.on_change()
        await asyncio.sleep(GIVE_WAY_S)
        return await self._vault.lend(job, version, image_bytes)

    async def _restored(self) -> tuple[Decision, Version]:
        """What the trainer was sent back to. Raises RequestError: it was not, or that is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ORDERS_S):
                while self._knows_less_than_its_trainer():
                    self._heard.clear()
                    await self._heard.wait()
        return self._sent_back_to()

    def _knows_less_than_its_trainer(self) -> bool:
        """Whether this process is so young that it has not heard yet what its trainer was told."""
        trainer = self._machine.trainer
        if trainer is None or trainer.decision is None:
            return False
        job = self._machine.orders.job(trainer.job)
        return job is None or job.decision is None or job.lineage < trainer.decision.epoch

    def _sent_back_to(self) -> tuple[Decision, Version]:
        trainer = self._machine.trainer
        if trainer is None or trainer.waiting or trainer.decision is None:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                "bytes of a snapshot were asked for before restore() had answered",
                "Ask to restore first",
            )
        job = self._machine.orders.job(trainer.job)
        decision = job.decision if job is not None else None
        if job is None or decision is None or decision.id != trainer.decision:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"this trainer was restored in epoch {trainer.decision.epoch}, which is over",
                "It is left over from an earlier run: end it",
            )
        if decision.restore is None:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER, "the job started fresh: there is nothing to read of it"
            )
        if job.committed != decision.restore:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"{decision.restore} is superseded by {job.committed}",
                "Read all that is needed before the first step",
            )
        return decision, decision.restore


def _damaged(error: DamagedBytes) -> RequestError:
    """For the trainer: what was decided on turned out damaged when it was read."""
    return RequestError(
        ErrorCode.LOST,
        error.what,
        "End all ranks, and start all ranks again: as long as this is damaged, they are sent back "
        "to an older step",
    )


def _checked_shards(decision: Decision, shards: set[int]) -> set[int]:
    world = decision.saved_world or decision.world
    wrong = [shard for shard in sorted(shards) if shard >= world]
    if wrong:
        raise RequestError(
            ErrorCode.MALFORMED,
            f"shards {wrong[:16]} were asked for of a snapshot that {world} ranks saved",
            f"Ask for shards 0 to {world - 1}",
        )
    return shards


def _ranges_from(request: pb.Fill) -> Sequence[Range]:
    """The columns of a Fill as rows. Raises RequestError: they have unlike lengths."""
    columns = (request.shards, request.offsets, request.lengths, request.to)
    counts = [len(column) for column in columns]
    if len(set(counts)) != 1:
        raise malformed(f"the columns of a Fill have unlike lengths: {counts}")
    checked_size(request.image_bytes)
    return [Range(*row) for row in zip(*columns, strict=True)]


def _clear(image: memoryview, ranges: Sequence[Range]) -> None:
    """Zero where no range goes: the memory has been another's."""
    for offset, length in gaps(ranges, len(image)):
        for at in range(offset, offset + length, TRANSFER_BYTES):
            count = min(TRANSFER_BYTES, offset + length - at)
            image[at : at + count] = _ZEROS[:count]
