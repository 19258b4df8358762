"""A job that other ranks saved, in another number: how many did, and who can take it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from snapshotd.core.protection import Slots
from snapshotd.core.recovery import world_of
from snapshotd.metadata import Group, JobFacts, TrainerFacts, Version

#: Ranks named in one sentence that goes to every slot.
MAX_NAMED: Final = 16


def saved_world(slots: Slots, known: JobFacts | None, job: str, version: Version) -> int:
    """How many ranks saved a version; 0 where nobody knows."""
    if known is not None and version.epoch == known.lineage:
        return known.world
    if known is not None and known.decision is not None and version == known.committed:
        return known.saved_world
    return world_of(slots, job, version) or (known.world if known is not None else 0)


def saved_groups(known: JobFacts | None, version: Version) -> tuple[Group, ...]:
    """The groups that keep a version in memory, as far as that is known."""
    if known is not None and version == known.committed:
        return known.keeping
    if known is not None and known.decision is not None and version.epoch == known.lineage:
        return known.decision.groups
    return ()


def all_able(trainers: Sequence[TrainerFacts]) -> bool:
    """Whether all of these can take up what another number of ranks saved."""
    return all(t.reshard for t in trainers)


def unable(trainers: Sequence[TrainerFacts]) -> str:
    """Which of them cannot, as the end of a sentence; empty where none can."""
    those = [str(t.shard) for t in trainers if not t.reshard]
    some = f"; not able to: rank {', '.join(those[:MAX_NAMED])}"
    return "" if len(those) == len(trainers) else some


def other_world(slots: Slots, known: JobFacts | None, trainers: Sequence[TrainerFacts]) -> str:
    """Why these trainers cannot take up the job's restore point; empty when they can."""
    world = len(trainers)
    if known is None or known.committed is None:
        return ""
    if known.world != world and _trains(slots, known):
        return f"job {known.job!r} trains on {known.world} ranks now, and {world} ask to restore it"
    before = saved_world(slots, known, known.job, known.committed)
    if before in (0, world) or all_able(trainers):
        return ""
    return (
        f"job {known.job!r} was saved by {before} ranks and {world} ask to restore it, at "
        f"{known.committed}{unable(trainers)}"
    )


def _trains(slots: Slots, known: JobFacts) -> bool:
    """Whether all ranks of the decision in force live, and have had their answer."""
    decision = known.decision
    if decision is None:
        return False
    for member in (m for g in decision.groups for m in g.members):
        facts = slots.get(member.home)
        trainer = facts.trainer if facts else None
        if trainer is None or trainer.decision != decision.id or not trainer.present:
            return False
    return True
