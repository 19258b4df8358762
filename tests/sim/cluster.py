"""A whole cluster from one seed: nodes, a network that misbehaves, a launcher, and faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapshotd.metadata import DataHolding, Home, NodeFacts, ParityHolding, Version

from .clock import Clock
from .memory import LostBytes, Memory
from .node import Node, Slot
from .oracle import Oracle
from .trainer import JOB, Gang, Trainer

RESTART_S = 1.0  # a launcher notices and starts again
REPLACE_S = 2.0  # a lost machine is replaced
STUCK_S = 25.0  # a launcher gives up on ranks that make no step


@dataclass(frozen=True)
class Setup:
    """The shape of a simulated cluster."""

    nodes: int
    slots_per_node: int
    parity: int
    generations: int = 2
    spares: int = 0
    max_losses: int = 1  # nodes lost between two commits; above `parity` states may be lost


class Cluster:
    """Everything there is, and the only way for one part to reach another."""

    def __init__(self, seed: int, setup: Setup) -> None:
        self.clock = Clock(seed)
        self.setup = setup
        self.world = setup.nodes * setup.slots_per_node
        self.oracle = Oracle(self)
        self.allow_fresh = False
        self.quiet = False
        self.tear_probability = 0.03
        self.drop_probability = 0.1
        self.faults: dict[str, int] = {}
        self._cut: set[str] = set()
        self._names = 0
        self._launches = 0
        self._launching = False
        self.gang: Gang | None = None
        self._progress = (-1, 0.0)
        self.nodes: dict[str, Node] = {}
        seeds = [f"n{i}" for i in range(setup.nodes + setup.spares)]
        for name in seeds:
            self._add(name, seeds)
        self._names = len(seeds)

    def _add(self, name: str, seeds: list[str]) -> None:
        self.nodes[name] = Node(self, name, seeds)
        self.nodes[name].start()

    # -- the network

    def tell(self, sender: str, facts: NodeFacts) -> None:
        """Facts to all others: late, lost, twice, out of order."""
        for node in [n for n in self.nodes.values() if n.name != sender and not n.lost]:
            for _ in range(2 if self.clock.random.random() < 0.05 else 1):
                if self.clock.random.random() >= self.drop_probability:
                    self._send(sender, node, facts)

    def _send(self, sender: str, node: Node, facts: NodeFacts) -> None:
        boots = node.boots

        def arrive() -> None:
            if boots == node.boots and self._connected(sender, node.name):
                node.hear(facts)

        self.clock.after(self.clock.about(0.02), arrive)

    def _connected(self, a: str, b: str) -> bool:
        return a == b or (a not in self._cut and b not in self._cut)

    def reaches(self, name: str, home: Home) -> bool:
        slot = self._slot(home)
        return slot is not None and slot.machine is not None and self._connected(name, home.node)

    def _slot(self, home: Home) -> Slot | None:
        node = self.nodes.get(home.node)
        return node.slots[home.slot] if node else None

    def read(self, reader: Slot, home: Home, holding: DataHolding | ParityHolding) -> bytes:
        slot = self._slot(home)
        if slot is None or not self.reaches(reader.node.name, home) or holding not in slot.memory:
            raise LostBytes
        return slot.memory[holding]

    def store(
        self, sender: Slot, home: Home, epoch: int, holding: ParityHolding, row: bytes
    ) -> None:
        slot = self._slot(home)
        if slot is None or not self.reaches(sender.node.name, home):
            raise LostBytes
        slot.store(epoch, holding, row)

    def memories(self) -> dict[Home, Memory]:
        return {s.home: s.memory for n in self.nodes.values() if not n.lost for s in n.slots}

    # -- the launcher

    def launch_soon(self) -> None:
        if not self._launching:
            self._launching = True
            self.clock.after(self.clock.about(RESTART_S), self._launch)

    def _launch(self) -> None:
        """All ranks anew, on whatever machines there are, in whatever order."""
        self._launching = False
        machines = [n for n in self.nodes.values() if not n.lost and n.name not in self._cut]
        if len(machines) < self.setup.nodes:
            self.launch_soon()
            return
        refused = self.gang is not None and any(t.refused for t in self.gang.trainers)
        if refused and not self.allow_fresh:
            self.allow_fresh = True  # the user reads the refusal, and chooses
            self.oracle.forgotten()
        self._kill_gang()
        self._launches += 1
        random = self.clock.random
        if random.random() < 0.5:
            random.shuffle(machines)
        homes = [s for n in machines[: self.setup.nodes] for s in n.slots]
        self.gang = gang = Gang(self.world)
        for shard, slot in enumerate(homes):
            trainer = Trainer(self, gang, shard, slot, f"{self._launches}.{shard}")
            gang.trainers.append(trainer)
            slot.trainer = trainer
            self.clock.after(self.clock.about(0.1), trainer.connect)
        self._progress = (-1, self.clock.now_s)

    def _kill_gang(self) -> None:
        for trainer in self.gang.trainers if self.gang else ():
            trainer.die()

    def _watch(self) -> None:
        """The launcher looks after its ranks."""
        gang = self.gang
        self.clock.after(0.5, self._watch)
        if gang is None or self.quiet:
            return
        if any(t.decision is not None for t in gang.trainers):
            self.allow_fresh = False
        done = min(gang.done)
        if done != self._progress[0]:
            self._progress = (done, self.clock.now_s)
        stuck = self.clock.now_s - self._progress[1] > STUCK_S
        assert not stuck, f"no rank made a step for {STUCK_S:.0f} s"
        if gang.broken:
            self.launch_soon()

    # -- faults

    def _strike_later(self, end_s: float) -> None:
        delay_s = self.clock.random.uniform(0.2, 4.0)
        if self.clock.now_s + delay_s < end_s:
            self.clock.after(delay_s, lambda: self._strike(end_s))

    def _strike(self, end_s: float) -> None:
        faults: list[Callable[[], None]] = [
            self._kill_trainer, self._kill_smp, self._kill_smp, self._kill_supervisor,
            self._lose_node, self._lose_node, self._cut_off,
        ]  # fmt: skip
        fault = self.clock.random.choice(faults)
        fault()
        self._strike_later(end_s)

    def _count(self, fault: str) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + 1

    def _some_node(self) -> Node:
        return self.clock.random.choice([n for n in self.nodes.values() if not n.lost])

    def _kill_trainer(self) -> None:
        if self.gang is not None and not self.gang.broken:
            self.clock.random.choice(self.gang.trainers).die()
            self._count("trainer killed")

    def _kill_smp(self) -> None:
        slot = self.clock.random.choice(self._some_node().slots)
        if slot.machine is not None:
            slot.stop()
            self._count("SMP killed")
            boots = slot.node.boots
            self.clock.after(
                self.clock.about(0.5),
                lambda: self._revive(slot, boots),
            )

    def _revive(self, slot: Slot, boots: int) -> None:
        if boots == slot.node.boots and slot.machine is None:
            slot.start()

    def _kill_supervisor(self) -> None:
        node = self._some_node()
        if node.board is None:
            return
        node.stop()
        self._count("supervisor killed")
        if self.clock.random.random() < 0.3:
            node.records = ()
            self.oracle.restarted(node.name)
            self._count("records lost")
            self._forget_what_nobody_knows()
        self.clock.after(self.clock.random.uniform(0.3, 2.0), lambda: self._reboot(node))

    def _forget_what_nobody_knows(self) -> None:
        """The last node that knew of the job is gone: for those left it begins now."""
        if not any(n.records for n in self.nodes.values()):
            self.oracle.forgotten()

    def _reboot(self, node: Node) -> None:
        if not node.lost and node.board is None:
            node.start()

    def _lose_node(self) -> None:
        lost = sum(1 for n in self.nodes.values() if n.lost and n.name in self._unreplaced())
        if lost >= self.setup.max_losses or not self._affordable():
            return
        node = self._some_node()
        node.lose()
        self._count("node lost")
        self.oracle.restarted(node.name)
        for slot in node.slots:
            self.oracle.memory_lost(slot.home)
        self._forget_what_nobody_knows()
        self.clock.after(self.clock.about(REPLACE_S), lambda: self._replace(node))

    def _unreplaced(self) -> set[str]:
        return {n.name for n in self.nodes.values() if n.lost}

    def _affordable(self) -> bool:
        return self.setup.max_losses > self.setup.parity or self.oracle.spared(
            self.setup.max_losses
        )

    def _replace(self, node: Node) -> None:
        """An empty machine, under the old name or a new one."""
        seeds = [n.name for n in self.nodes.values() if not n.lost]
        del self.nodes[node.name]
        if self.clock.random.random() < 0.3:
            name = node.name
        else:
            name = f"n{self._names}"
            self._names += 1
        self._add(name, seeds)

    def _cut_off(self) -> None:
        """A node is alone for a while, and knows nothing of it."""
        name = self._some_node().name
        self._cut.add(name)
        self._count("node cut off")
        self.clock.after(self.clock.about(3.0), lambda: self._cut.discard(name))

    # -- a run

    def run(self, faults_s: float, calm_s: float) -> None:
        """Train under faults, then in peace, then at rest; the oracle watches throughout."""
        self._launch()
        self._watch()
        self._strike_later(faults_s)
        self.clock.run_until(faults_s)
        self._cut.clear()
        self.drop_probability = self.tear_probability = 0.0
        self._wait_for_peace(calm_s)
        self.quiet = True
        self.clock.run_until(self.clock.now_s + 2.5)
        self._check_peace()

    def _wait_for_peace(self, bound_s: float) -> None:
        """Until all ranks train, and what they made a few steps ago is committed."""
        begun_s = self.clock.now_s
        while self.clock.now_s < begun_s + bound_s:
            self.clock.run_until(self.clock.now_s + 0.5)
            gang, point = self.gang, self.oracle.point
            assert gang is not None, "somebody launched"
            if gang.broken or point is None or point.committed is None:
                continue
            trained = {t.decision.id.epoch if t.decision else 0 for t in gang.trainers}
            settled = {point.committed_in, point.lineage, point.epoch} == trained
            if settled and point.committed.step >= max(gang.done) - 3 and self.up():
                return
        raise AssertionError(f"no peace {bound_s:.0f} s after the last fault: {self.oracle.point}")

    def up(self) -> bool:
        """Whether every daemon runs, and nobody starts ranks."""
        slots = [s for n in self.nodes.values() for s in n.slots]
        return not self._launching and all(s.machine is not None for s in slots)

    def _check_peace(self) -> None:
        """The newest step is committed, and every node knows it."""
        assert self.gang is not None, "somebody launched"
        steps = {t.step for t in self.gang.trainers}
        sealed = [
            {h.version for h in t.slot.memory if isinstance(h, DataHolding) and h.shard == t.shard}
            for t in self.gang.trainers
        ]
        newest = max(set.intersection(*sealed), default=Version(0, 0))
        assert newest.step >= min(steps) - 5, f"{newest} is sealed, ranks are at {steps}"
        for node in self.nodes.values():
            assert node.board is not None, f"{node.name} never came back"
            job = next(j for j in node.board.jobs() if j.job == JOB)
            assert job.committed == newest, f"{node.name} knows {job}; {newest} is sealed by all"
            assert job.committed_in == job.lineage, f"{node.name}: protected in older groups"
