"""Whatever a node says to another: it hears what is wrong, and the job goes on."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from snapshotd.core.protection import parity_homes
from snapshotd.core.stripes import parity_bytes
from snapshotd.metadata import Home
from snapshotd.rpc.convert import decision_from, place_to
from snapshotd.wire.protocol import MAX_CONTROL_BYTES, PROTOCOL_VERSION
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.integration import wires
from tests.integration.cluster import PORT, TIMEOUTS, Node, eventually
from tests.integration.steady import Steady

GARBAGE = b"\xff\x00 this is no message \xc3\x28" * 8
OVERSIZED = bytes(MAX_CONTROL_BYTES + 1024)
DIGEST = b"d" * 16


# -- the node service


def facts(**wrong: object) -> pb.NodeFacts:
    stranger = {
        "protocol": PROTOCOL_VERSION,
        "cluster_id": "test",
        "node": "stranger",
        "boot": "1",
        "sequence": 1,
        "address": "127.0.0.1:1",
    }
    return pb.NodeFacts(**{**stranger, **wrong})


def slot(**wrong: object) -> pb.SlotFacts:
    return pb.SlotFacts(address="127.0.0.1:2", **wrong)


def trainer(**wrong: object) -> pb.SlotFacts:
    right = {"job": "job", "shard": 0, "world": 2, "incarnation": "i", "waiting": True}
    return slot(trainer=pb.TrainerFacts(**{**right, **wrong}))


def parity(**wrong: object) -> pb.SlotFacts:
    place = seg.ParityPlace(shards=[0, 1], parity=1, stripe=0, row=0)
    right = {"job": "job", "place": place, "content_digests": [DIGEST] * 2, "shard_bytes": [1, 2]}
    return slot(parity=[pb.ParityHolding(**{**right, **wrong})])


def place(**wrong: object) -> seg.ParityPlace:
    return seg.ParityPlace(**{"shards": [0, 1], "parity": 1, "stripe": 0, "row": 0, **wrong})


def decided(**wrong: object) -> pb.JobFacts:
    who = [pb.Incarnation(shard=0, id="i")]
    group = pb.Group(members=[pb.Member(home=pb.Home(node="a"))])
    right = {"job": "job", "world": 1, "incarnations": who, "tier": 1, "groups": [group]}
    outcome = {} if "refusal" in wrong else {"fresh": pb.Fresh()}
    return pb.JobFacts(job="job", decision=pb.Decision(**{**right, **outcome, **wrong}))


def pending(lineage: int = 0, **wrong: object) -> pb.JobFacts:
    return pb.JobFacts(job="job", lineage=lineage, pending=decided(**wrong).decision)


MALFORMED = [
    ("no node id", facts(node=""), "without a node id"),
    ("an endless node id", facts(node="n" * 300), "a node id or boot of 300 characters"),
    ("a nameless member", facts(members=[pb.PeerAddress(address="a:1")]), "of 0 characters"),
    (
        "too many members",
        facts(members=[pb.PeerAddress(node=f"n{i}", address="a:1") for i in range(20_000)]),
        "20000 members, at most",
    ),
    ("a wild slot", facts(slots=[slot(slot=70)]), "local rank 70 is beyond"),
    ("a nameless job", facts(slots=[trainer(job="")]), "takes 0 bytes"),
    ("an endless world", facts(slots=[trainer(world=2**32 - 1)]), "a world of 4294967295"),
    ("rank beyond world", facts(slots=[trainer(shard=2)]), "rank 2 of a world of 2"),
    (
        "a short digest",
        facts(slots=[slot(data=[pb.DataHolding(job="job", content_digest=b"d")])]),
        "a digest of 1 bytes where 16",
    ),
    ("a row too many", facts(slots=[parity(place=place(row=1))]), "parity row 1 of 1"),
    ("a stripe too many", facts(slots=[parity(place=place(stripe=2))]), "stripe 2 of 2 shards"),
    ("a shard twice", facts(slots=[parity(place=place(shards=[1, 1]))]), "a shard twice"),
    ("a huge group", facts(slots=[parity(place=place(shards=range(999)))]), "group of 999 shards"),
    ("sizes missing", facts(slots=[parity(shard_bytes=[1])]), "does not describe each shard"),
    ("a nameless job's facts", facts(jobs=[pb.JobFacts()]), "takes 0 bytes"),
    ("a decision for nobody", facts(jobs=[decided(world=5)]), "a decision for 5 ranks names 1"),
    ("no outcome", facts(jobs=[decided(tier=0)]), "without an outcome"),
    ("another job's decision", facts(jobs=[decided(job="x")]), "carry a decision of 'x'"),
    ("another job's pending one", facts(jobs=[pending(job="x")]), "carry a decision of 'x'"),
    (
        "not released",
        facts(jobs=[decided(id=pb.DecisionId(epoch=3))]),
        "a decision that was not released counts as that of epoch 0",
    ),
    ("a refusal in force", facts(jobs=[decided(refusal="no")]), "was not released"),
    ("over already", facts(jobs=[pending(lineage=4)]), "not newer than epoch 4"),
    (
        "a shard beyond the world",
        facts(jobs=[decided(groups=[pb.Group(members=[pb.Member(shard=1)])])]),
        "for 1 ranks are of other shards",
    ),
    ("no groups", facts(jobs=[decided(groups=[])]), "for 1 ranks are of other shards"),
    (
        "a group of none",
        facts(jobs=[decided(groups=[pb.Group(parity=1)])]),
        "a group of 0 with 1 parity",
    ),
]


@pytest.mark.parametrize(
    ("message", "what"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED]
)
def test_facts_that_make_no_sense(steady: Steady, node: Node, message: Any, what: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wires.call(node.address, "Node/Exchange", pb.Telling(whole=message))
    code, details = wires.refusal(caught.value)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert what in details
    assert "stranger" not in {m.node for m in node.status().members}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"cluster_id": "other"}, "belongs to cluster 'other', n0 to 'test'. Correct cluster_id"),
        ({"protocol": 2}, "speaks protocol 2, n0 speaks 1. Install the same version on both"),
        ({"node": "n0"}, "node id 'n0' is in use by a live daemon at"),
        ({"node": "n1"}, "node id 'n1' is in use by a live daemon at"),
    ],
)
def test_facts_of_who_does_not_belong_here(
    steady: Steady, node: Node, wrong: dict[str, object], what: str
) -> None:
    told = pb.Telling(whole=facts(**wrong, boot="9" * 25))
    with pytest.raises(grpc.RpcError) as caught:
        wires.call(node.address, "Node/Exchange", told)
    code, details = wires.refusal(caught.value)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert what in details
    steady.cluster.met()


@pytest.mark.parametrize("method", ["Exchange", "Status", "Inventory", "Plan", "Drop", "Nothing"])
@pytest.mark.parametrize("message", [GARBAGE, OVERSIZED], ids=["garbage", "oversized"])
def test_bytes_that_are_no_message(steady: Steady, node: Node, method: str, message: bytes) -> None:
    with pytest.raises(grpc.RpcError):
        wires.call(node.address, f"Node/{method}", message)


def test_bytes_that_are_no_http(steady: Steady, node: Node) -> None:
    for address in (node.address, wires.blocks(node).address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(GARBAGE * 100)


def test_dropping_what_must_stay(steady: Steady, node: Node) -> None:
    for job, what in (
        ("job", "has trainers on n0/0, n1/0. End it"),
        ("none", "no live node knows"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            wires.call(node.address, "Node/Drop", pb.DropRequest(job=job))
        assert what in wires.refusal(caught.value)[1]
    plan = wires.call(node.address, "Node/Plan", pb.PlanRequest(job="../none"), pb.PlanReply)
    assert not plan.restorable
    assert "no live node knows a job '../none'" in plan.reason


# -- blocks


def committed(node: Node) -> pb.JobFacts:
    return next(j for j in node.status().jobs if j.job == "job")


def wanted(node: Node, **wrong: object) -> pb.ReadRequest:
    right = {
        "protocol": PROTOCOL_VERSION,
        "cluster_id": "test",
        "job": "job",
        "version": committed(node).committed,
        "shard": 0,
    }
    return pb.ReadRequest(**{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"protocol": 9}, "speaks protocol 9, this node 1"),
        ({"cluster_id": "other"}, "belongs to cluster 'other', this node to 'test'"),
        ({"shard": 5}, "shard 5 of job 'job'"),
        ({"job": "../job"}, "job '../job'"),
        ({"version": seg.Version(epoch=2**40, step=7)}, "is not held by n0/0"),
        ({"offset": 2**63, "bytes": 2**63}, "were asked of an image of"),
        ({"offset": 0, "bytes": 2**40}, "were asked of an image of"),
        ({"offset": 5, "bytes": 5}, "are not whole grains"),
        ({"offset": 0, "bytes": 5}, "are not whole grains"),
        ({"shard": None}, "parity row 0 of 0"),
        ({"shard": None, "place": place(stripe=7)}, "stripe 7 of 2 shards"),
    ],
)
def test_blocks_that_cannot_be_had(
    steady: Steady, node: Node, wrong: dict[str, object], what: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wires.read(wires.blocks(node), wanted(node, **wrong))
    code, details = wires.refusal(caught.value)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert what in details
    assert node.status().slots[0].counters.quarantined == 0


class Parcel:
    """A parity block that node n0 must keep, of a step that is far ahead of the job."""

    def __init__(self, node: Node) -> None:
        job = committed(node)
        (group,) = decision_from(job.decision).groups
        self.version = seg.Version(epoch=job.lineage, step=1_000_000)
        self.place = next(p for p, home in parity_homes(group) if home == Home("n0", 0))
        self.sizes = [9000, 9000]
        self.length = parity_bytes(self.place, self.sizes)
        self.epoch = job.lineage

    def opening(self, **wrong: object) -> pb.StoreRequest:
        right = {
            "protocol": PROTOCOL_VERSION,
            "cluster_id": "test",
            "job": "job",
            "epoch": self.epoch,
            "version": self.version,
            "place": place_to(self.place),
            "image_bytes": self.length,
            "shard_bytes": self.sizes,
            "sender": pb.Home(node="n1", slot=0),
        }
        return pb.StoreRequest(opening=pb.StoreOpening(**{**right, **wrong}))

    def chunk(self, count: int | None = None) -> pb.StoreRequest:
        return pb.StoreRequest(chunk=bytes(self.length if count is None else count))

    def record(self, **wrong: object) -> pb.StoreRequest:
        group = [
            seg.SealRecord(job="job", world=2, shard=s, version=self.version, image_bytes=9000)
            for s in self.place.shards
        ]
        right = {"place": place_to(self.place), "group": group, "image_bytes": self.length}
        return pb.StoreRequest(record=seg.ParityRecord(**{**right, **wrong}))


def test_parity_that_nobody_asked_for(steady: Steady, node: Node) -> None:
    block = Parcel(node)
    opening, chunk = block.opening(), block.chunk()
    wrong: list[tuple[list[object], str]] = [
        ([], "did not begin with its opening"),
        ([chunk], "did not begin with its opening"),
        ([block.record()], "did not begin with its opening"),
        ([GARBAGE], ""),
        ([block.opening(protocol=9)], "speaks protocol 9"),
        ([block.opening(cluster_id="other")], "belongs to cluster 'other'"),
        ([block.opening(epoch=1)], "parity of epoch 1 came while job 'job' is at epoch"),
        ([block.opening(job="none")], "parity of epoch"),
        ([block.opening(place=place(stripe=9))], "stripe 9 of 2 shards"),
        ([block.opening(place=place(shards=[0, 7]))], "n0/0 is not to keep parity"),
        ([block.opening(sender=pb.Home(node="nobody"))], "came from nobody/0, which is not of"),
        ([block.opening(image_bytes=1)], "1 bytes are no parity"),
        ([block.opening(shard_bytes=[1])], "are no parity"),
        ([block.opening(image_bytes=2**62, shard_bytes=[2**62] * 2)], "budget 536870912"),
        ([opening], f"broke off after 0 of {block.length}"),
        ([opening, chunk], f"broke off after {block.length} of {block.length}"),
        # What else a stream can be: tests/fuzz/test_streams.py. Three of them cut the sender off.
        ([opening, chunk, chunk], f"unexpected part behind {block.length} of"),
        ([opening, chunk, block.record()], "contradicts itself"),
    ]
    before = node.status().slots[0]
    for parts, what in wrong:
        with pytest.raises(grpc.RpcError) as caught:
            wires.store(wires.blocks(node), parts)
        assert what in wires.refusal(caught.value)[1], (what, wires.refusal(caught.value))
    after = node.status().slots[0]
    assert len(after.parity) == len(before.parity)
    # The buffers of what was refused are free again, and serve the next.
    assert after.counters.allocated_bytes <= before.counters.allocated_bytes + 3 * 16384


def test_a_store_that_stalls_is_given_up(steady: Steady, node: Node) -> None:
    block = Parcel(node)
    holding, released = futures.Future[None](), futures.ThreadPoolExecutor(1)

    def parts() -> Iterator[object]:
        yield block.opening()
        holding.result(20)

    stalled = released.submit(wires.store, wires.blocks(node), parts())

    def busy() -> bool:
        with pytest.raises(grpc.RpcError) as caught:
            wires.store(wires.blocks(node), [block.opening()])
        return "is already being stored" in wires.refusal(caught.value)[1]

    eventually("the block is being stored", busy)
    eventually("nobody waits for the rest", lambda: not busy())
    with contextlib.suppress(futures.InvalidStateError):
        holding.set_result(None)
    assert (
        f"sent nothing of a block for {TIMEOUTS['rpc_s']} s"
        in wires.refusal(stalled.exception())[1]
    )
    released.shutdown()


# -- the link of an SMP


def test_links_that_no_smp_would_make(steady: Steady, node: Node) -> None:
    mine = pb.SlotFacts(slot=40)
    wrong: list[tuple[list[object], str]] = [
        ([GARBAGE], ""),
        ([pb.SlotFacts(slot=9999)], "local rank 9999 is beyond the 64 slots"),
        ([pb.SlotFacts(slot=40, data=[pb.DataHolding(job="job")])], "a digest of 0 bytes"),
        ([mine, pb.SlotFacts(slot=0)], "the link of slot 40 spoke of slot 0"),
    ]
    for parts, what in wrong:
        with pytest.raises(grpc.RpcError) as caught:
            wires.link(node, parts)
        assert what in wires.refusal(caught.value)[1]
    assert node.status().slots[0].address


# -- newcomers


def refused_start(node: Node) -> str:
    """Start a daemon that must not run; what it said."""
    ended = subprocess.run(
        [sys.executable, "-m", "snapshotd", "serve", "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode not in (0, -9), ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert not list(node.run_dir.glob("*.sock"))
    return ended.stderr


def newcomer(steady: Steady, seeds: list[str] | None = None, **settings: object) -> Node:
    return steady.cluster.node(f"new{len(steady.cluster.nodes)}", seeds=seeds, **settings)


def test_a_newcomer_with_a_node_id_that_is_in_use(steady: Steady) -> None:
    said = refused_start(newcomer(steady, seeds=["n0"], node_id="n1"))
    assert f"node id 'n1' is in use by a live daemon at {steady.nodes[1].address}" in said
    assert "needs another node_id" in said


def test_a_newcomer_of_another_cluster(steady: Steady) -> None:
    foreign = newcomer(steady, seeds=["n0"], cluster_id="other")
    foreign.start()
    eventually("it is told", lambda: "belongs to cluster 'other'" in foreign.tail())
    (mine,) = [m for m in foreign.status().members if m.node == "n0"]
    assert mine.state == "refused"
    assert "Correct cluster_id" in mine.reason
    assert "belongs to cluster 'other'" in steady.nodes[0].tail()
    assert {m.node for m in steady.nodes[0].status().members if m.state == "live"} >= {"n0", "n1"}
    foreign.stop()


class Liar(grpc.GenericRpcHandler):
    """A peer that answers every call with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        del details
        return grpc.unary_unary_rpc_method_handler(lambda *_: self._answer)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (pb.Telling(whole=facts(node="liar", protocol=2)).SerializeToString(), "speaks protocol 2"),
        (
            pb.Telling(whole=facts(node="liar", cluster_id="x")).SerializeToString(),
            "belongs to cluster 'x'",
        ),
        (
            pb.Telling(whole=facts(node="liar", slots=[trainer(job="")])).SerializeToString(),
            "make no sense",
        ),
        (GARBAGE, "sent what is no message of snapshotd"),
    ],
    ids=["other version", "other cluster", "nonsense", "garbage"],
)
def test_seeds_that_lie_or_are_not_there(steady: Steady, answer: bytes, what: str) -> None:
    made = newcomer(steady, seeds=["n0"])
    host = made.address.rpartition(":")[0].rpartition(".")[0]
    liar, nobody = f"{host}.250:{PORT}", f"{host}.251:{PORT}"
    text = made.config.read_text()
    seeds = f'[peers]\nliar = "{liar}"\nnobody = "{nobody}"\n'
    made.config.write_text(text.replace("[peers]\n", seeds))
    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Liar(answer),))
    server.add_insecure_port(liar)
    server.start()
    try:
        made.start()
        eventually("it says what is wrong", lambda: what in made.tail())
        eventually("and who is away", lambda: "nobody: not up yet" in made.tail())
        members = {m.node: m for m in made.status().members}
        assert members["n0"].state == "live"
        assert members["liar"].state in ("refused", "unmet")
        assert members["nobody"].state == "unmet"
        assert "Traceback" not in made.tail()
        made.stop()
    finally:
        server.stop(None)
