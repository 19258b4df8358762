"""A buffer while its trainer writes it: digests of what stands are taken, and others may read it.

So a snapshot is sealed soon after its last byte is there, however large it is, and coded soon after
that. Each block that is coded apart grows from its start. What peers are served has its digest
already, as what is sealed has; it counts for them once the whole is sealed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from snapshotd.coding.digest import chunk_digests
from snapshotd.core.stripes import block_extent
from snapshotd.errors import DamagedBytes, PeerError
from snapshotd.flow.threads import to_the_end
from snapshotd.flow.vault import Vault
from snapshotd.memory.segment import Segment
from snapshotd.metadata import Version
from snapshotd.rpc.serving import Record
from snapshotd.wire.protocol import DIGEST_BYTES, grain_bytes

#: Read at one go, at most, of all blocks. Who gives the buffer back waits for that.
STRIDE_BYTES: Final = 32 << 20
#: For the trainer's copy, and for this.
ENOUGH_CPUS: Final = 2


class Filling:
    """The buffer that the trainer fills now.

    Args:
        segment: begun for this snapshot.
        version: that it is to hold.
        image_bytes: that it was claimed for.
        blocks: in how many its group codes the image.
        start: runs a task beside all others.
        is_freed: whether nothing but its readers keeps the segment.

    Attributes:
        block_bytes: length of a block, the last ones shorter.
        digests: of all grains; zeros where none was taken yet.
    """

    def __init__(
        self,
        segment: Segment,
        version: Version,
        image_bytes: int,
        blocks: int,
        start: Callable[[Coroutine[Any, Any, None]], object],
        is_freed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_freed = is_freed
        self.segment = segment
        self.version = version
        self.image_bytes = image_bytes
        self._grain = grain_bytes(image_bytes)
        self.block_bytes = block_extent(image_bytes, blocks, 0).length or self._grain
        self._stride = max(1, STRIDE_BYTES // blocks // self._grain) * self._grain
        self.digests = bytearray(-(-image_bytes // self._grain) * DIGEST_BYTES)
        self._start = start
        self._stands = 0  # of each block, from its start
        self._read = 0  # of that
        self._reading = asyncio.Lock()
        self._news = asyncio.Event()  # set, and another in its place, when there is some
        self._record: Record | None = None
        self._given_up = ""
        self._damage = ""

    # -- the trainer's side

    def stands(self, block_bytes: int) -> bool:
        """The trainer has written that much of each block for good, unless it gives up.

        It is read ahead only where there are processors enough: on a single one that would take
        them from the copy, for which training may wait. Returns whether it is.
        """
        if len(os.sched_getaffinity(0)) < ENOUGH_CPUS:
            return False
        self._stands = max(self._stands, block_bytes)
        self._start(self._read_ahead())
        return True

    async def finish(self, image_bytes: int) -> bytes | None:
        """The digests of all grains of the finished image; None where another length was announced.

        Raises:
            DamagedBytes: the file was cut, or bytes changed that stood.
        """
        if image_bytes != self.image_bytes:
            self._give_up(f"it has {image_bytes} bytes, and was to have {self.image_bytes}")
            await self.stop()
            return None
        self._stands = self.block_bytes
        await self._follow()
        if self._damage:
            raise DamagedBytes(self._damage)
        return bytes(self.digests)

    def sealed(self, record: Record) -> None:
        """What stands is what this says, for good."""
        self._record = record
        self._tell()

    async def stop(self) -> None:
        """Read no more; when this returns, nobody does but peers, who are told to leave."""
        self._stands = 0
        self._give_up("its trainer gave it up")
        async with self._reading:
            pass

    async def give_back(self, vault: Vault) -> None:
        """Nobody wants it any more."""
        await self.stop()
        vault.give_back(self.segment)

    # -- the peers' side

    def image(self, image_bytes: int) -> memoryview:
        """As `Segment.image`."""
        return self.segment.image(image_bytes)

    async def standing(self, at: int, count: int) -> int:
        """How far the image may be read from `at` on, once `count` bytes may.

        Raises:
            PeerError: they never will.
        """
        while (end := self._standing(at)) < at + count:
            await self._more()
        return end

    async def record(self) -> Record:
        """What was sealed, once it is. Raises PeerError: it never will be."""
        while self._record is None:
            await self._more()
        self.check()
        return self._record

    def check(self) -> None:
        """Raises PeerError: it was given up, or freed."""
        if self._given_up:
            raise PeerError(f"{self.version} was not sealed: {self._given_up}")
        if self._is_freed():
            raise PeerError(f"{self.version} is not needed any more")

    def spoil(self, reason: str) -> None:
        """Bytes have changed that stood: it must not be sealed."""
        self._damage = reason
        self._give_up(reason)

    async def _more(self) -> None:
        self.check()
        await self._news.wait()

    def _standing(self, at: int) -> int:
        while at < self.image_bytes:
            offset = at - at % self.block_bytes
            whole = min(offset + self.block_bytes, self.image_bytes)
            end = min(offset + self._read, whole)
            if end < whole:
                return max(at, end)
            at = whole
        return at

    def _give_up(self, reason: str) -> None:
        self._given_up = self._given_up or reason
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # -- reading ahead

    async def _read_ahead(self) -> None:
        with suppress(DamagedBytes):  # which is met again when it is to be sealed
            await self._follow()

    async def _follow(self) -> None:
        async with self._reading:
            while (end := self._next_end()) > self._read:
                await to_the_end(self._take_digests, self._read, end)
                self._read = end
                self._tell()

    def _next_end(self) -> int:
        end = min(self._stands, self._read + self._stride)
        return end if end == self.block_bytes else end - end % self._grain

    def _take_digests(self, start: int, end: int) -> None:
        """Of the bytes [start, end) of each block. In a thread."""
        with self.segment.image(self.image_bytes) as image:
            for offset in range(0, self.image_bytes, self.block_bytes):
                with image[offset + start : min(offset + self.block_bytes, offset + end)] as part:
                    found = chunk_digests(part, self.image_bytes)
                    at = (offset + start) // self._grain * DIGEST_BYTES
                    self.digests[at : at + len(found)] = found
