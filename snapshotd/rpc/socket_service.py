"""Blocks over plain sockets, serving side: the same streams, without gRPC under them.

Requests are checked and segments pinned on the event loop; bytes move in threads, one a stream,
between the mapped segment and the socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from snapshotd.core.trust import Misdeed
from snapshotd.errors import Misbehaved, PeerError, SnapshotdError
from snapshotd.rpc.channels import status_of
from snapshotd.rpc.connection import Connection, HungUp, Kind, NotAFrame, Stalled
from snapshotd.rpc.ranges import MAX_RANGES, Spans
from snapshotd.rpc.serving import (
    Blocks,
    Image,
    Incoming,
    Sealed,
    Serving,
    check_end,
    check_part,
)
from snapshotd.rpc.streaming import streamed
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

log = logging.getLogger(__name__)

#: Connections that one slot serves at once. For a further one, the one that has carried no stream
#: for longest is closed; where all do, the new one.
MAX_CONNECTIONS: Final = 256
#: What a stream begins with; anybody may have us make room for it.
MAX_REQUEST_BYTES: Final = 1 << 16
#: The same, of RangesRequest: MAX_RANGES numbers twice, of up to ten bytes.
MAX_RANGES_BYTES: Final = MAX_REQUEST_BYTES + 20 * MAX_RANGES
#: How long nobody new is let in where this process has no descriptor for him.
ACCEPT_PAUSE_S: Final = 0.5


class SocketService(Blocks):
    """Serves one stream after the other on each connection."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._resting: dict[Connection, None] = {}  # between two streams, for the longest first

    async def serve(self, connection: Connection) -> None:
        """Until the other end has gone, or was refused. Raises HungUp, Stalled, NotAFrame."""
        async with asyncio.timeout(self._stall_s):
            await _readable(connection)  # who has nothing to ask is not let wait here for ever
        while await self._answered(connection):
            self._resting[connection] = None
            try:
                await _readable(connection)
            finally:
                self._resting.pop(connection, None)

    def dismiss(self) -> bool:
        """Hang up on whoever has asked nothing for longest; whether there was one."""
        longest = next((c for c in self._resting if c.is_idle()), None)
        if longest is None:
            return False
        del self._resting[longest]
        longest.abort()
        return True

    async def _answered(self, connection: Connection) -> bool:
        """Serve one stream; returns whether another may follow."""
        try:
            await self._stream(connection)
        except SnapshotdError as error:
            code, what = status_of(error)
            text = f"{code.name.lower()}: {what}".encode()
            await streamed(partial(connection.send, Kind.REFUSED, text), connection.abort)
            return False
        return True

    async def _stream(self, connection: Connection) -> None:
        kind, first = await streamed(partial(self._first, connection), connection.abort)
        if kind is Kind.READ:
            self._callers.check_names(connection.names, connection.peer)
            request = _parsed(pb.ReadRequest, first)
            with self._asked_for(request) as image:
                await self._read(connection, request, image)
            return
        if kind is Kind.RANGES:
            self._callers.check_names(connection.names, connection.peer)
            with self._ranges_asked_for(_parsed(pb.RangesRequest, first)) as (sealed, spans):
                work = partial(self._send_ranges, connection, sealed, spans)
                await streamed(work, connection.abort)
            return
        opening = self._opening(_parsed(pb.StoreRequest, first) if kind is Kind.MESSAGE else None)
        self._callers.check_names(connection.names, connection.peer, opening.sender.node)
        incoming = await self._incoming(opening)
        if incoming is not None:
            try:
                await self._take_in(connection, incoming)
            except BaseException as error:
                incoming.abandon(error)
                raise
        await self._tell(connection, pb.StoreReply())

    def _first(self, connection: Connection) -> tuple[Kind, bytes]:
        """What a stream begins with: a ReadRequest, a RangesRequest, or a StoreRequest."""
        kind, count = self._head(connection)
        if kind not in (Kind.READ, Kind.RANGES, Kind.MESSAGE):
            return kind, b""
        most = MAX_RANGES_BYTES if kind is Kind.RANGES else MAX_REQUEST_BYTES
        return kind, connection.body(count, most)

    async def _read(self, connection: Connection, request: pb.ReadRequest, image: Image) -> None:
        if not request.unsealed:
            await self._tell(connection, await self._sealed(image))
        async for start, end in self._parts(request, image):
            send = partial(self._send, connection, start, end, image)
            await streamed(send, connection.abort)
        if request.unsealed:
            await self._tell(connection, await self._sealed(image))

    async def _tell(self, connection: Connection, message: Message) -> None:
        data = message.SerializeToString()
        await streamed(partial(connection.send, Kind.MESSAGE, data), connection.abort)

    # -- in threads

    def _send(self, connection: Connection, start: int, end: int, image: Image) -> None:
        with (
            self._unless_stalled("took nothing of a block"),
            closing(self._chunks(start, end, image)) as chunks,
        ):
            for chunk in chunks:
                connection.wait(self._bandwidth.pause_s(len(chunk)))
                connection.send(Kind.CHUNK, chunk)

    def _send_ranges(self, connection: Connection, sealed: Sealed, spans: Spans) -> None:
        with (
            self._unless_stalled("took nothing of some ranges"),
            closing(self._ranges(sealed, spans)) as chunks,
        ):
            for chunk, digest in chunks:
                connection.wait(self._bandwidth.pause_s(len(chunk)))
                connection.send(Kind.CHUNK, b"".join((digest, chunk)))

    async def _take_in(self, connection: Connection, incoming: Incoming) -> None:
        with incoming.image as image:
            filled = partial(self._gather, connection, image)
            record, digests = await streamed(filled, connection.abort)
        await self._finish(incoming, record, digests)

    def _gather(self, connection: Connection, image: memoryview) -> tuple[seg.ParityRecord, bytes]:
        at, digests = 0, b""
        try:
            connection.send(Kind.GO_ON)
            while True:
                kind, count = self._head(connection)
                if kind is Kind.MESSAGE:
                    request = _parsed(pb.StoreRequest, connection.body(count))
                    if request.WhichOneof("part") == "record":
                        check_end(at, len(image))
                        return request.record, digests
                check_part(at, count if kind is Kind.CHUNK else 0, len(image))
                with image[at : at + count] as stored:
                    with self._unless_stalled("sent nothing of a block"):
                        connection.fill(stored)
                    digests += self._written(stored, len(image))
                at += count
        except NotAFrame as error:
            raise Misbehaved(Misdeed.WRONG_STREAM, "what is no message of snapshotd") from error
        except HungUp as error:
            raise PeerError(
                f"a parity block broke off after {at} of {len(image)} bytes: {error}"
            ) from error

    def _head(self, connection: Connection) -> tuple[Kind, int]:
        with self._unless_stalled("sent nothing of a block"):
            return connection.head()

    @contextmanager
    def _unless_stalled(self, did: str) -> Iterator[None]:
        try:
            yield
        except Stalled as error:
            raise Misbehaved(Misdeed.STALLED, f"a peer {did} for {self._stall_s} s") from error


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise NotAFrame from error


