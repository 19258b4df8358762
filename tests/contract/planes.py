"""The planes under test: how each serves, dials, and lets a peer say what no honest one would.

A further plane is a further `Plane` in PLANES; the tests do not know which one they run over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.errors import SnapshotdError
from snapshotd.metadata import Home, ParityPlace, Version
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.channels import OPTIONS, Peer, listen
from snapshotd.rpc.connection import Connection, Kind
from snapshotd.rpc.convert import version_to
from snapshotd.rpc.framing import BLOCKS_SERVICE, parse_reply
from snapshotd.rpc.serving import Image, Record, SealedImage, Serving, What
from snapshotd.rpc.socket_client import PlanesClient
from snapshotd.rpc.socket_service import SocketsServer
from snapshotd.rpc.streaming import Bandwidth, streamed
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.smp import SERVERS
from snapshotd.wire.protocol import GRPC, SOCKETS
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.integration.authority import Authority

#: Short: what stalls is to be found out soon.
STALL_S = 1.0
#: Each of them as the tests name it.
NAMES = (GRPC, f"{GRPC}-tls", SOCKETS, f"{SOCKETS}-tls")
VERSION = Version(5, 1)
PLACE = ParityPlace((0, 1), 1, 0, 0)
HOST = "127.0.0.1"

#: What a hostile source answers: the bytes of one message after the other.
Script = Callable[[], AsyncIterator[bytes]]


def record_of(image: bytes) -> seg.SealRecord:
    digests = grain_digests(memoryview(image))
    return seg.SealRecord(
        job="job",
        world=2,
        shard=0,
        version=version_to(VERSION),
        image_bytes=len(image),
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


@dataclass
class Source:
    """A store of one sealed image, and how it was used."""

    image_bytes: bytes
    record: Record
    growing: Image | None = None  # what is followed, where that is not sealed
    pinned: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    errors: list[BaseException] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def _reading(self) -> Iterator[Source]:
        self.pinned += 1
        try:
            yield self
        except SnapshotdError as error:
            self.errors.append(error)
            raise
        finally:
            self.pinned -= 1
            self.released.set()

    def reading(self, job: str, version: Version, what: What) -> AbstractContextManager[Source]:
        return self._reading()

    def following(self, job: str, version: Version, what: What) -> AbstractContextManager[Image]:
        return self._following()

    @contextmanager
    def _following(self) -> Iterator[Image]:
        with self._reading():
            yield self.growing or SealedImage(self)

    def image(self, image_bytes: int) -> memoryview:
        return memoryview(self.image_bytes)[:image_bytes]

    def sent(self, count_bytes: int) -> None:
        self.sent_bytes += count_bytes

    def received(self, count_bytes: int) -> None:
        self.received_bytes += count_bytes


@dataclass
class Holder:
    """Takes parity blocks, and notes what came of them."""

    length: int
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    ends: asyncio.Queue[BaseException | tuple[bytes, bytes]] = field(default_factory=asyncio.Queue)

    async def storing(
        self, opening: pb.StoreOpening, version: Version, place: ParityPlace
    ) -> Holder:
        self.memory = bytearray(self.length)
        self.opened.set()
        return self

    @property
    def image(self) -> memoryview:
        return memoryview(self.memory)

    async def finish(self, record: seg.ParityRecord, digests: bytes) -> None:
        self.ends.put_nowait((bytes(self.memory), digests))

    def abandon(self, error: BaseException) -> None:
        self.ends.put_nowait(error)


@dataclass(frozen=True)
class Plane:
    """gRPC, with or without TLS."""

    identity: Identity | None
    name: str = GRPC

    @asynccontextmanager
    async def serving(
        self, source: Source, holder: Holder, bandwidth: Bandwidth | None = None
    ) -> AsyncIterator[Peer]:
        """An honest slot."""
        bounded = bandwidth or Bandwidth()
        serving = Serving(source, holder, "test", STALL_S, self.identity, bounded)
        server = SERVERS[self.name](serving)
        try:
            yield Peer("n0", f"{HOST}:{await server.start(HOST)}", self.name)
        finally:
            await server.stop()

    @asynccontextmanager
    async def lying(self, script: Script) -> AsyncIterator[Peer]:
        """A source that answers every Read with the messages of a script."""

        async def read(_: bytes, context: Any) -> None:
            async for message in script():
                await context.write(message)

        server = grpc.aio.server(options=OPTIONS)
        methods = {"Read": grpc.unary_stream_rpc_method_handler(read)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(BLOCKS_SERVICE, methods),)
        )
        port = listen(server, f"{HOST}:0", self.identity)
        await server.start()
        try:
            yield Peer("n0", f"{HOST}:{port}")
        finally:
            await server.stop(0)

    @asynccontextmanager
    async def client(self, bandwidth: Bandwidth | None = None) -> AsyncIterator[BlocksClient]:
        client = PlanesClient(
            self.identity,
            "test",
            Home("n0", 0),
            STALL_S,
            lambda _: None,
            lambda _: None,
            bandwidth,
        )
        try:
            yield client
        finally:
            await client.close()


@dataclass(frozen=True)
class SocketPlane(Plane):
    """Plain sockets, with or without TLS."""

    name: str = SOCKETS

    @asynccontextmanager
    async def lying(self, script: Script) -> AsyncIterator[Peer]:
        server = _LyingServer(script, self.identity)
        try:
            yield Peer("n0", f"{HOST}:{await server.start(HOST)}", self.name)
        finally:
            await server.stop()


class _LyingServer(SocketsServer):
    """Takes connections as an honest one does; what it serves on them is the script."""

    def __init__(self, script: Script, identity: Identity | None) -> None:
        nothing: Any = None
        super().__init__(Serving(nothing, nothing, "test", STALL_S, identity))
        self._service = _LyingService(script)  # type: ignore[assignment]


@dataclass
class _LyingService:
    script: Script

    async def serve(self, connection: Connection) -> None:
        kind, count = await streamed(connection.head, connection.abort)
        assert kind is Kind.READ
        await streamed(partial(connection.body, count), connection.abort)
        async for message in self.script():
            await streamed(partial(connection.send, *_frame(message)), connection.abort)


def _frame(message: bytes) -> tuple[Kind, bytes | memoryview]:
    """The frame in which a message would come."""
    try:
        part = parse_reply(message)
    except DecodeError:
        return Kind.MESSAGE, message
    if isinstance(part, memoryview):
        return Kind.CHUNK, part
    return Kind.MESSAGE, message


def planes(directory: Path) -> dict[str, Plane]:
    files = Authority(directory).of("n0")
    return {name: plane_of(name, files) for name in NAMES}


def plane_of(name: str, files: TlsFiles) -> Plane:
    """A plane of NAMES, as a node with these files has it."""
    identity = Identity.load(files, "test", "n0") if name.endswith("-tls") else None
    return (SocketPlane if name.startswith(SOCKETS) else Plane)(identity)
