"""Images that are read while their trainer writes them, whole and given up, over every plane."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from snapshotd.coding.digest import grain_digests
from snapshotd.core.trust import Misdeed
from snapshotd.errors import DamagedBytes, Misbehaved, PeerError
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.channels import Peer
from snapshotd.rpc.serving import PATIENCE, Record
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import node_pb2 as pb
from tests.contract.planes import NAMES, STALL_S, VERSION, Holder, Plane, Source, record_of
from tests.contract.test_planes import bytes_of, made, script_of, whole

__all__ = ["made"]  # a fixture

IMAGE = bytes_of(3 * TRANSFER_BYTES + 4097)


def digests_of(image: bytes) -> bytes:
    return grain_digests(memoryview(image))


@pytest.fixture(params=NAMES)
def plane(request: pytest.FixtureRequest, made: dict[str, Plane]) -> Plane:
    return made[request.param]


@dataclass
class Written:
    """An image that a test writes: how much of it stands, and what was sealed."""

    bytes: bytearray = field(default_factory=lambda: bytearray(IMAGE))
    stands: int = 0
    digests: bytes = digests_of(IMAGE)
    sealed: Record | None = None
    failure: str = ""
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def image_bytes(self) -> int:
        return len(self.bytes)

    def image(self, image_bytes: int) -> memoryview:
        return memoryview(self.bytes)[:image_bytes]

    async def standing(self, at: int, count: int) -> int:
        await self._until(lambda: self.stands >= at + count)
        return self.stands

    def check(self) -> None:
        if self.failure:
            raise PeerError(self.failure)

    async def record(self) -> Record:
        await self._until(lambda: self.sealed is not None)
        assert self.sealed is not None
        return self.sealed

    async def _until(self, happened: object) -> None:
        async with self.news:
            await self.news.wait_for(lambda: happened() or self.failure)
            if self.failure:
                raise PeerError(self.failure)

    async def say(self, **facts: object) -> None:
        async with self.news:
            vars(self).update(facts)
            self.news.notify_all()


def follow(client: BlocksClient, peer: Peer, offset: int, count: int) -> BlockReader:
    return client.follow(peer, "job", VERSION, 0, len(IMAGE), offset, count)


def source_of(written: Written | None) -> Source:
    return Source(IMAGE, record_of(IMAGE), written)


@pytest.mark.parametrize(
    ("offset", "count"), [(0, len(IMAGE)), (TRANSFER_BYTES, len(IMAGE) - TRANSFER_BYTES), (0, 0)]
)
def test_what_is_sealed_is_followed_too(plane: Plane, offset: int, count: int) -> None:
    async def act() -> None:
        source = source_of(None)
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = follow(client, peer, offset, count)
            await reader.open()
            got = b""
            while len(got) < count:
                got += await reader.chunk()
            assert await reader.record() == record_of(IMAGE)
            reader.cancel()
            # The connection goes on, where there is one.
            assert await client.record(peer, "job", VERSION, 0) == record_of(IMAGE)
        assert got == IMAGE[offset : offset + count]
        assert source.pinned == 0

    asyncio.run(act())


def test_each_chunk_comes_as_soon_as_it_stands(plane: Plane) -> None:
    async def act() -> None:
        written = Written()
        source = source_of(written)
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = follow(client, peer, 0, len(IMAGE))
            await reader.open()
            stands = 0
            for chunk in whole(IMAGE):
                coming = asyncio.ensure_future(reader.chunk())
                await written.say(stands=stands + len(chunk) - 1)
                await asyncio.sleep(0.05)
                assert not coming.done()
                stands += len(chunk)
                await written.say(stands=stands)
                assert await coming == chunk
            coming = asyncio.ensure_future(reader.record())
            await asyncio.sleep(0.05)
            assert not coming.done()
            await written.say(sealed=record_of(IMAGE))
            assert await coming == record_of(IMAGE)
            reader.cancel()
        assert source.pinned == 0

    asyncio.run(act())


@pytest.mark.parametrize("stands", [0, TRANSFER_BYTES, len(IMAGE)])
@pytest.mark.parametrize("why", ["it was torn", ""])
def test_an_image_that_is_given_up_or_stands_still(plane: Plane, stands: int, why: str) -> None:
    """Who reads it is told before he would take its node for stalled."""

    async def act() -> None:
        written = Written(stands=stands)
        source = source_of(written)
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = follow(client, peer, 0, len(IMAGE))
            await reader.open()
            for _ in range(-(-stands // TRANSFER_BYTES)):
                await reader.chunk()
            coming = asyncio.ensure_future(
                reader.record() if stands == len(IMAGE) else reader.chunk()
            )
            await written.say(failure=why)
            expected = why or f"the trainer wrote no more of it for {STALL_S * PATIENCE} s"
            with pytest.raises(PeerError, match=expected) as caught:
                await coming
            assert not isinstance(caught.value, Misbehaved)
            reader.cancel()
        assert source.pinned == 0

    asyncio.run(act())


async def drained(reader: BlockReader) -> None:
    while True:
        await reader.chunk()


def test_what_is_given_up_is_sent_no_further(plane: Plane) -> None:
    """Its memory is wanted, also where the reader could have gone on for long."""
    image = bytes_of(12 * TRANSFER_BYTES)

    async def act() -> None:
        written = Written(bytearray(image), stands=len(image), digests=digests_of(image))
        source = source_of(written)
        slow = Bandwidth(32 * TRANSFER_BYTES)
        async with plane.serving(source, Holder(0), slow) as peer, plane.client() as client:
            reader = client.follow(peer, "job", VERSION, 0, len(image), 0, len(image))
            await reader.chunk()
            await written.say(failure="it was torn")
            with pytest.raises(PeerError, match="it was torn"):
                await drained(reader)
            reader.cancel()
        assert source.sent_bytes < len(image)
        assert source.pinned == 0

    asyncio.run(act())


def test_bytes_that_changed_since_they_stood_are_not_sent(plane: Plane) -> None:
    async def act() -> None:
        written = Written(stands=len(IMAGE))
        written.bytes[TRANSFER_BYTES] ^= 1
        source = source_of(written)
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = follow(client, peer, 0, len(IMAGE))
            await reader.chunk()
            with pytest.raises(PeerError, match="differ from what was sealed"):
                await reader.chunk()
            reader.cancel()
        assert [type(e) for e in source.errors] == [DamagedBytes]

    asyncio.run(act())


def test_a_reader_that_goes_away_while_it_waits(plane: Plane) -> None:
    async def act() -> None:
        source = source_of(Written(stands=TRANSFER_BYTES))
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = follow(client, peer, 0, len(IMAGE))
            await reader.chunk()
            reader.cancel()
            async with asyncio.timeout(20 * STALL_S):
                await source.released.wait()
        assert source.pinned == 0

    asyncio.run(act())


FLIPPED = bytes([IMAGE[0] ^ 1]) + IMAGE[1:]


def stream_of(image: bytes, record: Record) -> list[pb.ReadReply]:
    return [*(pb.ReadReply(chunk=chunk) for chunk in whole(image)), pb.ReadReply(seal=record)]


def other(**facts: int) -> Record:
    record = record_of(IMAGE)
    for name, value in facts.items():
        setattr(record, name, value)
    return record


LIES = {
    "other bytes": (stream_of(FLIPPED, record_of(IMAGE)), Misdeed.WRONG_BYTES, "other bytes than"),
    "another shard": (stream_of(IMAGE, other(shard=1)), Misdeed.WRONG_RECORD, "of shard 1, where"),
    "another length": (
        stream_of(IMAGE, record_of(IMAGE + b"x")),
        Misdeed.WRONG_RECORD,
        f"sealed {len(IMAGE) + 1} bytes",
    ),
    "a record too early": (
        [*stream_of(IMAGE, record_of(IMAGE))[-1:]],
        Misdeed.WRONG_STREAM,
        "sent 0 bytes at 0",
    ),
    "no record": (
        [*stream_of(IMAGE, record_of(IMAGE))[:-1], pb.ReadReply(chunk=b"x")],
        Misdeed.WRONG_STREAM,
        "sent no record|0 were expected",
    ),
}


async def read(reader: BlockReader) -> None:
    for _ in whole(IMAGE):
        await reader.chunk()
    await reader.record()


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_lies(plane: Plane, lie: str) -> None:
    """Of an image that is followed, nothing counts before its record does."""
    parts, misdeed, what = LIES[lie]

    async def act() -> None:
        async with plane.lying(script_of(*parts)) as peer, plane.client() as client:
            reader = follow(client, peer, 0, len(IMAGE))
            with pytest.raises(Misbehaved, match=what) as caught:
                await read(reader)
            reader.cancel()
        assert caught.value.misdeed == misdeed

    asyncio.run(act())


@pytest.mark.parametrize("count", [0, TRANSFER_BYTES])
def test_an_image_of_another_length_than_was_told(plane: Plane, count: int) -> None:
    """A trainer may write less than it had said: that is held against nobody."""

    async def act() -> None:
        source = source_of(None)
        async with plane.serving(source, Holder(0)) as peer, plane.client() as client:
            reader = client.follow(peer, "job", VERSION, 0, len(IMAGE) + 1, 0, count)
            with pytest.raises(PeerError, match=f"asked for, it has {len(IMAGE)}") as caught:
                await (reader.chunk() if count else reader.record())
            assert not isinstance(caught.value, Misbehaved)
            reader.cancel()
        assert source.pinned == 0

    asyncio.run(act())