async def _readable(connection: Connection) -> None:
    """Wait until something has come, or the other end has gone."""
    if connection.has_read_ahead():
        return
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection.fileno(), arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(connection.fileno())


class SocketsServer:
    """Serves the blocks of one slot over plain sockets, on a port the system chooses."""

    def __init__(self, serving: Serving) -> None:
        self._service = SocketService(serving)
        self._stall_s = serving.stall_s
        self._identity = serving.identity
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None

    async def start(self, host: str) -> int:
        """Serve; returns the port. Raises OSError where none can be bound."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        self._socket = socket.create_server(where[:2], family=family, backlog=MAX_CONNECTIONS)
        self._socket.setblocking(False)
        self._begin(self._accept(self._socket))
        port: int = self._socket.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Break off what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("nobody new is let in for blocks: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._tasks) > MAX_CONNECTIONS and not self._service.dismiss():
                accepted.close()
            else:
                self._begin(self._serve(accepted))

    async def _serve(self, accepted: socket.socket) -> None:
        try:
            connection = Connection(accepted, self._stall_s)
        except OSError:
            return  # it was gone at once
        try:
            if self._identity is not None:
                shake = partial(connection.secure, self._identity.dialled, server_side=True)
                await streamed(shake, connection.abort)
            await self._service.serve(connection)
        except (HungUp, Stalled, NotAFrame, OSError, TimeoutError) as error:
            log.debug("%s: %s %s", connection.peer, type(error).__name__, error)
        finally:
            connection.close()
