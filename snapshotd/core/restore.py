"""The one answer to restore(): decided once for the whole job, before any rank loads.

Facts in, a decision or the reason to wait out. How a decision becomes an answer:

1. Of the live nodes with a waiting trainer, the one with the lowest id (`stating_node`) sees a
   trainer of every shard waiting, all of one start of the job, and states a `Decision` for exactly
   these incarnations, under an epoch newer than any known.
2. Each slot *adopts* the greatest decision it sees for its trainer, brings its shard into its own
   memory (`Local`, `Copy` or `Decode`), verifies it, and says *staged*; or says why it failed,
   and the coordinator decides again from what is left.
3. The decision is *released* once all slots have staged it. Only then is any trainer answered.

Two coordinators (each thinks the other dead) do no harm: a slot that has staged a decision moves
to a greater one only when some slot of the job has done so before staging; and then the first can
never be released, because release needs every slot. A decision is released to all or to none.
Nor do they block each other: who states a decision has a waiting trainer of its own, whose slot
hears of no smaller decision first, and so kills every smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from snapshotd.core.placement import form_groups
from snapshotd.core.protection import Slots
from snapshotd.core.recovery import Missing, Origin, candidates, survey, tier_of, world_of
from snapshotd.core.tier import TierView, fall_through
from snapshotd.errors import CallerError
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    RefusalKind,
    SlotFacts,
    Stored,
    Tier,
    TrainerFacts,
    Version,
)
from snapshotd.wire.protocol import MAX_EPOCH

#: Shards named in one sentence that goes to every slot.
MAX_NAMED: Final = 16
#: Starts of a job named in it, where none is complete.
MAX_STARTS: Final = 4

#: Trainers of one start of a job that wait, and where.
_Start = list[tuple[Home, TrainerFacts]]


@dataclass(frozen=True, slots=True)
class Wait:
    """No decision yet, and why; the reason is told to whoever asks.

    `looks`: it is the persistent tier that must be looked into.
    """

    reason: str
    looks: bool = False


@dataclass(frozen=True)
class Situation:
    """All that a decision may depend on.

    Attributes:
        job: which job.
        slots: facts of every slot of every live node.
        known: the merged job facts of all live nodes, None for a job nobody knows.
        absent: nodes that are known, or configured as seeds, and not live now.
        patience_s: how long absent nodes are waited for before an older restore point, a refusal
            or a fresh start is decided without them.
        waited_s: how long the set of waiting trainers has been complete.
        self_node: the node that decides.
        epoch_floor: no new epoch is below it. Seconds of the wall clock at this daemon's start, so
            that a cluster that lost all memory does not use an epoch again that a node which was
            cut off then still remembers.
        tier: the persistent tier, None where none is configured.
    """

    job: str
    slots: Slots
    known: JobFacts | None
    absent: tuple[str, ...]
    patience_s: float
    waited_s: float
    self_node: str
    group_size: int
    parity: int
    epoch_floor: int = 0
    tier: TierView | None = None


def decide(now: Situation) -> Decision | Wait | None:
    """The decision for the trainers that wait, the reason to wait, or None where none waits."""
    starts = _starts(now)
    if not starts:
        return None
    problems = [_incomplete(start) for start in starts]
    if all(problems):
        return Wait("; ".join(problems[:MAX_STARTS]))
    whole = [start for start, problem in zip(starts, problems, strict=True) if not problem]
    # One that is being restored is not given up for another that waits beside it.
    present, waiting = next(
        ((d, start) for start in whole if (d := _decided_for(now, start))), (None, whole[0])
    )
    homes = {facts.shard: home for home, facts in waiting}
    by_shard = sorted((facts for _, facts in waiting), key=lambda t: t.shard)
    if _next_epoch(now) > MAX_EPOCH:
        return Wait(f"some node speaks of epoch {MAX_EPOCH}, after which there is none")
    freshly = all(t.allow_fresh for t in by_shard)
    if present and not (present.refusal and freshly):
        return present
    outcome = _decide_anew(now, by_shard, homes)
    if present and isinstance(outcome, Decision) and outcome.refusal == present.refusal:
        return present
    return outcome


def _decide_anew(
    now: Situation, by_shard: list[TrainerFacts], homes: Mapping[int, Home]
) -> Decision | Wait:
    problem = _other_world(now, by_shard)
    if problem and not all(t.allow_fresh for t in by_shard):
        return _refused(now, by_shard, (), RefusalKind.OTHER_WORLD, problem)
    try:
        groups = form_groups(homes, now.group_size, now.parity)
    except CallerError as error:
        why = f"{error.what}. {error.remedy}"
        return _refused(now, by_shard, (), RefusalKind.CANNOT_PROTECT, why)
    if problem:
        return _stated(now, by_shard, groups)
    return _choose(now, by_shard, homes, groups)


def stating_node(slots: Slots, job: str) -> str:
    """The one node that states decisions now; empty where no trainer waits."""
    nodes = (h.node for h, f in slots.items() if f.trainer and _waits(f.trainer, job))
    return min(nodes, default="")


def within_lineage(version: Version, known: JobFacts | None) -> bool:
    """Whether the job may go back to `version`: nobody gave it up by a later restore or drop."""
    if known is None or version.epoch >= known.lineage:
        return True
    return known.committed is not None and version <= known.committed


def waiting_shards(slots: Slots, job: str) -> tuple[str, ...]:
    """Incarnations of all trainers of a job that wait for an answer, ordered."""
    return tuple(
        sorted(t.incarnation for f in slots.values() if (t := f.trainer) and _waits(t, job))
    )


def _waits(trainer: TrainerFacts, job: str) -> bool:
    return trainer.job == job and trainer.waiting and trainer.present


def _starts(now: Situation) -> list[_Start]:
    """The trainers that wait, by the start of the job they belong to.

    One that is left over from an earlier start completes no set with those of a new one: they
    could not train together.
    """
    found: dict[tuple[str, str, int], _Start] = {}
    for home, facts in sorted(now.slots.items()):
        trainer = facts.trainer
        if trainer is not None and _waits(trainer, now.job) and not _answered(now, trainer):
            found.setdefault(trainer.start, []).append((home, trainer))
    return list(found.values())


def _decided_for(now: Situation, start: _Start) -> Decision | None:
    """What was decided for exactly these trainers, and still stands."""
    incarnations = tuple(t.incarnation for _, t in sorted(start, key=lambda s: s[1].shard))
    known = (now.known.pending, now.known.decision) if now.known else ()
    for_them = (d for d in known if d is not None and d.incarnations == incarnations)
    return next((d for d in for_them if not _failed(now.slots, d)), None)


def _answered(now: Situation, trainer: TrainerFacts) -> bool:
    """Whether it is about to be answered: what it has staged is released.

    It must not be counted together with a trainer left over from an earlier start, which a rank
    of its own start that had its answer a moment sooner no longer contradicts.
    """
    decision = now.known.decision if now.known else None
    return trainer.staged and decision is not None and trainer.decision == decision.id


def _incomplete(waiting: _Start) -> str:
    """Why the trainers of one start are not yet the whole job; empty when they are."""
    run, world = waiting[0][1].run_id, waiting[0][1].world
    seen: dict[int, Home] = {}
    for home, trainer in waiting:
        if trainer.shard in seen:
            return f"two trainers claim shard {trainer.shard}: {seen[trainer.shard]} and {home}"
        seen[trainer.shard] = home
    more = world - len(seen) - MAX_NAMED
    lacking = list(islice((str(s) for s in range(world) if s not in seen), MAX_NAMED))
    if lacking:
        return (
            f"{len(seen)} of {world} trainers of run {run!r} have asked to restore; not yet: shard "
            + ", ".join(lacking)
            + (f" and {more} more" if more > 0 else "")
        )
    return ""


def _other_world(now: Situation, trainers: list[TrainerFacts]) -> str:
    """Why these trainers cannot take up the job's restore point; empty when they can."""
    known, world = now.known, len(trainers)
    if known is None or known.committed is None:
        return ""
    if known.world != world and _trains(now, known):
        return f"job {now.job!r} trains on {known.world} ranks now, and {world} ask to restore it"
    before = saved_world(now.slots, known, now.job, known.committed)
    unable = [str(t.shard) for t in trainers if not t.reshard]
    if before in (0, world) or not unable:
        return ""
    some = "" if len(unable) == world else f"; not able to: rank {', '.join(unable[:MAX_NAMED])}"
    return (
        f"job {now.job!r} was saved by {before} ranks and {world} ask to restore it, at "
        f"{known.committed}{some}"
    )


