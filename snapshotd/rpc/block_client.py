"""The asking side of blocks: opens their streams, each wait of which is bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from snapshotd.metadata import Home, ParityPlace, Version
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.convert import home_to, place_to, version_to
from snapshotd.rpc.framing import BLOCKS_SERVICE, pack_request, parse_reply
from snapshotd.rpc.ranges import RangesReader, Spans, ranges_request
from snapshotd.rpc.serving import PATIENCE, Record, What
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.wire.protocol import PROTOCOL_VERSION
from snapshotd.wire.v1 import node_pb2 as pb


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

    @property
    def patience_s(self) -> float:
        """How long a trainer that stands still while it writes is waited for."""
        return self._stall_s * PATIENCE

    def read(
        self, peer: Peer, job: str, version: Version, what: What, offset: int, count_bytes: int
    ) -> BlockReader:
        """Open a stream of [offset, offset + count_bytes) of a sealed image."""
        return self._reader(peer, self._request(job, version, what, offset, count_bytes), what)

    def follow(
        self,
        peer: Peer,
        job: str,
        version: Version,
        shard: int,
        image_bytes: int,
        offset: int,
        count_bytes: int,
    ) -> BlockReader:
        """The same of a shard's image of `image_bytes`, sealed or still written by its trainer."""
        request = self._request(job, version, shard, offset, count_bytes)
        request.unsealed, request.image_bytes = True, image_bytes
        return self._reader(peer, request, shard)

    def _request(
        self, job: str, version: Version, what: What, offset: int, count_bytes: int
    ) -> pb.ReadRequest:
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
        return request

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
