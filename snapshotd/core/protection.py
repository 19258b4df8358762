"""Whether a group protects a version, and what is lacking where it does not.

*Protected*: every shard of the group is sealed at its home and every parity block is stored at
its holder, computed from those very bytes. *Committed*: every group of the job protects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from snapshotd.core.stripes import places, stripes
from snapshotd.metadata import (
    DataHolding,
    Group,
    Home,
    JobFacts,
    Member,
    ParityHolding,
    ParityPlace,
    SlotFacts,
    Unsealed,
    Version,
)

Slots = Mapping[Home, SlotFacts]


def data_at(slots: Slots, home: Home, job: str, shard: int, version: Version) -> DataHolding | None:
    """The sealed shard at a home, if it is there."""
    facts = slots.get(home)
    if facts is None:
        return None
    wanted = (job, shard, version)
    return next((d for d in facts.data if (d.job, d.shard, d.version) == wanted), None)


def unsealed_at(
    slots: Slots, home: Home, job: str, shard: int, version: Version
) -> Unsealed | None:
    """The shard that the trainer at a home still writes, if it may be read meanwhile."""
    facts = slots.get(home)
    found = facts.unsealed if facts is not None else None
    if found is None or (found.job, found.shard, found.version) != (job, shard, version):
        return None
    return found


def parity_at(
    slots: Slots, home: Home, job: str, version: Version, place: ParityPlace
) -> ParityHolding | None:
    """The parity block at a home, if it is there."""
    facts = slots.get(home)
    if facts is None:
        return None
    wanted = (job, version, place)
    return next((p for p in facts.parity if (p.job, p.version, p.place) == wanted), None)


def lacking(group: Group, job: str, version: Version, slots: Slots) -> list[tuple[Home, str]]:
    """What keeps `group` from protecting `version`: (home, reason); empty when it is protected."""
    missing: list[tuple[Home, str]] = []
    digests: list[bytes] = []
    for member in group.members:
        held = data_at(slots, member.home, job, member.shard, version)
        digests.append(held.content_digest if held else b"")
        if held is None:
            silent = member.home not in slots
            why = "is not live" if silent else f"has not sealed shard {member.shard}"
            missing.append((member.home, why))
    for place, home in parity_homes(group):
        stored = parity_at(slots, home, job, version, place)
        if not coded_from(stored, digests):
            missing.append((home, f"has not stored parity {place.row} of stripe {place.stripe}"))
    return missing


def unprotected(job: JobFacts, newest: Version, slots: Slots) -> list[tuple[Home, str]]:
    """Who keeps the newest sealed version of a shard from being committed: (home, reason)."""
    if job.handed_on and newest == job.committed:
        return []  # these ranks have saved nothing yet
    return [pair for g in demanded(job) for pair in lacking(g, job.job, newest, slots)]


def coded_from(parity: ParityHolding | None, sealed: Sequence[bytes]) -> bool:
    """Whether a parity block is there, and computed from the sealed bytes, as far as known.

    Args:
        parity: the block.
        sealed: content digests of the group's shards; empty where nothing is sealed.
    """
    if parity is None:
        return False
    digests = parity.content_digests
    return all(not now or then == now for then, now in zip(digests, sealed, strict=True))


def parity_homes(group: Group) -> list[tuple[ParityPlace, Home]]:
    """Every parity block of a group, and the home that must keep it."""
    return [
        (
            ParityPlace(group.shards, group.parity, layout.index, row),
            group.members[holder].home,
        )
        for layout in stripes(group)
        for row, holder in enumerate(layout.holders[: group.rows])
    ]


def demanded(job: JobFacts) -> tuple[Group, ...]:
    """The decided groups, with as many parity rows as memory allows now."""
    return _saving(job.decision.groups if job.decision else (), job.economy.rows_less)


def kept(job: JobFacts) -> tuple[Group, ...]:
    """The groups that were formed to keep the restore point, with as many rows as memory allows."""
    return _saving(job.keeping, job.economy.rows_less)


def _saving(groups: tuple[Group, ...], less: int) -> tuple[Group, ...]:
    return tuple(replace(g, unkept=min(g.parity, less)) for g in groups) if less else groups


def newest_protected(job: str, groups: Sequence[Group], slots: Slots) -> Version | None:
    """The newest version that every group of the job protects now, if there is one."""
    common: set[Version] | None = None
    for group in groups:
        for member in group.members:
            facts = slots.get(member.home)
            held = {
                d.version
                for d in (facts.data if facts else ())
                if d.job == job and d.shard == member.shard
            }
            common = held if common is None else common & held
    for version in sorted(common or (), reverse=True):
        if not any(lacking(g, job, version, slots) for g in groups):
            return version
    return None


def aborted(job: JobFacts, version: Version, slots: Slots) -> Home | None:
    """The home of a member that passed `version` without sealing it, so that nobody needs it.

    Only versions made under the decision can be aborted: `passed_step` counts within its epoch. A
    member that keeps all its parity of the version had sealed it and lost it since: elsewhere it
    may be known as committed.
    """
    decision = job.decision
    for group in demanded(job):
        for member in group.members:
            facts = slots.get(member.home)
            trainer = facts.trainer if facts else None
            if trainer is None or decision is None or trainer.decision != decision.id:
                continue
            if (
                trainer.passed_step > version.step
                and data_at(slots, member.home, job.job, member.shard, version) is None
                and not was_coded(group, member, job.job, version, slots)
            ):
                return member.home
    return None


def was_coded(group: Group, member: Member, job: str, version: Version, slots: Slots) -> bool:
    """Whether a member keeps all its parity of a version, and so had sealed its own shard."""
    wanted = places(group, group.position(member.shard))
    return bool(wanted) and all(parity_at(slots, member.home, job, version, p) for p in wanted)
