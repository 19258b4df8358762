"""What nodes and SMPs say of themselves: message to value, value to mind, mind to message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from snapshotd.core.board import Board, Policy
from snapshotd.core.instructions import Encode, Rebuild, Stage
from snapshotd.core.membership import Membership
from snapshotd.core.recovery import find_shard
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import CallerError, RequestError
from snapshotd.flow.status import Clock, node_status, plan_reply
from snapshotd.metadata import Home, SlotCounters
from snapshotd.rpc import facts as convert
from snapshotd.rpc.checks import check_step
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import trainer_pb2 as tp
from tests.fuzz import likely
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import messages, wire

_VALUES: list[tuple[type[Message], Callable[[Any], Any], Callable[[Any], Any], Any]] = [
    (pb.NodeFacts, convert.node_from, convert.node_to, likely.nodes()),
    (pb.Orders, convert.orders_from, convert.orders_to, likely.orders),
    (pb.SlotFacts, convert.slot_from, convert.slot_to, likely.slots),
    (pb.JobFacts, convert.job_from, convert.job_to, likely.job_facts()),
]


def _wire_of(index: int) -> st.SearchStrategy[bytes]:
    kind, _, to, values = _VALUES[index]
    return wire(values.map(to) | messages(kind))


@st.composite
def _valued(draw: Any) -> list[bytes]:
    index = draw(st.integers(0, len(_VALUES) - 1))
    return [bytes([index]), draw(_wire_of(index))]


def parsed(kind: type[Message], data: bytes) -> Any:
    """A message; None where gRPC or ZeroMQ would have refused the bytes."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def values(parts: Parts) -> None:
    """What is taken in as a value can be said to others, and means the same to them."""
    if len(parts) != 2 or len(parts[0]) != 1 or parts[0][0] >= len(_VALUES):
        return
    kind, from_, to, _ = _VALUES[parts[0][0]]
    message = parsed(kind, parts[1])
    if message is None:
        return
    try:
        value = from_(message)
    except RequestError:
        return
    assert from_(kind.FromString(to(value).SerializeToString())) == value


def _board() -> Board:
    membership = Membership(
        cluster_id="test",
        node="n0",
        boot="1",
        address="127.0.0.1:1",
        seeds={"n1": "127.0.0.1:3"},
        suspect_s=2.0,
        dead_s=5.0,
    )
    return Board(membership, Policy(2, 1, 1.0, 4, replace_s=9.0, epoch_floor=7))


def board(parts: Parts) -> None:
    """A supervisor hears anything: whatever it then says must be taken by the others."""
    mind, clock = _board(), Clock()
    mind.conclude(0.0)
    for number, part in enumerate(parts):
        now_s = float(number)
        try:
            if part[:1] == b"N" and (facts := parsed(pb.NodeFacts, part[1:])):
                mind.hear(convert.node_from(facts), now_s)
                mind.conclude(now_s)
            elif part[:1] == b"S" and (slot := parsed(pb.SlotFacts, part[1:])):
                mind.slot_changed(convert.slot_from(slot), now_s)
            elif part[:1] == b"D":
                mind.drop("job", now_s)
        except CallerError:
            continue
        mind.conclude(now_s + 0.5)
        _told(mind, clock, now_s + 0.5)


def _told(mind: Board, clock: Clock, now_s: float) -> None:
    convert.node_from(pb.NodeFacts.FromString(convert.node_to(mind.facts).SerializeToString()))
    message = convert.orders_to(mind.orders(now_s)).SerializeToString()
    convert.orders_from(pb.Orders.FromString(message))
    clock.watch(mind, now_s)
    node_status(mind, clock, now_s).SerializeToString()
    for job in ("job", "other", "none"):
        plan_reply(mind, job, now_s).SerializeToString()


def slot(parts: Parts) -> None:
    """An SMP's mind hears anything of the others and from its trainer."""
    mind = SlotMachine(Home("n0", 0), 2)
    for number, part in enumerate(parts):
        now_s = float(number)
        try:
            if part[:1] == b"O" and (orders := parsed(pb.Orders, part[1:])):
                mind.orders = convert.orders_from(orders)
            elif part[:1] == b"S" and (held := parsed(pb.SlotFacts, part[1:])):
                _keep(mind, convert.slot_from(held))
            elif part[:1] == b"T" and (said := parsed(tp.ToDaemon, part[1:])):
                _hear(mind, said, now_s)
        except RequestError:
            continue
        _carry_out(mind, now_s)
        convert.slot_from(convert.slot_to(mind.facts("127.0.0.1:9", SlotCounters())))
        for job in mind.orders.jobs:
            mind.why_not_protected(job)


def _keep(mind: SlotMachine, facts: Any) -> None:
    for holding in (*facts.data, *facts.parity):
        mind.keep(holding)
    if facts.trainer is not None:
        mind.attach(replace(facts.trainer, skipped=0))  # a desk takes no count of skips over


def _hear(mind: SlotMachine, said: tp.ToDaemon, now_s: float) -> None:
    match said.WhichOneof("body"):
        case "restore":
            mind.ask_restore(allow_fresh=said.restore.allow_fresh)
        case "claim":
            check_step(said.claim.step)
            mind.claim(said.claim.step, said.claim.image_bytes, now_s)
        case "pass":
            step = getattr(said, "pass").step
            check_step(step)
            mind.passed(step)
        case "detach":
            mind.detach()


def _carry_out(mind: SlotMachine, now_s: float) -> None:
    for instruction in mind.instructions(now_s):
        match instruction:
            case Stage(decision):
                assert mind.trainer is not None
                assert decision.restore is not None
                version, shard = decision.restore, mind.trainer.shard
                find_shard(mind.orders.peers, decision.job, shard, version, mind.home)
                mind.staged(decision.id)
            case Encode():
                mind.encode_failed(instruction, now_s)
            case Rebuild():
                mind.rebuild_failed(instruction, now_s)
    mind.next_wake_s()


def _marked(mark: bytes, part: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return part.map(lambda data: mark + data)


def _seldom(value: Any, kind: type[Message], to: Callable[[Any], Message]) -> Any:
    """Well formed most often: what is refused at the door teaches nothing about the mind."""
    plain = value.map(lambda v: to(v).SerializeToString())
    return plain | plain | plain | wire(value.map(to) | messages(kind))


_NODES = _marked(b"N", _seldom(likely.nodes(), pb.NodeFacts, convert.node_to))
_SLOTS = _marked(b"S", _seldom(likely.slots, pb.SlotFacts, convert.slot_to))
_ORDERS = _marked(b"O", _seldom(likely.orders, pb.Orders, convert.orders_to))
_TRAINER = _marked(b"T", wire(messages(tp.ToDaemon, 2)))

TARGETS = [
    Target("values", _valued(), values, 250),
    Target("board", st.lists(_NODES | _SLOTS | st.just(b"D"), max_size=6), board, 100),
    Target("slot", st.lists(_ORDERS | _SLOTS | _TRAINER | _TRAINER, max_size=8), slot, 120),
]
