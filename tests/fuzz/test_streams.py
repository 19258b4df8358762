"""Streams of a parity block, one by one: each is refused by name, and held against its sender."""

from __future__ import annotations

from typing import Any

import pytest

from snapshotd.core.recovery import Decode, find_shard
from snapshotd.core.trust import FIRST_PAUSE_S, Misdeed
from snapshotd.errors import DamagedBytes, PeerError
from snapshotd.flow.transfer import Transfers
from snapshotd.metadata import Orders
from snapshotd.rpc.block_service import BlocksService
from snapshotd.rpc.framing import parse_request
from snapshotd.rpc.serving import Serving
from snapshotd.wire.v1 import node_pb2 as pb
from tests.fuzz.room import HERE, VERSION, Memory, orders, room, run
from tests.fuzz.targets import blocks as fuzz
from tests.fuzz.targets import transfers as lies

OPENING = pb.StoreRequest(opening=fuzz.OPENING)
CHUNK = pb.StoreRequest(chunk=fuzz.BLOCK)
RECORD = pb.StoreRequest(record=fuzz.RECORD)


def record(**wrong: Any) -> pb.StoreRequest:
    made = pb.StoreRequest(record=fuzz.RECORD)
    for name, value in wrong.items():
        made.record.ClearField(name)
        if value is not None:
            setattr(made.record, name, value)
    return made


def other_sizes() -> pb.StoreRequest:
    """Shards of other lengths than were announced, of the same parity."""
    made = pb.StoreRequest(record=fuzz.RECORD)
    longest = max(made.record.group, key=lambda r: r.image_bytes)
    for sealed in made.record.group:
        if sealed.image_bytes != longest.image_bytes:
            shard = sealed.shard
            sealed.CopyFrom(longest)
            sealed.shard = shard
    return made


WRONG = [
    ("opened twice", [OPENING, OPENING], Misdeed.WRONG_STREAM, "unexpected part behind 0 of"),
    ("an empty part", [OPENING, pb.StoreRequest()], Misdeed.WRONG_STREAM, "unexpected part"),
    (
        "empty chunks without end",
        [OPENING, *[pb.StoreRequest(chunk=b"")] * 9],
        Misdeed.WRONG_STREAM,
        "0 bytes where",
    ),
    ("a trickle", [OPENING, pb.StoreRequest(chunk=b"x")], Misdeed.WRONG_STREAM, "1 bytes where"),
    ("more than announced", [OPENING, CHUNK, CHUNK], Misdeed.WRONG_STREAM, "unexpected part"),
    ("less than announced", [OPENING, RECORD], Misdeed.WRONG_STREAM, "ended after 0 of"),
    ("what is no message", [OPENING, None], Misdeed.WRONG_STREAM, ""),
    ("no shards", [OPENING, CHUNK, record(group=None)], Misdeed.WRONG_RECORD, "other shards"),
    ("other lengths", [OPENING, CHUNK, other_sizes()], Misdeed.WRONG_RECORD, "bytes"),
    (
        "wrong digests",
        [OPENING, CHUNK, record(grain_digests=bytes(len(fuzz.RECORD.grain_digests)))],
        Misdeed.WRONG_BYTES,
        "damaged on its way",
    ),
]


async def stream(parts: list[Any]) -> Any:
    for part in parts:
        yield parse_request(part.SerializeToString()) if part is not None else b"garbage"


async def refused(service: BlocksService, parts: list[Any]) -> str:
    with pytest.raises(fuzz.Aborted) as caught:
        await service.Store(stream(parts), fuzz.Call())
    return caught.value.details


@pytest.mark.parametrize(
    ("parts", "misdeed", "what"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_wrong_stream(parts: list[Any], misdeed: Misdeed, what: str) -> None:
    async def act(memory: Memory) -> None:
        await memory.vault.adopt()
        memory.machine.orders = orders()
        service = BlocksService(Serving(memory.vault, memory.intake, "test", 5.0, None))
        assert what in await refused(service, parts)
        (held,) = memory.conduct._trust.accusations(0.0)
        assert (held.node, held.what, held.count) == ("n1", misdeed.value, 1)
        # Once is no reason to send an honest node away: the right block is taken, and clears it.
        await service.Store(stream([OPENING, CHUNK, RECORD]), fuzz.Call())
        assert [v for _, v, _ in memory.vault.held()] == [VERSION]
        assert memory.conduct._trust.accusations(0.0) == ()
        for _ in range(3):
            await refused(service, parts)
        assert memory.conduct._trust.accusations(0.0)[0].cut_off_s == FIRST_PAUSE_S
        assert "is cut off for" in await refused(service, [OPENING, CHUNK, RECORD])
        memory.arena.close()

    with room() as path:
        run(act(Memory(path)))


def test_parity_whose_epoch_ends_while_it_comes() -> None:
    """It was wanted when it began, and is not when it is whole; nobody is to blame."""

    async def act(memory: Memory) -> None:
        await memory.vault.adopt()
        memory.machine.orders = orders()
        service = BlocksService(Serving(memory.vault, memory.intake, "test", 5.0, None))

        async def parts() -> Any:
            yield parse_request(OPENING.SerializeToString())
            yield parse_request(CHUNK.SerializeToString())
            memory.machine.orders = Orders()
            yield parse_request(RECORD.SerializeToString())

        with pytest.raises(fuzz.Aborted) as caught:
            await service.Store(parts(), fuzz.Call())
        assert f"parity of epoch {VERSION.epoch} came while" in caught.value.details
        assert memory.vault.held() == ()
        assert all(segment.is_available for segment in memory.arena.segments)
        assert memory.conduct._trust.accusations(0.0) == ()
        memory.arena.close()

    with room() as path:
        run(act(Memory(path)))


def test_parity_that_is_not_the_code_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digests are right, its record too; only what is decoded from it shows the lie."""
    place = next(p for p, home in lies.HOLDERS.items() if home.node == "n1")
    monkeypatch.setitem(lies.CODED, place, bytes(len(lies.CODED[place])))

    async def act(memory: Memory) -> None:
        await memory.vault.adopt()
        peers = lies._facts()
        client = lies._Client(-1, [])
        transfers = Transfers(HERE, memory.vault, client, lies.CODEC, memory.conduct)
        plan = find_shard(peers, "job", 0, VERSION, HERE)
        assert isinstance(plan, Decode)
        for count in (1, 2, 3):
            with pytest.raises(DamagedBytes, match="decoded wrongly"):
                await transfers.decode(plan, peers)
            (held,) = memory.conduct.accusations()
            assert (held.node, held.what) == ("n1", Misdeed.WRONG_STRIPE.value)
            assert held.count >= count
            if held.cut_off_s:
                break
        with pytest.raises(PeerError, match="n1 sent wrong blocks, and is cut off"):
            await transfers.decode(plan, peers)
        assert memory.vault.held() == ()
        memory.arena.close()

    with room() as path:
        run(act(Memory(path)))
