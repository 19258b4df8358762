"""One slot's share in the persistent tier: writes its shard there.

A version that is being written is kept as any reader keeps it: it leaves the books when it is
freed, and its memory when the writing is done. So that the trainer has its buffers meanwhile, one
more is made. Where there is no memory for it the writing gives way, and training does not wait.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from snapshotd.core.persist import (
    RETRY_FIRST_S,
    RETRY_LAST_S,
    Look,
    Persistence,
    Publish,
    Schedule,
    Stop,
    Write,
)
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import Busy, DamagedBytes, NoRoom, RequestError, SnapshotdError
from snapshotd.flow.errands import ask, look, stored_from
from snapshotd.flow.stored import StoredShards
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import PersistFacts, SlotCounters
from snapshotd.telemetry.logs import ChangeLog
from snapshotd.wire.points import point

log = logging.getLogger(__name__)

Starter = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(frozen=True)
class TierSettings:
    """Where the persistent tier is, and how it is written; `bytes_per_s` for the whole node."""

    url: str
    bytes_per_s: int
    schedule: Schedule


@dataclass(slots=True)
class _Writing:
    """What is being written, by which task; `segment` once it is kept for that."""

    what: Write
    task: asyncio.Task[None] | None = None
    segment: Segment | None = None
    gives_way: bool = False


class Persister:
    """Carries out what `core.persist` decides for one slot."""

    def __init__(
        self, machine: SlotMachine, vault: Vault, settings: TierSettings, generations: int
    ) -> None:
        self._machine = machine
        self._vault = vault
        self._settings = settings
        self._generations = generations
        self._mind = Persistence(machine.home, settings.schedule)
        self._writing: dict[str, _Writing] = {}
        self.stored = StoredShards(vault, settings.url)
        self._log = ChangeLog(log)
        #: Called when something ended or came on.
        self.on_change: Callable[[], None] = lambda: None
        vault.give_way = self.give_way

    @property
    def facts(self) -> tuple[PersistFacts, ...]:
        return self._mind.facts()

    def next_wake_s(self) -> float | None:
        return self._mind.next_wake_s()

    def pursue(self, start: Starter) -> None:
        """Begin what is to be done now."""
        orders, home = self._machine.orders, self._machine.home
        slots = {**orders.peers, home: self._machine.facts("", SlotCounters())}
        for instruction in self._mind.instructions(
            orders.jobs, slots, time.monotonic(), time.time()
        ):
            match instruction:
                case Look(job):
                    start(self._look(job))
                case Write():
                    writing = self._writing[instruction.job] = _Writing(instruction)
                    writing.task = start(self._write(writing))
                case Stop(job):
                    stopped = self._writing.get(job)
                    if stopped is not None and stopped.task is not None:
                        stopped.task.cancel()
                case Publish():
                    start(self._publish(instruction))

    async def give_way(self) -> bool:
        """Let go of memory that training wants and only a writing keeps; whether there was any."""
        found = [
            w
            for w in self._writing.values()
            if w.segment is not None and w.task is not None and self._vault.is_freed(w.segment)
        ]
        for writing in found:
            assert writing.task is not None
            writing.gives_way = True
            writing.task.cancel()
            await asyncio.wait([writing.task])
        return bool(found)

    # -- what the leader does

    async def _look(self, job: str) -> None:
        try:
            stored = await look(self._settings.url, job)
        except SnapshotdError as error:
            self._fail(job, error)
        else:
            self._log.note(job, "")
            self._mind.looked(job, stored)
        self.on_change()

    async def _publish(self, task: Publish) -> None:
        schedule = self._settings.schedule
        request = {
            **self.stored.request("publish", task.job, task.version),
            "world": task.world,
            "number": task.number,
            "keep_last": schedule.keep_last,
            "keep_every_nth": schedule.keep_every_nth,
        }
        try:
            done = await ask(request)
        except SnapshotdError as error:
            self._fail(task.job, error)
        else:
            self._log.note(task.job, done["not_removed"], logging.WARNING)
            log.info("%s of job %s is whole in the persistent tier", task.version, task.job)
            point("smp.persist.published")
            self._mind.published(task.job, task.version, stored_from(done))
        self.on_change()

    def _fail(self, job: str, error: SnapshotdError) -> None:
        self._log.note(job, str(error), logging.WARNING)
        self._mind.failed(job, str(error), time.monotonic())

    # -- what each home does

    async def _write(self, writing: _Writing) -> None:
        what = writing.what
        point("smp.persist.begun")
        try:
            with self._vault.reading(what.job, what.version, what.shard) as segment:
                writing.segment = segment
                await self._make_room(segment, what.job)
                await self._until_written(what, segment)
        except (RequestError, DamagedBytes) as error:
            self._mind.gone(what, f"shard {what.shard} at {what.version}: {error}")
        except asyncio.CancelledError:
            if not writing.gives_way:
                self._mind.stopped(what)
                raise
            reason = (
                f"the writing of shard {what.shard} at {what.version} gave way to training, which "
                "wanted its memory: let memory_budget have room for one more buffer a shard"
            )
            self._log.note(f"{what.job}, written", reason, logging.WARNING)
            self._mind.gone(what, reason)
        else:
            point("smp.persist.written")
            self._mind.wrote(what)
        finally:
            if self._writing.get(what.job) is writing:
                del self._writing[what.job]
            self.on_change()

    async def _make_room(self, segment: Segment, job: str) -> None:
        """One buffer more than training takes turns with, where there is memory for it."""
        try:
            await self._vault.make_ready(job, segment.record.image_bytes, self._generations + 1)
        except SnapshotdError as error:
            if not isinstance(error, NoRoom | Busy):
                raise
            log.info("no buffer more while a step is written to the persistent tier: %s", error)

    async def _until_written(self, what: Write, segment: Segment) -> None:
        pause_s = RETRY_FIRST_S
        record = segment.record
        request = {
            **self.stored.request("write", what.job, what.version),
            "path": str(segment.path),
            "record": base64.b64encode(record.SerializeToString()).decode(),
            "bytes_per_s": self._share(),
        }

        def progress(done: int, total: int) -> None:
            self._mind.progressed(what, done, total)
            self.on_change()

        while True:
            try:
                await ask(request, progress)
            except SnapshotdError as error:
                if isinstance(error, DamagedBytes):
                    await to_the_end(segment.verify)  # is it the memory's fault?
                self._log.note(f"{what.job}, written", str(error), logging.WARNING)
                self._mind.hindered(what, str(error))
            else:
                self._log.note(f"{what.job}, written", "")
                return
            self.on_change()
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_LAST_S, 2 * pause_s)

    def _share(self) -> float:
        """This slot's part of the node's bandwidth, bytes a second."""
        node = self._machine.home.node
        slots = sum(home.node == node for home in self._machine.orders.peers)
        return self._settings.bytes_per_s / max(1, slots)
