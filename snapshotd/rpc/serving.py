"""What a slot serves blocks from and stores them into, and what is checked of those who ask.

Whatever the blocks go over: any range of a sealed segment out, parity blocks in. What is being read
is pinned until the reader is done or gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import xxhash

from snapshotd.coding.digest import check_range, chunk_digests
from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, PeerError, RequestError
from snapshotd.metadata import ParityPlace, Version
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.convert import place_from, version_from
from snapshotd.rpc.ranges import Spans, gathered, requested_spans
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.rpc.tls import Callers, Identity
from snapshotd.wire.points import point
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES, ErrorCode, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

Record = seg.SealRecord | seg.ParityRecord
What = int | ParityPlace
T = TypeVar("T")

#: Of the time after which a peer takes us for stalled, a trainer that stands still in the middle of
#: its copy is waited for this part: its bytes are read later, once it has sealed them.
PATIENCE: Final = 0.25


class Sealed(Protocol):
    """A sealed segment, as the service needs it."""

    @property
    def record(self) -> Record: ...

    def image(self, image_bytes: int) -> memoryview: ...


class Image(Protocol):
    """Bytes as a stream of blocks reads them: sealed, or still written by a trainer."""

    @property
    def image_bytes(self) -> int: ...

    @property
    def digests(self) -> bytes | bytearray:
        """Of all grains; of those that do not stand yet, anything."""

    def image(self, image_bytes: int) -> memoryview: ...

    def check(self) -> None:
        """Raises PeerError: it was given up, or freed, and its memory is wanted."""

    async def standing(self, at: int, count: int) -> int:
        """How far it may be read from `at` on, once `count` bytes may.

        Raises:
            PeerError: they never will.
        """

    async def record(self) -> Record:
        """What was sealed, once it is. Raises PeerError: it never will be."""


class SealedImage:
    """A sealed segment as an Image: all of it stands.

    Args:
        sealed: the segment.
        is_freed: whether nothing but its readers keeps it.

    Raises:
        DamagedBytes: its record is not what was sealed.
    """

    def __init__(self, sealed: Sealed, is_freed: Callable[[], bool] = lambda: False) -> None:
        self._is_freed = is_freed
        self._record = sealed.record
        self.image = sealed.image
        self.image_bytes = self._record.image_bytes
        self.digests = self._record.grain_digests

    def check(self) -> None:
        """Raises PeerError: it was freed."""
        if self._is_freed():
            raise PeerError("it is not needed any more")

    async def standing(self, _at: int, _count: int) -> int:
        return self.image_bytes

    async def record(self) -> Record:
        return self._record


class BlockStore(Protocol):
    """What the block service serves from."""

    def reading(self, job: str, version: Version, what: What) -> AbstractContextManager[Sealed]:
        """The sealed segment, kept from being freed for the time of the context.

        DamagedBytes raised within the context takes it out of service.

        Raises:
            RequestError: it is not here.
        """

    def following(self, job: str, version: Version, what: What) -> AbstractContextManager[Image]:
        """As `reading`, of a segment that is sealed, or that its trainer still writes."""

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


@dataclass(frozen=True)
class Serving:
    """What a slot serves, to whom, and within which bounds.

    Attributes:
        store: what is read from.
        intake: what is stored into.
        cluster_id: of all who may ask.
        stall_s: bound of one chunk on its way.
        identity: what is shown to callers; None for no TLS.
        bandwidth: of all that is sent.
    """

    store: BlockStore
    intake: BlockIntake
    cluster_id: str
    stall_s: float
    identity: Identity | None
    bandwidth: Bandwidth = field(default_factory=Bandwidth)


def check_caller(cluster_id: str, mine: str, protocol: int) -> None:
    """Refuse a caller of another cluster or protocol."""
    if protocol != PROTOCOL_VERSION:
        raise malformed(f"a caller speaks protocol {protocol}, this node {PROTOCOL_VERSION}")
    if cluster_id != mine:
        raise malformed(f"a caller belongs to cluster {cluster_id!r}, this node to {mine!r}")


class Blocks:
    """The blocks of one slot, whatever they go over."""

    def __init__(self, serving: Serving) -> None:
        self._store = serving.store
        self._intake = serving.intake
        self._cluster_id = serving.cluster_id
        self._stall_s = serving.stall_s
        self._patience_s = serving.stall_s * PATIENCE
        self._callers = Callers(serving.identity)
        self._bandwidth = serving.bandwidth

    # -- out

    @contextmanager
    def _asked_for(self, request: pb.ReadRequest) -> Iterator[Image]:
        """What a caller may read from, kept from being freed.

        Raises:
            PeerError: too many are served.
        """
        turns = self._bandwidth.stream() if request.bytes else nullcontext()
        with self._named(request) as image, turns:
            _check_bounds(request, image.image_bytes)
            _check_followed(request, image.image_bytes)
            point("smp.read.begun")
            yield image

    @contextmanager
    def _named(self, request: pb.ReadRequest) -> Iterator[Image]:
        wanted = self._wanted(request)
        if request.unsealed:
            with self._store.following(*wanted) as image:
                yield image
        else:
            with self._store.reading(*wanted) as sealed:
                yield SealedImage(sealed)

    @contextmanager
    def _ranges_asked_for(self, request: pb.RangesRequest) -> Iterator[tuple[Sealed, Spans]]:
        """The segment, kept from being freed, and what a caller wants of it."""
        with self._store.reading(*self._wanted(request)) as sealed:
            yield sealed, requested_spans(request, sealed.record)

    def _wanted(self, request: pb.ReadRequest | pb.RangesRequest) -> tuple[str, Version, What]:
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        version = version_from(request.version)
        shard = request.WhichOneof("what") == "shard"
        return request.job, version, request.shard if shard else place_from(request.place)

    async def _parts(self, request: pb.ReadRequest, image: Image) -> AsyncIterator[tuple[int, int]]:
        """The bytes asked for, [start, end) in whole chunks, as they stand.

        Raises:
            PeerError: some never will, or not soon.
        """
        at, end = request.offset, request.offset + request.bytes
        while at < end:
            count = min(TRANSFER_BYTES, end - at)
            until = await soon(image.standing(at, count), self._patience_s)
            stop = end if until >= end else until - (until - at) % TRANSFER_BYTES
            yield at, stop
            at = stop

    async def _sealed(self, image: Image) -> pb.ReadReply:
        """Raises PeerError: it never will be, or not soon."""
        return record_reply(await soon(image.record(), self._patience_s))

    def _chunks(self, start: int, end: int, source: Image) -> Generator[memoryview]:
        """Bytes that stand, each chunk verified; one is sent, and gone, when the next is due.

        Raises:
            DamagedBytes: they are not what they were when they were first read.
            PeerError: they were given up since.
        """
        with source.image(source.image_bytes) as image:
            for at in range(start, end, TRANSFER_BYTES):
                source.check()
                with image[at : min(at + TRANSFER_BYTES, end)] as chunk:
                    # Here, and not at the reader's only: it is this node that must lose it.
                    check_range(chunk, at, source.image_bytes, source.digests)
                    self._store.sent(len(chunk))
                    yield chunk
                point("smp.read.sent")

    def _ranges(self, sealed: Sealed, spans: Spans) -> Generator[tuple[bytes, bytes]]:
        """The ranges in chunks, each with its digest; one is sent when the next is due.

        Raises:
            DamagedBytes: they are not what was sealed. PeerError: too many are served.
        """
        point("smp.ranges.begun")
        with self._bandwidth.stream(), sealed.image(sealed.record.image_bytes) as image:
            for chunk in gathered(image, sealed.record, spans):
                # Counted now: who has all that he wants may not ask for the end of the stream.
                self._store.sent(len(chunk))
                yield chunk, xxhash.xxh3_128_digest(chunk)
                point("smp.ranges.sent")

    # -- in

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

    def _written(self, stored: memoryview, image_bytes: int) -> bytes:
        """A chunk of a parity block lies in its place: its digests, while the cache has it."""
        digests = chunk_digests(stored, image_bytes)
        self._store.received(len(stored))
        point("smp.store.written")
        return digests

    async def _finish(self, incoming: Incoming, record: seg.ParityRecord, digests: bytes) -> None:
        await incoming.finish(record, digests)
        point("smp.store.finished")


async def soon(wait: Awaitable[T], patience_s: float) -> T:
    """What comes of an image that a trainer still writes. Raises PeerError: it takes too long."""
    try:
        async with asyncio.timeout(patience_s):
            return await wait
    except TimeoutError as error:
        raise PeerError(f"the trainer wrote no more of it for {patience_s} s") from error


def record_reply(record: Record) -> pb.ReadReply:
    """The part of a Read that says what is read."""
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
        raise announced(
            f"unexpected part behind {at} of {image_bytes} bytes of parity: "
            f"{count} bytes where {expected} were expected"
        )


def check_end(at: int, image_bytes: int) -> None:
    """Raises Misbehaved: the record came behind the first `at` of `image_bytes`."""
    if at != image_bytes:
        raise announced(f"a parity block ended after {at} of {image_bytes} bytes")


def announced(what: str) -> Misbehaved:
    """The error for a stream that is not what it had announced."""
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


def _check_followed(request: pb.ReadRequest, image_bytes: int) -> None:
    """Its trainer may have written less than it had said: then nothing of it counts."""
    if request.unsealed and request.image_bytes != image_bytes:
        raise RequestError(
            ErrorCode.OUT_OF_ORDER,
            f"an image of {request.image_bytes} bytes was asked for, it has {image_bytes}",
        )
