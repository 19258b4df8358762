"""Conversions that are remembered: most of what is told was told before.

Supervisors tell their whole orders with every change; what has changed is mostly one slot.
Comparing two messages, or the identity of two values, costs next to nothing beside making a value
of a message, or a message of a value.
"""

from __future__ import annotations

from snapshotd.metadata import Home, Orders, SlotFacts
from snapshotd.rpc.facts import orders_from, orders_to, slot_from, slot_to
from snapshotd.wire.v1 import node_pb2 as pb


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
