"""Memory for a trainer's snapshots that is there before the first of them asks for it.

Allocating and touching is slow, and training would feel it once for each generation. Nothing
depends on it: what is not there when a claim comes is made then.
"""

from __future__ import annotations

import asyncio
import logging

from snapshotd.errors import SnapshotdError
from snapshotd.flow.vault import Vault
from snapshotd.memory.rooms import Rooms
from snapshotd.memory.segment import Segment

log = logging.getLogger(__name__)


class Readiness:
    """Makes the segments of one slot's generations, in the background.

    `more`: segments beyond those, for versions that are kept for readers.
    """

    def __init__(self, vault: Vault, rooms: Rooms, more: int = 0) -> None:
        self._vault = vault
        self._rooms = rooms
        self._more = more
        self._over = asyncio.Event()
        self._wanted = 0  # which call of `make` counts

    async def make(self, job: str, image_bytes: int) -> None:
        """Have a segment for each generation of a shard; a call that comes later takes over."""
        self._wanted += 1
        mine = self._wanted
        self._over.clear()
        try:
            if image_bytes:
                self._rooms.check_all(image_bytes)
                while mine == self._wanted and await self._vault.make_ready(
                    job, image_bytes, self._rooms.generations + self._more
                ):
                    pass
        except SnapshotdError as error:
            log.info("no memory is made ready for job %s: %s", job, error)
        finally:
            if mine == self._wanted:
                self._over.set()

    def stop(self) -> None:
        """Its trainer is gone: the segment that is being made is the last."""
        self._wanted += 1
        self._over.set()

    async def segments(self) -> tuple[Segment, ...]:
        """What a claim may be granted, once nothing more is being made."""
        await self._over.wait()
        return self._vault.buffers()
