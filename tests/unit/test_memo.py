"""What is remembered of a conversion is what converting anew would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import RequestError
from snapshotd.metadata import Home, NodeFacts, Orders
from snapshotd.rpc import memo
from snapshotd.rpc.convert import node_from, node_to, orders_from, orders_to
from snapshotd.wire.v1 import node_pb2 as pb
from tests.fuzz import likely

_Message = TypeVar("_Message", pb.NodeFacts, pb.Orders)


def _outcome(read: Callable[[_Message], object], message: _Message) -> object:
    """A value, or why there is none."""
    try:
        return read(message)
    except RequestError as error:
        return str(error)


@settings(max_examples=40)
@given(st.lists(likely.nodes(), max_size=4))
def test_facts_of_many_nodes_come_through(told: list[NodeFacts]) -> None:
    reader, writer = memo.FactsIn(), memo.FactsOut()
    for facts in [*told, *told, *reversed(told)]:
        for _ in range(2):
            message = writer.message(facts)
            assert message == node_to(facts)
            assert _outcome(reader.facts, node_to(facts)) == _outcome(node_from, message)


@settings(max_examples=40)
@given(st.lists(likely.nodes(), min_size=1, max_size=3))
def test_orders_come_through_whatever_was_told_before(told: list[NodeFacts]) -> None:
    reader, writer = memo.OrdersIn(), memo.OrdersOut()
    for node in [*told, *told]:
        orders = Orders(node.jobs, {Home(node.node, s.slot): s for s in node.slots}, {"job": "why"})
        for _ in range(2):
            sent = writer.message(orders)
            assert sent == orders_to(orders)
            assert _outcome(reader.orders, sent) == _outcome(orders_from, sent)


def test_as_many_nodes_are_remembered_as_there_is_room_for() -> None:
    reader = memo.FactsIn()
    for number in range(2 * memo.MAX_NODES):
        reader.facts(pb.NodeFacts(node=f"n{number}", cluster_id="c", address="h:1", boot="b"))
    assert len(reader._read) == memo.MAX_NODES
