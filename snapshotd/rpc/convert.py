"""Versions, places, groups and decisions to messages and back; what cannot be one is refused here.

Everything behind this module and `facts` may trust its values: versions are whole, places are
consistent, digests have their length, and no count is beyond what any cluster has.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    Member,
    ParityPlace,
    RefusalKind,
    Tier,
    Version,
)
from snapshotd.rpc.checks import (
    MAX_MEMBERS,
    MAX_WORLD,
    check_slot,
    check_step,
    checked_epoch,
    malformed,
)
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import segment_pb2 as seg

#: Decisions whose messages are kept: every node tells those of all jobs with each change.
REMEMBERED: Final = 16
#: ... of those that came in, only such as strangers cannot fill memory with.
MAX_REMEMBERED_BYTES: Final = 64 << 10
_told: dict[int, tuple[Decision, pb.Decision]] = {}


def ranges_from(
    extents: Iterable[seg.StorageExtent], image_bytes: int
) -> tuple[tuple[int, int], ...]:
    """Byte ranges [start, end) of an image, in order and apart. Raises RequestError."""
    ranges = tuple((e.image_offset, e.image_offset + e.bytes) for e in extents)
    places = [place for pair in ranges for place in pair]
    if places != sorted(places) or (places and places[-1] > image_bytes):
        raise malformed(f"tensors out of order or beyond an image of {image_bytes} bytes")
    return ranges


def version_to(v: Version) -> seg.Version:
    return seg.Version(epoch=v.epoch, step=v.step)


def version_from(m: seg.Version) -> Version:
    check_step(m.step)
    return Version(checked_epoch(m.epoch), m.step)


def place_to(p: ParityPlace) -> seg.ParityPlace:
    return seg.ParityPlace(shards=p.shards, parity=p.parity, stripe=p.stripe, row=p.row)


def place_from(m: seg.ParityPlace) -> ParityPlace:
    shards = tuple(m.shards)
    if len(shards) > MAX_MEMBERS:
        raise malformed(f"a group of {len(shards)} shards, at most {MAX_MEMBERS} expected")
    if not (1 <= m.parity < len(shards) and m.row < m.parity and m.stripe < len(shards)):
        raise malformed(
            f"parity row {m.row} of {m.parity} in stripe {m.stripe} of {len(shards)} shards"
        )
    if len(set(shards)) != len(shards):
        raise malformed(f"a group names a shard twice: {list(shards)}")
    return ParityPlace(shards, m.parity, m.stripe, m.row)


def group_to(g: Group) -> pb.Group:
    members = [pb.Member(shard=m.shard, home=home_to(m.home)) for m in g.members]
    return pb.Group(members=members, parity=g.parity, unkept=g.unkept)


def home_to(h: Home) -> pb.Home:
    return pb.Home(node=h.node, slot=h.slot)


def group_from(m: pb.Group) -> Group:
    members = tuple(Member(x.shard, Home(x.home.node, x.home.slot)) for x in m.members)
    for member in members:
        check_slot(member.home.slot)
    if not 0 < len(members) <= MAX_MEMBERS or m.parity >= len(members):
        raise malformed(f"a group of {len(members)} with {m.parity} parity blocks")
    if m.unkept > m.parity:
        raise malformed(f"a group that does not keep {m.unkept} of {m.parity} parity blocks")
    if list(members) != sorted(set(members)):
        raise malformed("a group's members are not in order, or not distinct")
    return Group(members, m.parity, m.unkept)


def decision_id_to(i: DecisionId) -> pb.DecisionId:
    return pb.DecisionId(epoch=i.epoch, node=i.node)


def decision_id_from(m: pb.DecisionId) -> DecisionId:
    return DecisionId(checked_epoch(m.epoch), m.node)


def decision_to(d: Decision) -> pb.Decision:
    """The message is shared, and only to be copied from: all facts tell the same few decisions."""
    known = _told.get(id(d))
    if known is None or known[0] is not d:
        if len(_told) >= REMEMBERED:
            _told.clear()
        known = _told[id(d)] = (d, _decision_to(d))
    return known[1]


def _decision_to(d: Decision) -> pb.Decision:
    message = pb.Decision(
        id=decision_id_to(d.id),
        job=d.job,
        world=d.world,
        groups=[group_to(g) for g in d.groups],
        incarnations=[pb.Incarnation(shard=s, id=i) for s, i in enumerate(d.incarnations)],
        tier=pb.Tier.Name(d.tier.value),
        committed=version_to(d.committed) if d.committed else None,
        refusal_kind=pb.RefusalKind.Name(d.refusal_kind.value) if d.refusal_kind else None,
        saved_world=d.saved_world,
        saved_groups=[group_to(g) for g in d.saved_groups],
    )
    if d.refusal:
        message.refusal = d.refusal
    elif d.restore is not None:
        message.restore.CopyFrom(version_to(d.restore))
    else:
        message.fresh.SetInParent()
    return message


def decision_from(m: pb.Decision) -> Decision:
    raw = m.SerializeToString(deterministic=True)
    return _heard(raw) if len(raw) <= MAX_REMEMBERED_BYTES else _decision_from(m)


@lru_cache(maxsize=REMEMBERED)
def _heard(raw: bytes) -> Decision:
    return _decision_from(pb.Decision.FromString(raw))


def _decision_from(m: pb.Decision) -> Decision:
    if not 0 < m.world <= MAX_WORLD or [i.shard for i in m.incarnations] != list(range(m.world)):
        raise malformed(f"a decision for {m.world} ranks names {len(m.incarnations)} trainers")
    outcome = m.WhichOneof("outcome")
    if outcome is None or m.tier not in {t.value for t in Tier}:
        raise malformed("a decision without an outcome")
    if outcome == "refusal" and not m.refusal:
        raise malformed("a refusal without a reason")
    groups = tuple(group_from(g) for g in m.groups)
    shards = sorted(member.shard for group in groups for member in group.members)
    if shards != list(range(m.world)) and (shards or outcome != "refusal"):
        raise malformed(f"the groups of a decision for {m.world} ranks are of other shards")
    return Decision(
        id=decision_id_from(m.id),
        job=m.job,
        world=m.world,
        groups=groups,
        incarnations=tuple(i.id for i in m.incarnations),
        restore=version_from(m.restore) if outcome == "restore" else None,
        refusal=m.refusal,
        refusal_kind=_refusal_kind(m) if m.refusal else None,
        tier=Tier(m.tier),
        committed=version_from(m.committed) if m.HasField("committed") else None,
        saved_world=m.saved_world,
        saved_groups=_saved_groups(m),
    )


def _saved_groups(m: pb.Decision) -> tuple[Group, ...]:
    """Who keeps what other ranks saved; none where they are the same, or nobody knows them."""
    groups = tuple(group_from(g) for g in m.saved_groups)
    shards = sorted(member.shard for group in groups for member in group.members)
    others = m.HasField("restore") and 0 < m.saved_world <= MAX_WORLD and m.saved_world != m.world
    if (m.saved_world and not others) or (shards and shards != list(range(m.saved_world))):
        raise malformed(
            f"a decision for {m.world} ranks says that {m.saved_world} saved what it restores, in "
            f"groups of {len(shards)} shards"
        )
    return groups


def _refusal_kind(m: pb.Decision) -> RefusalKind:
    if m.refusal_kind == pb.REFUSAL_KIND_UNSPECIFIED:
        return RefusalKind.LOST  # a record that an earlier daemon wrote
    if m.refusal_kind not in {k.value for k in RefusalKind}:
        raise malformed(f"a refusal of unknown kind {m.refusal_kind}")
    return RefusalKind(m.refusal_kind)
