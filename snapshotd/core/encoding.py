"""Which stripes a slot must code.

The first parity holder of a stripe codes it, as soon as it sees that every member of the group has
sealed its shard, or has written enough of it to be read meanwhile; a row that its holder does not
say it has is coded again, however it was lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from snapshotd.core.instructions import Encode
from snapshotd.core.pace import Pace
from snapshotd.core.protection import (
    Slots,
    coded_from,
    data_at,
    demanded,
    parity_at,
    parity_homes,
    unsealed_at,
)
from snapshotd.core.retention import may_free_version
from snapshotd.core.stripes import stripe
from snapshotd.metadata import Group, Home, JobFacts, Version

#: Snapshots that are coded once they are sealed, after one that was begun before came to nothing.
SOBER_SNAPSHOTS: Final = 8


class Coding(Pace[Encode]):
    """The pace of coding: ahead of the seals, unless that was in vain a short while ago.

    What is given up was sent for nothing. Ranks that stand still in the middle of their copies, or
    long before they seal, do so again and again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sober = 0

    def startable(self, tasks: Iterable[Encode], now_s: float) -> list[Encode]:
        sober = self._sober > 0
        return super().startable([t for t in tasks if not (t.early and sober)], now_s)

    def failed(self, task: Encode, now_s: float) -> None:
        super().failed(task, now_s)
        if task.early:
            self._sober = SOBER_SNAPSHOTS

    def sealed(self, job: str, version: Version) -> None:
        """This slot has sealed its shard: what was tried before does not count."""
        self.forget(job, version)
        self._sober = max(0, self._sober - 1)


def stripes_to_code(
    job: JobFacts,
    keepers: Sequence[Group],
    home: Home,
    versions: Iterable[Version],
    slots: Slots,
) -> list[Encode]:
    """The stripe that `home` codes, for each version of which a row is not stored.

    Args:
        job: as known now.
        keepers: the groups that keep its restore point now.
        home: the slot that asks.
        versions: whose data the slot holds, or has its trainer write now, oldest first.
        slots: facts of all slots.
    """
    if job.decision is None or job.restoring:
        return []
    tasks: list[Encode | None] = []
    for version in versions:
        group = _group_at(keepers if version == job.committed else demanded(job), home)
        due = version == job.committed or version.epoch == job.lineage
        if group is not None and due and not may_free_version(job, version, slots):
            tasks.append(_task(job, home, group, version, slots))
    return [task for task in tasks if task is not None]


def blocks_of(groups: Sequence[Group], home: Home) -> int:
    """In how many blocks the shard at `home` is coded: 1 where it is not."""
    group = _group_at(groups, home)
    return 1 if group is None else group.data


def _group_at(groups: Sequence[Group], home: Home) -> Group | None:
    """The one group in which `home` codes."""
    homes = ((g, m.home) for g in groups if g.rows for m in g.members)
    return next((g for g, where in homes if where == home), None)


def _task(job: JobFacts, me: Home, group: Group, version: Version, slots: Slots) -> Encode | None:
    """What is to be coded of one version; None while a member is missing, or nothing is."""
    shard_bytes: list[int] = []
    digests: list[bytes] = []
    for member in group.members:
        wanted = slots, member.home, job.job, member.shard, version
        if (held := data_at(*wanted)) is not None:
            digests.append(held.content_digest)
            shard_bytes.append(held.image_bytes)
        elif (unsealed := unsealed_at(*wanted)) is not None:
            digests.append(b"")
            shard_bytes.append(unsealed.image_bytes)
        else:
            return None
    index = next(i for i, m in enumerate(group.members) if m.home == me)
    rows = tuple(
        place.row
        for place, home in parity_homes(group)
        if place.stripe == index
        and _reachable(slots, home)
        and not coded_from(parity_at(slots, home, job.job, version, place), digests)
    )
    sources = stripe(group.size, group.parity, index).sources
    if not rows or not all(_reachable(slots, group.members[s.position].home) for s in sources):
        return None
    early = not all(digests)
    return Encode(job.job, job.lineage, version, group, index, rows, tuple(shard_bytes), early)


def _reachable(slots: Slots, home: Home) -> bool:
    facts = slots.get(home)
    return facts is not None and bool(facts.address)
