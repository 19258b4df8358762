"""Streams of blocks, whole and broken, over every plane."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from snapshotd.coding.digest import grain_digests
from snapshotd.core.bandwidth import BURST_S
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.channels import Peer
from snapshotd.rpc.streaming import Bandwidth, streamed
from snapshotd.wire.protocol import TRANSFER_BYTES, grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.contract.planes import (
    NAMES,
    PLACE,
    STALL_S,
    VERSION,
    Holder,
    Plane,
    Source,
    plane_of,
    planes,
    record_of,
)

LENGTHS = [0, 1, 4096, TRANSFER_BYTES - 1, TRANSFER_BYTES, 3 * TRANSFER_BYTES + 4097]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plane]:
    return planes(tmp_path_factory.mktemp("planes") / "ca")


@pytest.fixture(params=NAMES)
def plane(request: pytest.FixtureRequest, made: dict[str, Plane]) -> Plane:
    return made[request.param]


def bytes_of(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


async def read(client: BlocksClient, peer: Peer, offset: int, count: int) -> bytes:
    reader = client.read(peer, "job", VERSION, 0, offset, count)
    try:
        await reader.record()
        got = b""
        while len(got) < count:
            got += await reader.chunk()
        return got
    finally:
        reader.cancel()


async def store(client: BlocksClient, peer: Peer, chunks: list[bytes], length: int) -> None:
    writer = opened(client, peer, length)
    try:
        for chunk in chunks:
            await writer.send(memoryview(chunk))
        await writer.finish(seg.ParityRecord(image_bytes=length))
    finally:
        writer.cancel()


def whole(image: bytes) -> list[bytes]:
    return [image[at : at + TRANSFER_BYTES] for at in range(0, len(image), TRANSFER_BYTES)]


# -- reading


@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_image(plane: Plane, length: int) -> None:
    image = bytes_of(length)

    async def act() -> None:
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            assert await read(client, peer, 0, length) == image
            assert await client.record(peer, "job", VERSION, 0) == record_of(image)
        assert source.sent_bytes == length
        assert source.pinned == 0

    asyncio.run(act())


def test_ranges_of_whole_grains(plane: Plane) -> None:
    image = bytes_of(3 * TRANSFER_BYTES + 4097)
    grain = grain_bytes(len(image))

    async def act() -> None:
        async with (
            plane.serving(Source(image, record_of(image)), Holder(0)) as peer,
            plane.client() as client,
        ):
            last = len(image) // grain * grain
            for start, end in ((grain, 2 * grain), (0, last), (grain, len(image)), (last, last)):
                assert await read(client, peer, start, end - start) == image[start:end]
            for offset, count in ((1, grain), (0, grain + 1), (0, len(image) + 1)):
                with pytest.raises(PeerError, match=r"whole grains|were asked of an image"):
                    await read(client, peer, offset, count)

    asyncio.run(act())


def script_of(*parts: Any, forever: bool = False, silent: bool = False) -> Any:
    async def script() -> AsyncIterator[bytes]:
        for part in parts:
            yield part if isinstance(part, bytes) else part.SerializeToString()
        while forever:
            yield part if isinstance(part, bytes) else part.SerializeToString()
        if silent:
            await asyncio.Event().wait()

    return script


IMAGE = bytes_of(2 * TRANSFER_BYTES)
RECORD = pb.ReadReply(seal=record_of(IMAGE))
FIRST = pb.ReadReply(chunk=IMAGE[:TRANSFER_BYTES])
FLIPPED = pb.ReadReply(chunk=bytes([IMAGE[0] ^ 1]) + IMAGE[1:TRANSFER_BYTES])

LIES = {
    "short": (script_of(RECORD, FIRST), PeerError, "ended a block early, at byte 1048576"),
    "nothing": (script_of(), PeerError, "ended a block early, at byte 0"),
    "no record": (script_of(FIRST), Misdeed.WRONG_STREAM, "sent no record"),
    "two records": (script_of(RECORD, RECORD), Misdeed.WRONG_STREAM, "sent 0 bytes at 0"),
    "an endless trickle": (
        script_of(RECORD, pb.ReadReply(chunk=b"x"), forever=True),
        Misdeed.WRONG_STREAM,
        "sent 1 bytes at 0",
    ),
    "empty chunks for ever": (
        script_of(RECORD, pb.ReadReply(chunk=b""), forever=True),
        Misdeed.WRONG_STREAM,
        "sent 0 bytes at 0",
    ),
    "longer chunks": (
        script_of(RECORD, pb.ReadReply(chunk=IMAGE)),
        Misdeed.WRONG_STREAM,
        "sent 2097152 bytes at 0",
    ),
    "wrong bytes": (script_of(RECORD, FLIPPED), Misdeed.WRONG_BYTES, "sent damage"),
    "the right bytes twice": (script_of(RECORD, FIRST, FIRST), Misdeed.WRONG_BYTES, "damage"),
    "a record of another image": (
        script_of(pb.ReadReply(seal=record_of(IMAGE[:4096]))),
        Misdeed.WRONG_RECORD,
        "says that its image has 4096 bytes",
    ),
    "no message": (script_of(RECORD, b"\xff\xff"), Misdeed.WRONG_STREAM, "what is no message"),
    "silence": (script_of(RECORD, FIRST, silent=True), Misdeed.STALLED, "sent nothing"),
    "silence at once": (script_of(silent=True), Misdeed.STALLED, "sent nothing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_lies(plane: Plane, lie: str) -> None:
    script, wrong, what = LIES[lie]

    async def act() -> None:
        async with plane.lying(script) as peer, plane.client() as client:
            with pytest.raises(PeerError, match=what) as caught:
                await read(client, peer, 0, len(IMAGE))
        if isinstance(wrong, Misdeed):
            assert isinstance(caught.value, Misbehaved)
            assert caught.value.misdeed == wrong

    asyncio.run(act())


def test_more_than_was_asked_for_is_not_taken(plane: Plane) -> None:
    async def act() -> None:
        endless = script_of(RECORD, FIRST, forever=True)
        async with plane.lying(endless) as peer, plane.client() as client:
            got = await read(client, peer, 0, TRANSFER_BYTES)
        assert got == IMAGE[:TRANSFER_BYTES]

    asyncio.run(act())


def test_a_source_notices_its_own_damage(plane: Plane) -> None:
    """It does not send what is not what it sealed, and learns of it."""

    async def act() -> None:
        damaged = IMAGE[:TRANSFER_BYTES] + bytes(TRANSFER_BYTES)
        source = Source(damaged, record_of(IMAGE))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            with pytest.raises(PeerError, match="differ from what was sealed"):
                await read(client, peer, 0, len(IMAGE))
        assert [type(e) for e in source.errors] == [DamagedBytes]
        assert source.sent_bytes == TRANSFER_BYTES
        assert source.pinned == 0

    asyncio.run(act())


def test_a_reader_that_goes_away(plane: Plane) -> None:
    async def act() -> None:
        image = bytes_of(64 * TRANSFER_BYTES)
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = client.read(peer, "job", VERSION, 0, 0, len(image))
            await reader.chunk()
            assert source.pinned == 1
            reader.cancel()
            async with asyncio.timeout(20 * STALL_S):
                await source.released.wait()
            assert source.pinned == 0

    asyncio.run(act())


def test_a_reader_that_takes_nothing(plane: Plane) -> None:
    """What is under way is bounded, and the segment is not kept from being freed for ever."""

    async def act() -> None:
        image = bytes_of(64 * TRANSFER_BYTES)
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = client.read(peer, "job", VERSION, 0, 0, len(image))
            await reader.chunk()
            async with asyncio.timeout(20 * STALL_S):
                await source.released.wait()
            assert source.sent_bytes <= len(image) // 2
            assert source.pinned == 0
            reader.cancel()

    asyncio.run(act())


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_is_killed(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    command = [sys.executable, "-m", "tests.contract.dying", name, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as source:
        address = source.stdout.readline().strip()

        async def act() -> None:
            async with reading_as(directory, name).client() as client:
                peer = Peer("n0", address, name.removesuffix("-tls"))
                reader = client.read(peer, "job", VERSION, 0, 0, 2 * TRANSFER_BYTES)
                assert len(await reader.chunk()) == TRANSFER_BYTES
                source.kill()
                with pytest.raises(PeerError, match="reading a block"):
                    await reader.chunk()
                reader.cancel()

        try:
            asyncio.run(act())
        finally:
            source.kill()


def reading_as(directory: Path, name: str) -> Plane:
    """A plane with the identity that another process made in `directory`."""
    from snapshotd.rpc.tls import TlsFiles

    (key,) = directory.glob("*.key")
    return plane_of(name, TlsFiles(directory / "ca.pem", key.with_suffix(".pem"), key))


# -- storing


@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_parity_block(plane: Plane, length: int) -> None:
    image = bytes_of(length)

    async def act() -> None:
        source, holder = Source(b"", record_of(b"")), Holder(length)
        async with plane.serving(source, holder) as peer, plane.client() as client:
            await store(client, peer, whole(image), length)
        assert holder.ends.get_nowait() == (image, grain_digests(memoryview(image)))
        assert source.received_bytes == length

    asyncio.run(act())


@pytest.mark.parametrize(
    ("chunks", "what"),
    [
        (whole(IMAGE)[:1], "ended after 1048576 of 2097152"),
        ([*whole(IMAGE), b"x"], "unexpected part behind 2097152 of"),
        ([b""], "unexpected part behind 0 of"),
        ([IMAGE[:4096]], "4096 bytes where 1048576 were expected"),
        ([IMAGE], "2097152 bytes where 1048576 were expected"),
    ],
    ids=["short", "too much", "empty", "a trickle", "longer chunks"],
)
def test_a_sender_that_lies(plane: Plane, chunks: list[bytes], what: str) -> None:
    async def act() -> None:
        source, holder = Source(b"", record_of(b"")), Holder(len(IMAGE))
        async with plane.serving(source, holder) as peer, plane.client() as client:
            # gRPC may tell the sender no more than that the stream broke off under its hands.
            with pytest.raises(PeerError, match="storing a parity block"):
                await store(client, peer, chunks, len(IMAGE))
        error = holder.ends.get_nowait()
        assert isinstance(error, Misbehaved)
        assert error.misdeed == Misdeed.WRONG_STREAM
        assert what in str(error)

    asyncio.run(act())


@pytest.mark.parametrize("leaves", [True, False], ids=["goes away", "stalls"])
def test_a_sender_that_ends_nothing(plane: Plane, leaves: bool) -> None:
    """The buffer is free again."""

    async def act() -> None:
        source, holder = Source(b"", record_of(b"")), Holder(len(IMAGE))
        async with plane.serving(source, holder) as peer, plane.client() as client:
            writer = client.store(
                peer,
                job="job",
                epoch=5,
                version=VERSION,
                place=PLACE,
                image_bytes=len(IMAGE),
                shard_bytes=[len(IMAGE)] * 2,
            )
            await writer.send(memoryview(IMAGE)[:TRANSFER_BYTES])
            await holder.opened.wait()
            if leaves:
                writer.cancel()
            async with asyncio.timeout(20 * STALL_S):
                ended = await holder.ends.get()
            assert isinstance(ended, BaseException)
            if not leaves:
                assert isinstance(ended, Misbehaved)
                assert ended.misdeed == Misdeed.STALLED
            writer.cancel()

    asyncio.run(act())


# -- in threads, as stripes are coded


def test_chunks_taken_by_a_thread(plane: Plane) -> None:
    """Into memory of the stream's own, or where they are to lie."""
    image = bytes_of(3 * TRANSFER_BYTES + 4097)

    async def act() -> None:
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            for into in (None, bytearray(len(image))):
                reader = client.read(peer, "job", VERSION, 0, 0, len(image))
                await reader.record()
                got = await streamed(partial(taken, reader, len(image), into), reader.abort)
                reader.cancel()
                assert got == image
                assert into is None or into == image
        assert source.sent_bytes == 2 * len(image)

    asyncio.run(act())


