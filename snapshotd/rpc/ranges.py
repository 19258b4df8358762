"""Many ranges of one sealed image in one stream: checked where they lie, and again on arrival.

Only the bytes that are wanted go over the wire, so the reader cannot hold them against the digests
of whole grains. The holder does, grain by grain, before it sends; what it sends has a digest of
its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
import grpc.aio
import xxhash

from snapshotd.coding.digest import check_range
from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, PeerError, RequestError
from snapshotd.metadata import ParityPlace, Version
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.checks import malformed
from snapshotd.rpc.convert import place_to, version_to
from snapshotd.rpc.framing import BLOCKS_SERVICE
from snapshotd.wire.protocol import PROTOCOL_VERSION, TRANSFER_BYTES, ErrorCode, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

#: Ranges of one request; more take more requests.
MAX_RANGES: Final = 1 << 13

#: (offset, length) of ranges of an image, ascending; no two overlap.
Spans = Sequence[tuple[int, int]]


def ranges_request(
    cluster_id: str,
    job: str,
    version: Version,
    what: int | ParityPlace,
    spans: Spans,
    content_digest: bytes,
) -> pb.RangesRequest:
    """Ask for ranges of a shard, of the very bytes with this digest, or of a parity block."""
    request = pb.RangesRequest(
        protocol=PROTOCOL_VERSION,
        cluster_id=cluster_id,
        job=job,
        version=version_to(version),
        content_digest=content_digest,
        offsets=[offset for offset, _ in spans],
        lengths=[length for _, length in spans],
    )
    if isinstance(what, ParityPlace):
        request.place.CopyFrom(place_to(what))
    else:
        request.shard = what
    return request


def requested_spans(request: pb.RangesRequest, record: seg.SealRecord | seg.ParityRecord) -> Spans:
    """What is asked of an image. Raises RequestError: it makes no sense, or is of other bytes."""
    if len(request.offsets) != len(request.lengths) or len(request.offsets) > MAX_RANGES:
        raise malformed(
            f"{len(request.offsets)} offsets and {len(request.lengths)} lengths of ranges, at most "
            f"{MAX_RANGES} of each expected"
        )
    spans, end = list(zip(request.offsets, request.lengths, strict=True)), 0
    for offset, length in spans:
        if offset < end or length == 0 or offset + length > record.image_bytes:
            raise malformed(
                f"a range of {length} bytes at {offset} of an image of {record.image_bytes}, "
                f"behind one that ends at {end}"
            )
        end = offset + length
    held = record.content_digest if isinstance(record, seg.SealRecord) else b""
    if request.content_digest not in (b"", held):
        raise RequestError(ErrorCode.OUT_OF_ORDER, "other bytes of the shard are held here")
    return spans


def gathered(
    image: memoryview, record: seg.SealRecord | seg.ParityRecord, spans: Spans
) -> Iterator[bytes]:
    """The ranges in one row, in chunks of TRANSFER_BYTES; every grain that they touch is checked.

    Raises:
        DamagedBytes: some grain is not what was sealed.
    """
    sound = Sound(image, record)
    for pieces in chunked(spans):
        parts = []
        for at, count in pieces:
            sound.check(at, count)
            parts.append(image[at : at + count])
        chunk = b"".join(parts)
        for part in parts:
            part.release()
        yield chunk


def chunked(spans: Spans) -> Iterator[list[tuple[int, int]]]:
    """Ranges cut so that they fill chunks of TRANSFER_BYTES, the last one shorter."""
    pieces: list[tuple[int, int]] = []
    room = TRANSFER_BYTES
    for offset, length in spans:
        at, left = offset, length
        while left:
            count = min(left, room)
            pieces.append((at, count))
            at, left, room = at + count, left - count, room - count
            if room == 0:
                yield pieces
                pieces, room = [], TRANSFER_BYTES
    if pieces:
        yield pieces


class Sound:
    """Checks the grains of an image that are touched, in ascending order, each once."""

    def __init__(self, image: memoryview, record: seg.SealRecord | seg.ParityRecord) -> None:
        self._image = image
        self._size = record.image_bytes
        self._grain = grain_bytes(record.image_bytes)
        self._digests = record.grain_digests
        self._checked = 0  # where the next grain begins that was not checked

    def check(self, offset: int, length: int) -> None:
        """Raises DamagedBytes: a grain of [offset, offset + length) is not what was sealed."""
        start = max(self._checked, offset - offset % self._grain)
        end = min(-(-(offset + length) // self._grain) * self._grain, self._size)
        if start < end:
            with self._image[start:end] as grains:
                check_range(grains, start, self._size, self._digests)
            self._checked = end


class RangesReader:
    """The asking side of one stream of ranges: `chunk()` until all have come. Over gRPC."""

    def __init__(
        self,
        channels: Channels,
        peer: Peer,
        request: pb.RangesRequest,
        stall_s: float,
        received: Callable[[int], None],
    ) -> None:
        method: Any = channels.to(peer).unary_stream(
            f"/{BLOCKS_SERVICE}/ReadRanges",
            request_serializer=pb.RangesRequest.SerializeToString,
            response_deserializer=pb.RangesReply.FromString,
        )
        self._call = method(request, wait_for_ready=False)
        self._channels = channels
        self._arrivals = Arrivals(peer, request, stall_s, received)

    async def chunk(self) -> memoryview:
        """The next chunk, as it left its holder; its memory may be used again for the next one.

        Raises:
            PeerError, Misbehaved.
        """
        arrivals = self._arrivals
        with self._channels.errors(arrivals.peer, "reading ranges"):
            try:
                async with asyncio.timeout(arrivals.stall_s):
                    reply = await self._call.read()
            except TimeoutError as error:
                raise arrivals.stalled() from error
        if reply is grpc.aio.EOF:
            raise arrivals.ended("it ended the stream")
        if not isinstance(reply, pb.RangesReply):
            raise arrivals.no_message()
        arrivals.check_length(len(reply.chunk))
        return arrivals.verified(memoryview(reply.chunk), reply.digest)

    def cancel(self) -> None:
        self._call.cancel()


class Arrivals:
    """What is to come of some ranges, and what was wrong with what came. Of whatever plane."""

    def __init__(
        self,
        peer: Peer,
        request: pb.RangesRequest,
        stall_s: float,
        received: Callable[[int], None],
    ) -> None:
        self.peer = peer
        self.stall_s = stall_s
        self.left = sum(request.lengths)
        self._received = received

    @property
    def expected(self) -> int:
        """Length of the next chunk."""
        return min(TRANSFER_BYTES, self.left)

    def check_length(self, count: int) -> None:
        """Raises Misbehaved: the next chunk has another length."""
        if count != self.expected:
            raise self._misbehaved(
                Misdeed.WRONG_STREAM,
                f"sent {count} bytes of ranges, {self.expected} were expected",
            )

    def verified(self, chunk: memoryview, digest: bytes | memoryview) -> memoryview:
        """The next chunk. Raises Misbehaved: it is not what was sent."""
        if xxhash.xxh3_128_digest(chunk) != digest:
            raise self._misbehaved(Misdeed.WRONG_BYTES, "sent ranges that differ from their digest")
        self.left -= len(chunk)
        self._received(len(chunk))
        return chunk

    def stalled(self) -> Misbehaved:
        return self._misbehaved(
            Misdeed.STALLED, f"sent nothing of some ranges for {self.stall_s} s"
        )

    def no_message(self) -> Misbehaved:
        return self._misbehaved(Misdeed.WRONG_STREAM, "sent what is no message of snapshotd")

    def ended(self, why: str) -> PeerError:
        return PeerError(
            f"{self.peer} ended ranges early, {self.left} bytes before their end: {why}"
        )

    def _misbehaved(self, misdeed: Misdeed, what: str) -> Misbehaved:
        return Misbehaved(misdeed, f"{self.peer} {what}")
