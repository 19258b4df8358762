"""What an operator is shown: the board's facts as a status message, and whether all is well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from snapshotd import __version__
from snapshotd.core.board import Board
from snapshotd.core.economy import given_up
from snapshotd.core.margin import further_losses
from snapshotd.core.protection import Slots, data_at, lacking
from snapshotd.core.recovery import Copy, Decode, Local, Missing, Origin
from snapshotd.metadata import DataHolding, Group, Home, JobFacts, SlotFacts, Version
from snapshotd.rpc.convert import version_to
from snapshotd.rpc.facts import job_to, slot_to
from snapshotd.wire.v1 import node_pb2 as pb

#: Named in one sentence; a large job has more groups than anybody reads.
MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Exposure:
    """How safe a job's state in one slot of this node is: `why` not, empty while it is."""

    slot: int
    job: str
    why: str


@dataclass(slots=True)
class Clock:
    """When things were first seen here, for ages; seconds of the monotonic clock."""

    seen_s: dict[tuple[str, int, Version], float] = field(default_factory=dict)
    unprotected_since_s: float | None = None

    def watch(self, board: Board, now_s: float) -> None:
        """Note what is new on this node, forget what is gone."""
        held = {(d.job, d.shard, d.version) for facts in board.facts.slots for d in facts.data}
        self.seen_s = {key: self.seen_s.get(key, now_s) for key in held}
        if not any(exposed.why for exposed in exposure(board, now_s)):
            self.unprotected_since_s = None
        elif self.unprotected_since_s is None:
            self.unprotected_since_s = now_s


def exposure(board: Board, now_s: float) -> list[Exposure]:
    """Of each slot of this node, each job on record that trains there or left state there."""
    jobs = {j.job: j for j in board.jobs()}
    return [
        Exposure(facts.slot, name, _why_unprotected(board, jobs[name], now_s))
        for facts in board.facts.slots
        for name in sorted({job for job, _ in _shards_of(facts)})
        if name in jobs
    ]


def _shards_of(facts: SlotFacts) -> list[tuple[str, int]]:
    """(job, shard) that a slot holds, and the one of its trainer, which may hold nothing yet."""
    mine = {(facts.trainer.job, facts.trainer.shard)} if facts.trainer else set()
    return sorted({(d.job, d.shard) for d in facts.data} | mine)


def _why_unprotected(board: Board, job: JobFacts, now_s: float) -> str:
    if job.decision is None:
        return "its groups are not known to this node yet"
    if job.restoring:
        waits = board.orders(now_s).waits.get(job.job, "the ranks are being restored")
        return f"epoch {job.restoring.id.epoch} is not released: {waits}"
    if job.committed is None:
        return "no snapshot is committed yet"
    saving = _savings(job, board.slots(now_s)) if job.economy.rows_less else []
    return sentence(saving + _handed_on(job) + _causes(job, job.committed, board, now_s))


def _handed_on(job: JobFacts) -> list[str]:
    """What another number of ranks saved is the restore point still."""
    if not job.handed_on:
        return []
    where = "" if job.keeping else ", and it is in the persistent tier alone"
    return [
        f"{job.saved_world} ranks saved {job.committed}{where}; its {job.world} ranks nothing yet"
    ]


def _causes(job: JobFacts, version: Version, board: Board, now_s: float) -> list[str]:
    """Who keeps `version` from being protected, without what only follows from that.

    Parity cannot be computed of shards that are not there: where shards are missing, they are
    named, and not the parity that is missing because of them.
    """
    slots, decided = board.slots(now_s), job.decision.groups if job.decision else ()
    found: list[tuple[Home, str]] = []
    for group in job.keeping if version == job.committed else decided:
        missing = lacking(group, job.job, version, slots)
        absent = sum(
            data_at(slots, m.home, job.job, m.shard, version) is None for m in group.members
        )
        # Shards come before parity there.
        found += missing[:absent] or missing
    return [f"{home} {why}" for home, why in found]


