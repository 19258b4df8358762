"""When a decision to restore is over: released to all, given up, or left for a greater one.

The rules behind points 2 and 3 of `core.restore`; every node and every slot applies them to the
facts that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from snapshotd.core.protection import Slots
from snapshotd.metadata import Decision, DecisionId, SlotFacts, TrainerFacts


def released(decision: Decision, slots: Slots) -> bool:
    """Whether every trainer's slot has staged the decision, also where the trainer is gone since.

    Once it is true it stays so, for whoever sees it later than others did; but where there is no
    other trainer, there is nobody for whom it must.
    """
    staged = {
        f.trainer.shard: f.trainer.incarnation
        for f in slots.values()
        if f.trainer is not None and f.trainer.decision == decision.id and f.trainer.staged
    }
    for member in (m for g in decision.groups for m in g.members):
        facts = slots.get(member.home)
        if facts is not None and facts.has_staged(decision) and decision.world > 1:
            staged[member.shard] = decision.incarnations[member.shard]
    return all(staged.get(s) == who for s, who in enumerate(decision.incarnations))


def abandoned(decision: Decision, slots: Slots, heard: Mapping[str, int]) -> bool:
    """Whether those it is for are gone, so that it will not be released, or is read by nobody.

    A restore needs all of them. It is given up where a home tells of somebody else, or of nobody,
    and has surely not staged it: else others may have seen it released, where there are others. A
    refusal is kept as long as anybody waits.

    `heard` is the newest epoch that each node knew when it told of its slots. Of one that had not
    heard of the decision, the facts may be older than it, and its trainer not there yet. A later
    decision of an epoch that was heard of is pending no more, or this one would not be: so it is
    over, and it does not matter who has staged it.
    """
    if decision.refusal:
        trainers = (f.trainer for f in slots.values())
        return not any(t and t.waiting and t.incarnation in decision.incarnations for t in trainers)
    vows = (v for f in slots.values() for v in f.vows if v.job == decision.job)
    staged = {v.staged for v in vows if v.staged} - {decision.id}
    over = range(decision.id.epoch + 1, max(heard.values(), default=0) + 1)
    if any(other.epoch not in over for other in staged):
        return False  # another one, of which that is not known
    for member in (m for g in decision.groups for m in g.members):
        facts = slots.get(member.home)
        if facts is None or not facts.address:
            continue  # nothing is known of it now
        has_staged = facts.has_staged(decision)
        if has_staged is None or (has_staged and decision.world > 1):
            continue
        if heard.get(member.home.node, 0) < decision.id.epoch:
            continue
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
