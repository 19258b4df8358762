"""The blocks of a stripe in step: a chunk of each comes in while another is worked on or sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import nullcontext
from typing import Final, TypeVar

from snapshotd.flow.conduct import Conduct
from snapshotd.rpc.block_client import BlockReader, BlockWriter
from snapshotd.wire.points import point
from snapshotd.wire.protocol import TRANSFER_BYTES

S = TypeVar("S")
T = TypeVar("T")

#: What pads a block, of whatever length.
_ZEROS: Final = memoryview(bytes(TRANSFER_BYTES))


class Lane:
    """One block of a stripe, read chunk by chunk and padded with zeros to any length."""

    def __init__(
        self,
        reader: BlockReader | None,
        length: int,
        conduct: Conduct | None = None,
        node: str = "",
    ) -> None:
        self.reader = reader
        self.node = node
        self._conduct = conduct
        self._left = length

    async def take(self, count: int) -> memoryview:
        """The next `count` bytes; the padding is made here, never stored and never sent."""
        if self.reader is None or self._left <= 0:
            return _ZEROS[:count]
        with self._conduct.blaming(self.node) if self._conduct else nullcontext():
            chunk = await self.reader.chunk()
        self._left -= len(chunk)
        if len(chunk) >= count:
            return chunk[:count]
        return memoryview(b"".join((chunk, _ZEROS[: count - len(chunk)])))


async def both(one: Awaitable[S], other: Awaitable[T]) -> tuple[S, T]:
    """Wait until both have ended, also where one fails: what they work on may then be given back.

    Raises:
        BaseException: of the first of them that failed.
    """
    found, more = await asyncio.gather(one, other, return_exceptions=True)
    if isinstance(found, BaseException):
        raise found
    if isinstance(more, BaseException):
        raise more
    return found, more


async def taken(lanes: Iterable[Lane], count: int) -> list[memoryview]:
    """The next `count` bytes of each block; none where nothing follows."""
    return await asyncio.gather(*(lane.take(count) for lane in lanes)) if count else []


async def gathered(lanes: Iterable[Lane], count: int) -> list[memoryview]:
    """`taken`, for a stripe that is coded."""
    blocks = await taken(lanes, count)
    if blocks:
        point("smp.encode.gathered")
    return blocks


async def forwarded(writers: Mapping[int, BlockWriter], blocks: Mapping[int, memoryview]) -> None:
    """Send a chunk of each row to its holder."""

    async def one(row: int) -> None:
        await writers[row].send(blocks[row])
        point("smp.encode.forwarded")

    await asyncio.gather(*map(one, writers))
