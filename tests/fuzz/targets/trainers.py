"""What trainers say on a slot's socket: any frames, in any state, with a desk that really works."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import strategies as st

from snapshotd.coding.codec import ZfecCodec
from snapshotd.errors import NoRoom, PeerError, RequestError
from snapshotd.flow.desk import TrainerDesk
from snapshotd.flow.lending import Lending
from snapshotd.flow.ranges import Gatherer
from snapshotd.flow.smp import Smp
from snapshotd.metadata import SlotFacts
from snapshotd.rpc import facts as convert
from snapshotd.rpc.trainers import _answer
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import trainer_pb2 as tp
from tests.fuzz import likely
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import changed, messages, spoiled
from tests.fuzz.room import BUDGET_BYTES, GROUP, HERE, Memory, orders, room, run, watched
from tests.fuzz.targets.facts import parsed


class _Rooms:
    """What does not fit never will: nobody waits for room."""

    def check_ever(self, image_bytes: int) -> None:
        raise NoRoom(f"{image_bytes} bytes are too many")

    def check_all(self, image_bytes: int) -> None:
        """There is room to begin."""


class _Transfers:
    """No peer is there."""

    async def copy(self, *_: object) -> None:
        raise PeerError("nobody is there")

    decode = encode = copy


class _Nobody:
    """No peer answers."""

    async def record(self, *_: object) -> None:
        raise PeerError("nobody is there")

    def read_ranges(self, *_: object) -> None:
        raise PeerError("nobody is there")


class _Socket:
    """Takes what the desk sends unasked."""

    async def send(self, identity: bytes, message: tp.ToTrainer) -> None:
        message.SerializeToString()


class _Link:
    """Takes the facts; what the supervisor would refuse is a bug."""

    def publish(self, facts: SlotFacts) -> None:
        convert.slot_from(pb.SlotFacts.FromString(convert.slot_to(facts).SerializeToString()))


def _preflight(image_bytes: int) -> None:
    if image_bytes > BUDGET_BYTES:
        raise NoRoom("too much")


async def _converse(memory: Memory, parts: Parts) -> None:
    await memory.vault.adopt()
    link: Any = _Link()
    transfers: Any = _Transfers()
    rooms: Any = _Rooms()
    lock = memory.shm / "trainer.lock"
    tools = transfers, transfers, link, lock, rooms, memory.conduct
    smp = Smp(memory.machine, memory.vault, *tools)
    socket: Any = _Socket()
    nobody: Any = _Nobody()
    gatherer = Gatherer(
        HERE, memory.vault, nobody, ZfecCodec(), memory.conduct, smp.reachable, attempts=2
    )
    smp.lending = Lending(memory.machine, memory.vault, gatherer)
    smp.desk = TrainerDesk(smp, socket, "test", _preflight, lambda: "i0", lambda _: None)
    serving = asyncio.create_task(smp.run())
    try:
        for part in parts:
            await _event(smp, part)
            for _ in range(6):
                await asyncio.sleep(0)
            assert not serving.done(), serving.exception()
        async with asyncio.timeout(20):
            await _settled(smp)
        assert not serving.done(), serving.exception()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await smp.stop()
        await asyncio.sleep(0)
    smp.forget_trainer()
    await _settled(smp)
    held = len(memory.vault.held())
    assert sum(not s.is_available for s in memory.arena.segments) == held
    assert memory.arena.allocated_bytes <= BUDGET_BYTES
    memory.arena.close()


async def _settled(smp: Smp) -> None:
    """Until no grant and no seal is under way."""
    while smp._tasks:
        await asyncio.gather(*smp._tasks, return_exceptions=True)
        await asyncio.sleep(0)


async def _event(smp: Smp, part: bytes) -> None:
    desk = smp.desk
    assert desk is not None
    if part[:1] == b"O":
        message = parsed(pb.Orders, part[1:])
        try:
            smp.machine.orders = convert.orders_from(message) if message else orders()
        except RequestError:
            return
        smp.wake()
    elif part[:1] == b"G":  # the good supervisor
        smp.machine.orders = orders()
        smp.wake()
    elif part[:1] == b"W" and smp.buffer.filling is not None:
        # An honest trainer writes what it was granted.
        written = tp.Written(
            step=smp.buffer.filling.version.step,
            buffer=smp.buffer.filling.segment.name,
            image_bytes=smp.buffer.filling.image_bytes,
        )
        await _answer(b"1", [_said(written=written)], desk.handle)
    elif part[:1] == b"F":
        frames = [bytes(f) for f in part[1:].split(b"\xfe\xed")]
        reply = await _answer(b"1", frames, desk.handle)
        if reply is not None:
            reply.SerializeToString()


def _said(**body: Any) -> bytes:
    return tp.ToDaemon(protocol=1, request=1, incarnation="i0", **body).SerializeToString()


def trainers(parts: Parts) -> None:
    """Every frame gets an answer or a refusal; the SMP goes on, and keeps no buffer for ever."""
    with room() as path, watched(path):
        run(_converse(Memory(path), parts))


_ATTACHED = tp.Attach(
    job="job", run_id="r", shard=0, world=GROUP.size, decision=pb.DecisionId(epoch=5, node="n0")
)
_USUAL = [
    _said(attach=_ATTACHED),
    _said(attach=tp.Attach(job="job", run_id="r", shard=0, world=3)),
    _said(restore=tp.Restore()),
    _said(claim=tp.Claim(step=1, image_bytes=9000, patience_s=0.001)),
    _said(claim=tp.Claim(step=2, image_bytes=0, patience_s=0.001)),
    _said(claim=tp.Claim(step=3, image_bytes=2**63, patience_s=float("nan"))),
    _said(claim=tp.Claim(step=2**63, image_bytes=1, patience_s=0.0)),
    _said(written=tp.Written(step=1, buffer="data-0.seg", image_bytes=9000, manifest_bytes=10)),
    _said(**{"pass": tp.Pass(step=1)}),
    _said(**{"pass": tp.Pass(step=2**64 - 1)}),
    _said(manifests=tp.Manifests()),
    _said(manifests=tp.Manifests(shards=[0, 0, 7])),
    _said(fill=tp.Fill(image_bytes=9000, shards=[0], offsets=[0], lengths=[4096], to=[1])),
    _said(fill=tp.Fill(image_bytes=2**63, shards=[1], offsets=[2**63], lengths=[1], to=[0])),
    _said(query=tp.Query()),
    _said(detach=tp.Detach()),
]


@st.composite
def _frames(draw: Any) -> bytes:
    usual = st.sampled_from(_USUAL)
    some = draw(
        usual
        | usual
        | usual.flatmap(
            lambda m: changed(st.just(tp.ToDaemon.FromString(m))).map(
                lambda c: c.SerializeToString()
            )
        )
        | messages(tp.ToDaemon, 3).map(lambda m: m.SerializeToString())
    )
    frame = draw(spoiled(st.just(some), 1))
    return b"F" + b"\xfe\xed".join([frame, *draw(st.sampled_from([[], [], [], [b""], [frame]]))])


_ORDERS = likely.orders.map(lambda o: b"O" + convert.orders_to(o).SerializeToString())
_TALK = st.lists(
    _frames() | _frames() | _frames() | st.just(b"G") | st.just(b"W") | _ORDERS, max_size=9
)

TARGETS = [
    Target(
        "trainers",
        _TALK.map(lambda talk: [b"G", b"F" + _USUAL[0], *talk]) | _TALK,
        trainers,
        80,
    )
]
