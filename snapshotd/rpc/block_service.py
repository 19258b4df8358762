"""The serving side of blocks: any range of a sealed segment out, parity blocks in.

A stream holds at most one chunk of TRANSFER_BYTES here; gRPC's flow control bounds what is under
way beyond. What is being read is pinned until the reader is done or gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator, Iterator
from contextlib import AbstractContextManager, aclosing, closing, contextmanager
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
from snapshotd.rpc.ranges import Spans, gathered, requested_spans
from snapshotd.rpc.streaming import Bandwidth
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
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self._callers = callers
        self._bandwidth = bandwidth or Bandwidth()
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

    @contextmanager
    def _ranges_asked_for(self, request: pb.RangesRequest) -> Iterator[tuple[Sealed, Spans]]:
        """The segment, kept from being freed, and what a caller wants of it."""
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        shard = request.WhichOneof("what") == "shard"
        what: What = request.shard if shard else place_from(request.place)
        with self._store.reading(request.job, version_from(request.version), what) as sealed:
            yield sealed, requested_spans(request, sealed.record)

    async def _read_ranges(self, request: pb.RangesRequest) -> AsyncGenerator[pb.RangesReply]:
        with self._ranges_asked_for(request) as (sealed, spans):
            for chunk, digest in self._ranges(sealed, spans):
                await self._bandwidth.wait(len(chunk))
                yield pb.RangesReply(chunk=chunk, digest=digest)

    def _ranges(self, sealed: Sealed, spans: Spans) -> Generator[tuple[bytes, bytes]]:
        """The ranges in chunks, each with its digest; one is sent when the next is due.

        Raises:
            DamagedBytes: they are not what was sealed.
        """
        point("smp.ranges.begun")
        with sealed.image(sealed.record.image_bytes) as image:
            for chunk in gathered(image, sealed.record, spans):
                yield chunk, xxhash.xxh3_128_digest(chunk)
                self._store.sent(len(chunk))
                point("smp.ranges.sent")

    async def _bounded(self, wait: Awaitable[T], did: str) -> T:
        try:
            async with asyncio.timeout(self._stall_s):
                return await wait
        except TimeoutError as error:
            raise Misbehaved(
                Misdeed.STALLED, f"a peer {did} nothing of a block for {self._stall_s} s"
            ) from error

    @contextmanager
    def _asked_for(self, request: pb.ReadRequest) -> Iterator[Sealed]:
        """The segment that a caller may read from, kept from being freed."""
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        version = version_from(request.version)
        shard = request.WhichOneof("what") == "shard"
        what: What = request.shard if shard else place_from(request.place)
        with self._store.reading(request.job, version, what) as sealed:
            _check_bounds(request, sealed.record.image_bytes)
            yield sealed

    async def _read(self, request: pb.ReadRequest) -> AsyncGenerator[ReadPart]:
        with self._asked_for(request) as sealed:
            yield first_reply(sealed.record)
            with closing(self._chunks(request, sealed)) as chunks:
                for chunk in chunks:
                    await self._bandwidth.wait(len(chunk))
                    yield chunk

    def _chunks(self, request: pb.ReadRequest, sealed: Sealed) -> Generator[memoryview]:
        """The bytes asked for, each chunk verified; one is sent, and gone, when the next is due.

        Raises:
            DamagedBytes: they are not what was sealed.
        """
        point("smp.read.begun")
        record, end = sealed.record, request.offset + request.bytes
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

    def _opening(self, first: pb.StoreRequest | memoryview | None) -> pb.StoreOpening:
        """What a store stream begins with, of a caller whose name is still to be checked."""
        if not isinstance(first, pb.StoreRequest) or first.WhichOneof("part") != "opening":
            raise malformed("a store stream did not begin with its opening")
        check_caller(first.opening.cluster_id, self._cluster_id, first.opening.protocol)
        return first.opening

    async def _incoming(self, opening: pb.StoreOpening) -> Incoming | None:
        return await self._intake.storing(
            opening, version_from(opening.version), place_from(opening.place)
        )

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

    def _written(self, stored: memoryview, image_bytes: int) -> bytes:
        """A chunk of a parity block lies in its place: its digests, while the cache has it."""
        digests = chunk_digests(stored, image_bytes)
        self._store.received(len(stored))
        point("smp.store.written")
        return digests

    async def _finish(self, incoming: Incoming, record: seg.ParityRecord, digests: bytes) -> None:
        await incoming.finish(record, digests)
        point("smp.store.finished")

    async def _next(
        self, requests: AsyncIterator[StorePart]
    ) -> pb.StoreRequest | memoryview | None:
        part = await self._bounded(anext(requests, None), "sent")
        if part is not None and not isinstance(part, pb.StoreRequest | memoryview):
            raise _announced("what is no message of snapshotd")
        return part


def first_reply(record: Record) -> pb.ReadReply:
    """What every Read begins with."""
    if isinstance(record, seg.SealRecord):
        return pb.ReadReply(seal=record)
    return pb.ReadReply(parity=record)


def check_part(at: int, count: int, image_bytes: int) -> None:
    """Whole chunks only: a trickle of small ones would keep the buffer for ever.

    Raises:
        Misbehaved: `count` bytes came behind the first `at` of `image_bytes`.
    """
    expected = min(TRANSFER_BYTES, image_bytes - at)
    if not 0 < count == expected:
        raise _announced(
            f"unexpected part behind {at} of {image_bytes} bytes of parity: "
            f"{count} bytes where {expected} were expected"
        )


def check_end(at: int, image_bytes: int) -> None:
    """Raises Misbehaved: the record came behind the first `at` of `image_bytes`."""
    if at != image_bytes:
        raise _announced(f"a parity block ended after {at} of {image_bytes} bytes")


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
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self._server = grpc.aio.server(options=OPTIONS)
        self._identity = identity
        service = BlocksService(store, intake, cluster_id, stall_s, Callers(identity), bandwidth)
        self._server.add_generic_rpc_handlers((_handlers(service),))

    async def start(self, host: str) -> int:
        """Serve; returns the port."""
        port = listen(self._server, f"{host}:0", self._identity)
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(0)
