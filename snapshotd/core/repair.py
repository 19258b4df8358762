"""What of the restore point is missing at its home, and must be brought back."""

from __future__ import annotations

from collections.abc import Collection

from snapshotd.core.instructions import Rebuild
from snapshotd.metadata import Home, Orders, Version


def shards_to_rebuild(
    orders: Orders, home: Home, held: Collection[tuple[str, int, Version]]
) -> list[Rebuild]:
    """The shards of each job's restore point that `home` is to keep and does not hold.

    Args:
        orders: what is known now.
        home: the slot that asks.
        held: (job, shard, version) of what it holds.
    """
    return [
        Rebuild(job.job, member.shard, job.committed)
        for job in orders.jobs
        if job.decision is not None and job.lineage == job.decision.id.epoch
        for group in orders.keepers(job)
        for member in group.members
        if member.home == home
        and job.committed is not None
        and (job.job, member.shard, job.committed) not in held
    ]
