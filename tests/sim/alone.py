"""A job left alone: nobody starts its trainers, and its restore point is protected anew.

Once the faults are over, the nodes that remain must come to survive as many further losses as
their number allows, by a stand-in or by a shrunk group. Then so many more memories are lost, and
the restore that follows must not go back further than to what was protected.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import TYPE_CHECKING

from snapshotd.core.margin import further_losses
from snapshotd.core.recovery import Missing, survey
from snapshotd.metadata import Group, JobFacts, Version

from .promise import Shelter, facts_of
from .trainer import JOB
from .violation import must

if TYPE_CHECKING:
    from .cluster import Cluster

SHELTER_S = 15.0  # from the end of all faults to full protection by those who remain
CALM_S = 1.5  # after the last loss, until every node has heard of it
MAX_TRIED = 8  # in larger clusters not every combination of losses is tried


class LeftAlone:
    """The phase between the faults and the launcher's return."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._chance = cluster.chance("left alone")

    def run(self) -> None:
        """Wait for protection, check it, use it up; nothing where nothing is owed."""
        cluster = self._cluster
        if self._job() is not None:
            cluster.wait(self._lacking, SHELTER_S, "who remains protects")
        job = self._job()
        if job is None or job.decision is None or job.committed is None:
            return
        margin = self._margin(job, job.committed)
        self._check(job, job.committed, margin)
        cluster.seen["restore points sheltered"] += 1
        memories = cluster.memories()
        cluster.oracle.sheltered(Shelter(job, job.committed, job.keeping, margin, memories))
        self._lose(margin)
        cluster.clock.run_until(cluster.clock.now_s + CALM_S + 2 * self._chance.random())

    def _job(self) -> JobFacts | None:
        """What those who remain know, where it is the restore point that is owed."""
        promise = self._cluster.oracle.promise
        boards = [n.board for n in self._cluster.nodes.values() if n.board is not None]
        jobs = [j for b in boards for j in b.jobs() if j.job == JOB]
        job = max(jobs, key=lambda j: (j.lineage, j.committed or Version(0, 0)), default=None)
        if promise is None or not promise.owed() or job is None or job.decision is None:
            return None
        if job.committed != promise.version or job.restoring:
            return None  # a restore was being decided when its trainers went away
        return job

    def _lacking(self) -> str:
        cluster = self._cluster
        if any(n.board is not None and not n.up for n in cluster.nodes.values()):
            return "a slot starts"
        job = self._job()
        if job is None or job.decision is None or job.committed is None:
            return ""
        slots = facts_of(cluster.memories())
        for group, wanted in zip(job.keeping, self._wanted(job), strict=True):
            found = further_losses(slots, JOB, job.committed, group.shards)
            if found < wanted:
                return f"shards {group.shards} survive {found} losses of {wanted}"
        return ""

    def _wanted(self, job: JobFacts) -> list[int]:
        """The losses that each group can survive, by what nodes there are."""
        live = {n.name for n in self._cluster.nodes.values() if n.up}
        homes = {m.home.node for g in job.keeping for m in g.members}
        lost, idle = homes - live, live - homes
        return [_carried(g, lost if len(lost) > len(idle) else ()) for g in job.keeping]

    def _margin(self, job: JobFacts, version: Version) -> int:
        slots = facts_of(self._cluster.memories())
        return min(further_losses(slots, JOB, version, g.shards) for g in job.keeping)

    def _check(self, job: JobFacts, version: Version, margin: int) -> None:
        """What is said to be bearable is: whichever nodes are lost, every shard can be had."""
        slots = facts_of(self._cluster.memories())
        nodes = sorted({home.node for home in slots})
        if len(nodes) > MAX_TRIED:
            nodes = self._chance.sample(nodes, MAX_TRIED)
        for gone in combinations(nodes, margin):
            left = {h: f for h, f in slots.items() if h.node not in gone}
            origins = survey(left, JOB, job.saved_world, version, {})
            whole = not any(isinstance(o, Missing) for o in origins)
            must(whole, "the margin is never said too high", f"{version} without {gone}")

    def _lose(self, margin: int) -> None:
        """As many memories as may be, all at once."""
        cluster = self._cluster
        nodes = [n for n in cluster.nodes.values() if n.board is not None]
        for node in self._chance.sample(nodes, self._chance.choice([margin, margin, 0])):
            cluster.crash(node, memory=True, records=self._chance.random() < 0.5)
            node.gone = True
            cluster.seen["nodes lost after that"] += 1


def _carried(group: Group, lost: Collection[str]) -> int:
    """A group that nobody stands in for can lose all but one of the nodes that it has left."""
    left = sum(m.home.node not in lost for m in group.members)
    return min(group.parity, max(0, left - 1))
