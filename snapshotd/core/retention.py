"""What a slot must keep, and what it may free.

The rule: a generation is dropped only when a newer one is committed within the present groups.
So there is always a common restore point, also in the time between a restore and the first
commit after it.
"""

from __future__ import annotations

from snapshotd.core.protection import Slots, aborted, parity_homes
from snapshotd.metadata import DataHolding, Decision, Home, JobFacts, ParityHolding, Version


def may_free_version(job: JobFacts, version: Version, slots: Slots) -> str:
    """Why no node needs the bytes of `version` any more; empty while they must be kept."""
    decision = job.decision
    point = job.committed
    if decision is not None and job.lineage < decision.id.epoch:
        return ""  # a restore is being decided: everything may be wanted
    if decision is None and point is not None:
        return ""  # this node just started and has only its record
    settled = job.committed_in == job.lineage
    if version.epoch < job.lineage:
        return _older_epoch(version, point, settled)
    if version.epoch > job.lineage or version == point:
        return ""
    if point is not None and version < point:
        return f"superseded by {point}" if settled else ""
    passer = aborted(decision, version, slots) if decision else None
    return f"{passer} passed it without sealing it" if passer else ""


def _older_epoch(version: Version, point: Version | None, settled: bool) -> str:
    if point is None:
        return "the job started fresh"
    if version > point:
        return f"the job went back to {point}"
    if version < point and settled:
        return f"superseded by {point}"
    return ""


def may_free_data(job: JobFacts, me: Home, held: DataHolding, slots: Slots) -> str:
    """Why this slot may free a sealed shard; empty while it must keep it."""
    reason = may_free_version(job, held.version, slots)
    if reason:
        return reason
    return _moved_away(job, me, held.shard)


def _moved_away(job: JobFacts, me: Home, shard: int) -> str:
    """A shard that lives elsewhere now is only a spare copy once it is protected there."""
    decision = job.decision
    if decision is None or not _settled(job, decision):
        return ""
    home = decision.home_of(shard)
    return f"shard {shard} lives on {home} now" if home != me else ""


def may_free_parity(job: JobFacts, me: Home, held: ParityHolding, slots: Slots) -> str:
    """Why this slot may free a parity block; empty while it must keep it."""
    reason = may_free_version(job, held.version, slots)
    if reason:
        return reason
    decision = job.decision
    if decision is None or not _settled(job, decision):
        return ""
    wanted = any(
        home == me and place == held.place
        for group in decision.groups
        for place, home in parity_homes(group)
    )
    return "" if wanted else "the present groups do not use it"


def _settled(job: JobFacts, decision: Decision) -> bool:
    return job.lineage == decision.id.epoch == job.committed_in
