"""What is remembered of a conversion is what converting anew would give."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import RequestError
from snapshotd.metadata import Home, NodeFacts, Orders
from snapshotd.rpc import memo
from snapshotd.rpc.facts import orders_from, orders_to
from snapshotd.wire.v1 import node_pb2 as pb
from tests.fuzz import likely


def _outcome(read: Callable[[pb.Orders], object], message: pb.Orders) -> object:
    """A value, or why there is none."""
    try:
        return read(message)
    except RequestError as error:
        return str(error)


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
