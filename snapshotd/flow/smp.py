"""The snapshot management process of one slot: events to the machine, its instructions to work.

Everything that changes state runs on one event loop; digests, coding and allocation run in
threads. Tasks end in an event to the machine, never in a decision of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from snapshotd.core.instructions import (
    Answer,
    Deny,
    Encode,
    Free,
    Grant,
    Instruction,
    Rebuild,
    Stage,
)
from snapshotd.core.news import News
from snapshotd.core.protection import Slots
from snapshotd.core.recovery import Copy, Decode, Local, Missing, find_shard
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import DamagedBytes, PeerError, SnapshotdError
from snapshotd.flow.buffer import Buffer
from snapshotd.flow.coder import Coder
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.desk import TrainerDesk
from snapshotd.flow.foresight import Foresight
from snapshotd.flow.lending import Lending
from snapshotd.flow.persist import Persister
from snapshotd.flow.readiness import Readiness
from snapshotd.flow.shortage import Shortage
from snapshotd.flow.transfer import Transfers
from snapshotd.flow.vault import Vault
from snapshotd.memory.locks import trainer_holding
from snapshotd.memory.rooms import Rooms
from snapshotd.memory.segment import Segment
from snapshotd.metadata import Decision, Orders, Tier, Version
from snapshotd.rpc.local import Link
from snapshotd.telemetry.logs import ChangeLog
from snapshotd.wire.points import point
from snapshotd.wire.protocol import GRPC
from snapshotd.wire.v1 import segment_pb2 as seg

log = logging.getLogger(__name__)

STAGE_ATTEMPTS = 4
STAGE_PAUSE_S = 0.25


class Smp:
    """Owns a slot's machine, and does what it says."""

    def __init__(
        self,
        machine: SlotMachine,
        vault: Vault,
        coder: Coder,
        transfers: Transfers,
        link: Link,
        trainer_lock: Path,
        rooms: Rooms,
        conduct: Conduct,
        persister: Persister | None = None,
    ) -> None:
        self.machine = machine
        self.vault = vault
        self._coder = coder
        self._transfers = transfers
        self._link = link
        self._trainer_lock = trainer_lock
        self.shortage = Shortage(machine, rooms, self.start)
        self.readiness = Readiness(vault, rooms, more=1 if persister else 0)
        self.foresight = Foresight(vault, machine)
        self._conduct = conduct
        self._persister = persister
        self._wake = asyncio.Event()
        self._rebuilding = ChangeLog(log)
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = News()
        self._failure: BaseException | None = None
        self.desk: TrainerDesk | None = None
        self.lending: Lending | None = None
        self.buffer = Buffer(self)
        self.staged_s = 0.0  # what the last restore took, to have its shard here
        self.address = ""  # of its blocks
        self.plane = GRPC  # by which they are dialled
        vault.on_change = self.wake
        conduct.on_change = self.wake
        if persister is not None:
            persister.on_change = self.wake
        vault.on_no_room = self._note_shortage

    def follow(self, orders: Orders) -> None:
        """The supervisor states what there is to know."""
        point("smp.orders.heard")
        self.machine.orders = orders
        if self.lending is not None:
            self.lending.heard()
        trainer = self.machine.trainer
        if trainer is not None and trainer.waiting:
            self.check_trainer()
        self.wake()

    def wake(self) -> None:
        """Something happened: draw conclusions soon."""
        self._wake.set()

    def check_trainer(self) -> None:
        """Let go of a trainer whose process is gone: the kernel has released its lock."""
        trainer = self.machine.trainer
        if trainer is not None and trainer_holding(self._trainer_lock) != trainer.incarnation:
            log.info("the trainer of slot %d is gone", self.machine.home.slot)
            self.forget_trainer()

    def forget_trainer(self) -> None:
        """Its sealed generations stay; the buffer it was writing goes back."""
        job = self.machine.trainer.job if self.machine.trainer is not None else ""
        self.machine.detach()
        self.readiness.stop()
        self.foresight.forget()
        self.vault.repeats.forget()
        point("smp.trainer.forgotten")
        self.give_back()
        if job:
            self.start(self.vault.tidy(job))
        self.wake()

    def give_back(self) -> None:
        """All memory that is in the trainer's hands."""
        self.buffer.give_back()
        if self.lending is not None:
            self.lending.give_back()

    async def run(self) -> None:
        """Carry out instructions until a task fails in a way nobody foresaw."""
        while True:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            instructions = self.machine.instructions(time.monotonic())
            for instruction in instructions:
                self._carry_out(instruction)
            for job in {i.holding.job for i in instructions if isinstance(i, Free)}:
                self.start(self.vault.tidy(job))
            self.shortage.watch()
            if self._persister is not None:
                self._persister.pursue(self.start)
            self._publish()
            if self.desk is not None:
                await self.desk.report()
            await self._sleep()

    async def _sleep(self) -> None:
        now_s = time.monotonic()
        times = (
            self.machine.next_wake_s(),
            self._conduct.next_change_s(),
            self._news.due_s,
            self._persister.next_wake_s() if self._persister else None,
        )
        wake_s = min((t for t in times if t is not None), default=None)
        timeout_s = None if wake_s is None else max(0.0, wake_s - now_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _publish(self) -> None:
        accused = self._conduct.accusations()
        facts = replace(
            self.machine.facts(self.address, self.vault.counters()),
            accused=accused,
            plane=self.plane,
            persist=self._persister.facts if self._persister else (),
        )
        if self._news.to_tell(facts, time.monotonic()):
            self._link.publish(facts)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Stage():
                self.start(self._stage(instruction))
            case Encode():
                self.start(self._encode(instruction))
            case Rebuild():
                self.start(self._rebuild(instruction))
            case Free(holding, reason):
                log.debug("freed %s of %s: %s", holding.version, holding.job, reason)
                self.vault.free(holding)
            case Grant():
                self.start(self.buffer.grant(instruction))
            case Answer() | Deny() if self.desk is not None:
                self.start(self.desk.deliver(instruction))
            case _:
                log.warning("nobody is there to hear %s", instruction)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task; an error it does not expect ends `run`, and with it the process."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()
        self.wake()

    async def stop(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note_shortage(self, job: str, image_bytes: int) -> None:
        self.shortage.note(job, image_bytes)
        self.wake()

    # -- tasks

    async def _encode(self, task: Encode) -> None:
        try:
            await self._coder.encode(task, lambda: self.machine.orders.peers)
        except SnapshotdError as error:
            log.info("stripe %d of %s is not coded yet: %s", task.stripe, task.version, error)
            self.machine.encode_failed(task, time.monotonic())
        else:
            self.machine.encoded(task)

    async def _rebuild(self, task: Rebuild) -> None:
        point("smp.rebuild.begun")
        try:
            await self._fetch(task.job, task.shard, task.version)
        except SnapshotdError as error:
            self._note_not_rebuilt(task, str(error))
            self.machine.rebuild_failed(task, time.monotonic())
        else:
            self._rebuilding.forget(_subject(task))
            log.info("%s is rebuilt", _subject(task))
            point("smp.rebuild.done")
            self.machine.rebuilt(task)

    def _note_not_rebuilt(self, task: Rebuild, reason: str) -> None:
        """Once for each reason; while slots verify what they adopted, it is no trouble yet."""
        peers = self.machine.orders.peers.items()
        starting = sorted(str(home) for home, facts in peers if not facts.address)
        if starting:
            why = f"not rebuilt yet: {', '.join(starting)} still starting"
            self._rebuilding.note(_subject(task), why)
        else:
            self._rebuilding.note(_subject(task), f"not rebuilt yet: {reason}", logging.WARNING)

    async def _stage(self, task: Stage) -> None:
        """Bring the shard here; what is wrong now may heal, so try some times before giving up."""
        decision, trainer = task.decision, self.machine.trainer
        assert decision.restore is not None
        if trainer is None or trainer.decision != decision.id:
            return  # it went away before this began
        reason, damaged, begun_s = "", False, time.monotonic()
        point("smp.stage.begun")
        for attempt in range(STAGE_ATTEMPTS):
            await asyncio.sleep(STAGE_PAUSE_S * attempt)
            try:
                if decision.saved_world and self.lending is not None:
                    await self.lending.attempt(decision, task.to_try(trainer.shard))
                elif decision.tier is Tier.PERSISTENT:
                    await self._fetch_stored(decision.job, trainer.shard, decision.restore)
                else:
                    await self._fetch(decision.job, trainer.shard, decision.restore)
            except DamagedBytes as error:
                # The facts have changed: where the shard comes from must be decided anew.
                reason, damaged = str(error), decision.tier is Tier.PERSISTENT
                break
            except SnapshotdError as error:
                log.warning("shard %d at %s: %s", trainer.shard, decision.restore, error)
                reason = str(error)
            else:
                point("smp.stage.done")
                self.staged_s = time.monotonic() - begun_s
                self.machine.staged(decision.id)
                return
        if damaged:
            log.error("shard %d at %s: %s", trainer.shard, decision.restore, reason)
        self.machine.stage_failed(decision.id, reason, damaged=damaged)

    async def _fetch(self, job: str, shard: int, version: Version) -> None:
        """Have a shard here, verified. Raises SnapshotdError."""
        orders, home = self.machine.orders, self.machine.home
        match find_shard(self.reachable(), job, shard, version, home):
            case Local(holding):
                await self.foresight.verify(holding)
                point("smp.stage.verified")
            case Copy() as plan:
                await self._transfers.copy(plan, orders.peers)
            case Decode() as plan:
                await self._transfers.decode(plan, orders.peers)
            case Missing(reason):
                raise PeerError(f"shard {shard} cannot be had: {reason}")

    def reachable(self) -> Slots:
        """Facts of all slots that are trusted now, our own as they are at this moment."""
        mine = self.machine.facts(self.address, self.vault.counters())
        here = {self.machine.home: replace(mine, plane=self.plane)}
        peers = self.machine.orders.peers.items()
        return {**{h: f for h, f in peers if self._conduct.trusts(h.node)}, **here}

    async def _fetch_stored(self, job: str, shard: int, version: Version) -> None:
        if self._persister is None:
            raise PeerError(
                f"{self.machine.home} has no persistent tier configured",
                "Set the same persist.url on all nodes",
            )
        await self._persister.stored.fetch(job, shard, version)

    def record_of(self, decision: Decision, shard: int) -> tuple[Segment, seg.SealRecord]:
        """The staged segment that answers a restore."""
        assert decision.restore is not None
        segment = self.vault.segment(decision.job, decision.restore, shard)
        record = segment.record
        assert isinstance(record, seg.SealRecord)
        return segment, record


def _subject(task: Rebuild) -> str:
    return f"shard {task.shard} of job {task.job!r} at {task.version}"
