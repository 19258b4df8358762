"""The buffer that a slot's trainer writes: granted, read meanwhile, sealed, or given back."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from snapshotd.core.instructions import Deny, Grant
from snapshotd.core.repeats import Ranges
from snapshotd.errors import DamagedBytes, SnapshotdError
from snapshotd.flow.filling import Filling
from snapshotd.wire.points import point

if TYPE_CHECKING:
    from snapshotd.flow.smp import Smp

log = logging.getLogger(__name__)


class Buffer:
    """Of one slot.

    Attributes:
        filling: what is in the trainer's hands.
    """

    def __init__(self, smp: Smp) -> None:
        self._smp = smp
        self._machine = smp.machine
        self._vault = smp.vault
        self.filling: Filling | None = None

    async def grant(self, grant: Grant) -> None:
        """Give the trainer a buffer, or say why there is none."""
        version = grant.version
        try:
            async with asyncio.timeout(max(0.0, grant.until_s - time.monotonic())):
                segment = await self._vault.begin_data(
                    grant.job, grant.shard, version, grant.image_bytes
                )
        except TimeoutError:
            await self._deny(grant, "its segments are still being allocated")
            return
        except SnapshotdError as error:
            await self._deny(grant, str(error))
            return
        if self._machine.writing.filling != version or self._smp.desk is None:
            self._vault.give_back(segment)  # the trainer went away meanwhile
            return
        size, blocks = grant.image_bytes, grant.blocks
        is_freed = partial(self._vault.is_freed, segment)
        self.filling = Filling(segment, version, size, blocks, self._smp.start, is_freed)
        self._vault.grows(grant.job, version, grant.shard, self.filling)
        point("smp.grant.begun")
        await self._smp.desk.granted(self.filling)
        point("smp.grant.sent")

    async def _deny(self, grant: Grant, reason: str) -> None:
        """The trainer trains on; nothing changes where it is gone."""
        log.warning("no buffer for step %d: %s", grant.version.step, reason)
        if self._machine.writing.filling == grant.version:
            self._machine.passed(grant.version.step)
            if self._smp.desk is not None:
                await self._smp.desk.deliver(Deny(grant.version.step, reason))

    def stands(self, filling: Filling, block_bytes: int) -> None:
        """The trainer has written that much of each block: peers need not wait for the seal."""
        if filling.stands(block_bytes):
            self._machine.stands(filling.version, filling.image_bytes)
            point("smp.copied.heard")
            self._smp.wake()

    def seal(self, image_bytes: int, manifest_bytes: int, trained: Ranges) -> None:
        """The trainer has written it: from now on it is not the trainer's any more."""
        filling, trainer = self.filling, self._machine.trainer
        assert filling is not None, "the desk has looked"
        assert trainer is not None, "a buffer is given back when its trainer goes"
        self.filling = None
        point("smp.written.heard")
        self._smp.start(self._seal(filling, trainer.world, image_bytes, manifest_bytes, trained))

    async def _seal(
        self,
        filling: Filling,
        world: int,
        image_bytes: int,
        manifest_bytes: int,
        trained: Ranges,
    ) -> None:
        segment = filling.segment
        try:
            digests = await filling.finish(image_bytes)
            holding = await self._vault.seal_data(
                segment, world, image_bytes, manifest_bytes, digests
            )
        except DamagedBytes as error:
            # The trainer, or who else may write there, cut the file: the step has no snapshot.
            filling.spoil(str(error))
            self._vault.discard(segment, str(error))
            if self._machine.writing.filling == filling.version:
                self._machine.passed(filling.version.step)
            return
        self._vault.watch(segment, trained)
        self._vault.enter(segment)
        filling.sealed(segment.record)
        point("smp.seal.entered")
        self._machine.sealed(holding)

    def give_back(self) -> None:
        """It is not the trainer's any more, and holds nothing."""
        if self.filling is not None:
            self._smp.start(self.filling.give_back(self._vault))
            self.filling = None