def _trains(now: Situation, known: JobFacts) -> bool:
    """Whether all ranks of the decision in force live, and have had their answer."""
    decision = known.decision
    if decision is None:
        return False
    for member in (m for g in decision.groups for m in g.members):
        facts = now.slots.get(member.home)
        trainer = facts.trainer if facts else None
        if trainer is None or trainer.decision != decision.id or not trainer.present:
            return False
    return True


def saved_world(slots: Slots, known: JobFacts | None, job: str, version: Version) -> int:
    """How many ranks saved a version; 0 where nobody knows."""
    if known is not None and version.epoch == known.lineage:
        return known.world
    if known is not None and known.decision is not None and version == known.committed:
        return known.saved_world
    return world_of(slots, job, version) or (known.world if known is not None else 0)


def _failed(slots: Slots, decision: Decision) -> bool:
    return any(
        f.trainer is not None and f.trainer.decision == decision.id and f.trainer.failure
        for f in slots.values()
    )


def _choose(
    now: Situation,
    trainers: list[TrainerFacts],
    homes: Mapping[int, Home],
    groups: tuple[Group, ...],
) -> Decision | Wait:
    world = len(trainers)
    point = now.known.committed if now.known else None
    impatient = not _not_heard(now) or now.waited_s >= now.patience_s
    for version, saved in _candidates(now, trainers):
        origins = survey(now.slots, now.job, saved, version, homes if saved == world else {})
        if any(isinstance(o, Missing) for o in origins):
            continue
        if point is not None and version < point and not impatient:
            break
        decided = _stated(now, trainers, groups, restore=version, tier=tier_of(origins))
        return decided if saved == world else _handed_on(now, decided, version, saved)
    if not impatient:
        return Wait(_waiting_for_nodes(now, point))
    stored = _from_tier(now, trainers, groups)
    if stored is not None:
        return stored
    unknown = now.tier is not None and now.tier.stored is None
    unrecorded = (now.known is None or now.known.lineage == 0) and candidates(now.slots, now.job)
    nothing = point is None and not unrecorded and not unknown and not _in_tier(now)
    if all(t.allow_fresh for t in trainers) or nothing:
        return _stated(now, trainers, groups)
    return _refused(now, trainers, groups, RefusalKind.LOST, _lost(now, trainers, homes, point))


