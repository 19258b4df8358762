"""The asking side of blocks: streams that are verified before anyone sees their bytes.

A reader gets the record first, with the digests the source computed when it sealed, and checks
each chunk against them. Every wait is bounded: a peer that stalls is a PeerError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import grpc
import grpc.aio

from snapshotd.coding.digest import check_range
from snapshotd.errors import PeerError, RequestError
from snapshotd.metadata import ParityPlace, Version
from snapshotd.rpc.block_service import Record, What
from snapshotd.rpc.channels import Channels, peer_errors
from snapshotd.rpc.convert import check_seal, place_to, version_to
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc
from snapshotd.wire.v1 import segment_pb2 as seg


class BlocksClient:
    """Reads and stores blocks at other slots."""

    def __init__(
        self,
        channels: Channels,
        cluster_id: str,
        stall_s: float,
        received: Callable[[int], None],
        sent: Callable[[int], None],
    ) -> None:
        self._channels = channels
        self._cluster_id = cluster_id
        self._stall_s = stall_s
        self._received = received
        self._sent = sent

    def read(
        self, address: str, job: str, version: Version, what: What, offset: int, count_bytes: int
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
        stub = node_pb2_grpc.BlocksStub(self._channels.to(address))
        return BlockReader(
            stub.Read(request, wait_for_ready=False),
            address,
            request,
            self._stall_s,
            self._received,
        )

    async def record(self, address: str, job: str, version: Version, what: What) -> Record:
        """The record of a sealed segment, without its bytes."""
        reader = self.read(address, job, version, what, 0, 0)
        try:
            return await reader.record()
        finally:
            reader.cancel()

    def store(
        self,
        address: str,
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
        )
        stub = node_pb2_grpc.BlocksStub(self._channels.to(address))
        return BlockWriter(stub.Store(), opening, address, self._stall_s, self._sent)


class BlockReader:
    """One verified stream of bytes: `record()` first, then `chunk()` until all have come."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[pb.ReadRequest, pb.ReadReply],
        address: str,
        request: pb.ReadRequest,
        stall_s: float,
        received: Callable[[int], None],
    ) -> None:
        self._call = call
        self._address = address
        self._at = request.offset
        self._end = request.offset + request.bytes
        self._stall_s = stall_s
        self._received = received
        self._record: Record | None = None

    async def record(self) -> Record:
        """What the source sealed. Raises PeerError when it is not to be had."""
        if self._record is None:
            reply = await self._next()
            part = reply.WhichOneof("part")
            if part == "chunk":
                raise PeerError(f"{self._address} sent bytes before their record")
            for sealed in [reply.seal] if part == "seal" else reply.parity.group:
                self._check(sealed)
            self._record = reply.seal if part == "seal" else reply.parity
        return self._record

    async def chunk(self) -> memoryview:
        """The next verified chunk. Raises PeerError, or DamagedBytes with the offset."""
        record = await self.record()
        chunk = memoryview((await self._next()).chunk)
        expected = min(TRANSFER_BYTES, self._end - self._at)
        if len(chunk) != expected:
            raise PeerError(
                f"{self._address} sent {len(chunk)} bytes at {self._at} of a block, "
                f"{expected} were expected"
            )
        check_range(chunk, self._at, record.image_bytes, record.grain_digests)
        self._at += len(chunk)
        self._received(len(chunk))
        return chunk

    def cancel(self) -> None:
        self._call.cancel()

    def _check(self, sealed: seg.SealRecord) -> None:
        try:
            check_seal(sealed)
        except RequestError as error:
            raise PeerError(f"{self._address} sent what makes no sense: {error.what}") from error

    async def _next(self) -> pb.ReadReply:
        with peer_errors(self._address, "reading a block"):
            try:
                reply = await asyncio.wait_for(self._call.read(), self._stall_s)
            except TimeoutError as error:
                raise PeerError(
                    f"{self._address} sent nothing of a block for {self._stall_s} s"
                ) from error
        if reply is grpc.aio.EOF:
            raise PeerError(f"{self._address} ended a block early, at byte {self._at}")
        if not isinstance(reply, pb.ReadReply):  # what gRPC gives for bytes that are no message
            raise PeerError(f"{self._address} sent what is no message of snapshotd")
        return reply


class BlockWriter:
    """One parity block on its way to its holder."""

    def __init__(
        self,
        call: grpc.aio.StreamUnaryCall[pb.StoreRequest, pb.StoreReply],
        opening: pb.StoreOpening,
        address: str,
        stall_s: float,
        sent: Callable[[int], None],
    ) -> None:
        self._call = call
        self._opening: pb.StoreOpening | None = opening
        self._address = address
        self._stall_s = stall_s
        self._sent = sent

    async def send(self, chunk: bytes) -> None:
        await self._open()
        await self._write(pb.StoreRequest(chunk=chunk))
        self._sent(len(chunk))

    async def finish(self, record: seg.ParityRecord) -> None:
        """End the stream; returns once the holder has verified and sealed the block."""
        await self._open()  # a stripe whose blocks are all empty has no chunk
        await self._write(pb.StoreRequest(record=record))
        await self._bounded(self._done())

    def cancel(self) -> None:
        self._call.cancel()

    async def _open(self) -> None:
        if self._opening is not None:
            await self._write(pb.StoreRequest(opening=self._opening))
            self._opening = None

    async def _write(self, request: pb.StoreRequest) -> None:
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
        with peer_errors(self._address, "storing a parity block"):
            try:
                await asyncio.wait_for(wait, self._stall_s)
            except TimeoutError as error:
                raise PeerError(
                    f"{self._address} took nothing of a parity block for {self._stall_s} s"
                ) from error
