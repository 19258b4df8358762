"""What other slots answer when blocks are asked of them: copies, decodes and encodes."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from snapshotd.coding.codec import ZfecCodec
from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.core.instructions import Encode
from snapshotd.core.protection import parity_homes
from snapshotd.core.recovery import Copy, Decode, Local, Missing, find_shard
from snapshotd.core.stripes import block_extent, parity_bytes, stripe
from snapshotd.errors import SnapshotdError
from snapshotd.flow.coder import Coder
from snapshotd.flow.transfer import Transfers
from snapshotd.metadata import DataHolding, Home, ParityHolding, ParityPlace, SlotFacts
from snapshotd.rpc.block_client import BlocksClient
from snapshotd.rpc.block_reader import BlockReader
from snapshotd.rpc.block_writer import BlockWriter
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.convert import place_to
from snapshotd.rpc.framing import parse_reply
from snapshotd.rpc.serving import What
from snapshotd.rpc.streaming import Bandwidth
from snapshotd.wire.protocol import grain_bytes
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import changed, messages, spoiled
from tests.fuzz.room import GROUP, HERE, VERSION, Memory, orders, room, run, watched
from tests.fuzz.targets.blocks import IMAGES, SIZES, seal

CODEC = ZfecCodec()
PEERS = [m.home for m in GROUP.members if m.home != HERE]


def _coded(index: int) -> tuple[ParityPlace, bytes]:
    """The one parity block of a stripe."""
    layout = stripe(3, 1, index)
    place = ParityPlace(GROUP.shards, 1, index, 0)
    length = parity_bytes(place, SIZES)
    blocks = []
    for source in layout.sources:
        extent = block_extent(SIZES[source.position], 2, source.block)
        data = IMAGES[source.position][extent.offset : extent.offset + extent.length]
        blocks.append(memoryview(data.ljust(length, b"\0")))
    return place, CODEC.encode(2, 1, blocks, [0])[0]


CODED = dict(_coded(index) for index in range(3))
HOLDERS = dict(parity_homes(GROUP))


def _record(place: ParityPlace) -> seg.ParityRecord:
    return seg.ParityRecord(
        place=place_to(place),
        group=[seal(s) for s in GROUP.shards],
        image_bytes=len(CODED[place]),
        grain_digests=grain_digests(memoryview(CODED[place])),
    )


def _truth(what: int | ParityPlace, offset: int, count: int) -> list[pb.ReadReply]:
    """What an honest node answers."""
    if isinstance(what, ParityPlace):
        first, image = pb.ReadReply(parity=_record(what)), CODED[what]
    else:
        first, image = pb.ReadReply(seal=seal(what)), IMAGES[what]
    return [first, *([pb.ReadReply(chunk=image[offset : offset + count])] if count else [])]


class _Reply:
    """The replies of a call that another node answers as it likes; then it ends, or breaks off."""

    def __init__(self, replies: list[bytes]) -> None:
        self._replies = iter(replies)

    async def read(self) -> Any:
        data = next(self._replies, None)
        if data is None:
            return grpc.aio.EOF
        try:
            return parse_reply(data)
        except DecodeError:
            return None  # as gRPC gives

    def cancel(self) -> None: ...


class _Taker:
    """A holder that takes everything."""

    def done(self) -> bool:
        return False

    async def write(self, request: Any) -> None: ...

    async def done_writing(self) -> None: ...

    def cancel(self) -> None: ...

    def __await__(self) -> Any:
        return iter(())


class _Client(BlocksClient):
    """Reads are answered truly, but for one of them."""

    def __init__(self, lie: int, replies: list[bytes]) -> None:
        self._lie, self._replies, self._calls = lie, replies, 0
        super().__init__(Channels(None), "test", HERE, 5.0, lambda _: None, lambda _: None)

    def _reader(self, peer: Peer, request: pb.ReadRequest, what: What) -> BlockReader:
        truth = _truth(what, request.offset, request.bytes)
        if request.unsealed:
            truth = [*truth[1:], truth[0]]
        answer: Any = _Reply(self._answers(truth))
        self._calls += 1
        return BlockReader(answer, peer, self._channels, request, what, 5.0, lambda _: None)

    def _answers(self, truth: list[pb.ReadReply]) -> list[bytes]:
        if self._calls != self._lie:
            return [reply.SerializeToString() for reply in truth]
        left, answers = iter(truth), []
        for reply in self._replies:
            true = next(left, None) or truth[-1]
            if reply[:1] == b"=":
                answers.append(reply[1:])
            else:
                answers.append(_distorted(true, reply).SerializeToString())
        return answers

    def store(self, peer: Peer, **facts: Any) -> BlockWriter:
        taker: Any = _Taker()
        return BlockWriter(
            taker, pb.StoreOpening(), peer, self._channels, 5.0, lambda _: None, Bandwidth()
        )


def _facts() -> dict[Home, SlotFacts]:
    """The other nodes hold their shards and parity, so that ours can be decoded."""
    digests = tuple(seal(s).content_digest for s in GROUP.shards)
    found = {}
    for shard, home in enumerate(m.home for m in GROUP.members):
        data = DataHolding("job", shard, VERSION, SIZES[shard], digests[shard])
        parity = tuple(
            ParityHolding("job", VERSION, place, len(CODED[place]), digests, tuple(SIZES))
            for place, holder in HOLDERS.items()
            if holder == home
        )
        found[home] = SlotFacts(0, f"127.0.0.{shard}:9", data=(data,), parity=parity)
    return {home: facts for home, facts in found.items() if home in PEERS}


async def _work(memory: Memory, how: str, lie: int, replies: list[bytes]) -> None:
    await memory.vault.adopt()
    peers = _facts()
    memory.machine.orders = orders(peers)
    tools = HERE, memory.vault, _Client(lie, replies), CODEC, memory.conduct
    transfers = Transfers(*tools)
    try:
        if how == "encode":
            await memory.seal(0, IMAGES[0])
            await Coder(*tools).encode(_encode(), lambda: peers)
        else:
            shard = 1 if how == "copy" else 0
            match find_shard(peers, "job", shard, VERSION, HERE):
                case Copy() as plan:
                    await transfers.copy(plan, peers)
                case Decode() as plan:
                    await transfers.decode(plan, peers)
                case Local() | Missing() as other:
                    raise AssertionError(other)
            held = memory.vault.segment("job", VERSION, shard)
            with held.image(len(IMAGES[shard])) as image:
                assert bytes(image) == IMAGES[shard], "wrong bytes were taken"
    except SnapshotdError:
        pass
    held_count = len(memory.vault.held())
    assert sum(not s.is_available for s in memory.arena.segments) == held_count
    memory.arena.close()


def _encode() -> Encode:
    return Encode("job", 5, VERSION, GROUP, 0, (0,), tuple(SIZES))


def transfers(parts: Parts) -> None:
    """Whatever another node answers: the very bytes that were sealed are taken, or nothing is."""
    if len(parts) < 2 or parts[0] not in (b"copy", b"decode", b"encode") or len(parts[1]) != 1:
        return
    with room() as path, watched(path):
        run(_work(Memory(path), parts[0].decode(), parts[1][0], list(parts[2:])))


@st.composite
def _answers(draw: Any) -> list[bytes]:
    """Replies: T true, L of another length, B with a flipped bit, R of others' records, = any."""
    how = draw(st.sampled_from(["copy", "decode", "encode"]))
    first = draw(st.sampled_from([b"T", b"L", b"L", b"R"]))
    second = draw(st.sampled_from([b"T", b"T", b"B", b"L"]))
    lengths = st.sampled_from([1, 8193, 12288, 16384, 1 << 21, 1 << 29, 2**63])
    stream = [part + draw(lengths).to_bytes(8, "little") for part in (first, second)]
    what = draw(st.sampled_from([0, 1, 2, *CODED]))
    some = draw(changed(st.sampled_from(_truth(what, 0, 4096))) | messages(pb.ReadReply, 3))
    strange = b"=" + draw(spoiled(st.just(some.SerializeToString()), 1))
    match draw(st.sampled_from(["", "", "", "any", "first", "cut", "mix", "more"])):
        case "any":
            stream.insert(draw(st.integers(0, 2)), strange)
        case "first":
            stream[0] = strange
        case "cut":
            stream = stream[:1]
        case "mix":
            stream.reverse()
        case "more":
            stream += [stream[1]] * 3
    return [how.encode(), bytes([draw(st.integers(0, 5))]), *stream]


