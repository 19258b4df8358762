"""A node that sends wrong blocks is cut off and named, and is taken back when it is right again."""

from __future__ import annotations

import grpc
import pytest

from snapshotd.wire.v1 import node_pb2 as pb
from tests.integration import wires
from tests.integration.cluster import Node, eventually
from tests.integration.steady import Steady
from tests.integration.test_bad_peers import Parcel


def accused(node: Node, name: str) -> str:
    return next(m.reason for m in node.status().members if m.node == name)


def refused(node: Node, parts: list[pb.StoreRequest]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        wires.store(wires.blocks(node), parts)
    return wires.refusal(caught.value)[1]


def test_a_sender_of_wrong_blocks(steady: Steady, node: Node) -> None:
    eventually("nothing is held against n1", lambda: not accused(node, "n1"))
    before = node.log.read_text().count("blocks of n1: sent n0/0")
    block = Parcel(node)
    wrong = [block.opening(), block.chunk(), block.record()]
    said = [refused(node, wrong) for _ in range(3)]
    assert all("contradicts itself" in s for s in said)
    assert "n1 sent wrong blocks, and is cut off for" in refused(node, wrong)
    for each in steady.nodes:  # the whole cluster is told
        eventually(
            f"{each.name} names n1",
            lambda each=each: "and is cut off for 10 s" in accused(each, "n1"),
        )
    assert "sent n0/0 records that contradict themselves" in accused(node, "n1")
    assert accused(node, "n0") == ""
    told = node.log.read_text().count("blocks of n1: sent n0/0") - before
    assert told <= 4  # at changes, not at each
    # The true n1 is heard again after the pause, and what it sends then clears it.
    steady.job.train_until_protected()
    eventually("nothing is held against n1", lambda: not accused(node, "n1"))
