"""Blocks: requests and streams to a slot that really serves, in every order and with every lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from hypothesis import strategies as st

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.core.protection import parity_homes
from snapshotd.core.stripes import parity_bytes
from snapshotd.rpc.block_service import BlocksService
from snapshotd.rpc.connection import ALIGNMENT, Kind
from snapshotd.rpc.convert import place_to, version_to
from snapshotd.rpc.framing import pack_reply, parse_request
from snapshotd.rpc.serving import Serving
from snapshotd.rpc.socket_service import SocketsServer
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import changed, messages, spoiled
from tests.fuzz.room import BUDGET_BYTES, GROUP, HERE, VERSION, Memory, orders, room, run, watched
from tests.fuzz.targets.facts import parsed

STALL_S = 5.0
IMAGES = {0: bytes(range(256)) * 36, 1: b"second" * 1500, 2: b"third" * 3000}
PLACE = next(place for place, home in parity_homes(GROUP) if home == HERE)
SIZES = [len(IMAGES[s]) for s in PLACE.shards]
LENGTH = parity_bytes(PLACE, SIZES)


class Aborted(Exception):
    """What gRPC does to a call that a handler gives up."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details = code, details


class Call:
    """As much of a gRPC call as the services use."""

    def __init__(self) -> None:
        self.replies: list[Any] = []

    async def write(self, reply: Any) -> None:
        self.replies.append(pack_reply(reply))

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        raise Aborted(code, details)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


async def _stream(parts: list[Any]) -> AsyncIterator[Any]:
    for part in parts:
        yield parse_request(part.SerializeToString())


