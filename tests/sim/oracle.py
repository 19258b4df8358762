"""What must hold after each event, checked against what really lies in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotd.core.protection import data_at, parity_at, parity_homes
from snapshotd.core.recovery import Missing, candidates, survey
from snapshotd.metadata import (
    DataHolding,
    Decision,
    Group,
    Home,
    JobFacts,
    ParityHolding,
    SlotFacts,
    Version,
)

from .trainer import JOB, Trainer

if TYPE_CHECKING:
    from .cluster import Cluster


class Oracle:
    """The observer who sees everything at once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._truth: dict[tuple[int, Version], bytes] = {}
        self._answers: dict[tuple[str, ...], Decision] = {}
        self._points: dict[str, JobFacts] = {}  # node -> what it said last
        self.point: JobFacts | None = None  # newest restore point anybody knows
        self._groups: tuple[Group, ...] = ()  # that protect it
        self._lost: set[Home] = set()  # memories lost since it was committed
        self._ever_lost: set[Home] = set()
        self._seen: set[tuple[int, int, Version]] = set()
        self.commits = 0
        self.restores = 0
        self.refusals = 0

    # -- told by the simulation

    def wrote(self, shard: int, version: Version, image: bytes) -> None:
        before = self._truth.setdefault((shard, version), image)
        assert before == image, f"{version} of shard {shard} names two different states"

    def restored(self, shard: int, version: Version, image: bytes) -> None:
        assert self._truth[shard, version] == image, f"shard {shard} of {version} came back wrong"
        self.restores += 1

    def answered(self, trainer: Trainer, decision: Decision) -> None:
        """All ranks of one set of incarnations get the same decision."""
        first = self._answers.setdefault(decision.incarnations, decision)
        assert first == decision, f"two answers for one set of trainers: {first} and {decision}"
        if decision.refusal:
            self.refusals += 1
            assert not self._owed(), f"refused though it is restorable: {decision.refusal}"
        elif self._owed() and decision.restore is None:
            raise AssertionError(f"a fresh start over {self.point}")

    def memory_lost(self, home: Home) -> None:
        """Not by anyone's decision: a machine is gone."""
        self._lost.add(home)
        self._ever_lost.add(home)
        self._check_restorable(f"{home} lost its memory")

    def memory_shrank(self, why: str) -> None:
        self._check_restorable(why)

    def forgotten(self) -> None:
        """The operator chose to begin anew."""
        self.point, self._groups = None, ()

    def restarted(self, node: str) -> None:
        """A node without its records may know less than it did."""
        self._points.pop(node, None)

    def concluded(self, node: str, jobs: tuple[JobFacts, ...]) -> None:
        job = next((j for j in jobs if j.job == JOB), None)
        if job is None or job == self._points.get(node):
            return
        self._check_forward(node, self._points.get(node), job)
        self._points[node] = job
        if self.point is None or _key(job) > _key(self.point):
            self._take(job)

    # -- the laws

    def _check_forward(self, node: str, before: JobFacts | None, now: JobFacts) -> None:
        if before is None:
            return
        assert now.epoch >= before.epoch, f"{node}: the epoch went back"
        assert now.lineage >= before.lineage, f"{node}: the lineage went back"
        if now.lineage == before.lineage:
            assert _version(now) >= _version(before), f"{node}: the watermark went back"

    def _take(self, job: JobFacts) -> None:
        """A restore point nobody knew before."""
        older, self.point = self.point, job
        known_before = _key(job) in self._seen
        self._seen.add(_key(job))
        if job.committed is None or known_before:  # told again after the operator gave it up
            self._groups = ()
        elif job.committed_in == job.lineage:
            assert job.decision is not None, "committed without groups"
            self.commits += 1
            self._groups = job.decision.groups
            self._lost = {h for g in self._groups for h in self._absent(g, job.committed)}
            never_there = self._lost - self._ever_lost
            assert not never_there, f"{job.committed} was committed without {never_there}"
        elif older is not None and job.committed < _version(older):
            self._groups = ()  # gone back: nothing is promised until it is protected again
        self._check_restorable(f"{job.committed} was committed")

    def _absent(self, group: Group, version: Version) -> set[Home]:
        """Members that do not hold all their part of a version."""
        slots = self.slots()
        found = {m.home for m in group.members if not data_at(slots, m.home, JOB, m.shard, version)}
        rows = parity_homes(group)
        return found | {h for p, h in rows if not parity_at(slots, h, JOB, version, p)}

    def _owed(self) -> bool:
        """Whether a common restorable version is promised now."""
        homes = [{m.home for m in g.members} for g in self._groups]
        pairs = zip(self._groups, homes, strict=True)
        return bool(self._groups) and all(len(h & self._lost) <= g.parity for g, h in pairs)

    def spared(self, losses: int) -> bool:
        """Whether one more memory may be lost with no more than `losses` since the last commit."""
        return len({home.node for home in self._lost}) < losses

    def _check_restorable(self, why: str) -> None:
        if not self._owed():
            return
        assert self.point is not None, "groups without a point"
        slots = self.slots()
        for version in candidates(slots, JOB):
            origins = survey(slots, JOB, self._cluster.world, version, {})
            if not any(isinstance(o, Missing) for o in origins):
                return
        raise AssertionError(f"nothing is restorable after: {why}; {self.point} was promised")

    def slots(self) -> dict[Home, SlotFacts]:
        """What lies in every memory, as facts."""
        return {
            home: SlotFacts(
                home.slot,
                address="there",
                data=tuple(h for h in memory if isinstance(h, DataHolding)),
                parity=tuple(h for h in memory if isinstance(h, ParityHolding)),
            )
            for home, memory in self._cluster.memories().items()
        }


def _version(job: JobFacts) -> Version:
    return job.committed or Version(0, 0)


def _key(job: JobFacts) -> tuple[int, int, Version]:
    return (job.lineage, job.committed_in, _version(job))
