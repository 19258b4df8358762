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
from snapshotd.core.recovery import Missing, Origin, candidates, survey, tier_of
from snapshotd.core.tier import TierView, fall_through
from snapshotd.core.worlds import (
    MAX_NAMED,
    all_able,
    other_world,
    saved_groups,
    saved_world,
    unable,
)
from snapshotd.errors import CallerError
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    RefusalKind,
    Stored,
    Tier,
    TrainerFacts,
    Version,
)
from snapshotd.wire.protocol import MAX_EPOCH

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
    problem = other_world(now.slots, now.known, by_shard)
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
        if saved == world:
            return decided
        return replace(decided, saved_world=saved, saved_groups=saved_groups(now.known, version))
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
    world, able = len(trainers), all_able(trainers)
    versions = (v for v in candidates(now.slots, now.job) if within_lineage(v, now.known))
    saved = ((v, saved_world(now.slots, now.known, now.job, v) or world) for v in versions)
    return [(v, count) for v, count in saved if able or count == world]


def _from_tier(
    now: Situation, trainers: list[TrainerFacts], groups: tuple[Group, ...]
) -> Decision | Wait | None:
    """What the persistent tier has for a job that memory cannot serve; None where nothing."""
    if now.tier is None:
        return None
    lineage, world = _in_tier(now), len(trainers)
    able = all_able(trainers)
    found = fall_through(now.tier, lineage, world, now.waited_s, now.patience_s, able=able)
    if found.wait:
        return Wait(found.wait, looks=True)
    if found.step is not None:
        step = found.step
        decided = _stated(now, trainers, groups, restore=step.version, tier=Tier.PERSISTENT)
        # It lies in the tier, and no group keeps it.
        return decided if step.world == world else replace(decided, saved_world=step.world)
    if found.other_world and not all(t.allow_fresh for t in trainers):
        why = f"job {now.job!r} {found.other_world}{unable(trainers)}"
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
    """Newer than anything that is known or held, and than what dead attempts left in the tier."""
    begun = now.tier.stored.unfinished if now.tier and now.tier.stored else ()
    held = [v.epoch for v in (*candidates(now.slots, now.job), *_in_tier(now), *begun)]
    known = [now.known.epoch if now.known else 0, *held]
    return max(1 + max(known), now.epoch_floor)