def sentence(causes: list[str]) -> str:
    """Some causes in one line, the first of them by name."""
    more = len(causes) - MAX_NAMED
    return "; ".join([*causes[:MAX_NAMED], *([f"and {more} more"] if more > 0 else [])])


def node_status(board: Board, clock: Clock, now_s: float) -> pb.NodeStatus:
    """Members, shards, jobs and slots as this node knows them."""
    facts = board.facts
    return pb.NodeStatus(
        cluster_id=facts.cluster_id,
        node=facts.node,
        boot=facts.boot,
        version=__version__,
        coordinator=board.coordinator(now_s),
        members=_members(board, now_s),
        shards=_shards(board, clock, now_s),
        jobs=[job_to(j) for j in board.jobs()],
        slots=[slot_to(s) for s in facts.slots],
        groups=_groups(board, now_s),
        notes=[note for s in facts.slots if (note := _standstill(s))],
    )


def _standstill(facts: SlotFacts) -> str:
    """An alarm, not an error: the snapshots of a slot bring nothing new."""
    count = facts.counters.repeated_now
    if not count or facts.trainer is None:
        return ""
    return (
        f"the last {count + 1} snapshots of shard {facts.trainer.shard} of job "
        f"{facts.trainer.job!r} in slot {facts.slot} hold the very same tensors: its capture, or "
        "its training, stands still"
    )


def _members(board: Board, now_s: float) -> list[pb.MemberStatus]:
    who = board.membership
    found = [pb.MemberStatus(node=who.node, address=who.address, state="live")]
    accused = accusations(board.slots(now_s))
    found[0].reason = accused.get(who.node, "")
    for node, address in who.addresses().items():
        state, silent_s, reason = who.liveness(node, now_s)
        found.append(
            pb.MemberStatus(
                node=node,
                address=address,
                state=state.value,
                silent_s=min(silent_s, 1e9),
                reason=sentence([r for r in (reason, accused.get(node, "")) if r]),
            )
        )
    return found


def accusations(slots: Mapping[Home, SlotFacts]) -> dict[str, str]:
    """Of each node that some slot holds something against: what, and whether it is cut off."""
    found: dict[str, list[str]] = {}
    for home, facts in sorted(slots.items()):
        for held in facts.accused:
            pause = f", and is cut off for {held.cut_off_s:.0f} s" if held.cut_off_s else ""
            said = f"sent {home} {held.what}, {_times(held.count)}{pause}"
            found.setdefault(held.node, []).append(said)
    return {node: sentence(said) for node, said in found.items()}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _shards(board: Board, clock: Clock, now_s: float) -> list[pb.ShardStatus]:
    exposed = {(e.slot, e.job): e.why for e in exposure(board, now_s)}
    waits = board.orders(now_s).waits
    jobs = {j.job: j for j in board.jobs()}
    found = []
    for facts in board.facts.slots:
        for name, shard in _shards_of(facts):
            held = [d for d in facts.data if (d.job, d.shard) == (name, shard)]
            unknown = waits.get(name, "no live node has a record of this job")
            why = exposed.get((facts.slot, name), unknown)
            found.append(
                pb.ShardStatus(
                    job=name,
                    shard=shard,
                    home=pb.Home(node=board.facts.node, slot=facts.slot),
                    generations=[_generation(d, jobs.get(name), clock, now_s) for d in held],
                    is_protected=not why,
                    why_not=why,
                    waits_for=_waits_for(board, jobs.get(name), held, now_s)
                    + ([f"restore: {waits[name]}"] if name in waits else []),
                )
            )
    return found


def _generation(
    held: DataHolding, job: JobFacts | None, clock: Clock, now_s: float
) -> pb.GenerationStatus:
    state = "sealed"
    if job is not None and job.committed == held.version:
        state = "committed" if job.committed_in == job.lineage else "restored"
    born_s = clock.seen_s.get((held.job, held.shard, held.version), now_s)
    return pb.GenerationStatus(
        version=version_to(held.version),
        state=state,
        age_s=now_s - born_s,
        bytes=held.image_bytes,
    )


