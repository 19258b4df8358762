"""A job's restore point: how what one node knows of a job grows and merges.

Every node computes this for itself from the same facts, and takes over what others already know:
once a decision was released, or a version committed, it stays so. `merge` is commutative,
associative and idempotent, so it does not matter who tells whom, how often, in which order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from snapshotd.core.protection import Slots, demanded, newest_protected
from snapshotd.core.release import abandoned, released
from snapshotd.metadata import Decision, JobFacts, Version

_NEVER = Version(-1, -1)  # before any version


def merge(mine: JobFacts | None, theirs: JobFacts) -> JobFacts:
    """All that two nodes know of a job together."""
    if mine is None:
        return theirs
    point = max(mine, theirs, key=_point_key)
    decided = [d for d in (mine.decision, theirs.decision) if d is not None]
    newer = (d for d in (mine.pending, theirs.pending) if d and d.id.epoch > point.lineage)
    return JobFacts(
        job=mine.job,
        world=point.world,
        epoch=max(mine.epoch, theirs.epoch),
        lineage=point.lineage,
        committed=point.committed,
        committed_in=point.committed_in,
        decision=next((d for d in decided if d.id.epoch == point.lineage), None),
        cadence=max(mine, theirs, key=_cadence_key).cadence,
        economy=max(mine, theirs, key=_economy_key).economy,
        pending=max(newer, key=lambda d: d.id, default=None),
    )


def merge_all(facts: Iterable[JobFacts]) -> JobFacts | None:
    """`merge` over any number of nodes."""
    merged: JobFacts | None = None
    for each in facts:
        if each != merged:  # most nodes know the same
            merged = merge(merged, each)
    return merged


def stated(known: JobFacts | None, decision: Decision) -> JobFacts:
    """What is known once a decision has been stated."""
    fresh = JobFacts(decision.job, epoch=decision.id.epoch, pending=decision)
    return merge(known, fresh)


def advance(
    known: JobFacts, slots: Slots, heard: Mapping[str, int] = MappingProxyType({})
) -> JobFacts:
    """Draw the conclusions that the slots' facts allow: released or abandoned, committed.

    `heard` is the newest epoch that each node knew when it told of its slots.
    """
    pending = known.pending
    if pending is not None and not pending.refusal and released(pending, slots):
        # In the groups that keep it on, what is handed on is as protected as it was.
        kept = pending.saved_world and pending.restore == known.committed
        known = JobFacts(
            job=known.job,
            world=pending.world,
            epoch=known.epoch,
            lineage=pending.id.epoch,
            committed=pending.restore,
            committed_in=known.committed_in if kept else 0,
            decision=pending,
        )
    elif pending is not None and abandoned(pending, slots, heard):
        known = replace(known, pending=None)
    if known.decision is None or known.restoring:
        return known
    version = newest_protected(known.job, demanded(known), slots)
    if version is None or not _newer(version, known):
        return known
    return replace(known, committed=version, committed_in=known.lineage)


def _newer(version: Version, known: JobFacts) -> bool:
    if known.committed is not None and version == known.committed:
        # What other ranks saved is never protected in the groups of these, whatever it looks like.
        return known.committed_in < known.lineage and not known.handed_on
    return version.epoch == known.lineage and version > (known.committed or _NEVER)


def _point_key(facts: JobFacts) -> tuple[int, int, Version, int]:
    return (facts.lineage, facts.committed_in, facts.committed or _NEVER, facts.world)


def _cadence_key(facts: JobFacts) -> tuple[int, int, int]:
    return (facts.lineage, facts.cadence.from_step, facts.cadence.interval)


def _economy_key(facts: JobFacts) -> tuple[int, int, int]:
    return (facts.lineage, facts.economy.serial, facts.economy.rows_less)
