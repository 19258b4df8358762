"""A slot goes on saying what it has staged, and says nothing of what came before it."""

from __future__ import annotations

from dataclasses import replace

from snapshotd.core.slot import SlotMachine
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Version,
    Vow,
)

HOME = Home("a", 0)
GROUP = Group((Member(0, HOME),), 0)
DECISION = Decision(DecisionId(2, "a"), "job", 1, (GROUP,), ("one",), Version(1, 3))
TRAINS = JobFacts("job", 1, 1, 1)
RESTORES = replace(TRAINS, epoch=2, pending=DECISION)
TRAINER = TrainerFacts("job", "run", 0, "one", 0, 1, waiting=True)


def told(*orders: JobFacts) -> SlotMachine:
    mind = SlotMachine(HOME, 2)
    for job in orders:
        mind.orders = Orders((job,))
    return mind


def facts(mind: SlotMachine) -> SlotFacts:
    return mind.facts("up", SlotCounters())


def test_who_was_there_before_it_was_decided_knows() -> None:
    mind = told(TRAINS, RESTORES)
    assert facts(mind).has_staged(DECISION) is False
    mind.attach(TRAINER)
    mind.instructions(0.0)
    mind.staged(DECISION.id)
    assert facts(mind).has_staged(DECISION) is True
    mind.detach()
    assert facts(mind).has_staged(DECISION) is True, "its trainer is gone, and it had staged"
    newer = replace(DECISION, id=DecisionId(3, "a"))
    mind.orders = Orders((replace(RESTORES, epoch=3, pending=newer),))
    assert facts(mind).has_staged(newer) is False


def test_a_fresh_start_is_staged_as_soon_as_it_is_adopted() -> None:
    """Others may release it as soon as they hear of that, and the trainer may end before."""
    fresh = replace(DECISION, restore=None)
    mind = told(TRAINS, replace(RESTORES, pending=fresh))
    mind.attach(TRAINER)
    mind.instructions(0.0)
    assert mind.trainer is not None
    assert mind.trainer.staged
    mind.detach()
    assert facts(mind).has_staged(fresh) is True


def test_who_came_later_does_not_know() -> None:
    assert facts(told(RESTORES)).has_staged(DECISION) is None
    assert facts(told()).has_staged(DECISION) is None


def test_nothing_is_said_of_what_is_over() -> None:
    mind = told(TRAINS, RESTORES, replace(TRAINS, lineage=2, decision=DECISION, epoch=2))
    assert facts(mind).vows == ()
    mind._vows.staged("job", DECISION.id)
    newer = replace(DECISION, id=DecisionId(3, "a"))
    mind.orders = Orders((replace(RESTORES, lineage=2, epoch=3, decision=DECISION, pending=newer),))
    assert facts(mind).vows == (Vow("job", 1),), "what it staged was released"
    mind.orders = Orders()
    mind.orders = Orders((RESTORES,))
    assert facts(mind).has_staged(DECISION) is None, "it had forgotten the job"
