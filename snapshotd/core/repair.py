"""What is missing at its home and must be brought back, and what never can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

from snapshotd.core.holdings import Holding
from snapshotd.core.instructions import Rebuild
from snapshotd.core.protection import Slots, data_at, demanded, was_coded
from snapshotd.core.recovery import Missing, find_shard
from snapshotd.metadata import DataHolding, Home, JobFacts, Member, Orders, Version

#: Attempts, with pauses that grow to seconds, until facts that are on their way have come.
HOPELESS_TRIES: Final = 6
HOPELESS: Final = "its shard of it is lost, and cannot be put together any more"
UNCODED: Final = "its shard of it was lost before its parity was here"


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
        if job.decision is not None and not job.restoring
        for group in orders.keepers(job)
        for member in group.members
        if member.home == home
        and job.committed is not None
        and (job.job, member.shard, job.committed) not in held
    ]


def lost_after_coding(job: JobFacts, home: Home, slots: Slots) -> Iterator[Rebuild]:
    """Shards of newer versions that `home` had sealed and coded, and lost since.

    Elsewhere such a version may be known as committed, so nobody drops it; and as long as the
    shard is not back, it is never committed here.
    """
    facts = slots.get(home)
    if facts is None or job.decision is None or job.restoring:
        return
    versions = sorted({p.version for p in facts.parity if p.job == job.job})
    for group in demanded(job):
        for member in group.members:
            for version in versions if member.home == home else ():
                newer = job.committed is None or version > job.committed
                lost = data_at(slots, home, job.job, member.shard, version) is None
                open_still = newer and lost and version.epoch == job.lineage
                if open_still and was_coded(group, member, job.job, version, slots):
                    yield Rebuild(job.job, member.shard, version)


class Hopeless:
    """Versions that this slot has given up, because its shard of them cannot be had any more.

    Or because it was lost before all its parity was here. Then the slot has said, for a moment at
    least, that it passed the step without the shard; others may have freed theirs for that, so
    parity that comes later must not make the version count after all.
    """

    def __init__(self) -> None:
        self._failures: Counter[Rebuild] = Counter()
        self._uncoded: set[tuple[str, Version]] = set()

    def lost(self, holding: Holding, job: JobFacts | None, home: Home, slots: Slots) -> None:
        """What `home` held is gone."""
        if isinstance(holding, DataHolding) and job is not None:
            wanted = Member(holding.shard, home)
            for group in (g for g in demanded(job) if wanted in g.members):
                if not was_coded(group, wanted, job.job, holding.version, slots):
                    self._uncoded.add((job.job, holding.version))

    def kept(self, holding: Holding) -> None:
        """It is here, or here again: a restore has brought it."""
        if isinstance(holding, DataHolding):
            self._uncoded.discard((holding.job, holding.version))

    def failed(self, task: Rebuild, job: JobFacts | None, slots: Slots) -> None:
        """A shard was not rebuilt; it counts when everybody is there and nobody has it."""
        homes = [m.home for g in demanded(job) for m in g.members] if job else []
        complete = all(home in slots and slots[home].address for home in homes)
        origin = find_shard(slots, task.job, task.shard, task.version, None)
        if complete and isinstance(origin, Missing):
            self._failures[task] += 1

    def given_up(self, job: JobFacts, version: Version) -> str:
        """Why the slot takes back that it had sealed `version`; never of the restore point."""
        open_still = job.committed is None or version > job.committed
        if open_still and not job.restoring and (job.job, version) in self._uncoded:
            return UNCODED
        lost = version != job.committed and any(
            count >= HOPELESS_TRIES and (task.job, task.version) == (job.job, version)
            for task, count in self._failures.items()
        )
        return HOPELESS if lost else ""

    def forget(self, job: str, version: Version) -> None:
        """Nobody needs the version any more."""
        self._uncoded.discard((job, version))
        for task in [t for t in self._failures if (t.job, t.version) == (job, version)]:
            del self._failures[task]
