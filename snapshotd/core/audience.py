"""Who must hear of a change at once: a node's groups of everything, others of what they judge by.

All else they hear with the next heartbeat. So what a snapshot costs in messages does not grow with
the number of nodes, but for one word of each node to each when it has done its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

from snapshotd.core.protection import Slots, parity_at
from snapshotd.core.stripes import places
from snapshotd.metadata import Group, Home, JobFacts, NodeFacts, SlotCounters, Version

#: Of a job: the groups that keep it, or are about to.
Keepers = Mapping[str, Sequence[Group]]


class Audience:
    """Remembers what all nodes were told last."""

    def __init__(self) -> None:
        self._report: object = None

    def of(self, facts: NodeFacts, keepers: Keepers, slots: Slots, peers: Set[str]) -> Set[str]:
        """Which of `peers` must hear these new facts of this node at once.

        Args:
            facts: of this node.
            keepers: of all jobs.
            slots: of every live node.
            peers: all that there are.
        """
        report = _report(facts, keepers)
        same, self._report = report == self._report, report
        if not same or _restoring(facts.jobs, slots):
            return peers
        return peers & _partners(facts.node, keepers)


def _restoring(jobs: Iterable[JobFacts], slots: Slots) -> bool:
    """Whether something is being decided for which everything counts."""
    waiting = any(f.trainer is not None and f.trainer.waiting for f in slots.values())
    return waiting or any(job.restoring for job in jobs)


def _partners(node: str, keepers: Keepers) -> frozenset[str]:
    """Nodes that keep something together with a node."""
    groups = (
        {m.home.node for m in group.members} for of_job in keepers.values() for group in of_job
    )
    return frozenset().union(*(nodes for nodes in groups if node in nodes))


def _report(facts: NodeFacts, keepers: Keepers) -> object:
    """What every node judges by, whether it is in a group with this one or not."""
    slots = {Home(facts.node, s.slot): s for s in facts.slots}
    return (
        facts.boot,
        facts.members,
        [
            (j.job, j.epoch, j.lineage, j.decision, j.pending, j.cadence, j.economy)
            for j in facts.jobs
        ],
        [
            (
                home,
                replace(
                    s,
                    data=(),
                    parity=(),
                    counters=SlotCounters(),
                    accused=(),
                    trainer=None,
                    unsealed=None,
                    persist=tuple(replace(p, bytes_done=0, bytes_total=0) for p in s.persist),
                ),
                replace(s.trainer, passed_step=0) if s.trainer else None,
                [
                    _done(home, job, group, slots)
                    for job, groups in sorted(keepers.items())
                    for group in groups
                ],
            )
            for home, s in slots.items()
        ],
    )


def _done(home: Home, job: str, group: Group, slots: Slots) -> Version | None:
    """The newest version of which a home keeps all that a group has it keep."""
    position = next((i for i, m in enumerate(group.members) if m.home == home), None)
    if position is None:
        return None
    mine, shard = places(group, position), group.members[position].shard
    sealed = (d.version for d in slots[home].data if (d.job, d.shard) == (job, shard))
    whole = (v for v in sealed if all(parity_at(slots, home, job, v, place) for place in mine))
    return max(whole, default=None)
