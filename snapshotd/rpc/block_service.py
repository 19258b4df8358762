"""The serving side of blocks: any range of a sealed segment out, parity blocks in.

A stream holds at most one chunk of TRANSFER_BYTES here; gRPC's flow control bounds what is under
way beyond. What is being read is pinned until the reader is done or gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AbstractContextManager, aclosing
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
import xxhash

from snapshotd.coding.digest import check_range, chunk_digests
from snapshotd.core.trust import Misdeed
from snapshotd.errors import (
    DamagedBytes,
    Misbehaved,
    NoRoom,
    PeerError,
    RequestError,
    SnapshotdError,
)
from snapshotd.metadata import ParityPlace, Version
from snapshotd.rpc.channels import OPTIONS, listen
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.convert import place_from, version_from
from snapshotd.rpc.framing import pack_reply, parse_request
from snapshotd.rpc.ranges import gathered, requested_spans
from snapshotd.rpc.tls import Callers, Identity
from snapshotd.wire.points import point
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

log = logging.getLogger(__name__)

BLOCKS_SERVICE = pb.DESCRIPTOR.services_by_name["Blocks"].full_name

Record = seg.SealRecord | seg.ParityRecord
What = int | ParityPlace
#: Of streams: chunks as they are, all else as messages.
ReadPart = pb.ReadReply | memoryview
StorePart = pb.StoreRequest | memoryview
T = TypeVar("T")


class Sealed(Protocol):
    """A sealed segment, as the service needs it."""

    @property
    def record(self) -> Record: ...

    def image(self, image_bytes: int) -> memoryview: ...


class BlockStore(Protocol):
    """What the block service serves from."""

    def reading(self, job: str, version: Version, what: What) -> AbstractContextManager[Sealed]:
        """The sealed segment, kept from being freed for the time of the context.

        DamagedBytes raised within the context takes it out of service.

        Raises:
            RequestError: it is not here.
        """

    def sent(self, count_bytes: int) -> None: ...

    def received(self, count_bytes: int) -> None: ...


class BlockIntake(Protocol):
    """What the block service stores into."""

    async def storing(
        self, opening: pb.StoreOpening, version: Version, place: ParityPlace
    ) -> Incoming | None:
        """A buffer for a parity block; None when that block is stored already.

        Raises:
            RequestError: this slot must not keep it. NoRoom: it cannot.
        """


class Incoming(Protocol):
    """A parity block on its way in."""

    @property
    def image(self) -> memoryview: ...

    async def finish(self, record: seg.ParityRecord, digests: bytes) -> None:
        """Hold the digests of what lies in `image` against the record, seal, publish.

        Raises:
            Misbehaved: the record is of other bytes.
        """

    def abandon(self, error: BaseException) -> None:
        """Nobody will send the rest; the error says why."""


def check_caller(cluster_id: str, mine: str, protocol: int) -> None:
    """Refuse a caller of another cluster or protocol."""
    if protocol != PROTOCOL_VERSION:
        raise malformed(f"a caller speaks protocol {protocol}, this node {PROTOCOL_VERSION}")
    if cluster_id != mine:
        raise malformed(f"a caller belongs to cluster {cluster_id!r}, this node to {mine!r}")


class BlocksService:
    """Serves blocks of one slot."""

    def __init__(
        self,
        store: BlockStore,
        intake: BlockIntake,
        cluster_id: str,
        stall_s: float,
        callers: Callers,
    ) -> None:
        self._callers = callers
        self._store = store
        self._intake = intake
        self._cluster_id = cluster_id
        self._stall_s = stall_s

    async def Read(  # noqa: N802  # the name in the .proto
        self,
        request: pb.ReadRequest,
        context: grpc.aio.ServicerContext[pb.ReadRequest, ReadPart],
    ) -> None:
        try:
            self._callers.check(context)
            async with aclosing(self._read(request)) as replies:
                async for reply in replies:
                    # A reader that takes nothing must not keep the segment for ever.
                    await self._bounded(context.write(reply), "took")
        except SnapshotdError as error:
            await context.abort(*status_of(error))

    async def ReadRanges(  # noqa: N802  # the name in the .proto
        self,
        request: pb.RangesRequest,
        context: grpc.aio.ServicerContext[pb.RangesRequest, pb.RangesReply],
    ) -> None:
        try:
            self._callers.check(context)
            async with aclosing(self._read_ranges(request)) as replies:
                async for reply in replies:
                    await self._bounded(context.write(reply), "took")
        except SnapshotdError as error:
            await context.abort(*status_of(error))

    async def _read_ranges(self, request: pb.RangesRequest) -> AsyncGenerator[pb.RangesReply]:
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        shard = request.WhichOneof("what") == "shard"
        what: What = request.shard if shard else place_from(request.place)
        with self._store.reading(request.job, version_from(request.version), what) as sealed:
            record = sealed.record
            spans = requested_spans(request, record)
            with sealed.image(record.image_bytes) as image:
                for chunk in gathered(image, record, spans):
                    yield pb.RangesReply(chunk=chunk, digest=xxhash.xxh3_128_digest(chunk))
                    self._store.sent(len(chunk))

    async def _bounded(self, wait: Awaitable[T], did: str) -> T:
        try:
            async with asyncio.timeout(self._stall_s):
                return await wait
        except TimeoutError as error:
            raise Misbehaved(
                Misdeed.STALLED, f"a peer {did} nothing of a block for {self._stall_s} s"
            ) from error

    async def _read(self, request: pb.ReadRequest) -> AsyncGenerator[ReadPart]:
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        version = version_from(request.version)
        shard = request.WhichOneof("what") == "shard"
        what: What = request.shard if shard else place_from(request.place)
        with self._store.reading(request.job, version, what) as sealed:
            record = sealed.record
            _check_bounds(request, record.image_bytes)
            if isinstance(record, seg.SealRecord):
                yield pb.ReadReply(seal=record)
            else:
                yield pb.ReadReply(parity=record)
            point("smp.read.begun")
            end = request.offset + request.bytes
            with sealed.image(record.image_bytes) as image:
                for at in range(request.offset, end, TRANSFER_BYTES):
                    with image[at : min(at + TRANSFER_BYTES, end)] as chunk:
                        # Here, and not at the reader's only: it is this node that must lose it.
                        check_range(chunk, at, record.image_bytes, record.grain_digests)
                        yield chunk
                        self._store.sent(len(chunk))
                    point("smp.read.sent")

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
        first = await self._next(requests)
        if not isinstance(first, pb.StoreRequest) or first.WhichOneof("part") != "opening":
            raise malformed("a store stream did not begin with its opening")
        opening = first.opening
        check_caller(opening.cluster_id, self._cluster_id, opening.protocol)
        self._callers.check(context, opening.sender.node)
        incoming = await self._intake.storing(
            opening, version_from(opening.version), place_from(opening.place)
        )
        if incoming is None:
            return
        try:
            with incoming.image as image:
                record, digests = await self._fill(image, requests)
            await incoming.finish(record, digests)
            point("smp.store.finished")
        except BaseException as error:
            incoming.abandon(error)
            raise

    async def _fill(
        self, image: memoryview, requests: AsyncIterator[StorePart]
    ) -> tuple[seg.ParityRecord, bytes]:
        at, digests = 0, b""
        while (part := await self._next(requests)) is not None:
            if isinstance(part, pb.StoreRequest) and part.WhichOneof("part") == "record":
                if at != len(image):
                    raise _announced(f"a parity block ended after {at} of {len(image)} bytes")
                return part.record, digests
            # Whole chunks only: a trickle of small ones would keep the buffer for ever.
            expected = min(TRANSFER_BYTES, len(image) - at)
            count = len(part) if isinstance(part, memoryview) else 0
            if not isinstance(part, memoryview) or not 0 < count == expected:
                raise _announced(
                    f"unexpected part behind {at} of {len(image)} bytes of parity: "
                    f"{count} bytes where {expected} were expected"
                )
            with image[at : at + count] as stored:
                stored[:] = part
                digests += chunk_digests(stored, len(image))  # while the cache has it
            at += count
            self._store.received(count)
            point("smp.store.written")
        raise PeerError(f"a parity block broke off after {at} of {len(image)} bytes")

    async def _next(
        self, requests: AsyncIterator[StorePart]
    ) -> pb.StoreRequest | memoryview | None:
        part = await self._bounded(anext(requests, None), "sent")
        if part is not None and not isinstance(part, pb.StoreRequest | memoryview):
            raise _announced("what is no message of snapshotd")
        return part


def _announced(what: str) -> Misbehaved:
    return Misbehaved(Misdeed.WRONG_STREAM, what)


def _check_bounds(request: pb.ReadRequest, image_bytes: int) -> None:
    if request.offset + request.bytes > image_bytes:
        raise malformed(
            f"bytes {request.offset} to {request.offset + request.bytes} were asked of an image "
            f"of {image_bytes}"
        )
    grain, end = grain_bytes(image_bytes), request.offset + request.bytes
    if request.offset % grain or (end % grain and end != image_bytes):
        raise malformed(f"bytes {request.offset} to {end} are not whole grains of {grain} bytes")


def status_of(error: SnapshotdError) -> tuple[grpc.StatusCode, str]:
    """The gRPC status of an error of ours."""
    code = grpc.StatusCode.UNAVAILABLE
    if isinstance(error, RequestError) or (
        isinstance(error, Misbehaved) and error.misdeed != Misdeed.STALLED
    ):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, NoRoom):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    elif isinstance(error, DamagedBytes):
        code = grpc.StatusCode.DATA_LOSS
    log.warning("refused a peer: %s", error)
    return code, str(error)


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

    def __init__(
        self,
        store: BlockStore,
        intake: BlockIntake,
        cluster_id: str,
        stall_s: float,
        identity: Identity | None,
    ) -> None:
        self._server = grpc.aio.server(options=OPTIONS)
        self._identity = identity
        service = BlocksService(store, intake, cluster_id, stall_s, Callers(identity))
        self._server.add_generic_rpc_handlers((_handlers(service),))

    async def start(self, host: str) -> int:
        """Serve; returns the port."""
        port = listen(self._server, f"{host}:0", self._identity)
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(0)
