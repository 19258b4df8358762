"""Streams of ranges: what comes is what lies there; who sends anything else is not believed."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import grpc
import grpc.aio
import pytest
import xxhash

from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError
from snapshotd.rpc.channels import OPTIONS, Peer, listen
from snapshotd.rpc.connection import Connection, Kind
from snapshotd.rpc.framing import BLOCKS_SERVICE
from snapshotd.rpc.ranges import MAX_RANGES, Spans
from snapshotd.wire.protocol import SOCKETS, TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from tests.contract.planes import HOST, NAMES, VERSION, Holder, Plane, Source, planes, record_of

IMAGE = random.Random(1).randbytes(3 * TRANSFER_BYTES + 4097)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plane]:
    return planes(tmp_path_factory.mktemp("planes") / "ca")


@pytest.fixture(params=NAMES)
def plane(request: pytest.FixtureRequest, made: dict[str, Plane]) -> Plane:
    return made[request.param]


async def read(plane: Plane, peer: Peer, spans: Spans, digest: bytes = b"") -> bytes:
    async with plane.client() as client:
        reader = client.read_ranges(peer, "job", VERSION, 0, spans, digest)
        got, count = b"", sum(n for _, n in spans)
        try:
            while len(got) < count:
                got += await reader.chunk()
            return got
        finally:
            reader.cancel()


def serve(plane: Plane, image: bytes, act: Callable[[Peer, Source], Any]) -> Source:
    source = Source(image, record_of(IMAGE))

    async def run() -> None:
        async with plane.serving(source, Holder(0)) as peer:
            await act(peer, source)

    asyncio.run(run())
    assert source.pinned == 0
    return source


SOME: list[Spans] = [
    ((0, len(IMAGE)),),
    ((len(IMAGE) - 1, 1),),
    ((1, 1), (3, 1), (4096, 4097), (TRANSFER_BYTES - 5, TRANSFER_BYTES + 9)),
    tuple((at, 7) for at in range(0, 7 * 1000, 13)),
]


@pytest.mark.parametrize("spans", SOME)
def test_ranges_come_in_one_row(plane: Plane, spans: Spans) -> None:
    async def act(peer: Peer, source: Source) -> None:
        got = await read(plane, peer, spans, source.record.content_digest)  # type: ignore[union-attr]
        assert got == b"".join(IMAGE[at : at + n] for at, n in spans)

    source = serve(plane, IMAGE, act)
    assert source.sent_bytes == sum(n for _, n in spans)


@pytest.mark.parametrize(
    ("spans", "digest", "why"),
    [
        (((5, 5), (9, 5)), b"", "behind one that ends at 10"),
        (((5, 0), (9, 1)), b"", "a range of 0 bytes"),
        (((len(IMAGE), 1),), b"", "a range of 1 bytes"),
        (((1 << 62, 1 << 62),), b"", "a range of"),
        (((0, 1),), b"x" * 16, "other bytes of the shard"),
        (tuple((2 * i, 1) for i in range(MAX_RANGES + 1)), b"", f"at most {MAX_RANGES}"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(
    plane: Plane, spans: Spans, digest: bytes, why: str
) -> None:
    async def act(peer: Peer, _: Source) -> None:
        with pytest.raises(PeerError, match=why):
            await read(plane, peer, spans, digest)

    serve(plane, IMAGE, act)


def test_a_flipped_bit_is_found_where_it_lies(plane: Plane) -> None:
    """Also beside the range: the grain is what is checked. Elsewhere it hurts nobody."""
    image = bytearray(IMAGE)
    image[20_000] ^= 1

    async def act(peer: Peer, source: Source) -> None:
        assert await read(plane, peer, ((40_000, 10),)) == IMAGE[40_000:40_010]
        with pytest.raises(PeerError, match="differ from what was sealed"):
            await read(plane, peer, ((20_001, 10),))

    source = serve(plane, bytes(image), act)
    assert [type(e) for e in source.errors] == [DamagedBytes]


def reply(chunk: bytes) -> pb.RangesReply:
    return pb.RangesReply(chunk=chunk, digest=xxhash.xxh3_128_digest(chunk))


@asynccontextmanager
async def lying(answers: list[bytes | None]) -> AsyncIterator[Peer]:
    async def ranges(_: bytes, context: Any) -> None:
        for answer in answers:
            if answer is None:
                await asyncio.sleep(30)
            await context.write(answer)

    server = grpc.aio.server(options=OPTIONS)
    methods = {"ReadRanges": grpc.unary_stream_rpc_method_handler(ranges)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(BLOCKS_SERVICE, methods),)
    )
    port = listen(server, f"{HOST}:0", None)
    await server.start()
    try:
        yield Peer("n0", f"{HOST}:{port}")
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("answers", "misdeed"),
    [
        ([reply(b"x" * 9).SerializeToString()], Misdeed.WRONG_STREAM),
        ([reply(b"x" * 11).SerializeToString()], Misdeed.WRONG_STREAM),
        ([b""], Misdeed.WRONG_STREAM),
        ([pb.RangesReply(chunk=b"x" * 10).SerializeToString()], Misdeed.WRONG_BYTES),
        ([b"\xff\x00 no message"], Misdeed.WRONG_STREAM),
        ([None], Misdeed.STALLED),
    ],
)
def test_who_sends_anything_else_misbehaves(
    made: dict[str, Plane], answers: list[bytes | None], misdeed: Misdeed
) -> None:
    async def run() -> None:
        async with lying(answers) as peer:
            with pytest.raises(Misbehaved) as caught:
                await read(made["grpc"], peer, ((0, 10),))
            assert caught.value.misdeed == misdeed

    asyncio.run(run())


def test_a_stream_that_ends_early_is_said(made: dict[str, Plane]) -> None:
    async def run() -> None:
        async with lying([]) as peer:
            with pytest.raises(PeerError, match="ended ranges early, 10 bytes"):
                await read(made["grpc"], peer, ((0, 10),))

    asyncio.run(run())


def _frame(kind: Kind, chunk: bytes, digest: bytes | None = None) -> tuple[Kind, bytes]:
    return kind, (xxhash.xxh3_128_digest(chunk) if digest is None else digest) + chunk


@pytest.mark.parametrize(
    ("frames", "misdeed"),
    [
        ([_frame(Kind.CHUNK, b"x" * 9)], Misdeed.WRONG_STREAM),
        ([_frame(Kind.CHUNK, b"x" * 11)], Misdeed.WRONG_STREAM),
        ([(Kind.CHUNK, b"x")], Misdeed.WRONG_STREAM),
        ([_frame(Kind.MESSAGE, b"x" * 10)], Misdeed.WRONG_STREAM),
        ([_frame(Kind.CHUNK, b"x" * 10, b"y" * 16)], Misdeed.WRONG_BYTES),
        (None, Misdeed.STALLED),
        ([], None),
    ],
    ids=["short", "long", "no digest", "no chunk", "damaged", "silent", "early end"],
)
def test_who_sends_anything_else_over_plain_sockets_misbehaves(
    made: dict[str, Plane], frames: list[tuple[Kind, bytes]] | None, misdeed: Misdeed | None
) -> None:
    def lie(listening: socket.socket) -> None:
        accepted, _ = listening.accept()
        with closing(Connection(accepted, 5.0)) as connection:
            kind, count = connection.head()
            assert kind is Kind.RANGES
            connection.body(count)
            for frame in frames or ():
                connection.send(*frame)
            if frames is None:
                accepted.recv(1)  # until the other end gives up

    async def run() -> None:
        with socket.create_server((HOST, 0)) as listening:
            lying = asyncio.create_task(asyncio.to_thread(lie, listening))
            peer = Peer("n0", f"{HOST}:{listening.getsockname()[1]}", SOCKETS)
            with pytest.raises(Misbehaved if misdeed else PeerError) as caught:
                await read(made[SOCKETS], peer, ((0, 10),))
            await lying
        if misdeed:
            assert caught.value.misdeed == misdeed
        else:
            assert "ended ranges early, 10 bytes before their end" in str(caught.value)

    asyncio.run(run())
