"""Verifies what a restore will most likely name, while the nodes still decide."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Final

from snapshotd.core.slot import SlotMachine
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.metadata import DataHolding, SlotCounters

#: A pass that ended longer ago says too little of the bytes as they are now.
FRESH_S: Final = 1.0
#: Of the processors that this process may use: a restore waits for the pass.
MOST_THREADS: Final = 4


@dataclass(slots=True)
class _Pass:
    holding: DataHolding
    task: asyncio.Task[float]  # when it ended, monotonic seconds

    def counts(self, holding: DataHolding) -> bool:
        """Whether it is, or has just been, over these very bytes, and found no damage."""
        if self.holding != holding or self.task.cancelled():
            return False
        if not self.task.done():
            return True
        return self.task.exception() is None and time.monotonic() - self.task.result() < FRESH_S


class Foresight:
    """At most one pass over an image that was begun ahead; it counts for one restore.

    Damage that it finds is known before the decision, which then names something else.
    """

    def __init__(self, vault: Vault, machine: SlotMachine) -> None:
        self._vault = vault
        self._machine = machine
        self._begun: _Pass | None = None

    def newest(self, job: str, shard: int) -> DataHolding | None:
        """Of a shard what is here: most likely a restore will name just that."""
        held = self._machine.facts("", SlotCounters()).data
        mine = (d for d in held if (d.job, d.shard) == (job, shard))
        return max(mine, key=lambda d: d.version, default=None)

    def begin(self, job: str, shard: int) -> None:
        """A trainer asks to restore a shard."""
        newest = self.newest(job, shard)
        if self._begun is None and newest is not None:
            task = asyncio.get_running_loop().create_task(self._verify(newest))
            task.add_done_callback(_looked_at)
            self._begun = _Pass(newest, task)

    def forget(self) -> None:
        """The trainer is gone: the next one's restore begins with a pass of its own."""
        self._begun = None

    async def verify(self, holding: DataHolding) -> None:
        """Have every byte read, just now or now. Raises DamagedBytes, RequestError."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.counts(holding):
            await begun.task
        else:
            await self._verify(holding)

    async def _verify(self, holding: DataHolding) -> float:
        with self._vault.reading(holding.job, holding.version, holding.shard) as segment:
            await to_the_end(segment.verify, min(len(os.sched_getaffinity(0)), MOST_THREADS))
        return time.monotonic()


def _looked_at(task: asyncio.Task[float]) -> None:
    """What it found is quarantined already, and met again by whoever wants the bytes."""
    if not task.cancelled():
        task.exception()
