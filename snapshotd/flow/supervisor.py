"""The supervisor of a node: exchanges facts with peers, states orders to SMPs, keeps records.

The board decides; this shell delivers. Each peer has one loop with at most one exchange under
way, so a slow peer delays nobody, and news that piles up is sent as one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from snapshotd.core.board import Board
from snapshotd.core.membership import Refusal
from snapshotd.core.rhythm import Rhythm, visits
from snapshotd.errors import ConfigError, PeerError
from snapshotd.flow.reach import Reach
from snapshotd.flow.records import Records
from snapshotd.flow.status import accusations
from snapshotd.metadata import DataHolding, NodeFacts, Orders, ParityHolding, SlotFacts, Stored
from snapshotd.rpc.channels import Channels, Peer
from snapshotd.rpc.exchange import Exchanges, RefusedByPeer
from snapshotd.rpc.local import Mailbox
from snapshotd.rpc.memo import OrdersOut
from snapshotd.rpc.telling import Tellings
from snapshotd.telemetry.logs import ChangeLog
from snapshotd.wire.points import point

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often facts go out, how long an answer may take, how long a peer may be silent."""

    heartbeat_s: float
    rpc_s: float
    dead_s: float


class Supervisor:
    """Holds the board of a node, and tells its conclusions to whom they concern."""

    def __init__(self, board: Board, channels: Channels, records: Records, pace: Pace) -> None:
        self.board = board
        self._records = records
        self._pace = pace
        self._outboxes: dict[int, Mailbox] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._heard = asyncio.Event()
        self._rhythm = Rhythm(pace.heartbeat_s)
        self._beat = asyncio.Event()
        self._thinking: asyncio.Task[None] | None = None
        self._met_s: dict[str, float] = {}  # when each peer last exchanged facts with us
        self._came_s: dict[str, float] = {}  # when it last came to us for that
        self._linked: dict[int, asyncio.Event] = {}
        self._log = ChangeLog(log)
        self._reach = Reach(log, pace.dead_s)
        self._spread_sequence = 0
        #: What each slot's SMP was told last: it is not told again what it knows.
        self._ordered: dict[int, Orders] = {}
        self.tellings, self._orders_out = Tellings(), OrdersOut()
        self._exchanges = Exchanges(channels, self.tellings, pace.rpc_s)
        self._accused: frozenset[str] = frozenset()
        self.on_change: Callable[[], None] = lambda: None

    # -- events

    def asked(self, facts: NodeFacts) -> Refusal | None:
        """A peer states its facts, and gets ours: as good as if we had gone to it."""
        refusal = self.hear(facts)
        if refusal is None:
            self._met_s[facts.node] = self._came_s[facts.node] = time.monotonic()
        return refusal

    def hear(self, facts: NodeFacts) -> Refusal | None:
        """A peer states its facts; what has come together is concluded from together, soon."""
        refusal = self.board.hear(facts, time.monotonic())
        point("supervisor.peer.heard")
        if refusal is not None:
            self._log.note(facts.address, refusal.reason, logging.WARNING)
        elif self.board.unheeded:
            self._heard.set()
        elif self._rhythm.joins(time.monotonic()):
            self._beat.set()
        return refusal

    def linked(self, slot: int, outbox: Mailbox) -> None:
        """An SMP has adopted its segments and is ready."""
        point("supervisor.link.accepted")
        self._outboxes[slot] = outbox
        self._ordered.pop(slot, None)
        self._linked.setdefault(slot, asyncio.Event()).set()

    def starting(self, slot: int) -> None:
        """An SMP is being started: it may hold more than anybody knows yet."""
        self.board.slot_changed(SlotFacts(slot), time.monotonic())
        self._spread()

    def slot_changed(self, facts: SlotFacts) -> None:
        """An SMP states its facts."""
        self.board.slot_changed(facts, time.monotonic())
        point("supervisor.slot.heard")
        self._spread()

    def unlinked(self, slot: int, outbox: Mailbox) -> None:
        """An SMP is gone."""
        if self._outboxes.get(slot) is not outbox:
            return
        del self._outboxes[slot]
        self._linked.setdefault(slot, asyncio.Event()).clear()
        self.starting(slot)

    async def slot_ready(self, slot: int, timeout_s: float) -> bool:
        """Wait until the SMP of a slot has linked."""
        event = self._linked.setdefault(slot, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def drop(self, job: str) -> int:
        """Give a job up on all nodes; returns the bytes of its segments on this one."""
        holdings: list[DataHolding | ParityHolding] = []
        for facts in self.board.facts.slots:
            holdings += [*facts.data, *facts.parity]
        freed = sum(held.image_bytes for held in holdings if held.job == job)
        self.board.drop(job, time.monotonic())
        point("supervisor.drop.heard")
        self._spread()
        return freed

    def tier_seen(self, job: str, stored: Stored | None, error: str) -> None:
        """What the persistent tier holds of a job whose restore waits, or why it is not known."""
        self.board.tier_seen(job, stored, error, time.monotonic())
        self._spread()

    def facts(self) -> NodeFacts:
        return self.board.facts

    async def rest(self, limit_s: float) -> None:
        """Until the next beat, at most so long."""
        due_s = min(self._rhythm.due_s, time.monotonic() + limit_s)
        timer = asyncio.get_running_loop().call_at(due_s, self._beat.set)
        try:
            await self._beat.wait()
        finally:
            timer.cancel()

    def tick(self, now_s: float) -> None:
        """A beat: silence, too, is news; and who was told nothing for a while is told again."""
        self._beat.clear()
        self._rhythm.beat(now_s)
        self.board.conclude(now_s)
        for facts in self.board.facts.slots:
            # Orders have an SMP look whether a trainer that waits is still there.
            if facts.trainer is not None and facts.trainer.waiting:
                self._ordered.pop(facts.slot, None)
        self._spread()
        visited = visits(self.board.membership.node, self._news)
        for node, news in self._news.items():
            if self._is_due(node, now_s) and (node in visited or self._is_late(node, now_s)):
                news.set()

    def _is_due(self, node: str, now_s: float) -> bool:
        """Nothing was exchanged with it for a while."""
        return now_s - self._met_s.get(node, float("-inf")) > self._pace.heartbeat_s / 2

    def _is_late(self, node: str, now_s: float) -> bool:
        """It should have come, as of the two it is the one that goes; perhaps it cannot."""
        return now_s - self._came_s.get(node, float("-inf")) > 1.25 * self._pace.heartbeat_s

    # -- spreading

    def _spread(self) -> None:
        """State orders to the SMPs, news to the peers, and what must last to the disk."""
        self._order()
        point("supervisor.spread.ordered")
        self._records.keep(self.board.jobs())
        self._note_accused()
        self._follow_membership()
        if self.board.facts.sequence != self._spread_sequence:
            self._spread_sequence = self.board.facts.sequence
            for node in self.board.audience(self._news.keys(), time.monotonic()):
                self._news[node].set()
        point("supervisor.spread.told")
        self.on_change()

    def _order(self) -> None:
        orders = self.board.orders(time.monotonic())
        outdated = [slot for slot in self._outboxes if self._ordered.get(slot) != orders]
        if outdated:
            message = self._orders_out.message(orders)
            for slot in outdated:
                self._ordered[slot] = orders
                self._outboxes[slot].put(message)

    def _note_accused(self) -> None:
        accused = accusations(self.board.slots(time.monotonic()))
        for node in {*self._accused, *accused}:
            self._log.note(f"blocks of {node}", accused.get(node, ""), logging.WARNING)
        self._accused = frozenset(accused)

    def _follow_membership(self) -> None:
        known = self.board.membership.addresses()
        for node in known:
            if node not in self._loops:
                self._news[node] = asyncio.Event()
                task = asyncio.get_running_loop().create_task(self._talk_to(node))
                self._loops[node] = task
                # Its end is news of its own: nothing else may ever change.
                task.add_done_callback(lambda _: self.on_change())
        for node in set(self._loops) - set(known):
            self._loops.pop(node).cancel()
            del self._news[node]
            self._met_s.pop(node, None)
            self._came_s.pop(node, None)
            self._reach.forget(node)
            self._exchanges.leave(node)

    async def _talk_to(self, node: str) -> None:
        """Exchange facts with one peer: at each change for it, and at each beat that is due."""
        news = self._news[node]
        while True:
            news.clear()
            facts = self.board.facts
            address = self.board.membership.addresses().get(node)
            reached = address is not None and await self._exchange(node, address, facts)
            if reached or address is None:  # it was forgotten: this ends with the next spreading
                await news.wait()
            else:
                await asyncio.sleep(self._pace.heartbeat_s / 2)

    async def _exchange(self, node: str, address: str, facts: NodeFacts) -> bool:
        try:
            reply = await self._exchanges.exchange(Peer(node, address), facts)
        except RefusedByPeer as error:
            self._log.note(address, str(error), logging.WARNING)
            self.board.membership.note_refusal(address, str(error))
            if error.fatal:
                raise ConfigError(str(error)) from error
            return False
        except PeerError as error:
            self._reach.failed(node, str(error), time.monotonic())
            return False
        self._met_s[node] = time.monotonic()
        self._reach.reached(node, self._met_s[node])
        point("supervisor.peer.told")
        self.hear(reply)
        return True

    # -- life

    def start(self) -> None:
        """Begin to talk to the seeds."""
        self._thinking = asyncio.get_running_loop().create_task(self._think())
        self._thinking.add_done_callback(lambda _: self.on_change())
        self.board.conclude(time.monotonic())
        self._spread()

    async def _think(self) -> None:
        while True:
            await self._heard.wait()
            self._heard.clear()
            self.board.conclude(time.monotonic())
            self._spread()

    @property
    def loops(self) -> tuple[asyncio.Task[None], ...]:
        """What runs for ever: one that ends says why this node must not run."""
        thinking = (self._thinking,) if self._thinking else ()
        return (*thinking, *self._loops.values())

    def leave(self) -> None:
        """The daemon is about to stop: peers that do, too, are not worth a line."""
        self._reach.leave()

    async def stop(self) -> None:
        for task in self.loops:
            task.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)
        await self._exchanges.close()