def _waits_for(
    board: Board, job: JobFacts | None, held: list[DataHolding], now_s: float
) -> list[str]:
    """Who keeps the newest generation from being committed."""
    if job is None or job.decision is None or not held:
        return []
    return _causes(job, max(d.version for d in held), board, now_s)


def _groups(board: Board, now_s: float) -> list[pb.GroupStatus]:
    """How safe the restore point is in each group that this node is in, or stands in for."""
    me = board.membership.node
    slots = board.slots(now_s)
    found = []
    for job in board.jobs():
        version = job.committed
        if job.decision is None or version is None:
            continue
        keeping = board.keepers(job)
        for group in job.keeping:
            kept = [g for g in keeping if not set(g.shards).isdisjoint(group.shards)]
            homes = [m.home for g in kept for m in g.members]
            if me not in {home.node for home in homes}:
                continue
            missing = [why for g in kept for why in lacking(g, job.job, version, slots)]
            why = [*_savings(job, slots), *_handed_on(job), *_lost_homes(group, kept)]
            found.append(
                pb.GroupStatus(
                    job=job.job,
                    shards=group.shards,
                    homes=[pb.Home(node=h.node, slot=h.slot) for h in homes],
                    version=version_to(version),
                    further_losses=further_losses(slots, job.job, version, group.shards),
                    parity=group.parity,
                    why=sentence(why + [f"{home} {what}" for home, what in missing]),
                )
            )
    return found


def _savings(job: JobFacts, slots: Slots) -> list[str]:
    """What is given up because memory is short, and where it is."""
    short = ", ".join(str(home) for home, facts in sorted(slots.items()) if job.job in facts.short)
    found = [f"memory is short on {short}: no spare generations"] if short else []
    saving = given_up(job.economy)
    return [*found, saving] if saving else found


def _lost_homes(group: Group, kept: list[Group]) -> list[str]:
    """Whose shards are kept elsewhere now."""
    homes = {(m.shard, m.home) for g in kept for m in g.members}
    return [
        f"{m.home} is lost, shard {m.shard} is kept on "
        + " and ".join(str(home) for shard, home in sorted(homes) if shard == m.shard)
        for m in group.members
        if (m.shard, m.home) not in homes
    ]


def plan_reply(board: Board, job: str, now_s: float) -> pb.PlanReply:
    """What a restore would do now, shard by shard."""
    version, origins, reason = board.plan(job, now_s)
    groups = next((j.keeping for j in board.jobs() if j.job == job), ())
    homes = {member.shard: member.home for group in groups for member in group.members}
    return pb.PlanReply(
        job=job,
        restorable=version is not None,
        version=version_to(version) if version else None,
        reason=reason,
        shards=[_shard_plan(i, origin, homes.get(i)) for i, origin in enumerate(origins)],
        world=len(origins),
    )


def _shard_plan(shard: int, origin: Origin, last_home: Home | None) -> pb.ShardPlan:
    match origin:
        case Local(held):
            detail = f"{held.image_bytes} bytes at {last_home}, where it was"
            return pb.ShardPlan(shard=shard, source="local", detail=detail)
        case Copy(home, held):
            detail = f"{held.image_bytes} bytes at {home}"
            return pb.ShardPlan(shard=shard, source="copy", detail=detail)
        case Decode():
            homes = sorted({str(i.home) for b in origin.blocks for i in b.inputs if i.home})
            detail = f"{origin.image_bytes} bytes from {', '.join(homes)}"
            return pb.ShardPlan(shard=shard, source="decode", detail=detail)
        case Missing(reason):
            return pb.ShardPlan(shard=shard, source="missing", detail=reason)
