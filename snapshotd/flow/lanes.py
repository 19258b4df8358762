"""The blocks of a stripe in step, chunk by chunk, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, TypeVar

from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, PeerError
from snapshotd.flow.conduct import Conduct
from snapshotd.metadata import DataHolding, Home, SlotFacts
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.channels import Peer
from snapshotd.rpc.serving import Record
from snapshotd.rpc.streaming import streamed
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import segment_pb2 as seg

T = TypeVar("T")

#: What every slot says of itself.
Peers = Mapping[Home, SlotFacts]

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

    def cancel(self) -> None:
        """Nothing more of it is wanted."""
        if self.reader is not None:
            self.reader.cancel()


def peer_at(conduct: Conduct, peers: Peers, home: Home) -> Peer:
    """Where a slot listens. Raises PeerError: it is not live, or cut off."""
    conduct.check(home.node)
    facts = peers.get(home)
    if facts is None or not facts.address:
        raise PeerError(f"{home} is not live")
    return Peer(home.node, facts.address, facts.plane)


def as_told(record: Record, told: DataHolding | None, who: str) -> seg.SealRecord:
    """The record of the very bytes that a slot's facts speak of, where they do already.

    Raises:
        Misbehaved: it is of others.
    """
    assert isinstance(record, seg.SealRecord), "asked for a shard"
    sealed = record.image_bytes, record.content_digest
    if told is not None and sealed != (told.image_bytes, told.content_digest):
        raise Misbehaved(
            Misdeed.WRONG_RECORD, f"{who} serves other bytes of shard {told.shard} than it says"
        )
    return record


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
    """Wait until each lane is open, and each writer's holder is ready."""

    async def ready(lane: Lane) -> None:
        if lane.reader is not None:
            with conduct.blaming(lane.node):
                await lane.reader.open()

    await all_of(*map(ready, lanes), *(writer.open() for writer in writers))


async def all_of(*work: Awaitable[None]) -> None:
    """Wait until all have ended, also where one fails: their streams may then be given up.

    Raises:
        BaseException: of the first of them that failed.
    """
    for found in await asyncio.gather(*work, return_exceptions=True):
        if found is not None:
            raise found