def taken(reader: BlockReader, count: int, into: bytearray | None) -> bytes:
    got = b""
    while len(got) < count:
        place = memoryview(into)[len(got) : len(got) + TRANSFER_BYTES] if into else None
        got += reader.take(place)
    return got


def test_chunks_put_by_a_thread(plane: Plane) -> None:
    image = bytes_of(3 * TRANSFER_BYTES + 4097)

    async def act() -> None:
        holder = Holder(len(image))
        async with (
            plane.serving(Source(b"", record_of(b"")), holder) as peer,
            plane.client() as client,
        ):
            writer = opened(client, peer, len(image))
            await writer.open()
            for chunk in whole(image):
                await streamed(partial(writer.put, memoryview(chunk)), writer.abort)
            await writer.finish(seg.ParityRecord(image_bytes=len(image)))
            writer.cancel()
        assert holder.ends.get_nowait() == (image, grain_digests(memoryview(image)))

    asyncio.run(act())


def opened(client: BlocksClient, peer: Peer, length: int) -> BlockWriter:
    return client.store(
        peer,
        job="job",
        epoch=5,
        version=VERSION,
        place=PLACE,
        image_bytes=length,
        shard_bytes=[length, length],
    )


@pytest.mark.parametrize("lie", ["short", "wrong bytes", "longer chunks", "silence"])
def test_a_thread_hears_of_lies(plane: Plane, lie: str) -> None:
    script, wrong, what = LIES[lie]

    async def act() -> None:
        async with plane.lying(script) as peer, plane.client() as client:
            reader = client.read(peer, "job", VERSION, 0, 0, len(IMAGE))
            await reader.record()
            with pytest.raises(PeerError, match=what) as caught:
                await streamed(partial(taken, reader, len(IMAGE), None), reader.abort)
            reader.cancel()
        if isinstance(wrong, Misdeed):
            assert isinstance(caught.value, Misbehaved)
            assert caught.value.misdeed == wrong

    asyncio.run(act())


