"""A simulated node: one Board, its SlotMachines, and the shells that carry out instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from snapshotd.core.board import Board, Policy
from snapshotd.core.instructions import (
    Answer,
    Deny,
    Encode,
    Free,
    Grant,
    Instruction,
    Rebuild,
    Stage,
)
from snapshotd.core.membership import Membership
from snapshotd.core.recovery import Copy, Decode, Local, Missing, find_shard
from snapshotd.core.slot import SlotMachine
from snapshotd.metadata import (
    DataHolding,
    Decision,
    Home,
    JobFacts,
    NodeFacts,
    Orders,
    ParityHolding,
    SlotCounters,
    SlotFacts,
    Version,
)

from .memory import LostBytes, Memory, data_holding, decode, digest, encode, fetch_from

if TYPE_CHECKING:
    from .cluster import Cluster
    from .trainer import Trainer

SUSPECT_S, DEAD_S, HEARTBEAT_S = 1.0, 3.0, 0.7
REPLACE_S = 6.0  # the group shrinks when no replacement has come
FLUSH_S = 0.02  # facts and orders that change together travel together


class Slot:
    """One SMP and the memory that outlives it."""

    def __init__(self, cluster: Cluster, node: Node, index: int) -> None:
        self.cluster, self.node = cluster, node
        self.home = Home(node.name, index)
        self.memory: Memory = {}
        self.machine: SlotMachine | None = None
        self.trainer: Trainer | None = None
        self.life = 0
        self._told: SlotFacts | None = None
        self._wake_s: float | None = None

    def start(self) -> None:
        """An SMP starts: it adopts what lies in memory before it speaks to anybody."""
        self.life += 1
        self.machine = SlotMachine(self.home, self.cluster.setup.generations)
        self._told = None
        self._wake_s = None
        for holding in self.memory:
            self.machine.keep(holding)
        self.node.flush_soon()

    def stop(self) -> None:
        self.life += 1
        self.machine = None
        if self.node.board is not None:
            self.node.board.slot_gone(self.home.slot, self.cluster.clock.now_s)
            self.node.concluded()
        if self.trainer is not None:
            self.trainer.daemon_lost()

    def order(self, orders: Orders) -> None:
        if self.machine is not None:
            self.machine.orders = orders
            self.happened()

    def happened(self) -> None:
        """After each event: do what the machine says, publish what it knows."""
        machine = self.machine
        if machine is None:
            return
        for instruction in machine.instructions(self.cluster.clock.now_s):
            self._carry_out(instruction)
        self._wake_later(machine)
        facts = machine.facts(f"{self.home}", SlotCounters())
        if facts != self._told:
            self._told = facts
            self.node.flush_soon()

    def state_facts(self) -> SlotFacts | None:
        return self._told if self.machine is not None else None

    def _wake_later(self, machine: SlotMachine) -> None:
        clock, wake_s = self.cluster.clock, machine.next_wake_s()
        if wake_s is None or wake_s == self._wake_s:
            return
        assert wake_s > clock.now_s, f"{self.home} would spin: asked to be woken in the past"
        self._wake_s, life = wake_s, self.life

        def wake() -> None:
            if life == self.life:
                self._wake_s = None
                self.happened()

        clock.after(wake_s - clock.now_s, wake)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Stage():
                self._later(0.05, lambda: self._stage(instruction.decision))
            case Encode():
                self._later(0.05, lambda: self._encode(instruction))
            case Rebuild():
                self._later(0.05, lambda: self._rebuild(instruction))
            case Free():
                self.memory.pop(instruction.holding)
                self.cluster.oracle.memory_shrank(str(instruction))
            case Answer():
                assert self.trainer is not None, "an answer to nobody"
                self.trainer.answered(instruction.decision)
            case Grant():
                assert self.trainer is not None, "a grant to nobody"
                self.trainer.granted(instruction.version)
            case Deny():
                assert self.trainer is not None, "a denial to nobody"
                self.trainer.denied(instruction.step)

    def _later(self, mean_s: float, work: Callable[[], None]) -> None:
        """Work that dies with the SMP."""
        life = self.life

        def run() -> None:
            if life == self.life:
                work()
                self.happened()

        self.cluster.clock.after(self.cluster.clock.about(mean_s), run)

    def seal(self, step_image: bytes, job: str, shard: int, version: Version) -> None:
        """The trainer has written a buffer; checksums take a while."""
        holding = data_holding(job, shard, version, step_image)

        def done() -> None:
            assert self.machine is not None, "work dies with the SMP"
            self.memory[holding] = step_image
            self.machine.sealed(holding)

        self._later(0.05, done)

    def _stage(self, decision: Decision) -> None:
        machine, trainer = self.machine, self.machine.trainer if self.machine else None
        if machine is None or trainer is None or decision.restore is None:
            return
        slots = {**machine.orders.peers, self.home: machine.facts(str(self.home), SlotCounters())}
        origin = find_shard(slots, decision.job, trainer.shard, decision.restore, self.home)
        try:
            holding, image = self._bring(origin)
        except LostBytes:
            machine.stage_failed(decision.id, f"{origin} could not be read")
            return
        self.memory[holding] = image
        machine.keep(holding)
        machine.staged(decision.id)

    def _rebuild(self, task: Rebuild) -> None:
        machine = self.machine
        assert machine is not None, "work dies with the SMP"
        slots = {**machine.orders.peers, self.home: machine.facts(str(self.home), SlotCounters())}
        try:
            holding, image = self._bring(
                find_shard(slots, task.job, task.shard, task.version, self.home)
            )
        except LostBytes:
            machine.rebuild_failed(task, self.cluster.clock.now_s)
            return
        self.memory[holding] = image
        machine.keep(holding)
        machine.rebuilt(task)

    def _bring(self, origin: Local | Copy | Decode | Missing) -> tuple[DataHolding, bytes]:
        match origin:
            case Local(holding):
                return holding, self.cluster.read(self, self.home, holding)
            case Copy(home, holding):
                return holding, self.cluster.read(self, home, holding)
            case Decode():
                fetch = fetch_from(self.cluster.memories(), origin, self._reaches)
                image = decode(origin, fetch)
                assert digest(image) == origin.content_digest, "decoded bytes differ"
                return data_holding(origin.job, origin.shard, origin.version, image), image
            case Missing():
                raise LostBytes

    def _reaches(self, home: Home) -> bool:
        return self.cluster.reaches(self.node.name, home)

    def _encode(self, task: Encode) -> None:
        machine = self.machine
        assert machine is not None, "work dies with the SMP"
        try:
            rows = encode(task, lambda home, holding: self.cluster.read(self, home, holding))
            for holding, row in rows.items():
                n = task.group.size
                holder = task.group.members[(task.stripe + holding.place.row) % n].home
                self.cluster.store(self, holder, task.epoch, holding, row)
        except LostBytes:
            machine.encode_failed(task, self.cluster.clock.now_s)
        else:
            machine.encoded(task)

    def store(self, epoch: int, holding: ParityHolding, row: bytes) -> None:
        """A peer hands a parity block over; one of an epoch that is over is refused."""
        if self.machine is None:
            raise LostBytes
        job = self.machine.orders.job(holding.job)
        if job is not None and epoch < job.lineage:
            raise LostBytes
        self.memory[holding] = row
        self.machine.keep(holding)
        self.happened()


class Node:
    """A supervisor, its slots, and what its disk remembers."""

    def __init__(self, cluster: Cluster, name: str, seeds: Iterable[str]) -> None:
        self.cluster, self.name = cluster, name
        self.seeds = tuple(seeds)
        self.slots = [Slot(cluster, self, i) for i in range(cluster.setup.slots_per_node)]
        self.records: tuple[JobFacts, ...] = ()
        self.board: Board | None = None
        self.lost = False
        self.boots = 0
        self._flushing = False
        self._sent_sequence = -1
        self._ordered: Orders | None = None

    def start(self) -> None:
        """The supervisor starts from its records, then its SMPs."""
        setup = self.cluster.setup
        self.boots += 1
        membership = Membership(
            cluster_id="sim",
            node=self.name,
            boot=f"{self.cluster.clock.now_s:012.6f}",
            address=self.name,
            seeds={s: s for s in self.seeds},
            suspect_s=SUSPECT_S,
            dead_s=DEAD_S,
            started_s=self.cluster.clock.now_s,
        )
        policy = Policy(
            setup.nodes,
            setup.parity,
            patience_s=4.0,
            max_interval=4,
            dead_s=DEAD_S,
            replace_s=REPLACE_S,
        )
        self.board = Board(membership, policy, self.records)
        self._ordered = None
        self.board.conclude(self.cluster.clock.now_s)
        self.concluded()
        for slot in self.slots:
            slot.start()
        boots = self.boots
        self.cluster.clock.after(HEARTBEAT_S, lambda: self._beat(boots))

    def stop(self) -> None:
        """The supervisor dies, and its SMPs with it."""
        self.boots += 1
        self.board = None
        for slot in self.slots:
            slot.stop()

    def lose(self) -> None:
        """The machine is gone: memory, disk and processes."""
        self.lost = True
        self.stop()
        for slot in self.slots:
            if slot.trainer is not None:
                slot.trainer.die()
            slot.memory.clear()
        self.records = ()

    def _beat(self, boots: int) -> None:
        """Time passes: conclude, and tell everybody again even when nothing changed."""
        if boots != self.boots or self.board is None:
            return
        self.board.conclude(self.cluster.clock.now_s)
        self._sent_sequence = -1
        self.concluded()
        self.cluster.clock.after(HEARTBEAT_S, lambda: self._beat(boots))

    def hear(self, facts: NodeFacts) -> None:
        if self.board is not None and self.board.hear(facts, self.cluster.clock.now_s) is None:
            self.concluded()

    def flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.cluster.clock.after(FLUSH_S, self._flush)

    def concluded(self) -> None:
        """After each event of the board: records are on disk before anybody hears of them."""
        if self.board is not None:
            self.records = self.board.jobs()
            self.cluster.oracle.concluded(self.name, self.records)
        self.flush_soon()

    def _flush(self) -> None:
        self._flushing = False
        if self.board is None:
            return
        now_s = self.cluster.clock.now_s
        for slot in self.slots:
            facts = slot.state_facts()
            if facts is not None and facts != self.board.slots(now_s).get(slot.home):
                self.board.slot_changed(facts, now_s)
        self.records = self.board.jobs()
        self.cluster.oracle.concluded(self.name, self.records)
        self._order(self.board.orders(now_s))
        if self.board.facts.sequence != self._sent_sequence:
            self._sent_sequence = self.board.facts.sequence
            self.cluster.tell(self.name, self.board.facts)

    def _order(self, orders: Orders) -> None:
        if orders != self._ordered:
            self._ordered = orders
            for slot in self.slots:
                self._deliver(slot, orders)
            return
        for slot in self.slots:
            if slot.machine is not None and slot.machine.orders != orders:
                self._deliver(slot, orders)

    def _deliver(self, slot: Slot, orders: Orders) -> None:
        """Orders travel in order, over a stream that dies with either end."""
        boots, life = self.boots, slot.life

        def arrive() -> None:
            if boots == self.boots and life == slot.life and orders is self._ordered:
                slot.order(orders)

        self.cluster.clock.after(self.cluster.clock.random.uniform(0.001, 0.02), arrive)
