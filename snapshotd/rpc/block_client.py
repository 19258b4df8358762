"""The asking side of blocks: streams that are verified before anyone sees their bytes.

A reader gets the record first, with the digests the source computed when it sealed, and checks
each chunk against them. Every wait is bounded: a peer that stalls is a PeerError.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from snapshotd.coding.digest import check_range
from snapshotd.core.stripes import parity_bytes
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError, RequestError
from snapshotd.metadata import Home, ParityPlace, Version
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.checks import check_seal
from snapshotd.rpc.convert import home_to, place_from, place_to, version_to
from snapshotd.rpc.framing import BLOCKS_SERVICE, pack_request, parse_reply
from snapshotd.rpc.ranges import RangesReader, Spans, ranges_request
from snapshotd.rpc.serving import Record, What
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

T = TypeVar("T")


class BlocksClient:
    """Reads and stores blocks at other slots, over gRPC."""

    def __init__(
        self,
        channels: Channels,
        cluster_id: str,
        home: Home,
        stall_s: float,
        received: Callable[[int], None],
        sent: Callable[[int], None],
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self._channels = channels
        self._bandwidth = bandwidth or Bandwidth()
        self._cluster_id = cluster_id
        self._home = home
        self._stall_s = stall_s
        self._received = received
        self._sent = sent

    def read(
        self, peer: Peer, job: str, version: Version, what: What, offset: int, count_bytes: int
    ) -> BlockReader:
        """Open a stream of [offset, offset + count_bytes) of a sealed image."""
        request = pb.ReadRequest(
            protocol=PROTOCOL_VERSION,
            cluster_id=self._cluster_id,
            job=job,
            version=version_to(version),
            offset=offset,
            bytes=count_bytes,
        )
        if isinstance(what, ParityPlace):
            request.place.CopyFrom(place_to(what))
        else:
            request.shard = what
        return self._reader(peer, request, what)

    def _reader(self, peer: Peer, request: pb.ReadRequest, what: What) -> BlockReader:
        method: Any = self._channels.to(peer).unary_stream(
            f"/{BLOCKS_SERVICE}/Read",
            request_serializer=pb.ReadRequest.SerializeToString,
            response_deserializer=parse_reply,
        )
        return BlockReader(
            method(request, wait_for_ready=False),
            peer,
            self._channels,
            request,
            what,
            self._stall_s,
            self._received,
        )

    def read_ranges(
        self,
        peer: Peer,
        job: str,
        version: Version,
        what: What,
        spans: Spans,
        content_digest: bytes = b"",
    ) -> RangesReader:
        """Open a stream of ranges of a sealed image, at most MAX_RANGES of them."""
        request = ranges_request(self._cluster_id, job, version, what, spans, content_digest)
        return self._ranges_reader(peer, request)

    def _ranges_reader(self, peer: Peer, request: pb.RangesRequest) -> RangesReader:
        return RangesReader(self._channels, peer, request, self._stall_s, self._received)

    async def record(self, peer: Peer, job: str, version: Version, what: What) -> Record:
        """The record of a sealed segment, without its bytes."""
        reader = self.read(peer, job, version, what, 0, 0)
        try:
            return await reader.record()
        finally:
            reader.cancel()

    def store(
        self,
        peer: Peer,
        *,
        job: str,
        epoch: int,
        version: Version,
        place: ParityPlace,
        image_bytes: int,
        shard_bytes: Sequence[int],
    ) -> BlockWriter:
        """Open a stream that stores one parity block."""
        opening = pb.StoreOpening(
            protocol=PROTOCOL_VERSION,
            cluster_id=self._cluster_id,
            job=job,
            epoch=epoch,
            version=version_to(version),
            place=place_to(place),
            image_bytes=image_bytes,
            shard_bytes=shard_bytes,
            sender=home_to(self._home),
        )
        return self._writer(peer, opening)

    def _writer(self, peer: Peer, opening: pb.StoreOpening) -> BlockWriter:
        method: Any = self._channels.to(peer).stream_unary(
            f"/{BLOCKS_SERVICE}/Store",
            request_serializer=pack_request,
            response_deserializer=pb.StoreReply.FromString,
        )
        return BlockWriter(
            method(), opening, peer, self._channels, self._stall_s, self._sent, self._bandwidth
        )


class BlockReader:
    """One verified stream of bytes: `record()` first, then `chunk()` until all have come.

    In a thread, with an event loop beside it, `take()` in place of `chunk()`.
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
        self._at = request.offset
        self._end = request.offset + request.bytes
        self._stall_s = stall_s
        self._received = received
        self._record: Record | None = None
        self._loop = asyncio.get_running_loop()
        self._coming: concurrent.futures.Future[memoryview] | None = None

    async def record(self) -> Record:
        """What the source sealed.

        Raises:
            PeerError: it is not to be had. Misbehaved: it is not what was asked for, or nonsense.
        """
        if self._record is None:
            reply = await self._next()
            expected = "parity" if isinstance(self._what, ParityPlace) else "seal"
            if isinstance(reply, memoryview) or reply.WhichOneof("part") != expected:
                raise self._misbehaved(Misdeed.WRONG_STREAM, "did not begin with the record")
            found = reply.parity if expected == "parity" else reply.seal
            self._check(found)
            self._record = found
        return self._record

    async def chunk(self) -> memoryview:
        """The next verified chunk. Raises PeerError, or Misbehaved with what was wrong."""
        await self.record()
        part = await self._next()
        chunk = part if isinstance(part, memoryview) else memoryview(b"")
        self._check_length(len(chunk))
        return self._verified(chunk)

    def take(self, into: memoryview | None = None) -> memoryview:
        """The next verified chunk, once `record()` has come; for a thread beside the event loop.

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
        if self._end > record.image_bytes or self._at % grain_bytes(record.image_bytes):
            raise self._misbehaved(
                Misdeed.WRONG_RECORD,
                f"says that its image has {record.image_bytes} bytes, where {self._at} to "
                f"{self._end} were asked for",
            )

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


def result_of(work: concurrent.futures.Future[T]) -> T:
    """What a call on the event loop gave. Raises PeerError: it was broken off."""
    try:
        return work.result()
    except concurrent.futures.CancelledError as error:
        raise PeerError("a stream of a block was broken off") from error
