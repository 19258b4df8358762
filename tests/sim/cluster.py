"""A whole cluster from one seed: nodes, network, launcher; under fire, in peace, at rest."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Set

from snapshotd.metadata import DataHolding, Home, NodeFacts, Version

from .alone import LeftAlone
from .clock import Clock
from .faults import Fault
from .launcher import Launcher
from .memory import Memory, sound
from .network import Network
from .node import Node
from .oracle import HEARD_S, Oracle
from .setup import Setup
from .slot import Slot
from .strike import Striker
from .trainer import JOB
from .violation import Violation, must

PEACE_S = 40.0  # protection returns within this after the last fault
REST_S = 12.0  # ... and all work ends within this after the last step
STILL_S = 1.3  # nothing moves for this long: longer than any pause between two attempts
POLL_S = 0.1


class Cluster:
    """Everything there is, and the only way for one part to reach another."""

    def __init__(self, seed: int, setup: Setup) -> None:
        self.seed, self.setup = seed, setup
        self.clock = Clock()
        self.injected: Counter[str] = Counter()  # faults, by kind
        self.seen: Counter[str] = Counter()  # what came of them
        self.network = Network(self.clock, self.chance("network"), self.injected)
        self.early = self.chance("early")  # how trainers' images come to stand
        self.oracle = Oracle(self)
        self.launcher = Launcher(self)
        self.quiet = False
        self.instructions = 0
        self.peace_s = 0.0
        self._names = setup.nodes + setup.spares
        self.nodes: dict[str, Node] = {}
        seeds = [f"n{i}" for i in range(self._names)]
        for name in seeds:
            self._add(name, seeds)

    def chance(self, what: str) -> random.Random:
        """A source of chance of its own, so that one part's luck does not change another's."""
        return random.Random(f"{self.seed} {what}")

    def _add(self, name: str, seeds: Iterable[str]) -> None:
        self.nodes[name] = Node(self, name, seeds)
        self.nodes[name].start()

    # -- ways from part to part

    def tell(self, sender: str, facts: NodeFacts, audience: Set[str]) -> None:
        here = self.nodes[sender]
        for name, node in self.nodes.items():
            if name in audience and not node.gone:
                here.tells(node, facts)

    def slot(self, home: Home) -> Slot | None:
        node = self.nodes.get(home.node)
        return node.slots[home.slot] if node and not node.gone else None

    def memories(self) -> dict[Home, Memory]:
        return {s.home: s.memory for n in self.nodes.values() if not n.gone for s in n.slots}

    def away(self, viewer: Node) -> set[Home]:
        """Homes of which a node may not know all now."""
        since_s = self.clock.now_s - HEARD_S
        troubled = self.network.troubled(viewer.name, since_s)
        homes: set[Home] = set()
        for node in self.nodes.values():
            lately = node.down_s >= since_s or not node.up
            if node.gone or lately or node.name in troubled or viewer.name in troubled:
                homes.update(s.home for s in node.slots)
        return homes

    # -- what faults do to nodes

    def crash(self, node: Node, *, memory: bool, records: bool) -> None:
        """All processes of a machine end; memory and disk may go with them."""
        node.stop()
        for slot in node.slots:
            if slot.trainer is not None:
                slot.trainer.die()
            if memory:
                slot.memory.clear()
        if memory:
            self.oracle.memory_lost([slot.home for slot in node.slots])
        if records:
            self.lose_records(node)

    def lose_records(self, node: Node) -> None:
        node.records = ()
        self.oracle.restarted(node.name)
        if not any(n.records for n in self.nodes.values()):
            self.oracle.forgotten()  # for those left it begins now
            self.launcher.launch_soon()  # somebody sees that nothing is protected any more

    def replace(self, node: Node, *, old_name: bool) -> None:
        """An empty machine; nothing where one has come already."""
        if self.nodes.get(node.name) is not node:
            return
        del self.nodes[node.name]
        name = node.name
        if not old_name:
            name = f"n{self._names}"
            self._names += 1
        self._add(name, [n.name for n in self.nodes.values() if not n.gone])

    # -- a run

    def run(self, faults: Iterable[Fault]) -> None:
        """Train under faults, then in peace, then at rest; the oracle watches throughout."""
        striker = Striker(self)
        self.launcher.launch()
        self.launcher.watch()
        for fault in faults:
            self.clock.after(fault.at_s, lambda f=fault: striker.strike(f))  # type: ignore[misc]
        self.clock.run_until(self.setup.faults_s)
        self._make_peace()
        if self.launcher.alone:
            LeftAlone(self).run()
            self._return_all()
        began_s = self.clock.now_s
        self.wait(self._peaceful, PEACE_S, "protection returns")
        self.peace_s = self.clock.now_s - began_s
        self.quiet = True
        self.wait(self._rests, REST_S, "work ends")
        if self.seed % 4 == 0:
            self._check_still()
        self._check_memory()

    def _return_all(self) -> None:
        """Machines come for those that were lost, and the launcher comes back."""
        for node in list(self.nodes.values()):
            if node.gone:
                self.replace(node, old_name=self._names % 2 == 0)
        self.launcher.come_back()

    def _make_peace(self) -> None:
        self.network.heal()
        for node in self.nodes.values():
            for slot in node.slots:
                slot.short_until_s = 0.0

    def wait(self, until: Callable[[], str], bound_s: float, law: str) -> None:
        """Let time pass until nothing is lacking any more; a broken law where it takes too long."""
        end_s = self.clock.now_s + bound_s
        lacking = until()
        while lacking:
            if self.clock.now_s > end_s:
                raise Violation(law, f"not after {bound_s:.0f} s: {lacking}")
            self.clock.run_until(self.clock.now_s + POLL_S)
            lacking = until()

    def _peaceful(self) -> str:
        """What is lacking: all ranks train, and something of this epoch is committed."""
        gang, point = self.launcher.gang, self.oracle.point
        if any(n.gone or not n.up for n in self.nodes.values()):
            return "a daemon is down"
        if self.launcher.launching or gang is None or gang.broken or not gang.trains:
            return "the job is being started"
        epochs = {t.decision.id.epoch for t in gang.trainers if t.decision}
        if point is None or point.committed is None or point.committed.epoch not in epochs:
            return f"{point} is committed, ranks are at {gang.done}"
        if any(not sound(b) for memory in self.memories().values() for b in memory.values()):
            return "damage is not found"  # without parity only the next commit makes up for it
        if not self.oracle.protected():
            return f"{point.committed} is not protected"
        settled = {point.committed_in, point.lineage} == epochs and not point.restoring
        return "" if settled else f"{point}"

    def _rests(self) -> str:
        """What is lacking: the newest step that all sealed is committed, protected, known."""
        gang = self.launcher.gang
        assert gang is not None, "there was peace"
        sealed = [
            {v for j, v, w in t.slot.memory if j == JOB and w == t.shard} for t in gang.trainers
        ]
        newest = max(set.intersection(*sealed), default=Version(0, 0))
        there = {node.name for node in self.nodes.values() if not node.gone}
        for node in self.nodes.values():
            job = next((j for j in node.board.jobs() if j.job == JOB), None) if node.board else None
            gone = set(node.board.membership.live(self.clock.now_s)) - there if node.board else None
            if gone:
                return f"{node.name} has not noticed yet that {gone} is gone"
            if job is None or job.economy.rows_less:
                return f"{node.name} saves memory: {job}"
            if job.committed != newest or job.committed_in != job.lineage:
                return f"{node.name} knows {job}; {newest} is sealed by all"
            for slot in node.slots:
                if slot.machine is not None and slot.machine.short:
                    return f"{slot.home} is short of memory"
                if slot.machine is None or slot.machine.writing.filling is not None:
                    return f"a buffer of {slot.home} is still claimed"
                work = slot.machine._coding._running | slot.machine._rebuilding._running
                if work or slot.machine.next_wake_s() is not None:
                    return f"{slot.home} works, or will try something again"
                if any(not sound(b) for b in slot.memory.values()):
                    return f"the damage at {slot.home} is not found"
        return "" if self.oracle.protected() else f"{newest} is not protected"

    def _check_still(self) -> None:
        """At rest nothing happens any more."""
        before = self._traces()
        self.clock.run_until(self.clock.now_s + STILL_S)
        after = self._traces()
        if before != after:  # an echo of the faults was still under way, and may call for work
            self.wait(self._rests, REST_S, "work ends")
            before = self._traces()
            self.clock.run_until(self.clock.now_s + STILL_S)
            after = self._traces()
        must(before == after, "rest is rest", f"{before} became {after}")

    def _check_memory(self) -> None:
        """At rest nothing is kept that nobody needs, and every byte is what was sealed."""
        self.wait(self._leaks, REST_S, "no memory leaks")
        for node in self.nodes.values():
            for slot in node.slots:
                for block in slot.memory.values():
                    self.oracle.served(slot.home, block)

    def _leaks(self) -> str:
        """More generations than there may be; what is free now goes a moment after the commit."""
        for node in self.nodes.values():
            for slot in node.slots:
                held = [b.holding for b in slot.memory.values()]
                shards = [h for h in held if isinstance(h, DataHolding)]
                if max(len({h.version for h in held}), len(shards)) > self.setup.generations:
                    return f"{slot.home} holds {[(h.shard, h.version) for h in shards]}"
        return ""

    def _traces(self) -> tuple[int, tuple[int, ...]]:
        boards = [n.board for n in self.nodes.values() if n.board is not None]
        return self.instructions, tuple(b.facts.sequence for b in boards)