def _candidates(now: Situation, trainers: list[TrainerFacts]) -> list[tuple[Version, int]]:
    """Versions that these trainers may go back to, newest first, and how many ranks saved each."""
    world, able = len(trainers), all(t.reshard for t in trainers)
    versions = (v for v in candidates(now.slots, now.job) if within_lineage(v, now.known))
    saved = ((v, saved_world(now.slots, now.known, now.job, v) or world) for v in versions)
    return [(v, count) for v, count in saved if able or count == world]


def _handed_on(now: Situation, decided: Decision, version: Version, saved: int) -> Decision:
    """The same for what `saved` other ranks saved, and for those who keep it now."""
    known = now.known
    groups: tuple[Group, ...] = ()
    if known is not None and version == known.committed:
        groups = known.keeping
    elif known is not None and known.decision is not None and version.epoch == known.lineage:
        groups = known.decision.groups
    return replace(decided, saved_world=saved, saved_groups=groups)


def _from_tier(
    now: Situation, trainers: list[TrainerFacts], groups: tuple[Group, ...]
) -> Decision | Wait | None:
    """What the persistent tier has for a job that memory cannot serve; None where nothing."""
    if now.tier is None:
        return None
    found = fall_through(now.tier, _in_tier(now), len(trainers), now.waited_s, now.patience_s)
    if found.wait:
        return Wait(found.wait, looks=True)
    if found.version is not None:
        return _stated(now, trainers, groups, restore=found.version, tier=Tier.PERSISTENT)
    if found.other_world and not all(t.allow_fresh for t in trainers):
        why = f"job {now.job!r} {found.other_world}"
        return _refused(now, trainers, groups, RefusalKind.OTHER_WORLD, why)
    return None


def _in_tier(now: Situation) -> list[Version]:
    """Whole steps of this lineage in the persistent tier; damaged ones, too."""
    stored = now.tier.stored if now.tier and now.tier.stored else Stored()
    versions = [s.version for s in stored.steps] + [version for version, _ in stored.damaged]
    return [version for version in versions if within_lineage(version, now.known)]


def _not_heard(now: Situation) -> tuple[str, ...]:
    """Who may still bring bytes: nodes that are not live, slots whose SMP is starting."""
    starting = (str(home) for home, facts in now.slots.items() if not facts.address)
    return (*now.absent, *sorted(starting))


def _waiting_for_nodes(now: Situation, point: Version | None) -> str:
    left_s = max(0.0, now.patience_s - now.waited_s)
    absent = ", ".join(_not_heard(now))
    goal = f"the committed {point} cannot be restored" if point else "nothing is held of the job"
    return f"{goal} without node(s) {absent}; waiting {left_s:.0f} s for them"


