"""The blocks of a stripe in step, chunk by chunk, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

from snapshotd.errors import Misbehaved
from snapshotd.flow.conduct import Conduct
from snapshotd.rpc.block_client import BlockReader, BlockWriter
from snapshotd.rpc.streaming import streamed
from snapshotd.wire.protocol import TRANSFER_BYTES

T = TypeVar("T")

#: What pads a block, of whatever length.
_ZEROS: Final = memoryview(bytes(TRANSFER_BYTES))


class Lane:
    """One block of a stripe, read chunk by chunk and padded with zeros to any length."""

    def __init__(self, reader: BlockReader | None, length: int, node: str = "") -> None:
        self.reader = reader
        self.node = node
        #: What it was sent that no honest node sends.
        self.failure: Misbehaved | None = None
        self._left = length

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, there until the next call; for a thread of its own.

        The padding is made here, never stored and never sent.
        """
        if self.reader is None or self._left <= 0:
            return _ZEROS[:count]
        try:
            chunk = self.reader.take()
        except Misbehaved as error:
            self.failure = error
            raise
        self._left -= len(chunk)
        if len(chunk) >= count:
            return chunk[:count]
        return memoryview(b"".join((chunk, _ZEROS[: count - len(chunk)])))


async def in_step(
    work: Callable[[], T],
    conduct: Conduct,
    lanes: Iterable[Lane],
    writers: Iterable[BlockWriter] = (),
) -> T:
    """Run `work`, which takes from lanes and puts to writers, in a thread, to its end.

    What it was sent that no honest node sends is held against the node of the lane.
    """
    streams: list[BlockReader | BlockWriter] = [
        *(lane.reader for lane in lanes if lane.reader is not None),
        *writers,
    ]

    def stop() -> None:
        for stream in streams:
            stream.abort()

    try:
        return await streamed(work, stop)
    except Misbehaved as error:
        for lane in lanes:
            if lane.failure is error:
                conduct.strike(lane.node, error.misdeed, str(error))
        raise


async def opened(
    conduct: Conduct, lanes: Iterable[Lane], writers: Iterable[BlockWriter] = ()
) -> None:
    """Wait until each lane has its record, and each writer's holder is ready."""

    async def record(lane: Lane) -> None:
        if lane.reader is not None:
            with conduct.blaming(lane.node):
                await lane.reader.record()

    await all_of(*map(record, lanes), *(writer.open() for writer in writers))


async def all_of(*work: Awaitable[None]) -> None:
    """Wait until all have ended, also where one fails: their streams may then be given up.

    Raises:
        BaseException: of the first of them that failed.
    """
    for found in await asyncio.gather(*work, return_exceptions=True):
        if found is not None:
            raise found
