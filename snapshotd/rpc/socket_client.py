"""Blocks over plain sockets, asking side: the streams of `block_client`, without gRPC under them.

A stream has a connection for itself; one that came to its end gives it back for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from snapshotd.core.trust import Misdeed
from snapshotd.errors import PeerError
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.connection import Connection, HungUp, Kind, NotAFrame, Stalled
from snapshotd.rpc.dialling import Sockets
from snapshotd.rpc.ranges import Arrivals, RangesReader
from snapshotd.rpc.serving import What
from snapshotd.rpc.streaming import streamed
from snapshotd.rpc.tls import Identity
from snapshotd.wire.protocol import DIGEST_BYTES, GRPC, SOCKETS
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

T = TypeVar("T")

_READING: Final = "reading a block"
_RANGING: Final = "reading ranges"
_STORING: Final = "storing a parity block"


class PlanesClient(BlocksClient):
    """Reads and stores blocks at other slots, over the plane that each of them serves."""

    def __init__(self, identity: Identity | None, *arguments: Any, **facts: Any) -> None:
        """As BlocksClient, with connections of its own: without TLS where there is no identity."""
        super().__init__(Channels(identity), *arguments, **facts)
        self._sockets = Sockets(identity)

    async def close(self) -> None:
        await self._channels.close()
        self._sockets.close()

    def _reader(self, peer: Peer, request: pb.ReadRequest, what: What) -> BlockReader:
        if _plane(peer) == GRPC:
            return super()._reader(peer, request, what)
        return SocketReader(self._sockets, peer, request, what, self._stall_s, self._received)

    def _ranges_reader(self, peer: Peer, request: pb.RangesRequest) -> RangesReader:
        if _plane(peer) == GRPC:
            return super()._ranges_reader(peer, request)
        return SocketRangesReader(self._sockets, peer, request, self._stall_s, self._received)

    def _writer(self, peer: Peer, opening: pb.StoreOpening) -> BlockWriter:
        if _plane(peer) == GRPC:
            return super()._writer(peer, opening)
        return SocketWriter(
            self._sockets, opening, peer, self._stall_s, self._sent, self._bandwidth
        )


def _plane(peer: Peer) -> str:
    if peer.plane not in (GRPC, SOCKETS):
        raise PeerError(
            f"{peer.node} serves blocks over {peer.plane!r}, which this node does not know: "
            "install the same version on both"
        )
    return peer.plane


class SocketReader(BlockReader):
    """One verified stream of bytes; chunks come in right where they are wanted."""

    def __init__(
        self,
        sockets: Sockets,
        peer: Peer,
        request: pb.ReadRequest,
        *arguments: Any,
    ) -> None:
        no_call: Any = None
        super().__init__(no_call, peer, no_call, request, *arguments)
        self._sockets = sockets
        self._request: pb.ReadRequest | None = request
        self._connection: Connection | None = None
        self._buffer = memoryview(b"")

    async def open(self) -> None:
        await self._lease()
        if self._follows:
            await streamed(self._ask, self.abort)
        else:
            await self.record()

    async def _next(self) -> pb.ReadReply | memoryview:
        await self._lease()
        return await streamed(partial(self._receive, None), self.abort)

    async def _lease(self) -> None:
        if self._connection is None:
            self._connection = await self._sockets.lease(self._peer, self._stall_s)

    def take(self, into: memoryview | None = None) -> memoryview:
        part = self._receive(into)
        if not isinstance(part, memoryview):
            self._check_length(0)
            part = memoryview(b"")
        return self._verified(part)

    def _ask(self) -> None:
        """Say what is wanted, unless that was said."""
        with self._connected() as connection:
            if self._request is not None:
                connection.send(Kind.READ, self._request.SerializeToString())
                self._request = None

    def _receive(self, into: memoryview | None) -> pb.ReadReply | memoryview:
        self._ask()
        with self._connected() as connection:
            kind, count = connection.head()
            if kind is Kind.CHUNK:
                self._check_length(count)
                part = self._buffer_of(count) if into is None else into
                connection.fill(part)
                return part
            if kind is Kind.REFUSED:
                raise _refused(connection, count, _READING, self._peer)
            if kind is not Kind.MESSAGE:
                raise NotAFrame
            return _parsed(pb.ReadReply, connection.body(count))

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        if self._connection is None:
            raise PeerError(f"{self._peer}: a stream that is over was read from")
        try:
            yield self._connection
        except Stalled as error:
            raise self._misbehaved(
                Misdeed.STALLED, f"sent nothing of a block for {self._stall_s} s"
            ) from error
        except NotAFrame as error:
            raise self._misbehaved(
                Misdeed.WRONG_STREAM, "sent what is no message of snapshotd"
            ) from error
        except HungUp as error:
            raise PeerError(
                f"{_READING} at {self._peer} failed: it ended a block early, at byte {self._at}: "
                f"{error}"
            ) from error

    def _buffer_of(self, count: int) -> memoryview:
        if len(self._buffer) < count:
            self._buffer = memoryview(bytearray(count))
        return self._buffer[:count]

    def cancel(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._record is not None and self._at == self._end:
            self._sockets.give_back(self._peer, connection)
        else:
            connection.close()

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()


class SocketRangesReader(RangesReader):
    """One stream of ranges; chunks come into memory that each uses anew."""

    def __init__(
        self,
        sockets: Sockets,
        peer: Peer,
        request: pb.RangesRequest,
        stall_s: float,
        received: Callable[[int], None],
    ) -> None:
        self._arrivals = Arrivals(peer, request, stall_s, received)
        self._sockets = sockets
        self._request: pb.RangesRequest | None = request
        self._connection: Connection | None = None
        self._buffer = memoryview(b"")

    async def chunk(self) -> memoryview:
        if self._connection is None:
            arrivals = self._arrivals
            self._connection = await self._sockets.lease(arrivals.peer, arrivals.stall_s)
        return await streamed(partial(self._receive, self._connection), self._connection.abort)

    def _receive(self, connection: Connection) -> memoryview:
        arrivals = self._arrivals
        try:
            if self._request is not None:
                connection.send(Kind.RANGES, self._request.SerializeToString())
                self._request = None
                self._buffer = memoryview(bytearray(DIGEST_BYTES + arrivals.expected))
            kind, count = connection.head()
            if kind is Kind.REFUSED:
                raise _refused(connection, count, _RANGING, arrivals.peer)
            if kind is not Kind.CHUNK:
                raise NotAFrame
            arrivals.check_length(count - DIGEST_BYTES)
            connection.fill(self._buffer[:count])
        except Stalled as error:
            raise arrivals.stalled() from error
        except NotAFrame as error:
            raise arrivals.no_message() from error
        except HungUp as error:
            raise arrivals.ended(str(error)) from error
        return arrivals.verified(self._buffer[DIGEST_BYTES:count], self._buffer[:DIGEST_BYTES])

    def cancel(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._arrivals.left or self._request is not None:
            connection.close()
        else:
            self._sockets.give_back(self._arrivals.peer, connection)


class SocketWriter(BlockWriter):
    """One parity block on its way to its holder, right from the memory it lies in."""

    def __init__(
        self,
        sockets: Sockets,
        opening: pb.StoreOpening,
        peer: Peer,
        *arguments: Any,
    ) -> None:
        no_call: Any = None
        super().__init__(no_call, opening, peer, no_call, *arguments)
        self._sockets = sockets
        self._connection: Connection | None = None
        self._over = False

    async def open(self) -> None:
        """Announce the block, unless that is done; the holder is ready when this returns."""
        if self._opening is None:
            return
        request, self._opening = pb.StoreRequest(opening=self._opening), None
        self._connection = await self._sockets.lease(self._peer, self._stall_s)
        await self._in_thread(partial(self._say, request))

    async def send(self, chunk: memoryview) -> None:
        await self.open()
        await self._in_thread(partial(self.put, chunk))

    def put(self, chunk: memoryview) -> None:
        if not self._over:
            connection = self._leased()
            connection.wait(self._bandwidth.pause_s(len(chunk)))
            self._tell(connection, Kind.CHUNK, chunk)
            self._sent(len(chunk))

    async def finish(self, record: seg.ParityRecord) -> None:
        await self.open()
        if not self._over:
            await self._in_thread(partial(self._say, pb.StoreRequest(record=record)))
        connection, self._connection = self._leased(), None
        self._sockets.give_back(self._peer, connection)

    def cancel(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def _say(self, request: pb.StoreRequest) -> None:
        """Send a message, and hear what the holder says of it: go on, or that it has the block."""
        connection = self._leased()
        self._tell(connection, Kind.MESSAGE, request.SerializeToString())
        try:
            self._hear(connection)
        except (HungUp, Stalled, NotAFrame) as error:
            raise self._failed(error) from error

    def _hear(self, connection: Connection) -> None:
        kind, count = connection.head()
        if kind is Kind.REFUSED:
            raise _refused(connection, count, _STORING, self._peer)
        self._over = kind is Kind.MESSAGE
        if self._over:
            _parsed(pb.StoreReply, connection.body(count))
        elif kind is not Kind.GO_ON or count:
            raise NotAFrame

    def _tell(self, connection: Connection, kind: Kind, body: bytes | memoryview) -> None:
        try:
            connection.send(kind, body)
        except Stalled as error:
            raise self._failed(error) from error
        except HungUp as error:
            with suppress(HungUp, Stalled, NotAFrame):
                self._hear(connection)  # it may have said why
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> PeerError:
        if isinstance(error, Stalled):
            what = f"it took nothing of a parity block for {self._stall_s} s"
        elif isinstance(error, HungUp):
            what = f"{error}"
        else:
            what = "it sent what is no message of snapshotd"
        return PeerError(f"{_STORING} at {self._peer} failed: {what}")

    def _leased(self) -> Connection:
        if self._connection is None:
            raise PeerError(f"{self._peer}: a stream that is over was written to")
        return self._connection

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await streamed(work, self.abort)


M = TypeVar("M", bound=Message)


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise NotAFrame from error


def _refused(connection: Connection, count: int, what: str, peer: Peer) -> PeerError:
    text = connection.body(count).decode(errors="replace")
    return PeerError(f"{what} at {peer} failed: {text}")