def test_a_thread_that_waits_for_a_chunk_ends_when_it_is_cancelled(plane: Plane) -> None:
    async def act() -> None:
        silent = script_of(RECORD, silent=True)
        async with plane.lying(silent) as peer, plane.client() as client:
            reader = client.read(peer, "job", VERSION, 0, 0, len(IMAGE))
            await reader.record()
            begun, ended = threading.Event(), threading.Event()

            def work() -> None:
                begun.set()
                try:
                    reader.take()
                finally:
                    ended.set()

            task = asyncio.create_task(streamed(work, reader.abort))
            await asyncio.to_thread(begun.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended.is_set()
            reader.cancel()

    asyncio.run(act())


# -- no more than is allowed


class Virtual(Bandwidth):
    """Nobody waits; the time that all of them would have waited is counted."""

    RATE = 32 << 20

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sent: list[tuple[float, int]] = []
        super().__init__(self.RATE, clock=lambda: self.now_s)

    def pause_s(self, count: int) -> float:
        self.now_s += super().pause_s(count)
        self.sent.append((self.now_s, count))
        return 0.0

    def check(self, count: int) -> None:
        """`count` bytes went, and at no time more than the bound allows."""
        assert sum(sent for _, sent in self.sent) == count
        gone = 0
        for now_s, sent in self.sent:
            assert gone <= self.RATE * (now_s + BURST_S)
            gone += sent
        assert self.now_s >= (count - TRANSFER_BYTES) / self.RATE - BURST_S


def test_blocks_that_are_read_keep_the_bound_of_their_source(plane: Plane) -> None:
    image, bound = bytes_of(20 * TRANSFER_BYTES + 1), Virtual()

    async def act() -> None:
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0), bound) as peer, plane.client() as client:
            got = await asyncio.gather(*(read(client, peer, 0, len(image)) for _ in range(2)))
            assert got == [image, image]

    asyncio.run(act())
    bound.check(2 * len(image))


