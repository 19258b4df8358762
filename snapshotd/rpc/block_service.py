"""The serving side of blocks over gRPC.

A stream holds at most one chunk of TRANSFER_BYTES here; gRPC's flow control bounds what is under
way beyond.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, closing
from typing import Any, TypeVar

import grpc
import grpc.aio

from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, PeerError, SnapshotdError
from snapshotd.rpc.channels import OPTIONS, listen, status_of
from snapshotd.rpc.framing import BLOCKS_SERVICE, pack_reply, parse_request
from snapshotd.rpc.serving import Blocks, Serving, announced, check_end, check_part
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

#: Of streams: chunks as they are, all else as messages.
ReadPart = pb.ReadReply | memoryview
StorePart = pb.StoreRequest | memoryview
T = TypeVar("T")


class BlocksService(Blocks):
    """Serves blocks of one slot."""

    async def Read(  # noqa: N802  # the name in the .proto
        self,
        request: pb.ReadRequest,
        context: grpc.aio.ServicerContext[pb.ReadRequest, ReadPart],
    ) -> None:
        await self._answer(self._read(request), context)

    async def ReadRanges(  # noqa: N802  # the name in the .proto
        self,
        request: pb.RangesRequest,
        context: grpc.aio.ServicerContext[pb.RangesRequest, pb.RangesReply],
    ) -> None:
        await self._answer(self._read_ranges(request), context)

    async def _answer(
        self, answer: AsyncGenerator[T], context: grpc.aio.ServicerContext[Any, T]
    ) -> None:
        try:
            self._callers.check(context)
            async with aclosing(answer) as replies:
                async for reply in replies:
                    # A reader that takes nothing must not keep the segment for ever.
                    await self._bounded(context.write(reply), "took")
        except SnapshotdError as error:
            await context.abort(*status_of(error))

    async def _read(self, request: pb.ReadRequest) -> AsyncGenerator[ReadPart]:
        with self._asked_for(request) as image:
            if not request.unsealed:
                yield await self._sealed(image)
            async for start, end in self._parts(request, image):
                with closing(self._chunks(start, end, image)) as chunks:
                    for chunk in chunks:
                        await self._bandwidth.wait(len(chunk))
                        yield chunk
            if request.unsealed:
                yield await self._sealed(image)

    async def _read_ranges(self, request: pb.RangesRequest) -> AsyncGenerator[pb.RangesReply]:
        with (
            self._ranges_asked_for(request) as (sealed, spans),
            closing(self._ranges(sealed, spans)) as chunks,
        ):
            for chunk, digest in chunks:
                await self._bandwidth.wait(len(chunk))
                yield pb.RangesReply(chunk=chunk, digest=digest)

    async def _bounded(self, wait: Awaitable[T], did: str) -> T:
        try:
            async with asyncio.timeout(self._stall_s):
                return await wait
        except TimeoutError as error:
            raise Misbehaved(
                Misdeed.STALLED, f"a peer {did} nothing of a block for {self._stall_s} s"
            ) from error

    async def Store(  # noqa: N802  # the name in the .proto
        self,
        requests: AsyncIterator[StorePart],
        context: grpc.aio.ServicerContext[StorePart, pb.StoreReply],
    ) -> pb.StoreReply:
        try:
            await self._receive(requests, context)
        except SnapshotdError as error:
            await context.abort(*status_of(error))
        return pb.StoreReply()

    async def _receive(
        self,
        requests: AsyncIterator[StorePart],
        context: grpc.aio.ServicerContext[StorePart, pb.StoreReply],
    ) -> None:
        opening = self._opening(await self._next(requests))
        self._callers.check(context, opening.sender.node)
        incoming = await self._incoming(opening)
        if incoming is None:
            return
        try:
            with incoming.image as image:
                record, digests = await self._fill(image, requests)
            await self._finish(incoming, record, digests)
        except BaseException as error:
            incoming.abandon(error)
            raise

    async def _fill(
        self, image: memoryview, requests: AsyncIterator[StorePart]
    ) -> tuple[seg.ParityRecord, bytes]:
        at, digests = 0, b""
        while (part := await self._next(requests)) is not None:
            if isinstance(part, pb.StoreRequest) and part.WhichOneof("part") == "record":
                check_end(at, len(image))
                return part.record, digests
            count = len(part) if isinstance(part, memoryview) else 0
            check_part(at, count, len(image))
            assert isinstance(part, memoryview), "it has bytes"
            with image[at : at + count] as stored:
                stored[:] = part
                digests += self._written(stored, len(image))
            at += count
        raise PeerError(f"a parity block broke off after {at} of {len(image)} bytes")

    async def _next(
        self, requests: AsyncIterator[StorePart]
    ) -> pb.StoreRequest | memoryview | None:
        part = await self._bounded(anext(requests, None), "sent")
        if part is not None and not isinstance(part, pb.StoreRequest | memoryview):
            raise announced("what is no message of snapshotd")
        return part


def _handlers(service: BlocksService) -> grpc.GenericRpcHandler:
    """What the generated code would make, but for what chunks are packed and parsed by."""
    methods: dict[str, Any] = {
        "Read": grpc.unary_stream_rpc_method_handler(
            service.Read, pb.ReadRequest.FromString, pack_reply
        ),
        "ReadRanges": grpc.unary_stream_rpc_method_handler(
            service.ReadRanges, pb.RangesRequest.FromString, pb.RangesReply.SerializeToString
        ),
        "Store": grpc.stream_unary_rpc_method_handler(
            service.Store, parse_request, pb.StoreReply.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(BLOCKS_SERVICE, methods)


class BlocksServer:
    """The gRPC server of one slot, on a port the system chooses."""

    def __init__(self, serving: Serving) -> None:
        self._server = grpc.aio.server(options=OPTIONS)
        self._identity = serving.identity
        self._server.add_generic_rpc_handlers((_handlers(BlocksService(serving)),))

    async def start(self, host: str) -> int:
        """Serve; returns the port."""
        port = listen(self._server, f"{host}:0", self._identity)
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(0)
