"""Parity blocks that other nodes computed: asked for, from whom they should come, and verified."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from snapshotd.core.protection import parity_homes
from snapshotd.core.slot import SlotMachine
from snapshotd.core.stripes import parity_bytes
from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, RequestError, SnapshotdError
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.holdings import check_parity_record
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import Home, ParityPlace, Version
from snapshotd.rpc.checks import MAX_NAME_BYTES, malformed
from snapshotd.wire.points import point
from snapshotd.wire.protocol import ErrorCode
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

Arrival = tuple[str, Version, ParityPlace]


class Intake:
    """Takes the blocks that this slot is to keep into its vault."""

    def __init__(self, vault: Vault, machine: SlotMachine, conduct: Conduct) -> None:
        self.vault = vault
        self.conduct = conduct
        self._machine = machine
        self._arriving: set[Arrival] = set()

    async def storing(
        self, opening: pb.StoreOpening, version: Version, place: ParityPlace
    ) -> IncomingBlock | None:
        """A buffer for a parity block that another node computed; None when it is here already."""
        sender = self._check_wanted(opening, place)
        self.conduct.check(sender)
        if len(opening.shard_bytes) != len(place.shards) or (
            parity_bytes(place, opening.shard_bytes) != opening.image_bytes
        ):
            raise malformed(f"{opening.image_bytes} bytes are no parity of {place}")
        key = (opening.job, version, place)
        if key in self._arriving:
            raise RequestError(ErrorCode.BUSY, f"parity {place} is already being stored")
        self._arriving.add(key)
        try:
            segment = await self.vault.begin_parity(
                opening.job, version, place, opening.shard_bytes
            )
        except BaseException:
            self._arriving.discard(key)
            raise
        point("smp.store.opened")
        still_wanted = partial(self._check_wanted, opening, place)
        return IncomingBlock(
            self, segment, opening.image_bytes, opening.shard_bytes, key, sender, still_wanted
        )

    def _check_wanted(self, opening: pb.StoreOpening, place: ParityPlace) -> str:
        """Refuse what this slot is not to keep; returns the node of the sender."""
        job = self._machine.orders.job(opening.job)
        if job is None or job.decision is None or job.lineage != opening.epoch:
            known = job.lineage if job else 0
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"parity of epoch {opening.epoch} came while job {opening.job!r} is at "
                f"epoch {known} here",
            )
        groups = (*job.decision.groups, *self._machine.orders.keepers(job))
        keeping = [g for g in groups if (place, self._machine.home) in parity_homes(g)]
        if not keeping:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER, f"{self._machine.home} is not to keep parity {place}"
            )
        sender = Home(opening.sender.node, opening.sender.slot)
        if sender not in {m.home for g in keeping for m in g.members}:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"parity {place} came from {str(sender)[:MAX_NAME_BYTES]}, "
                "which is not of its group",
            )
        return sender.node

    def arrived(self, key: Arrival) -> None:
        self._arriving.discard(key)


class IncomingBlock:
    """A parity block on its way into a segment."""

    def __init__(
        self,
        intake: Intake,
        segment: Segment,
        image_bytes: int,
        shard_bytes: Sequence[int],
        key: Arrival,
        sender: str,
        still_wanted: Callable[[], object],
    ) -> None:
        self._still_wanted = still_wanted
        self._shard_bytes = list(shard_bytes)
        self._sender = sender
        self._intake = intake
        self._segment = segment
        self._image_bytes = image_bytes
        self._key = key
        self._finishing = False

    @property
    def image(self) -> memoryview:
        return self._segment.image(self._image_bytes)

    async def finish(self, record: seg.ParityRecord, digests: bytes) -> None:
        """Seal what came, if it is what the coder computed; done even if nobody waits for it."""
        self._finishing = True
        await asyncio.shield(asyncio.get_running_loop().create_task(self._finish(record, digests)))

    async def _finish(self, record: seg.ParityRecord, digests: bytes) -> None:
        try:
            job, version, place = self._key
            self._still_wanted()  # what trainers write is coded for long, and epochs end
            record.DiscardUnknownFields()  # they would be kept, and nobody has made room for them
            self._check_record(record, job, version, place)
            if digests != record.grain_digests:
                raise Misbehaved(
                    Misdeed.WRONG_BYTES, "a parity block was damaged on its way: its digests differ"
                )
            await asyncio.to_thread(
                self._segment.seal_parity, list(record.group), self._image_bytes, digests
            )
            point("smp.store.sealed")
            self._intake.vault.replace(self._segment)
            point("smp.store.replaced")
            self._intake.conduct.praise(self._sender)
        except Misbehaved as error:
            self._intake.conduct.strike(self._sender, error.misdeed, str(error))
            raise
        finally:
            self._intake.arrived(self._key)
            self._intake.vault.give_back(self._segment)

    def _check_record(
        self, record: seg.ParityRecord, job: str, version: Version, place: ParityPlace
    ) -> None:
        try:
            check_parity_record(record, job, version, place, self._image_bytes)
        except SnapshotdError as error:
            raise Misbehaved(Misdeed.WRONG_RECORD, error.what) from error
        sizes = [r.image_bytes for r in record.group]
        if sizes != self._shard_bytes:
            raise Misbehaved(
                Misdeed.WRONG_RECORD, f"{self._shard_bytes} bytes were announced, {sizes} came"
            )

    def abandon(self, error: BaseException) -> None:
        """Nobody will send the rest; the error says whether that is the sender's fault."""
        if not self._finishing:
            if isinstance(error, Misbehaved):
                self._intake.conduct.strike(self._sender, error.misdeed, str(error))
            self._intake.arrived(self._key)
            self._intake.vault.give_back(self._segment)
