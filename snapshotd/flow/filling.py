"""A buffer while its trainer writes it: the digests of what stands already are taken meanwhile.

So a snapshot is sealed soon after its last byte is there, however large it is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from snapshotd.coding.digest import chunk_digests
from snapshotd.errors import DamagedBytes
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.wire.protocol import grain_bytes

#: Read at one go, at most; a multiple of every grain. Who gives the buffer back waits for that.
STRIDE_BYTES: Final = 64 << 20
#: For the trainer's copy, and for this.
ENOUGH_CPUS: Final = 2


class Filling:
    """The buffer that the trainer fills now.

    Args:
        segment: begun for this snapshot.
        step: of training.
        image_bytes: that it was claimed for.
        start: runs a task beside all others.
    """

    def __init__(
        self,
        segment: Segment,
        step: int,
        image_bytes: int,
        start: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.segment = segment
        self.step = step
        self.image_bytes = image_bytes
        self._start = start
        self._stands = 0  # of the image, from its start
        self._digests = bytearray()  # of its first `_read` bytes
        self._read = 0
        self._reading = asyncio.Lock()

    def stands(self, count_bytes: int) -> None:
        """The trainer has written that much of the image's start for good, unless it gives up.

        It is read ahead only where there are processors enough: on a single one that would take
        them from the copy, for which training may wait.
        """
        if len(os.sched_getaffinity(0)) < ENOUGH_CPUS:
            return
        self._stands = max(self._stands, count_bytes)
        self._start(self._read_ahead())

    async def digests(self, image_bytes: int) -> bytes | None:
        """Of all grains of the finished image; None where another length was announced.

        Raises:
            DamagedBytes: the file was cut.
        """
        if image_bytes != self.image_bytes:
            await self.stop()
            return None
        self._stands = image_bytes
        await self._follow()
        return bytes(self._digests)

    async def stop(self) -> None:
        """Read no more; when this returns, nobody does."""
        self._stands = 0
        async with self._reading:
            pass

    async def give_back(self, vault: Vault) -> None:
        """Nobody wants it any more."""
        await self.stop()
        vault.give_back(self.segment)

    async def _read_ahead(self) -> None:
        with suppress(DamagedBytes):  # which is met again when it is to be sealed
            await self._follow()

    async def _follow(self) -> None:
        async with self._reading:
            while (end := self._next_end()) > self._read:
                self._digests += await to_the_end(self._digested, self._read, end)
                self._read = end

    def _next_end(self) -> int:
        end = min(self._stands, self._read + STRIDE_BYTES)
        return end if end == self.image_bytes else end - end % grain_bytes(self.image_bytes)

    def _digested(self, start: int, end: int) -> bytes:
        with self.segment.image(self.image_bytes) as image, image[start:end] as part:
            return chunk_digests(part, self.image_bytes)
