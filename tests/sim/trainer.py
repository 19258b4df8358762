"""Simulated trainers in lockstep: they restore, step, claim, tear, skip, and die."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

from snapshotd.core.slot import SlotMachine
from snapshotd.errors import RequestError
from snapshotd.metadata import Decision, TrainerFacts, Version

from .clock import about
from .memory import LostBytes, digest
from .violation import Violation, must

if TYPE_CHECKING:
    from .cluster import Cluster
    from .slot import Slot

PATIENCE_S = 0.4
STEP_S = 0.12
WRITE_S = 0.02
LONG_WRITE_S = 0.3  # while others may read what stands
#: How rarely an image is sealed with another length, or other bytes, than others were told of.
CHANGED = 0.03
GATHERS = 8  # attempts, with pauses
JOB = "job"


def next_state(state: bytes, shard: int, step: int) -> bytes:
    """Training: any byte of the state before changes all of the state after; uneven sizes."""
    seed = random.Random(hash_of(state) ^ (shard << 32) ^ step)
    return seed.randbytes(1_000 + 4_096 * (shard % 3))


def hash_of(state: bytes) -> int:
    return int.from_bytes(state[:16], "little")


class Gang:
    """One launch of all ranks: nobody is more than one step ahead of the slowest."""

    def __init__(self, world: int, launch: str, *, allow_fresh: bool, able: float = 0.0) -> None:
        self.world, self.launch, self.allow_fresh = world, launch, allow_fresh
        self.able = able  # the part of the ranks that can take up another world
        self.trainers: list[Trainer] = []
        self.done = [-1] * world

    @property
    def broken(self) -> bool:
        return any(t.dead or t.refused for t in self.trainers)

    @property
    def trains(self) -> bool:
        """Whether every rank was answered."""
        return all(t.decision is not None for t in self.trainers)


class Trainer:
    """One rank of a gang, on one slot."""

    def __init__(self, cluster: Cluster, gang: Gang, shard: int, slot: Slot, name: str) -> None:
        self.cluster, self.gang, self.shard, self.slot = cluster, gang, shard, slot
        self.incarnation = name
        self.decision: Decision | None = None
        self.dead = self.skip_next = self.tear_next = False
        self.refused = ""
        self.step = 0
        self.state = b""
        self.passed_step = 0
        self._claimed: int | None = None
        self._connected = False

    # -- its process

    def connect(self) -> None:
        """Attach to the slot's SMP, again and again until it is there."""
        if self.dead or self.refused or self._connected:
            return
        machine = self.slot.machine
        if self.slot.trainer is None:
            self.slot.trainer = self  # the slot's lock: whoever lives and came first has it
        if machine is None or self.slot.trainer is not self:
            self._retry()
            return
        facts = TrainerFacts(
            JOB, "run", 0, self.incarnation, self.shard, self.gang.world,
            decision=self.decision.id if self.decision else None, passed_step=self.passed_step,
            launch=self.gang.launch,
        )  # fmt: skip
        try:
            machine.attach(facts)
        except RequestError:
            self.cluster.seen["attach refused"] += 1
            self._retry()
            return
        self.cluster.oracle.attached(self.slot, facts)
        self._connected = True
        if self.decision is None:
            able = self.shard < self.gang.able * self.gang.world
            machine.ask_restore(allow_fresh=self.gang.allow_fresh, reshard=able)
        self.slot.happened()

    def _retry(self) -> None:
        self.cluster.clock.after(0.1, self.connect)

    def daemon_lost(self) -> None:
        self._connected = False
        if self._claimed is not None:
            self.denied(self._claimed)
        self.connect()

    def die(self) -> None:
        if self.dead:
            return
        self.dead = True
        if self.slot.trainer is self:
            self.slot.trainer = None
            if self._connected:
                self.slot.trainer_died(self)
        if self.slot.node.chance.random() < 0.3:
            self.cluster.clock.after(about(self.slot.node.chance, 0.4), self._late_message)

    def _late_message(self) -> None:
        """It was on its way when the process died."""
        taken = False
        with contextlib.suppress(RequestError):
            taken = self.slot.request(self.incarnation, lambda m: m.passed(self.step + 1))
        self.cluster.seen["late trainer message"] += 1
        if taken:
            self.cluster.seen["late trainer message taken"] += 1

    # -- answers

    def answered(self, decision: Decision) -> None:
        if self.dead:
            return
        self.cluster.oracle.answered(self, decision)
        if decision.refusal:
            self.refused = decision.refusal
            return
        self.decision = decision
        self.step = decision.restore.step + 1 if decision.restore else 0
        self.passed_step = self.step
        self.gang.done[self.shard] = self.step - 1
        if decision.saved_world:
            self._gather(decision, GATHERS)
            return
        self.state = self._restored_image(decision)
        self._train_later()

    def _gather(self, decision: Decision, attempts: int) -> None:
        """What other ranks saved, all of it; it ends where that cannot be had."""
        assert decision.restore is not None, "there is nothing to gather of a fresh start"
        if self.dead:
            return
        images = []
        try:
            for shard in range(decision.saved_world):
                image, _ = self.slot.gather(JOB, shard, decision.restore)
                self.cluster.oracle.restored(shard, decision.restore, image)
                images.append(image)
        except LostBytes:
            if attempts:
                self.cluster.clock.after(0.3, lambda: self._gather(decision, attempts - 1))
                return
            self.cluster.seen["other world not gathered"] += 1
            self.die()
            return
        self.cluster.seen["other world gathered"] += 1
        self.state = digest(b"".join(images)) + bytes(self.shard)
        self._train_later()

    def _restored_image(self, decision: Decision) -> bytes:
        if decision.restore is None:
            return b"fresh"
        try:
            image = self.slot.serve((JOB, decision.restore, self.shard)).image
        except LostBytes:
            # Flipped between staging and the answer, or seconds after: the trainer's own check
            # of the image says so, and it ends.
            self.cluster.seen["restored image was damaged"] += 1
            self.cluster.clock.after(0.0, self.die)
            return b"damaged"
        self.cluster.oracle.restored(self.shard, decision.restore, image)
        return image

    # -- training

    def _train_later(self) -> None:
        self.cluster.clock.after(about(self.slot.node.chance, STEP_S), self._train)

    def _train(self) -> None:
        if self.dead or self.cluster.quiet:
            return
        if not self.gang.trains or min(self.gang.done) < self.step - 1:
            self.cluster.clock.after(0.03, self._train)
            return
        self.state = next_state(self.state, self.shard, self.step)
        self.gang.done[self.shard] = self.step
        self._snapshot()

    def _snapshot(self) -> None:
        machine = self.slot.machine
        if machine is None or not self._connected:
            self._next_step()
            return
        if self.skip_next:
            self.skip_next = False
            self.slot.request(self.incarnation, lambda m: m.passed(self.step))
            self._next_step()
            return
        job = machine.orders.job(JOB)
        interval = job.cadence.interval if job else 1
        if self.step % interval:
            machine.passed(self.step, due=False)
            self._next_step()
        else:
            self._claim(machine)
        self.slot.happened()

    def _claim(self, machine: SlotMachine) -> None:
        self._claimed = step = self.step
        try:
            machine.claim(step, 1, self.cluster.clock.now_s + PATIENCE_S)
        except RequestError as error:
            raise Violation("claims are taken", f"{self.slot.home}: {error}") from error

        def check() -> None:
            waiting = self._claimed == step and not self.dead and self._connected
            must(not waiting, "claims are answered", f"step {step} by rank {self.shard}")

        self.cluster.clock.after(PATIENCE_S + 0.1, check)

    def granted(self, version: Version) -> None:
        if version.step != self._claimed:
            raise Violation("grants are asked for", f"{version}, claimed {self._claimed}")
        self._claimed = None
        life, delay_s = self.slot.life, about(self.slot.node.chance, WRITE_S)
        chance = self.cluster.early
        if chance.random() < self.cluster.setup.early:
            self.cluster.clock.after(delay_s, lambda: self._stands(version, life))
            delay_s += about(chance, LONG_WRITE_S)
        self.cluster.clock.after(delay_s, lambda: self._written(version, life))

    def _stands(self, version: Version, life: int) -> None:
        """Some of the image is written, the rest is on its way."""
        chance, image = self.cluster.early, self.state
        if chance.random() < CHANGED:
            image = image[:-1] + bytes([image[-1] ^ 1])
        said_bytes = len(image) + (1 if chance.random() < CHANGED else 0)
        if not self.dead and life == self.slot.life:
            self.slot.stands((JOB, version, self.shard), image, said_bytes)

    def _written(self, version: Version, life: int) -> None:
        machine = self.slot.machine
        if self.dead:
            return
        if machine is not None and life == self.slot.life:
            if self.tear_next:
                self.tear_next = False
                machine.passed(version.step)
            else:
                self.cluster.oracle.wrote(self.shard, version, self.state)
                self.slot.seal(self.state, JOB, self.shard, version, self.gang.world)
            self.slot.happened()
        self._next_step()

    def denied(self, step: int) -> None:
        self._claimed = None
        self.cluster.clock.after(0.0, self._next_step)

    def _next_step(self) -> None:
        if self.dead:
            return
        self.step += 1
        self.passed_step = self.step
        self._train_later()
