"""What a slot serves blocks from and stores them into, and what is checked of those who ask.

Whatever the blocks go over: any range of a sealed segment out, parity blocks in. What is being read
is pinned until the reader is done or gone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from snapshotd.coding.digest import check_range, chunk_digests
from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved
from snapshotd.metadata import ParityPlace, Version
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.convert import place_from, version_from
from snapshotd.rpc.ranges import Spans, gathered, requested_spans
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.rpc.tls import Callers, Identity
from snapshotd.wire.points import point
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

Record = seg.SealRecord | seg.ParityRecord
What = int | ParityPlace


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
        self._callers = Callers(serving.identity)
        self._bandwidth = serving.bandwidth

    # -- out

    @contextmanager
    def _asked_for(self, request: pb.ReadRequest) -> Iterator[Sealed]:
        """The segment that a caller may read from, kept from being freed."""
        with self._named(request) as sealed:
            _check_bounds(request, sealed.record.image_bytes)
            yield sealed

    @contextmanager
    def _ranges_asked_for(self, request: pb.RangesRequest) -> Iterator[tuple[Sealed, Spans]]:
        """The segment, kept from being freed, and what a caller wants of it."""
        with self._named(request) as sealed:
            yield sealed, requested_spans(request, sealed.record)

    @contextmanager
    def _named(self, request: pb.ReadRequest | pb.RangesRequest) -> Iterator[Sealed]:
        check_caller(request.cluster_id, self._cluster_id, request.protocol)
        version = version_from(request.version)
        shard = request.WhichOneof("what") == "shard"
        what: What = request.shard if shard else place_from(request.place)
        with self._store.reading(request.job, version, what) as sealed:
            yield sealed

    def _chunks(self, request: pb.ReadRequest, sealed: Sealed) -> Generator[memoryview]:
        """The bytes asked for, each chunk verified; one is sent, and gone, when the next is due.

        Raises:
            DamagedBytes: they are not what was sealed. PeerError: too many are served.
        """
        point("smp.read.begun")
        record, end = sealed.record, request.offset + request.bytes
        turns = self._bandwidth.stream() if request.bytes else nullcontext()
        with turns, sealed.image(record.image_bytes) as image:
            for at in range(request.offset, end, TRANSFER_BYTES):
                with image[at : min(at + TRANSFER_BYTES, end)] as chunk:
                    # Here, and not at the reader's only: it is this node that must lose it.
                    check_range(chunk, at, record.image_bytes, record.grain_digests)
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
