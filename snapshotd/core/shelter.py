"""Who keeps a job's restore point while nodes of its groups are lost.

A group is formed for trainers that run. When one of its nodes is lost, what that node kept is
rebuilt elsewhere without waiting for the trainers: on a *stand-in*, an idle node of the cluster,
which takes over the lost node's place in the code; and where none has come in time, on the nodes
that remain, with the group shrunk. All of it is a function of facts: when the node comes back the
function says so, and what was rebuilt is freed once the old homes hold everything again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from snapshotd.core.protection import Slots, data_at, kept
from snapshotd.metadata import Group, Home, JobFacts, Member, Version


@dataclass(frozen=True, slots=True)
class Absence:
    """Which nodes are away.

    Attributes:
        live: nodes that are heard of, this one too.
        dead: nodes silent for so long that they count as lost.
        overdue: those of them for which no replacement is waited for any more.
    """

    live: Collection[str]
    dead: Collection[str]
    overdue: Collection[str]


def keepers(job: JobFacts, slots: Slots, absence: Absence) -> tuple[Group, ...]:
    """The groups that are to keep the restore point now; as they were formed while all live."""
    groups = kept(job)
    lost = sorted(nodes_of(g for g in groups if g.parity) & set(absence.dead))
    if not lost or job.committed is None or job.restoring:
        return groups
    stand_ins = _stand_ins(job, job.committed, lost, slots, absence)
    found: list[Group] = []
    for group in groups:
        moved = replace(group, members=tuple(_moved(m, stand_ins) for m in group.members))
        found += _shrunk(moved, job.job, job.committed, slots, absence)
    return tuple(found)


def nodes_of(groups: Iterable[Group]) -> frozenset[str]:
    """All nodes that are home to a member."""
    return frozenset(m.home.node for g in groups for m in g.members)


def _moved(member: Member, stand_ins: Mapping[str, str]) -> Member:
    node = stand_ins.get(member.home.node, member.home.node)
    return Member(member.shard, Home(node, member.home.slot))


def _stand_ins(
    job: JobFacts, version: Version, lost: list[str], slots: Slots, absence: Absence
) -> dict[str, str]:
    """Lost node -> the idle one that takes its place; one that has begun to do so stays.

    One without room for it is passed over.
    """
    mine = nodes_of(job.keeping)
    outside = [h for h in slots if h.node not in mine]
    busy = {h.node for h, f in slots.items() if f.trainer is not None} | mine
    short = {h.node for h, f in slots.items() if job.job in f.short}
    idle = sorted(set(absence.live) - busy - short)
    found: dict[str, str] = {}
    for node in lost:
        holders = _holders(job, version, node, slots, outside)
        began = [n for n in holders if n not in short and n not in found.values()]
        free = [n for n in idle if n not in found.values()]
        chosen = next(iter((*began, *free)), None)
        if chosen is not None:
            found[node] = chosen
    return found


def _holders(
    job: JobFacts, version: Version, lost: str, slots: Slots, outside: Iterable[Home]
) -> list[str]:
    """Nodes of homes outside the job's groups that hold a shard of a lost node."""
    members = [m for g in job.keeping for m in g.members if m.home.node == lost]
    return sorted(
        home.node
        for home in outside
        if any(
            m.home.slot == home.slot and data_at(slots, home, job.job, m.shard, version)
            for m in members
        )
    )


def _shrunk(
    group: Group, job: str, version: Version, slots: Slots, absence: Absence
) -> Iterator[Group]:
    """`group`, or without its overdue members: a smaller code, and copies of their shards."""
    gone = [m for m in group.members if m.home.node in absence.overdue]
    stay = tuple(m for m in group.members if m not in gone)
    if not gone or not stay or group.parity == 0:
        yield group
        return
    parity, rows = (min(count, len(stay) - 1) for count in (group.parity, group.rows))
    yield Group(stay, parity, parity - rows)
    for member in gone:
        for home in _refuges(member.shard, group.rows + 1, stay, job, version, slots):
            yield Group((Member(member.shard, home),), 0)


def _refuges(
    shard: int, copies: int, stay: tuple[Member, ...], job: str, version: Version, slots: Slots
) -> list[Home]:
    """Homes of the copies of a shard whose node is gone; those that have one come first."""
    start = shard % len(stay)
    turn = [m.home for m in (*stay[start:], *stay[:start])]
    holding = [h for h in turn if data_at(slots, h, job, shard, version)]
    return (holding + [h for h in turn if h not in holding])[:copies]