def seal(shard: int) -> seg.SealRecord:
    digests = grain_digests(memoryview(IMAGES[shard]))
    return seg.SealRecord(
        job="job",
        world=3,
        shard=shard,
        version=version_to(VERSION),
        image_bytes=len(IMAGES[shard]),
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


OPENING = pb.StoreOpening(
    protocol=1,
    cluster_id="test",
    job="job",
    epoch=5,
    version=version_to(VERSION),
    place=place_to(PLACE),
    image_bytes=LENGTH,
    shard_bytes=SIZES,
    sender=pb.Home(node="n1"),
)
BLOCK = bytes(7 for _ in range(LENGTH))
RECORD = seg.ParityRecord(
    place=place_to(PLACE),
    group=[seal(s) for s in PLACE.shards],
    image_bytes=LENGTH,
    grain_digests=grain_digests(memoryview(BLOCK)),
)


async def _by_calls(memory: Memory, calls: list[list[Any]]) -> None:
    """As gRPC would hand them on."""
    service = BlocksService(Serving(memory.vault, memory.intake, "test", STALL_S, None))
    for parts in calls:
        context = Call()
        try:
            if isinstance(parts[0], pb.ReadRequest):
                await service.Read(parts[0], context)
            elif isinstance(parts[0], pb.RangesRequest):
                await service.ReadRanges(parts[0], context)
            else:
                await service.Store(_stream(parts), context)
        except Aborted:
            continue


async def _by_sockets(memory: Memory, calls: list[list[Any]]) -> None:
    """Each call over a connection of its own, whatever is answered."""
    server = SocketsServer(Serving(memory.vault, memory.intake, "test", STALL_S, None))
    port = await server.start("127.0.0.1")
    try:
        for parts in calls:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                for part in parts:
                    writer.write(frame(part))
                writer.write_eof()
                while await reader.read(1 << 16):
                    continue
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    finally:
        await server.stop()


def frame(part: Any) -> bytes:
    """A part of a stream as the plane of plain sockets has it; bytes are what they are."""
    if isinstance(part, bytes):
        return part
    kind, body = (b"R", b"") if isinstance(part, pb.ReadRequest) else (b"M", b"")
    if isinstance(part, pb.StoreRequest) and part.WhichOneof("part") == "chunk":
        kind, body = b"C", part.chunk
    body = body or part.SerializeToString()
    head = kind + len(body).to_bytes(4, "big")
    return head.ljust(ALIGNMENT, b"\0") + body + bytes(-len(body) % ALIGNMENT)


Serve = Callable[[Memory, list[list[Any]]], Awaitable[None]]


async def _serve(memory: Memory, calls: list[list[Any]], serve: Serve) -> None:
    await memory.vault.adopt()
    memory.machine.orders = orders()
    for shard, image in IMAGES.items():
        await memory.seal(shard, image)
    await serve(memory, calls)
    assert memory.arena.allocated_bytes <= BUDGET_BYTES
    # Nothing stays half done: what is not held is free again, and nothing is kept from anybody.
    assert not memory.intake._arriving
    held = len(memory.vault.held())
    assert sum(not s.is_available for s in memory.arena.segments) == held
    for job, version, what in memory.vault.held():
        with memory.vault.reading(job, version, what) as sealed:
            sealed.verify()
    memory.arena.close()


def blocks(parts: Parts) -> None:
    """Whatever is read or stored: refused by name, or served right; nothing is left behind."""
    calls: list[list[Any]] = []
    for part in parts:
        kind = {b"R": pb.ReadRequest, b"G": pb.RangesRequest}.get(part[:1], pb.StoreRequest)
        message = parsed(kind, part[1:])
        if message is None:
            continue
        if part[:1] == b"S" and calls and isinstance(calls[-1][0], pb.StoreRequest):
            calls[-1].append(message)
        elif part[:1] in b"RGSO":
            calls.append([message])
    if not calls:
        return
    with room() as path, watched(path):
        run(_serve(Memory(path), calls, _by_calls))


def sockets(parts: Parts) -> None:
    """The same over plain sockets, with bytes in between that are no frame at all."""
    streams: list[list[Any]] = []
    for part in parts:
        kind = pb.ReadRequest if part[:1] == b"R" else pb.StoreRequest
        message = part[1:] if part[:1] == b"X" else parsed(kind, part[1:])
        if message is None:
            continue
        if part[:1] in b"SX" and streams:
            streams[-1].append(message)
        elif part[:1] in b"RSOX":
            streams.append([message])
    if not streams:
        return
    with room() as path, watched(path):
        run(_serve(Memory(path), streams, _by_sockets))


@st.composite
def _reads(draw: Any) -> list[bytes]:
    right = pb.ReadRequest(
        protocol=1,
        cluster_id="test",
        job="job",
        version=version_to(VERSION),
        shard=draw(st.sampled_from([0, 1, 2])),
        offset=draw(st.sampled_from([0, 0, 4096, 8192, 1])),
        bytes=draw(st.sampled_from([0, 4096, 9216, 5120, 2**63])),
    )
    if draw(st.booleans()):
        right.place.CopyFrom(place_to(PLACE))
    request = draw(changed(st.just(right)) | messages(pb.ReadRequest))
    return [b"R" + draw(spoiled(st.just(request.SerializeToString())))]


@st.composite
def _ranges(draw: Any) -> list[bytes]:
    """Ranges in order and apart, and every way of not being so."""
    shard = draw(st.sampled_from([0, 1, 2]))
    ends = draw(st.lists(st.integers(0, 10_000), max_size=8))
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    if draw(st.booleans()):
        spans = [(at, 1) for at in sorted({at for at, _ in spans})]
    digest = draw(st.sampled_from([b"", seal(shard).content_digest, b"d" * 16]))
    right = pb.RangesRequest(
        protocol=1,
        cluster_id="test",
        job="job",
        version=version_to(VERSION),
        shard=shard,
        content_digest=digest,
        offsets=[at for at, _ in spans],
        lengths=[count for _, count in spans],
    )
    if draw(st.booleans()):
        right.place.CopyFrom(place_to(PLACE))
    request = draw(changed(st.just(right)) | messages(pb.RangesRequest))
    return [b"G" + draw(spoiled(st.just(request.SerializeToString())))]


def _changed_part(draw: Any, message: Any) -> Any:
    return draw(st.just(message) | st.just(message) | st.just(message) | changed(st.just(message)))


@st.composite
def _stores(draw: Any) -> list[bytes]:
    opening = pb.StoreRequest(opening=_changed_part(draw, OPENING))
    record = pb.StoreRequest(record=_changed_part(draw, RECORD))
    chunks = draw(
        st.sampled_from(
            [[BLOCK], [BLOCK], [BLOCK], [b""] * 3, [BLOCK[:1]] * 4, [BLOCK, b"x"], [], [BLOCK[1:]]]
        )
    )
    stream = [opening, *(pb.StoreRequest(chunk=c) for c in chunks), record]
    how = draw(st.sampled_from(["", "", "", "", "cut", "mix", "any", "twice"]))
    if how == "cut":
        stream = stream[: draw(st.integers(0, len(stream)))]
    elif how == "mix":
        stream = draw(st.permutations(stream))
    elif how == "any":
        stream.insert(draw(st.integers(0, len(stream))), draw(messages(pb.StoreRequest, 3)))
    elif how == "twice":
        stream += stream
    parts = [draw(spoiled(st.just(m.SerializeToString()), 1)) for m in stream]
    return [b"O" + parts[0], *(b"S" + p for p in parts[1:])] if parts else []


@st.composite
def _raw(draw: Any) -> list[bytes]:
    """No frame, or a head whose body is not there."""
    kind = draw(st.sampled_from([*(kind.value for kind in Kind), b"?"]))
    length = draw(st.sampled_from([0, 1, 64, 1 << 16, (1 << 16) + 1, 1 << 20, 2**32 - 1]))
    head = (kind + length.to_bytes(4, "big")).ljust(ALIGNMENT, b"\0")
    return [b"X" + draw(st.binary(max_size=200) | st.just(head))]


def _flat(calls: list[list[bytes]]) -> list[bytes]:
    return [part for call in calls for part in call]


_CALLS = st.lists(_reads() | _ranges() | _stores() | _stores(), max_size=3)
_STREAMS = st.lists(_reads() | _stores() | _stores() | _raw(), max_size=4)

TARGETS = [
    Target("blocks", _CALLS.map(_flat), blocks, 100),
    Target("sockets", _STREAMS.map(_flat), sockets, 60),
]
