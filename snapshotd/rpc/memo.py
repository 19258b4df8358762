"""Conversions that are remembered: most of what is told was told before.

Nodes tell their whole facts, and supervisors their whole orders, with every change and every
heartbeat; what has changed is mostly one slot. Comparing two messages, or the identity of two
values, costs next to nothing beside making a value of a message, or a message of a value.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from snapshotd.metadata import Home, NodeFacts, Orders, SlotFacts
from snapshotd.rpc.convert import node_from, node_to, orders_from, orders_to, slot_from, slot_to
from snapshotd.wire.v1 import node_pb2 as pb

#: Nodes whose last message is kept, and how long it may be: strangers must not fill memory.
MAX_NODES: Final = 256
MAX_BYTES: Final = 64 << 10


class FactsOut:
    """This node's facts as a message, made once for each change and told to many."""

    def __init__(self) -> None:
        self._made: tuple[NodeFacts, pb.NodeFacts] | None = None

    def message(self, facts: NodeFacts) -> pb.NodeFacts:
        """Shared: not to be changed."""
        if self._made is None or self._made[0] is not facts:
            self._made = facts, node_to(facts)
        return self._made[1]


class FactsIn:
    """Other nodes' facts, each message read once."""

    def __init__(self) -> None:
        self._read: OrderedDict[str, tuple[pb.NodeFacts, NodeFacts]] = OrderedDict()

    def facts(self, message: pb.NodeFacts) -> NodeFacts:
        """Raises RequestError: it makes no sense."""
        known = self._read.get(message.node)
        if known is not None and known[0] == message:
            return known[1]
        facts = node_from(message)
        self._read.pop(facts.node, None)
        if message.ByteSize() <= MAX_BYTES:
            if len(self._read) >= MAX_NODES:
                self._read.popitem(last=False)
            self._read[facts.node] = message, facts
        return facts


class OrdersOut:
    """A supervisor's orders as messages: a slot's facts are converted when they have changed."""

    def __init__(self) -> None:
        self._slots: dict[Home, tuple[SlotFacts, pb.SlotFacts]] = {}

    def message(self, orders: Orders) -> pb.Orders:
        """A message of the caller's own."""
        made: dict[Home, tuple[SlotFacts, pb.SlotFacts]] = {}
        for home, facts in orders.peers.items():
            known = self._slots.get(home)
            made[home] = known if known and known[0] is facts else (facts, slot_to(facts))
        self._slots = made
        message = orders_to(Orders(orders.jobs, {}, orders.waits, orders.shelters))
        for home in sorted(made):
            message.peers.add(node=home.node, facts=made[home][1])
        return message


class OrdersIn:
    """The orders of one supervisor: a slot's facts are read when they have changed."""

    def __init__(self) -> None:
        self._slots: dict[Home, tuple[pb.SlotFacts, SlotFacts]] = {}

    def orders(self, message: pb.Orders) -> Orders:
        """Raises RequestError: they make no sense."""
        read: dict[Home, tuple[pb.SlotFacts, SlotFacts]] = {}
        for peer in message.peers:
            home = Home(peer.node, peer.facts.slot)
            known = self._slots.get(home)
            if known is None or known[0] != peer.facts:
                kept = pb.SlotFacts()
                kept.CopyFrom(peer.facts)  # a part of a message keeps the whole of it in memory
                known = kept, slot_from(kept)
            read[home] = known
        self._slots = read
        rest = orders_from(
            pb.Orders(jobs=message.jobs, waits=message.waits, shelters=message.shelters)
        )
        peers = {home: facts for home, (_, facts) in read.items()}
        return Orders(rest.jobs, peers, rest.waits, rest.shelters)
