"""A simulated SMP: the real SlotMachine, the memory that outlives it, and what it is told to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
from snapshotd.core.protection import parity_homes
from snapshotd.core.recovery import Copy, Decode, Local, Missing, find_shard, world_of
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import RequestError
from snapshotd.metadata import (
    Home,
    Orders,
    ParityHolding,
    SlotCounters,
    SlotFacts,
    Version,
)

from . import memory
from .clock import about
from .coding import Buffer, Reading
from .memory import Block, Holding, Key, LostBytes, Memory, data_holding, key_of
from .network import BLOCKS
from .trainer import JOB
from .violation import must

if TYPE_CHECKING:
    from .cluster import Cluster
    from .node import Node
    from .trainer import Trainer

WORK_S = 0.03  # sealing, staging, coding
ROOM_CHECK_S = 0.5
NO_COUNTERS = SlotCounters()


class Slot:
    """One local rank's place on a node."""

    def __init__(self, cluster: Cluster, node: Node, index: int) -> None:
        self.cluster, self.node = cluster, node
        self.home = Home(node.name, index)
        self.memory: Memory = {}
        self.buffers: dict[Key, Buffer] = {}  # that trainers fill, or that are being sealed
        self.machine: SlotMachine | None = None
        self.trainer: Trainer | None = None
        self.life = 0
        self.short_until_s = 0.0
        self.limit_bytes = 0  # until then
        self._watches_room = False
        self._told: SlotFacts | None = None
        self._wake_s: float | None = None

    # -- its process

    def start(self) -> None:
        """An SMP starts: it adopts what verifies, before it speaks to anybody."""
        self.life += 1
        machine = SlotMachine(self.home, self.cluster.setup.generations)
        self._told, self._wake_s = None, None
        self._watches_room = False
        for key, block in list(self.memory.items()):
            if memory.sound(block):
                machine.keep(block.holding)
            else:
                self._discard(key)
        self.machine = machine
        self.node.flush_soon()

    def stop(self) -> None:
        """It dies; another is started by the supervisor, if there is one."""
        self.life += 1
        self.machine, self._told = None, None
        for key in list(self.buffers):
            self._over(key, sealed=False)
        self.node.slot_starts(self)
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
        held = len({version for _, version, _ in self.memory})
        for instruction in machine.instructions(self.cluster.clock.now_s):
            if isinstance(instruction, Free):
                self._check_spare(instruction, held)
            self._carry_out(instruction)
        for key, buffer in list(self.buffers.items()):
            if not buffer.sealing and key[1] != machine.writing.filling:
                self._over(key, sealed=False)  # torn, or its trainer is gone
        self._wake_later(machine)
        facts = machine.facts(str(self.home), NO_COUNTERS)
        if facts != self._told:
            self._told = facts
            self.node.flush_soon()

    @property
    def facts(self) -> SlotFacts | None:
        """What it said last."""
        return self._told

    def _wake_later(self, machine: SlotMachine) -> None:
        clock, wake_s = self.cluster.clock, machine.next_wake_s()
        if wake_s is None or wake_s == self._wake_s:
            return
        must(wake_s > clock.now_s, "no busy waiting", f"{self.home} asks for a time gone by")
        self._wake_s, life = wake_s, self.life

        def wake() -> None:
            if life == self.life:
                self._wake_s = None
                self.happened()

        clock.after(wake_s - clock.now_s, wake)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Stage():
                self._work(lambda: self._stage(instruction))
            case Encode():
                self._work(lambda: Reading(self, instruction))
            case Rebuild():
                self._work(lambda: self._rebuild(instruction))
            case Free():
                if self.memory.pop(key_of(instruction.holding), None) is not None:
                    self.cluster.oracle.freed(self.home, instruction.holding, instruction.reason)
            case Answer():
                taker = self._taker()
                if taker is not None:
                    taker.answered(instruction.decision)
            case Grant():
                self._grant(instruction)
            case Deny():
                taker = self._taker()
                if taker is not None:
                    taker.denied(instruction.step)
        self.cluster.instructions += 1

    def _check_spare(self, free: Free, held: int) -> None:
        """An older generation is freed only for a buffer that is wanted."""
        machine = self.machine
        if machine is None or machine.short or not free.reason.startswith("superseded"):
            return
        job = machine.orders.job(JOB)
        if job is not None and free.holding.world != job.world:
            return  # what other ranks saved goes whole, once these have a restore point
        fits = held <= self.cluster.setup.generations
        wanted = machine.writing.filling is not None or machine.writing.claim is not None
        text = f"{self.home} freed {free.holding.version}: {free.reason}"
        must(wanted or not fits, "a spare generation stays", text)

    def later(self, mean_s: float, work: Callable[[], None]) -> None:
        """Work of about that length: longer on a slow node, and it dies with the SMP."""
        pace = self.cluster.network.pace(self.node.name)
        self._after(about(self.node.chance, mean_s) * pace, work)

    def _after(self, delay_s: float, work: Callable[[], None]) -> None:
        life = self.life

        def run() -> None:
            if life == self.life:
                work()
                self.happened()

        self.cluster.clock.after(delay_s, run)

    def _work(self, work: Callable[[], None]) -> None:
        self.later(WORK_S, work)

    # -- the trainer's desk

    def request(self, incarnation: str, act: Callable[[SlotMachine], None]) -> bool:
        """A trainer's message; one of a process that is not attached here is refused."""
        machine = self.machine
        if machine is None:
            return False
        owner = machine.trainer
        if owner is None or owner.incarnation != incarnation:
            return False
        try:
            act(machine)
        except RequestError:
            return False  # said to the trainer, as the desk does
        self.cluster.oracle.requested(self.home, owner.incarnation, incarnation)
        self.happened()
        return True

    def trainer_died(self, trainer: Trainer) -> None:
        """The kernel has released its lock; the SMP notices a moment later."""

        def notice() -> None:
            machine = self.machine
            attached = machine.trainer if machine is not None else None
            if machine is not None and attached and attached.incarnation == trainer.incarnation:
                machine.detach()

        self.later(0.03, notice)

    def _grant(self, grant: Grant) -> None:
        machine, trainer = self.machine, self._taker()
        assert machine is not None
        if not self._fits(len(trainer.state) if trainer else 0):
            self.cluster.seen["buffers refused"] += 1
            machine.passed(grant.version.step)
            if trainer is not None:
                trainer.denied(grant.version.step)
            return
        self.buffers[grant.job, grant.version, grant.shard] = Buffer()
        if trainer is not None:
            trainer.granted(grant.version)

    def _taker(self) -> Trainer | None:
        """Who hears the machine's answers: the trainer that it means, if that still lives."""
        meant = self.machine.trainer if self.machine else None
        trainer = self.trainer
        if meant is None or trainer is None or trainer.incarnation != meant.incarnation:
            return None
        return trainer

    def stands(self, key: Key, image: bytes, said_bytes: int) -> None:
        """The trainer has written part of a buffer; from now on others may read it as it comes."""
        buffer = self.buffers.get(key)
        if self.machine is not None and buffer is not None:
            buffer.standing = image
            self.machine.stands(key[1], said_bytes)
            self.cluster.oracle.stands(self.home, key, said_bytes)
            self.happened()

    def _over(self, key: Key, *, sealed: bool) -> None:
        self.buffers.pop(key).over(sealed=sealed)

    def seal(self, image: bytes, job: str, shard: int, version: Version, world: int) -> None:
        """The trainer has written a buffer; checksums take a while."""
        holding = data_holding(job, shard, version, image, world)
        self.buffers[key_of(holding)].sealing = True

        def done() -> None:
            assert self.machine is not None, "work dies with the SMP"
            self._keep(holding, image)
            self.machine.sealed(holding)
            self._over(key_of(holding), sealed=True)

        self._work(done)

    # -- memory

    def _fits(self, image_bytes: int) -> bool:
        """Whether there is memory for so much more; if not, the machine is told, as `flow` does."""
        if self.cluster.clock.now_s >= self.short_until_s:
            return True
        held = sum(len(b.image) for b in self.memory.values())
        if held + image_bytes <= self.limit_bytes:
            return True
        self.cluster.seen["memory was short"] += 1
        if self.machine is not None:
            self.machine.no_room(JOB, image_bytes)
            self._watch_room()
        return False

    def _watch_room(self) -> None:
        """Memory that others give back announces itself to nobody."""
        if not self._watches_room:
            self._watches_room = True
            self._after(ROOM_CHECK_S, self._check_room)

    def _check_room(self) -> None:
        assert self.machine is not None, "work dies with the SMP"
        self._watches_room = False
        if self.cluster.clock.now_s >= self.short_until_s:
            self.machine.room(JOB)
        elif self.machine.short:
            self._watch_room()

    def _keep(self, holding: Holding, image: bytes) -> None:
        """Bytes are here, checksummed; an older block in their place goes."""
        machine = self.machine
        assert machine is not None
        old = self.memory.get(key_of(holding))
        if old is not None:
            machine.lose(old.holding)
        self.memory[key_of(holding)] = memory.sealed(holding, image)
        machine.keep(holding)
        self.cluster.oracle.kept(self.home, holding, image)

    def serve(self, key: Key) -> Block:
        """Verified bytes; a damaged block is never served, and gone from then on."""
        block = self.memory.get(key)
        if block is None or self.machine is None:
            raise LostBytes
        if not memory.sound(block):
            self._quarantine(key)
            raise LostBytes
        self.cluster.oracle.served(self.home, block)
        return block

    def scrub(self) -> None:
        """Read everything again, so that damage is found early."""
        for key, block in list(self.memory.items()):
            if self.machine is not None and not memory.sound(block):
                self._quarantine(key)

    def _quarantine(self, key: Key) -> None:
        block = self._discard(key)
        if self.machine is not None:
            self.machine.lose(block.holding)
            self.later(0.0, lambda: None)

    def _discard(self, key: Key) -> Block:
        self.cluster.seen["blocks quarantined"] += 1
        return self.memory.pop(key)

    # -- work

    def read(self, home: Home, key: Key) -> Block:
        slot = self.cluster.slot(home)
        if slot is None or not self.cluster.network.reaches(self.node.name, home.node, BLOCKS):
            raise LostBytes
        return slot.serve(key)

    def _stage(self, task: Stage) -> None:
        machine, trainer = self.machine, self.machine.trainer if self.machine else None
        decision = task.decision
        if machine is None or trainer is None or decision.restore is None:
            return
        try:
            if decision.saved_world:
                for shard in task.to_try(trainer.shard):
                    self.gather(decision.job, shard, decision.restore)
            else:
                self._fetch(decision.job, trainer.shard, decision.restore)
        except LostBytes:
            machine.stage_failed(decision.id, "its bytes could not be had")
        else:
            machine.staged(decision.id)

    def _rebuild(self, task: Rebuild) -> None:
        machine = self.machine
        assert machine is not None, "work dies with the SMP"
        try:
            self._fetch(task.job, task.shard, task.version)
        except LostBytes:
            machine.rebuild_failed(task, self.cluster.clock.now_s)
        else:
            machine.rebuilt(task)

    def _fetch(self, job: str, shard: int, version: Version) -> None:
        """Have a shard here, verified."""
        image, world = self.gather(job, shard, version)
        if (job, version, shard) in self.memory:
            return
        if not self._fits(len(image)):
            raise LostBytes
        self._keep(data_holding(job, shard, version, image, world), image)

    def gather(self, job: str, shard: int, version: Version) -> tuple[bytes, int]:
        """A shard from wherever it is, verified, and how many ranks saved it."""
        machine = self.machine
        if machine is None:
            raise LostBytes
        here = machine.facts(str(self.home), NO_COUNTERS)
        slots = {**machine.orders.peers, self.home: here}
        origin = find_shard(slots, job, shard, version, self.home)
        match origin:
            case Local(holding):
                return self.serve(key_of(holding)).image, holding.world
            case Copy(home, holding):
                block = self.read(home, key_of(holding))
                if block.holding != holding:
                    raise LostBytes
                return block.image, holding.world
            case Decode():
                image = decode_verified(origin, self.read)
                return image, world_of(slots, job, version)
            case Missing():
                raise LostBytes

    def store(self, epoch: int, holding: ParityHolding, row: bytes) -> bool:
        """A peer hands a parity block over; whether it was taken."""
        machine = self.machine
        if machine is None or not self._wanted(machine, epoch, holding):
            return False
        if not self._fits(len(row)):
            self.happened()
            return False
        self._keep(holding, row)
        self.cluster.oracle.stored(self.home, epoch, holding)
        self.happened()
        return True

    def store_own(self, holding: ParityHolding, row: bytes) -> bool:
        """The coder's own row needs no leave."""
        if not self._fits(len(row)):
            return False
        self._keep(holding, row)
        return True

    def _wanted(self, machine: SlotMachine, epoch: int, holding: ParityHolding) -> bool:
        """As the vault judges: of the epoch that is, and to be kept here."""
        job = machine.orders.job(holding.job)
        if job is None or job.decision is None or job.lineage != epoch:
            if job is not None and epoch < job.lineage:
                self.cluster.seen["late store of an older epoch"] += 1
            return False
        groups = (*job.decision.groups, *machine.orders.keepers(job))
        homes = (pair for group in groups for pair in parity_homes(group))
        return (holding.place, self.home) in homes


def decode_verified(plan: Decode, read: memory.Reader) -> bytes:
    """Decoded bytes, if they are what the shard's trainer sealed."""
    image = memory.decode(plan, read)
    if digest_differs(image, plan.content_digest):
        raise LostBytes
    return image


def digest_differs(image: bytes, wanted: bytes) -> bool:
    return memory.digest(image) != wanted
