"""Why a trainer that asks for a buffer need not wait for one."""

from __future__ import annotations

from snapshotd.core.protection import Slots
from snapshotd.metadata import Home, JobFacts, TrainerFacts


def out_of_epoch(trainer: TrainerFacts, job: JobFacts | None) -> str:
    """Why no snapshot of this trainer can count now; empty when it can."""
    if job is None or job.decision is None:
        return "this node does not know the job's groups yet"
    if job.restoring:
        return f"the job is being restored in epoch {job.restoring.id.epoch}"
    if trainer.decision != job.decision.id:
        return f"the job is in epoch {job.lineage}, and this trainer is of another"
    return ""


def stalled(trainer: TrainerFacts, job: JobFacts | None, home: Home, slots: Slots) -> str:
    """A member of its group that cannot do its part now, so that no buffer will come free soon."""
    decision = job.decision if job is not None else None
    group = decision.group_of(trainer.shard) if decision is not None else None
    if decision is None or group is None or decision.home_of(trainer.shard) != home:
        return ""
    for member in group.members:
        facts = slots.get(member.home)
        if facts is None or not facts.address or facts.trainer is None:
            return f"{member.home} does not take part now"
    return ""