def test_blocks_that_are_stored_keep_the_bound_of_their_sender(plane: Plane) -> None:
    image, bound = bytes_of(20 * TRANSFER_BYTES), Virtual()

    async def act() -> None:
        holder = Holder(len(image))
        async with (
            plane.serving(Source(b"", record_of(b"")), holder) as peer,
            plane.client(bound) as client,
        ):
            await store(client, peer, whole(image), len(image))
        assert holder.ends.get_nowait()[0] == image

    asyncio.run(act())
    bound.check(len(image))


def test_streams_that_share_a_small_bound_are_not_taken_for_stalled(plane: Plane) -> None:
    """Whoever would get no turn in time is refused, and nothing is held against anybody."""
    image, wanted = bytes_of(2 * TRANSFER_BYTES), 12
    bound = Bandwidth(int(6 * TRANSFER_BYTES / STALL_S), STALL_S)

    async def act() -> None:
        source = Source(image, record_of(image))
        async with plane.serving(source, Holder(0), bound) as peer, plane.client() as client:
            reads = (read(client, peer, 0, len(image)) for _ in range(wanted))
            got = await asyncio.gather(*reads, return_exceptions=True)
            refused = [error for error in got if isinstance(error, BaseException)]
            assert {type(error) for error in refused} == {PeerError}, refused
            assert all("share" in str(error) for error in refused)
            assert got.count(image) == wanted - len(refused) >= 2
            assert await read(client, peer, 0, len(image)) == image

    asyncio.run(act())