def _distorted(true: pb.ReadReply, how: bytes) -> pb.ReadReply:
    made = pb.ReadReply()
    made.CopyFrom(true)
    number = int.from_bytes(how[1:9], "little")
    part = made.WhichOneof("part")
    if how[:1] == b"L" and part == "chunk":
        made.chunk = made.chunk[:number]
    elif how[:1] == b"B" and made.chunk:
        at = number % len(made.chunk)
        made.chunk = made.chunk[:at] + bytes([made.chunk[at] ^ 1]) + made.chunk[at + 1 :]
    elif how[:1] == b"L" and part == "seal":
        made.seal.CopyFrom(_other_length(made.seal, number))
    elif how[:1] == b"L" and part == "parity":
        made.parity.image_bytes = number
        for record in made.parity.group:
            record.CopyFrom(_other_length(record, number))
    elif how[:1] == b"R" and part == "parity":
        del made.parity.group[number % len(made.parity.group)]
    elif how[:1] == b"R":
        made.parity.CopyFrom(_record(next(iter(CODED))))
    return made


def _other_length(record: seg.SealRecord, image_bytes: int) -> seg.SealRecord:
    """A record that does not contradict itself, of another image than was asked for."""
    made = seg.SealRecord()
    made.CopyFrom(record)
    made.image_bytes = image_bytes
    grains = -(-image_bytes // grain_bytes(image_bytes))
    if len(made.grain_digests) != 16 * grains and grains <= 1024:
        made.grain_digests = bytes(16 * grains)
        made.content_digest = content_digest(made.grain_digests)
    return made


TARGETS = [Target("transfers", _answers(), transfers, 120)]
