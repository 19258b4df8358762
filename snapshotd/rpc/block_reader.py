"""One stream of a block's bytes, verified before anyone sees them.

A reader gets the record first, with the digests the source computed when it sealed, and checks
each chunk against them. One that follows an image while it is written keeps the digests of what
came, and holds them against the record at the end: what it has handed out by then counts only if
`record()` returns.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

from snapshotd.coding.digest import check_range, chunk_digests
from snapshotd.core.stripes import parity_bytes
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError, RequestError
from snapshotd.metadata import ParityPlace
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.checks import check_seal
from snapshotd.rpc.convert import place_from
from snapshotd.rpc.serving import Record, What
from snapshotd.rpc.streaming import result_of
from snapshotd.wire.protocol import DIGEST_BYTES, TRANSFER_BYTES, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

T = TypeVar("T")


class BlockReader:
    """One verified stream of bytes: `record()` first, then `chunk()` until all have come.

    In a thread, with an event loop beside it, `take()` in place of `chunk()`. Of an image that is
    followed, `open()` first and `record()` last.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[pb.ReadRequest, pb.ReadReply | memoryview],
        peer: Peer,
        channels: Channels,
        request: pb.ReadRequest,
        what: What,
        stall_s: float,
        received: Callable[[int], None],
    ) -> None:
        self._call = call
        self._peer = peer
        self._channels = channels
        self._what = what
        self._follows = request.unsealed
        self._digests = b""  # of what came, where it is followed
        self._asked = request
        self._at = request.offset
        self._end = request.offset + request.bytes
        self._stall_s = stall_s
        self._received = received
        self._record: Record | None = None
        self._loop = asyncio.get_running_loop()
        self._coming: concurrent.futures.Future[memoryview] | None = None

    async def open(self) -> None:
        """Have what comes before the first chunk."""
        if not self._follows:
            await self.record()

    async def record(self) -> Record:
        """What the source sealed; the bytes that came are of it.

        Raises:
            PeerError: it is not to be had. Misbehaved: it is not what was asked for, or nonsense.
        """
        if self._record is None:
            reply = await self._next()
            expected = "parity" if isinstance(self._what, ParityPlace) else "seal"
            if isinstance(reply, memoryview) or reply.WhichOneof("part") != expected:
                raise self._misbehaved(Misdeed.WRONG_STREAM, "sent no record where it was due")
            found = reply.parity if expected == "parity" else reply.seal
            self._check(found)
            if self._follows:
                self._check_followed(reply.seal)
            self._record = found
        return self._record

    async def chunk(self) -> memoryview:
        """The next verified chunk. Raises PeerError, or Misbehaved with what was wrong."""
        await self.open()
        part = await self._next()
        chunk = part if isinstance(part, memoryview) else memoryview(b"")
        self._check_length(len(chunk))
        return self._verified(chunk)

    def take(self, into: memoryview | None = None) -> memoryview:
        """The next verified chunk, once `open()` has returned; for a thread beside the event loop.

        Args:
            into: where it is to lie, as long as the chunk; else memory of its own, which is used
                again for the next one.

        Raises:
            PeerError, Misbehaved: as `chunk`; the former when `abort` was called.
        """
        coming = self._coming or self._submit(self.chunk())
        chunk = result_of(coming)
        # One is on its way while this one is worked on.
        self._coming = self._submit(self.chunk()) if self._at < self._end else None
        if into is None:
            return chunk
        into[:] = chunk
        return into

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _expected(self) -> int:
        return min(TRANSFER_BYTES, self._end - self._at)

    def _check_length(self, count: int) -> None:
        if count != self._expected():
            raise self._misbehaved(
                Misdeed.WRONG_STREAM,
                f"sent {count} bytes at {self._at} of a block, {self._expected()} were expected",
            )

    def _verified(self, chunk: memoryview) -> memoryview:
        record = self._record
        if self._follows:
            self._digests += chunk_digests(chunk, self._asked.image_bytes)
        else:
            assert record is not None, "it comes first"
            try:
                check_range(chunk, self._at, record.image_bytes, record.grain_digests)
            except DamagedBytes as error:
                raise self._misbehaved(Misdeed.WRONG_BYTES, f"sent damage: {error.what}") from error
        self._at += len(chunk)
        self._received(len(chunk))
        return chunk

    def cancel(self) -> None:
        """Nothing more of it is wanted, and no thread is within `take`."""
        self._call.cancel()

    def abort(self) -> None:
        """Have a thread that is within `take` leave it soon."""
        self._call.cancel()

    def _misbehaved(self, misdeed: Misdeed, what: str) -> Misbehaved:
        return Misbehaved(misdeed, f"{self._peer} {what}")

    def _check(self, record: Record) -> None:
        """A record must make sense, and be of an image that has the bytes that were asked for."""
        try:
            if isinstance(record, seg.ParityRecord):
                self._check_parity(record)
            else:
                check_seal(record)
        except RequestError as error:
            raise self._misbehaved(
                Misdeed.WRONG_RECORD, f"sent what makes no sense: {error.what}"
            ) from error
        if self._end > record.image_bytes or self._asked.offset % grain_bytes(record.image_bytes):
            raise self._misbehaved(
                Misdeed.WRONG_RECORD,
                f"says that its image has {record.image_bytes} bytes, where "
                f"{self._asked.offset} to {self._end} were asked for",
            )

    def _check_followed(self, record: seg.SealRecord) -> None:
        """What came while it was written must be what was sealed."""
        sealed = record.job, record.version, record.shard, record.image_bytes
        asked = self._asked
        if sealed != (asked.job, asked.version, asked.shard, asked.image_bytes):
            raise self._misbehaved(
                Misdeed.WRONG_RECORD,
                f"sealed {record.image_bytes} bytes of shard {record.shard}, where it had said "
                f"{asked.image_bytes} of shard {asked.shard}",
            )
        first = asked.offset // grain_bytes(asked.image_bytes) * DIGEST_BYTES
        if self._digests != record.grain_digests[first : first + len(self._digests)]:
            raise self._misbehaved(Misdeed.WRONG_BYTES, "sent other bytes than it sealed")

    def _check_parity(self, record: seg.ParityRecord) -> None:
        place = place_from(record.place)
        for sealed in record.group:
            check_seal(sealed)
        shards = tuple(r.shard for r in record.group)
        sizes = [r.image_bytes for r in record.group]
        if place != self._what or shards != place.shards:
            raise self._misbehaved(Misdeed.WRONG_RECORD, f"sent the record of {place}")
        if record.image_bytes != parity_bytes(place, sizes):
            raise self._misbehaved(
                Misdeed.WRONG_RECORD, f"sent {record.image_bytes} bytes as parity of {sizes} bytes"
            )

    async def _next(self) -> pb.ReadReply | memoryview:
        with self._channels.errors(self._peer, "reading a block"):
            try:
                async with asyncio.timeout(self._stall_s):
                    reply = await self._call.read()
            except TimeoutError as error:
                raise self._misbehaved(
                    Misdeed.STALLED, f"sent nothing of a block for {self._stall_s} s"
                ) from error
        if reply is grpc.aio.EOF:
            raise PeerError(f"{self._peer} ended a block early, at byte {self._at}")
        if not isinstance(reply, pb.ReadReply | memoryview):
            raise self._misbehaved(Misdeed.WRONG_STREAM, "sent what is no message of snapshotd")
        return reply
