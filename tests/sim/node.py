"""A simulated node: the real Board and Membership, its slots, and what its disk remembers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from snapshotd.core.board import Board, Policy
from snapshotd.core.membership import Membership
from snapshotd.metadata import JobFacts, NodeFacts, Orders, SlotFacts

from .clock import about
from .network import FACTS
from .slot import Slot

if TYPE_CHECKING:
    from .cluster import Cluster

HEARTBEAT_S, SUSPECT_S, DEAD_S, PATIENCE_S = 0.5, 1.0, 1.7, 2.5
REPLACE_S = 2.2  # the group shrinks when no replacement has come
GIVE_UP_S, TAKE_UP_S = 0.3, 1.0  # a row of parity, while memory is short
FLUSH_S = 0.04  # facts and orders that change together travel together
ADOPT_S = 0.05  # an SMP starts and verifies what it finds
EPOCHS_PER_S = 10_000  # the clock of the floor outruns any course of decisions


class Node:
    """A supervisor and its SMPs."""

    def __init__(self, cluster: Cluster, name: str, seeds: Iterable[str]) -> None:
        self.cluster, self.name = cluster, name
        self.chance = random.Random(f"{cluster.seed} {name} {cluster.clock.now_s}")
        self.seeds = tuple(seeds)
        self.slots = [Slot(cluster, self, i) for i in range(cluster.setup.slots_per_node)]
        self.records: tuple[JobFacts, ...] = ()
        self.board: Board | None = None
        self.down_s = 0.0  # when its processes were last not all there
        self.gone = False
        self.boots = 0
        self._flush_s = FLUSH_S * max(1.0, cluster.setup.nodes / 8)
        self._flushing = False
        self._sent_sequence = -1
        self._ordered: Orders | None = None

    # -- its process

    def start(self) -> None:
        """The supervisor starts from its records, then its SMPs."""
        setup, now_s = self.cluster.setup, self.cluster.clock.now_s
        self.boots += 1
        membership = Membership(
            cluster_id="sim",
            node=self.name,
            boot=f"{now_s:012.6f}",
            address=self.name,
            seeds={s: s for s in self.seeds},
            suspect_s=SUSPECT_S,
            dead_s=DEAD_S,
            started_s=now_s,
        )
        policy = Policy(
            setup.group_size,
            setup.parity,
            patience_s=PATIENCE_S,
            max_interval=4,
            replace_s=REPLACE_S,
            epoch_floor=1 + int(now_s * EPOCHS_PER_S),
            give_up_s=GIVE_UP_S,
            take_up_s=TAKE_UP_S,
        )
        self.board = Board(membership, policy, self.records)
        self._ordered = None
        for slot in self.slots:
            self.board.slot_changed(SlotFacts(slot.home.slot), now_s)
        self.board.conclude(now_s)
        self._concluded()
        for slot in self.slots:
            self._start_soon(slot, ADOPT_S)
        boots = self.boots
        first_s = min(HEARTBEAT_S, about(self.chance, HEARTBEAT_S / 2))
        self.cluster.clock.after(first_s, lambda: self._beat(boots))

    def stop(self) -> None:
        """The supervisor dies, and its SMPs with it."""
        self.boots += 1
        self.board = None
        for slot in self.slots:
            slot.stop()

    def slot_starts(self, slot: Slot) -> None:
        """An SMP has died; until another has adopted, nobody knows what the slot holds."""
        self.down_s = self.cluster.clock.now_s
        if self.board is not None:
            self.board.slot_changed(SlotFacts(slot.home.slot), self.cluster.clock.now_s)
            self._concluded()

    def _start_soon(self, slot: Slot, mean_s: float) -> None:
        boots, life = self.boots, slot.life

        def start() -> None:
            if boots == self.boots and life == slot.life and slot.machine is None:
                slot.start()
                self.down_s = self.cluster.clock.now_s

        self.cluster.clock.after(about(self.chance, mean_s), start)

    def restart_slot(self, slot: Slot, after_s: float) -> None:
        self._start_soon(slot, after_s)

    @property
    def up(self) -> bool:
        """Whether all its processes run and have spoken."""
        return self.board is not None and all(s.facts is not None for s in self.slots)

    # -- events

    def _beat(self, boots: int) -> None:
        """Time passes: conclude, and tell everybody again even when nothing changed."""
        if boots != self.boots or self.board is None:
            return
        self.board.conclude(self.cluster.clock.now_s)
        self._sent_sequence = -1
        self._concluded()
        for slot in self.slots:
            slot.scrub()
        self.cluster.clock.after(HEARTBEAT_S, lambda: self._beat(boots))

    def hear(self, facts: NodeFacts) -> None:
        if self.board is None:
            return
        now_s = self.cluster.clock.now_s
        if self.board.hear(facts, now_s) is None:
            if self.board.unheeded:
                self.board.conclude(now_s)
            self.cluster.oracle.heard(self, facts)
            self._concluded()

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            delay_s = self._flush_s * self.cluster.network.pace(self.name)
            self.cluster.clock.after(delay_s, self._flush)

    def _concluded(self) -> None:
        """After each event of the board: records are on disk before anybody hears of them."""
        if self.board is not None:
            self._record(self.board)
        self.flush_soon()

    def _record(self, board: Board) -> None:
        self.records = board.jobs()
        self.cluster.oracle.concluded(self, self.records)

    def _flush(self) -> None:
        self._flushing = False
        board = self.board
        if board is None:
            return
        now_s = self.cluster.clock.now_s
        stated = {f.slot: f for f in board.facts.slots}
        for slot in self.slots:
            facts = slot.facts
            if facts is not None and facts != stated.get(slot.home.slot):
                board.slot_changed(facts, now_s)
        self._record(board)
        self._order(board.orders(now_s))
        if board.facts.sequence != self._sent_sequence:
            peers = self.cluster.nodes.keys() - {self.name}
            beat, self._sent_sequence = self._sent_sequence < 0, board.facts.sequence
            self.cluster.tell(
                self.name, board.facts, peers if beat else board.audience(peers, now_s)
            )

    def _order(self, orders: Orders) -> None:
        if orders != self._ordered:
            self._ordered = orders
            for slot in self.slots:
                self._deliver(slot, self._ordered)
            return
        for slot in self.slots:
            if slot.machine is not None and slot.machine.orders != orders:
                self._deliver(slot, self._ordered)

    def _deliver(self, slot: Slot, orders: Orders) -> None:
        """Orders travel in order, over a stream that dies with either end."""
        boots, life = self.boots, slot.life

        def arrive() -> None:
            if boots == self.boots and life == slot.life and orders is self._ordered:
                slot.order(orders)

        self.cluster.clock.after(0.001 + 0.01 * self.chance.random(), arrive)

    def tells(self, other: Node, facts: NodeFacts) -> None:
        """One message to one peer."""
        boots = other.boots

        def arrive() -> None:
            if boots == other.boots and not other.gone:
                other.hear(facts)

        self.cluster.network.send(self.name, other.name, FACTS, arrive)
