"""The sealed segments of one slot: what they hold, who reads them, and when one may go.

The vault keeps the slot machine's holdings and the files in step. A holding that is freed while
a peer reads it leaves the books at once and the memory when the last reader is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

from snapshotd.core.repeats import Ranges, Repeats, fingerprint
from snapshotd.core.slot import SlotMachine
from snapshotd.core.stripes import parity_bytes
from snapshotd.errors import DamagedBytes, NoRoom, RequestError
from snapshotd.flow.holdings import Growing, Key, describe, key_of
from snapshotd.flow.threads import to_the_end
from snapshotd.memory.arena import Arena
from snapshotd.memory.records import parity_record_bytes, seal_record_bytes
from snapshotd.memory.segment import Segment
from snapshotd.memory.states import Kind
from snapshotd.metadata import DataHolding, ParityHolding, ParityPlace, SlotCounters, Version
from snapshotd.rpc.serving import Image, SealedImage, What
from snapshotd.wire.points import point
from snapshotd.wire.protocol import ErrorCode
from snapshotd.wire.v1 import segment_pb2 as seg

log = logging.getLogger(__name__)


class Vault:
    """Segments of one slot by what they hold."""

    def __init__(self, arena: Arena, machine: SlotMachine, cluster_id: str, keep_free: int) -> None:
        self._arena = arena
        self._machine = machine
        self._cluster_id = cluster_id
        self._keep_free = keep_free
        self._claiming = asyncio.Lock()  # the arena gives a segment again until it is begun
        self._sealed: dict[Key, Segment] = {}
        self._doomed: list[Segment] = []
        self._condemned: dict[Segment, str] = {}  # damaged, and still being read: why
        self._unentered: set[Segment] = set()  # being filled; neither in the books nor free
        self._growing: dict[Key, Growing] = {}  # of these, what peers may read meanwhile
        self._followed: list[Segment] = []  # once for each who does; he leaves when it is freed
        self._counting = Lock()  # blocks are sent and received in threads
        self._sent_bytes = 0
        self._received_bytes = 0
        self.copied_bytes = 0
        self.decoded_bytes = 0
        self._quarantined = 0
        self.repeats = Repeats()
        #: Called when a peer's request changed what is held here.
        self.on_change: Callable[[], None] = lambda: None
        #: Called when a segment could not be had: job, bytes of its largest image.
        self.on_no_room: Callable[[str, int], None] = lambda _job, _bytes: None
        #: Asked when a segment cannot be had: whether a reader that can wait has let go of one.
        self.give_way: Callable[[], Awaitable[bool]] = _nobody

    # -- taking over

    async def adopt(self) -> None:
        """Take over what an earlier daemon sealed: verified first, quarantined otherwise."""
        self._quarantined += len(self._arena.open())
        for segment in self._arena.candidates():
            try:
                await asyncio.to_thread(segment.verify)
                point("smp.adopt.verified")
                self.enter(segment)
            except (DamagedBytes, RequestError) as error:
                self._condemn(segment, str(error))

    def enter(self, segment: Segment) -> None:
        """From now on the sealed segment counts, and is served. Raises DamagedBytes."""
        if segment.header.cluster_id != self._cluster_id:
            raise DamagedBytes(
                f"{segment.name} belongs to cluster {segment.header.cluster_id!r}, "
                f"this daemon to {self._cluster_id!r}"
            )
        holding = describe(segment)
        self._unentered.discard(segment)
        self._growing.pop(key_of(holding), None)
        if key_of(holding) in self._sealed:
            # The same bytes twice: a daemon died between storing and freeing, or two tasks have
            # brought them here at once.
            segment.free()
            return
        self._sealed[key_of(holding)] = segment
        self._machine.keep(holding)

    def _condemn(self, segment: Segment, reason: str) -> None:
        """It is out of the books; its file goes when the last reader is done."""
        self._quarantined += 1
        self._condemned[segment] = reason
        self._let_go(segment)

    def _let_go(self, segment: Segment) -> None:
        if segment.pinned:
            return
        reason = self._condemned.pop(segment, None)
        if reason is not None:
            point("smp.quarantine.begun")
            self._arena.quarantine(segment, reason)
            point("smp.quarantine.done")
        elif segment in self._doomed:
            self._doomed.remove(segment)
            point("smp.free.forgotten")
            segment.free()
            point("smp.free.headed")

    # -- filling

    async def begin_data(self, job: str, shard: int, version: Version, image_bytes: int) -> Segment:
        """A buffer for a shard, in state WRITING. Raises NoRoom."""
        record = seal_record_bytes(job, image_bytes)

        def begin(segment: Segment) -> None:
            segment.begin_data(self._cluster_id, job, shard, version)

        with self._noting_shortage(job, image_bytes):
            return await self._begun(Kind.DATA, image_bytes, record, begin)

    async def begin_parity(
        self, job: str, version: Version, place: ParityPlace, shard_bytes: Sequence[int]
    ) -> Segment:
        """A buffer for a parity block, in state WRITING. Raises NoRoom."""
        image_bytes = parity_bytes(place, shard_bytes)
        record = parity_record_bytes(job, shard_bytes, image_bytes)

        def begin(segment: Segment) -> None:
            segment.begin_parity(self._cluster_id, job, version, place)

        with self._noting_shortage(job, max(shard_bytes)):
            return await self._begun(Kind.PARITY, image_bytes, record, begin)

    async def lend(self, job: str, version: Version, image_bytes: int) -> Segment:
        """Memory for a trainer to read from, in state WRITING. Raises NoRoom."""

        def begin(segment: Segment) -> None:
            segment.begin_data(self._cluster_id, job, 0, version)

        record = seal_record_bytes(job, image_bytes)
        return await self._begun(Kind.DATA, image_bytes, record, begin)

    async def make_ready(self, job: str, image_bytes: int, count: int) -> bool:
        """Make one buffer for shards, unless there are `count`; whether one was made.

        Raises:
            NoRoom, ConfigError, Busy: it cannot be made.
        """
        record = seal_record_bytes(job, image_bytes)
        async with self._claiming:
            return await asyncio.to_thread(
                self._arena.reserve, Kind.DATA, image_bytes, record, count
            )

    def buffers(self) -> tuple[Segment, ...]:
        """The segments that shards stand in, or may."""
        return tuple(s for s in self._arena.segments if s.kind is Kind.DATA)

    @contextmanager
    def _noting_shortage(self, job: str, largest_bytes: int) -> Iterator[None]:
        try:
            yield
        except NoRoom:
            if not any(segment in self._followed for segment in self._doomed):
                self.on_no_room(job, largest_bytes)
            raise  # or it comes free in a moment, for which nothing need be given up

    async def _begun(
        self, kind: Kind, image_bytes: int, record_bytes: int, begin: Callable[[Segment], None]
    ) -> Segment:
        """Claim and begin as one act: who stops waiting for it does not leave a segment behind."""

        async def act() -> Segment:
            async with self._claiming:
                try:
                    segment = await asyncio.to_thread(
                        self._arena.claim, kind, image_bytes, record_bytes
                    )
                except NoRoom:
                    if not await self.give_way():
                        raise
                    segment = await asyncio.to_thread(
                        self._arena.claim, kind, image_bytes, record_bytes
                    )
                begin(segment)
                self._unentered.add(segment)
                return segment

        task = asyncio.get_running_loop().create_task(act())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back_unwanted)
            raise

    def _give_back_unwanted(self, task: asyncio.Task[Segment]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.give_back(task.result())

    async def seal_data(
        self,
        segment: Segment,
        world: int,
        image_bytes: int,
        manifest_bytes: int,
        digests: bytes | None = None,
    ) -> DataHolding:
        """Seal, and checksum what comes without digests; it counts once it is entered."""
        await to_the_end(segment.seal_data, world, image_bytes, manifest_bytes, digests)
        holding = describe(segment)
        assert isinstance(holding, DataHolding)
        return holding

    def watch(self, segment: Segment, trained: Ranges) -> None:
        """Hold a new snapshot's trained tensors against those of the one before."""
        holding, before = describe(segment), self.repeats.in_a_row
        assert isinstance(holding, DataHolding)
        self.repeats.sealed(fingerprint(holding, trained, segment.record.grain_digests))
        subject = f"shard {holding.shard} of job {holding.job!r}"
        if self.repeats.in_a_row and not before:
            log.warning(
                "%s at %s has the very tensors of the snapshot before: does its capture, or its "
                "training, stand still?",
                subject,
                holding.version,
            )
        elif before and not self.repeats.in_a_row:
            log.info("%s changes again, after %d equal snapshots", subject, before)

    async def seal_parity(
        self, segment: Segment, group: list[seg.SealRecord], image_bytes: int, digests: bytes
    ) -> None:
        """Seal, and enter the block into the books."""
        await to_the_end(segment.seal_parity, group, image_bytes, digests)
        self.replace(segment)

    def give_back(self, segment: Segment) -> None:
        """A buffer that was begun: free it, unless it was entered since."""
        if segment in self._unentered:
            self._unentered.remove(segment)
            self._ungrow(segment)
            self._doomed.append(segment)
            self._let_go(segment)

    def discard(self, segment: Segment, reason: str) -> None:
        """A buffer that was begun and is damaged: nobody gets it again."""
        self._unentered.discard(segment)
        self._ungrow(segment)
        self._condemn(segment, reason)

    def grows(self, job: str, version: Version, shard: int, growing: Growing) -> None:
        """Peers may read from a buffer that was begun, until it is entered, or given back."""
        self._growing[job, version, shard] = growing

    def _ungrow(self, segment: Segment) -> None:
        self._growing = {k: g for k, g in self._growing.items() if g.segment is not segment}

    # -- letting go

    def free(self, holding: DataHolding | ParityHolding) -> None:
        """The bytes are not needed; their memory goes when the last reader is done."""
        segment = self._sealed.pop(key_of(holding), None)
        if segment is None:
            return
        self._doomed.append(segment)
        self._let_go(segment)

    async def tidy(self, job: str) -> None:
        """Give memory back that the usual course of steps does not need.

        Some free segments are kept for the next step of a job that goes on; of one that is gone
        (no trainer here, nothing sealed) all are given back.
        """
        goes_on = self._machine.trainer is not None or any(key[0] == job for key in self._sealed)
        async with self._claiming:
            point("smp.trim.begun")
            self._arena.trim(self._keep_free if goes_on else 0)

    def quarantine(self, holding: DataHolding | ParityHolding, reason: str) -> None:
        """The bytes did not verify: they are never served again."""
        segment = self._sealed.pop(key_of(holding), None)
        if segment is None:
            return
        self._machine.lose(holding)
        self._condemn(segment, reason)
        self.on_change()

    def is_freed(self, segment: Segment) -> bool:
        """Whether nothing but its readers keeps it."""
        return segment in self._doomed

    # -- reading

    def held(self) -> tuple[Key, ...]:
        """Job, version and shard or place of everything sealed here."""
        return tuple(self._sealed)

    def segment(self, job: str, version: Version, what: What) -> Segment:
        """The sealed segment. Raises RequestError when it is not here."""
        segment = self._sealed.get((job, version, what))
        if segment is None:
            name = f"shard {what}" if isinstance(what, int) else f"parity {what}"
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"{name} of job {job!r} at {version} is not held by {self._machine.home}",
            )
        return segment

    @contextmanager
    def reading(self, job: str, version: Version, what: What) -> Iterator[Segment]:
        """The sealed segment, kept from being freed for the time of the context.

        A reader that finds it damaged says so by DamagedBytes, and it is quarantined.
        """
        segment = self.segment(job, version, what)
        with self._kept((job, version, what), segment):
            yield segment

    @contextmanager
    def following(self, job: str, version: Version, what: What) -> Iterator[Image]:
        """As `reading`, of what is sealed or still filled; to code it, so what is freed ends it."""
        key = job, version, what
        growing = self._growing.get(key)
        segment = self.segment(*key) if growing is None else growing.segment
        with self._kept(key, segment, growing), self._noting_follower(segment):
            yield growing or SealedImage(segment, partial(self.is_freed, segment))

    @contextmanager
    def _kept(self, key: Key, segment: Segment, growing: Growing | None = None) -> Iterator[None]:
        holding = describe(segment) if growing is None else None
        segment.pin()
        try:
            yield
        except DamagedBytes as error:
            if self._sealed.get(key) is segment:
                self.quarantine(holding or describe(segment), str(error))
            elif growing is not None:
                growing.spoil(str(error))
            raise
        finally:
            segment.unpin()
            self._let_go(segment)

    @contextmanager
    def _noting_follower(self, segment: Segment) -> Iterator[None]:
        self._followed.append(segment)
        try:
            yield
        finally:
            self._followed.remove(segment)

    def replace(self, segment: Segment) -> None:
        """Enter a block that was computed anew, in place of an older one. Raises DamagedBytes."""
        old = self._sealed.get(key_of(describe(segment)))
        if old is not None:
            holding = describe(old)
            self._machine.lose(holding)
            self.free(holding)
        self.enter(segment)
        self.on_change()

    # -- counting

    def sent(self, count_bytes: int) -> None:
        with self._counting:
            self._sent_bytes += count_bytes

    def received(self, count_bytes: int) -> None:
        with self._counting:
            self._received_bytes += count_bytes

    def counters(self) -> SlotCounters:
        return SlotCounters(
            bytes_sent=self._sent_bytes,
            bytes_received=self._received_bytes,
            bytes_copied=self.copied_bytes,
            bytes_decoded=self.decoded_bytes,
            quarantined=self._quarantined,
            allocated_bytes=self._arena.allocated_bytes,
            repeated_total=self.repeats.total,
            repeated_now=self.repeats.in_a_row,
        )


async def _nobody() -> bool:
    return False