def _lost(
    now: Situation,
    trainers: list[TrainerFacts],
    homes: Mapping[int, Home],
    point: Version | None,
) -> str:
    """Name, for each version still held, every shard that cannot be had and why."""
    before = f"had committed {point}" if point else "left state behind, and no record of it"
    if now.tier and now.tier.stored is None and not point:
        before = "may have left snapshots in the persistent tier"
    lines = [f"job {now.job!r} {before}, and no snapshot of it can be restored from memory"]
    world, found = len(trainers), _candidates(now, trainers)
    if not found and point is not None:
        found = [(point, saved_world(now.slots, now.known, now.job, point) or world)]
    for version, saved in found:
        origins = survey(now.slots, now.job, saved, version, homes if saved == world else {})
        by = "" if saved == world else f", saved by {saved} ranks"
        lines += [f"{version}{by}: {text}" for text in _shortfalls(origins)]
    if _not_heard(now):
        lines.append(f"not heard of: {', '.join(_not_heard(now))}")
    lines += now.tier.tried() if now.tier else []
    return "\n  ".join(lines)


def _shortfalls(origins: Iterable[Origin]) -> list[str]:
    return [
        f"shard {shard} is missing: {origin.reason}"
        for shard, origin in enumerate(origins)
        if isinstance(origin, Missing)
    ]


def _stated(
    now: Situation,
    trainers: list[TrainerFacts],
    groups: tuple[Group, ...],
    *,
    restore: Version | None = None,
    tier: Tier = Tier.NONE,
) -> Decision:
    return Decision(
        id=DecisionId(_next_epoch(now), now.self_node),
        job=now.job,
        world=len(trainers),
        groups=groups,
        incarnations=tuple(t.incarnation for t in trainers),
        restore=restore,
        tier=tier,
        committed=now.known.committed if now.known else None,
    )


def _refused(
    now: Situation,
    trainers: list[TrainerFacts],
    groups: tuple[Group, ...],
    kind: RefusalKind,
    why: str,
) -> Decision:
    return replace(_stated(now, trainers, groups), refusal=why, refusal_kind=kind)


def _next_epoch(now: Situation) -> int:
    """Newer than anything that is known or held."""
    held = [v.epoch for v in (*candidates(now.slots, now.job), *_in_tier(now))]
    known = [now.known.epoch if now.known else 0, *held]
    return max(1 + max(known), now.epoch_floor)


def released(decision: Decision, slots: Slots) -> bool:
    """Whether every trainer's slot has staged the decision, also where the trainer is gone since.

    Once it is true it stays so, for whoever sees it later than others did.
    """
    staged = {
        f.trainer.shard: f.trainer.incarnation
        for f in slots.values()
        if f.trainer is not None and f.trainer.decision == decision.id and f.trainer.staged
    }
    for member in (m for g in decision.groups for m in g.members):
        facts = slots.get(member.home)
        if facts is not None and facts.has_staged(decision):
            staged[member.shard] = decision.incarnations[member.shard]
    return all(staged.get(s) == who for s, who in enumerate(decision.incarnations))


def abandoned(decision: Decision, slots: Slots) -> bool:
    """Whether those it is for are gone, so that it will not be released, or is read by nobody.

    A restore needs all of them. It is given up where a home tells of somebody else, or of nobody,
    and has surely not staged it: else others may have seen it released. A refusal is kept as long
    as anybody waits.
    """
    if decision.refusal:
        trainers = (f.trainer for f in slots.values())
        return not any(t and t.waiting and t.incarnation in decision.incarnations for t in trainers)
    vows = (v for f in slots.values() for v in f.vows if v.job == decision.job and v.staged)
    if any(v.staged != decision.id for v in vows):
        return False  # an earlier one, of which that is not known
    for member in (m for g in decision.groups for m in g.members):
        facts = slots.get(member.home)
        if facts is None or not facts.address or facts.has_staged(decision) is not False:
            continue  # nothing is known of it now, or not enough
        here = facts.trainer.incarnation if facts.trainer else ""
        if here != decision.incarnations[member.shard]:
            return True
    return False


def should_adopt(trainer: TrainerFacts, decision: Decision, slots: Slots) -> bool:
    """Whether a slot's waiting trainer moves to `decision` from the one it follows now."""
    if not trainer.waiting or decision.job != trainer.job:
        return False
    if decision.incarnations[trainer.shard : trainer.shard + 1] != (trainer.incarnation,):
        return False
    if trainer.decision is None:
        return True
    if decision.id <= trainer.decision:
        return False
    return not trainer.staged or _killed(trainer.decision, decision, slots.values())


def _killed(old: DecisionId, new: Decision, slots: Iterable[SlotFacts]) -> bool:
    """Whether some trainer of `new` has left `old` behind, so that `old` is never released."""
    return any(
        f.trainer is not None
        and f.trainer.incarnation in new.incarnations
        and f.trainer.decision is not None
        and f.trainer.decision > old
        for f in slots
    )
