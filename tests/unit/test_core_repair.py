"""A shard lost before its version was committed: rebuilt where it can be, else given up by all."""

from __future__ import annotations

from dataclasses import replace

from snapshotd.core.instructions import Free, Rebuild
from snapshotd.core.protection import Slots, aborted, parity_homes
from snapshotd.core.repair import HOPELESS_TRIES, UNCODED
from snapshotd.core.slot import SlotMachine
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    ParityHolding,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Version,
)

JOB, NEWER, SIZE = "job", Version(1, 6), 1 << 20
HOMES = tuple(Home(name, 0) for name in "abc")
GROUP = Group(tuple(Member(i, h) for i, h in enumerate(HOMES)), 1)
DECISION = Decision(DecisionId(1, "a"), JOB, 3, (GROUP,), ("x", "y", "z"))
FACTS = JobFacts(JOB, 3, 1, 1, Version(1, 5), 1, DECISION)


def data(shard: int) -> DataHolding:
    return DataHolding(JOB, shard, NEWER, SIZE, b"%d" % shard)


def sealed_and_coded() -> dict[Home, SlotFacts]:
    found = {}
    for shard, home in enumerate(HOMES):
        rows = tuple(
            ParityHolding(JOB, NEWER, place, SIZE, (b"0", b"1", b"2"), (SIZE,) * 3)
            for place, where in parity_homes(GROUP)
            if where == home
        )
        trainer = TrainerFacts(
            JOB, "r", 0, "xyz"[shard], shard, 3, decision=DECISION.id, staged=True, passed_step=7
        )
        found[home] = SlotFacts(0, "up", trainer, (data(shard),), rows)
    return found


def without_data(slots: Slots, *homes: Home) -> dict[Home, SlotFacts]:
    return {h: replace(f, data=()) if h in homes else f for h, f in slots.items()}


def machine(home: Home, slots: dict[Home, SlotFacts]) -> SlotMachine:
    mind = SlotMachine(home, 2)
    for held in (*slots[home].data, *slots[home].parity):
        mind.keep(held)
    trainer = slots[home].trainer
    assert trainer is not None
    mind.attach(trainer)
    mind.orders = Orders((FACTS,), slots)
    return mind


def rebuilds(mind: SlotMachine, now_s: float) -> list[Rebuild]:
    return [i for i in mind.instructions(now_s) if isinstance(i, Rebuild) and i.version == NEWER]


def test_a_coded_shard_that_was_lost_is_brought_back() -> None:
    mind = machine(HOMES[0], without_data(sealed_and_coded(), HOMES[0]))
    assert rebuilds(mind, 0.0) == [Rebuild(JOB, 0, NEWER)]


def test_what_cannot_be_brought_back_is_given_up_by_all() -> None:
    """Else it holds its buffers for ever: it is neither protected nor aborted."""
    slots = without_data(sealed_and_coded(), HOMES[0], HOMES[1])
    assert aborted(FACTS, NEWER, slots) is None
    mind = machine(HOMES[0], slots)
    for attempt in range(HOPELESS_TRIES):
        (task,) = rebuilds(mind, now := 10.0 * attempt)
        mind.rebuild_failed(task, now)
    freed = [i for i in mind.instructions(99.0) if isinstance(i, Free)]
    assert {f.holding for f in freed} == set(slots[HOMES[0]].parity)
    told = {**slots, HOMES[0]: mind.facts("up", slots[HOMES[0]].counters)}
    assert aborted(FACTS, NEWER, told) == HOMES[0]


def test_nothing_is_given_up_while_somebody_is_away() -> None:
    slots = without_data(sealed_and_coded(), HOMES[0], HOMES[1])
    del slots[HOMES[2]]
    mind = machine(HOMES[0], slots)
    for attempt in range(2 * HOPELESS_TRIES):
        (task,) = rebuilds(mind, now := 10.0 * attempt)
        mind.rebuild_failed(task, now)
    assert not [i for i in mind.instructions(999.0) if isinstance(i, Free)]


def test_the_restore_point_is_never_given_up() -> None:
    slots = without_data(sealed_and_coded(), HOMES[0], HOMES[1])
    mind = machine(HOMES[0], slots)
    mind.orders = Orders((replace(FACTS, committed=NEWER),), slots)
    for attempt in range(2 * HOPELESS_TRIES):
        (task,) = rebuilds(mind, now := 10.0 * attempt)
        mind.rebuild_failed(task, now)
    assert not [i for i in mind.instructions(999.0) if isinstance(i, Free)]


def parity_arrives_after_the_loss(job: JobFacts) -> tuple[SlotMachine, list[Free]]:
    """Its shard is damaged before its own row is stored; then the row comes all the same."""
    slots = sealed_and_coded()
    (row,) = slots[HOMES[0]].parity
    slots[HOMES[0]] = replace(slots[HOMES[0]], parity=())
    mind = machine(HOMES[0], slots)
    mind.orders = Orders((job,), slots)
    mind.lose(data(0))
    told = {**slots, HOMES[0]: mind.facts("up", slots[HOMES[0]].counters)}
    assert aborted(FACTS, NEWER, told) == HOMES[0], "whoever hears it now may free what he has"
    mind.keep(row)
    return mind, [i for i in mind.instructions(0.0) if isinstance(i, Free)]


def test_what_others_may_have_given_up_is_not_made_to_count_after_all() -> None:
    mind, freed = parity_arrives_after_the_loss(FACTS)
    assert [(f.holding.version, f.reason) for f in freed] == [(NEWER, UNCODED)]
    assert not mind.facts("up", SlotCounters()).parity
    assert not rebuilds(mind, 9.0)


def test_what_is_committed_elsewhere_is_brought_back_whenever_it_was_lost() -> None:
    mind, freed = parity_arrives_after_the_loss(replace(FACTS, committed=NEWER))
    assert not freed
    assert mind.facts("up", SlotCounters()).parity


def test_what_a_restore_brings_again_is_not_given_up() -> None:
    mind, _ = parity_arrives_after_the_loss(FACTS)
    mind.lose(data(0))
    mind.keep(data(0))
    assert not [i for i in mind.instructions(9.0) if isinstance(i, Free)]
