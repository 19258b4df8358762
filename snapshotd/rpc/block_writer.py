"""One parity block on its way to its holder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio

from snapshotd.errors import PeerError
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.streaming import Bandwidth, result_of
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg


class BlockWriter:
    """One parity block on its way to its holder."""

    def __init__(
        self,
        call: grpc.aio.StreamUnaryCall[pb.StoreRequest | memoryview, pb.StoreReply],
        opening: pb.StoreOpening,
        peer: Peer,
        channels: Channels,
        stall_s: float,
        sent: Callable[[int], None],
        bandwidth: Bandwidth,
    ) -> None:
        self._bandwidth = bandwidth
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._opening: pb.StoreOpening | None = opening
        self._peer = peer
        self._channels = channels
        self._stall_s = stall_s
        self._sent = sent

    async def send(self, chunk: memoryview) -> None:
        """Send the next chunk; its memory is the caller's again when this returns."""
        await self.open()
        await self._bandwidth.wait(len(chunk))
        await self._write(chunk)
        self._sent(len(chunk))

    def put(self, chunk: memoryview) -> None:
        """As `send`, once it is open; for a thread beside the event loop."""
        result_of(asyncio.run_coroutine_threadsafe(self.send(chunk), self._loop))

    async def finish(self, record: seg.ParityRecord) -> None:
        """End the stream; returns once the holder has verified and sealed the block."""
        await self.open()  # a stripe whose blocks are all empty has no chunk
        await self._write(pb.StoreRequest(record=record))
        await self._bounded(self._done())

    def cancel(self) -> None:
        """Nothing more of it is to be sent, and no thread is within `put`."""
        self._call.cancel()

    def abort(self) -> None:
        """Have a thread that is within `put` leave it soon."""
        self._call.cancel()

    async def open(self) -> None:
        """Announce the block, unless that is done."""
        if self._opening is not None:
            await self._write(pb.StoreRequest(opening=self._opening))
            self._opening = None

    async def _write(self, request: pb.StoreRequest | memoryview) -> None:
        if self._call.done():
            return  # the holder answered early: `finish` tells what
        try:
            await self._bounded(self._call.write(request))
        except asyncio.InvalidStateError:
            return  # the same, in the middle of the write

    async def _done(self) -> None:
        await self._call.done_writing()
        await self._call

    async def _bounded(self, wait: Awaitable[None]) -> None:
        with self._channels.errors(self._peer, "storing a parity block"):
            try:
                async with asyncio.timeout(self._stall_s):
                    await wait
            except TimeoutError as error:
                raise PeerError(
                    f"{self._peer} took nothing of a parity block for {self._stall_s} s"
                ) from error
