"""Simulated trainers in lockstep: they restore, step, claim, tear, skip, and die."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from snapshotd.errors import RequestError
from snapshotd.metadata import Decision, TrainerFacts, Version

if TYPE_CHECKING:
    from .cluster import Cluster
    from .node import Slot

PATIENCE_S = 0.6
STEP_S = 0.25
JOB = "job"


def next_state(state: bytes, shard: int, step: int) -> bytes:
    """Training: any byte of the state before changes all of the state after."""
    seed = random.Random(f"{state[:64].hex()}/{shard}/{step}")
    return seed.randbytes(5_000 + 4_096 * (shard % 3))


class Gang:
    """One launch of all ranks: nobody is more than one step ahead of the slowest."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.trainers: list[Trainer] = []
        self.done = [-1] * world
        self.decision: Decision | None = None

    @property
    def broken(self) -> bool:
        return any(t.dead or t.refused for t in self.trainers)


class Trainer:
    """One rank of a gang, on one slot."""

    def __init__(self, cluster: Cluster, gang: Gang, shard: int, slot: Slot, name: str) -> None:
        self.cluster, self.gang, self.shard, self.slot = cluster, gang, shard, slot
        self.incarnation = name
        self.decision: Decision | None = None
        self.dead = False
        self.refused = ""
        self.step = 0
        self.state = b""
        self.passed_step = 0
        self._claimed: int | None = None
        self._connected = False

    # -- its process

    def connect(self) -> None:
        """Attach to the slot's SMP, again and again until it is there."""
        if self.dead or self._connected:
            return
        machine = self.slot.machine
        if machine is None or self.slot.trainer is not self:
            self._retry()
            return
        facts = TrainerFacts(
            JOB, "run", 0, self.incarnation, self.shard, self.gang.world,
            decision=self.decision.id if self.decision else None, passed_step=self.passed_step,
        )  # fmt: skip
        try:
            machine.attach(facts)
        except RequestError:
            self._retry()
            return
        self._connected = True
        if self.decision is None:
            machine.ask_restore(allow_fresh=self.cluster.allow_fresh)
        self.slot.happened()

    def _retry(self) -> None:
        self.cluster.clock.after(0.2, self.connect)

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
            if self.slot.machine is not None and self._connected:
                self.slot.machine.detach()
                self.slot.happened()

    # -- answers

    def answered(self, decision: Decision) -> None:
        assert decision.incarnations[self.shard] == self.incarnation, "a stranger's decision"
        self.cluster.oracle.answered(self, decision)
        if decision.refusal:
            self.refused = decision.refusal
            return
        self.decision = decision
        self.step = decision.restore.step + 1 if decision.restore else 0
        self.passed_step = self.step
        self.gang.done[self.shard] = self.step - 1
        self.state = self._restored_image(decision)
        self._train_later()

    def _restored_image(self, decision: Decision) -> bytes:
        if decision.restore is None:
            return b"fresh"
        wanted = (JOB, self.shard, decision.restore)
        for holding, image in self.slot.memory.items():
            if (holding.job, getattr(holding, "shard", None), holding.version) == wanted:
                self.cluster.oracle.restored(self.shard, decision.restore, image)
                return image
        raise AssertionError(f"rank {self.shard} was answered and {decision.restore} is not here")

    # -- training

    def _train_later(self) -> None:
        self.cluster.clock.after(self.cluster.clock.about(STEP_S), self._train)

    def _train(self) -> None:
        if self.dead or self.cluster.quiet:
            return
        behind = any(t.decision is None for t in self.gang.trainers)
        if behind or min(self.gang.done) < self.step - 1:
            self.cluster.clock.after(0.05, self._train)
            return
        self.state = next_state(self.state, self.shard, self.step)
        self.gang.done[self.shard] = self.step
        self._snapshot()

    def _snapshot(self) -> None:
        machine = self.slot.machine
        if machine is None or not self._connected:
            self._next_step()
            return
        job = machine.orders.job(JOB)
        interval = job.cadence.interval if job else 1
        if self.step % interval:
            machine.passed(self.step, due=False)
            self._next_step()
        else:
            self._claim()
        self.slot.happened()

    def _claim(self) -> None:
        machine = self.slot.machine
        assert machine is not None, "_snapshot looked"
        self._claimed = step = self.step
        until_s = self.cluster.clock.now_s + PATIENCE_S
        machine.claim(step, 1, until_s)

        def check() -> None:
            waiting = self._claimed == step and not self.dead and self._connected
            assert not waiting, f"the claim of step {step} by rank {self.shard} was never answered"

        self.cluster.clock.after(PATIENCE_S + 0.1, check)

    def granted(self, version: Version) -> None:
        assert version.step == self._claimed, "a grant of another step"
        self._claimed = None
        life, delay_s = self.slot.life, self.cluster.clock.about(0.03)
        self.cluster.clock.after(delay_s, lambda: self._written(version, life))

    def _written(self, version: Version, life: int) -> None:
        machine = self.slot.machine
        if self.dead:
            return
        if machine is not None and life == self.slot.life:
            if self.cluster.clock.random.random() < self.cluster.tear_probability:
                machine.passed(version.step)
            else:
                self.cluster.oracle.wrote(self.shard, version, self.state)
                self.slot.seal(self.state, JOB, self.shard, version)
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
