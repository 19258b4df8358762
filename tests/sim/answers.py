"""The laws of answers: one a trainer, a start, an epoch; and none that was given up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from snapshotd.metadata import Decision, DecisionId, JobFacts

from .trainer import JOB, Trainer
from .violation import must

if TYPE_CHECKING:
    from .cluster import Cluster

GIVEN_UP = "what is given up is answered to nobody"
EPOCH = "one answer an epoch"


class Answers:
    """Every answer that was given, and every restore that some node gave up."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._starts: dict[tuple[str, ...], Decision] = {}
        self._epochs: dict[int, Decision] = {}
        self._given_up: set[DecisionId] = set()
        self._unremembered: set[DecisionId] = set()

    def of(self, epoch: int) -> Decision | None:
        """What was answered in an epoch."""
        return self._epochs.get(epoch)

    def given(self, trainer: Trainer, decision: Decision) -> None:
        """A trainer gets its answer."""
        rank = f"rank {trainer.shard} of {decision.id}"
        mine = decision.incarnations[trainer.shard] == trainer.incarnation
        must(mine, "an answer is for the one who asked", rank)
        must(trainer.decision is None and not trainer.refused, "one answer a trainer", rank)
        first = self._starts.setdefault(decision.incarnations, decision)
        must(first == decision, "one answer a start", f"{first.id} and {decision.id}")
        if decision.refusal:
            return
        must(decision.id not in self._given_up, GIVEN_UP, rank)
        first = self._epochs.setdefault(decision.id.epoch, decision)
        if first != decision:
            left = self._left_of(first)
            must(not left, EPOCH, f"{first.id} and {decision.id}: {left}")
            self._epochs[decision.id.epoch] = decision
            self._unremembered.add(first.id)
            self._cluster.seen["epoch that nothing was left of used again"] += 1
            self._cluster.oracle.unremembered(decision.id.epoch)

    def concluded(self, node: str, before: JobFacts | None, now: JobFacts) -> None:
        """A node knows more than it did."""
        told = {d.id for d in (now.decision, now.pending) if d is not None}
        must(not told & self._unremembered, EPOCH, f"{node} knows what nothing was left of: {told}")
        over = before.restoring if before else None
        if over is None or now.lineage >= over.id.epoch:
            return
        if now.pending is None or now.pending.id < over.id:
            text = f"{over.id} by {node}"
            must(self._epochs.get(over.id.epoch) != over, GIVEN_UP, text)
            living = {t.incarnation for t in self._trainers() if not t.dead}
            gone = not living.issuperset(over.incarnations)
            must(gone, "whose restore is given up is gone", text)
            self._given_up.add(over.id)

    def _left_of(self, decision: Decision) -> str:
        """Who has an answer, a record or bytes of its epoch; empty where nobody has."""
        cluster = self._cluster
        for node in cluster.nodes.values():
            jobs = [j for j in node.records if j.job == JOB]
            if any(decision in (j.decision, j.pending) for j in jobs):
                return f"{node.name} has a record of the first"
        if any(t.decision == decision and not t.dead for t in self._trainers()):
            return "a trainer has the first"
        for home, memory in cluster.memories().items():
            if any(version.epoch == decision.id.epoch for _, version, _ in memory):
                return f"{home} holds bytes of the first"
        return ""

    def _trainers(self) -> Iterator[Trainer]:
        """All that may live: of the newest start, and those that have a slot."""
        gang = self._cluster.launcher.gang
        yield from gang.trainers if gang else ()
        for node in self._cluster.nodes.values():
            yield from (slot.trainer for slot in node.slots if slot.trainer is not None)
