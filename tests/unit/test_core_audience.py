"""Who hears of a change at once: one's own groups of everything, others of what they judge by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.audience import Audience
from snapshotd.core.stripes import places
from snapshotd.metadata import (
    DataHolding,
    Group,
    Home,
    JobFacts,
    Member,
    NodeFacts,
    ParityHolding,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Unsealed,
    Version,
)

GROUPS = tuple(
    Group(tuple(Member(s, Home(f"n{s}", 0)) for s in shards), 1)
    for shards in ((0, 1, 2), (3, 4, 5))
)
PEERS = frozenset(f"n{i}" for i in range(1, 7))
PARTNERS = frozenset({"n1", "n2"})
TRAINER = TrainerFacts("job", "run", 0, "a", 0, 6, staged=True)


def data(step: int) -> DataHolding:
    return DataHolding("job", 0, Version(1, step), 100, bytes([step]) * 16)


def parity(step: int) -> tuple[ParityHolding, ...]:
    digests = tuple(bytes([step]) * 16 for _ in range(3))
    return tuple(
        ParityHolding("job", Version(1, step), place, 50, digests, (100, 100, 100))
        for place in places(GROUPS[0], 0)
    )


def facts(slot: SlotFacts, *jobs: JobFacts) -> NodeFacts:
    return NodeFacts("c", "n0", "b", 1, "h:1", slots=(slot,), jobs=jobs)


SLOT = SlotFacts(0, "h:2", TRAINER, (data(1),), parity(1))


@pytest.fixture
def audience() -> Audience:
    found = Audience()
    assert found.of(facts(SLOT), {"job": GROUPS}, {}, PEERS) == PEERS, "nobody was told before"
    return found


@pytest.mark.parametrize(
    "slot",
    [
        SLOT,
        replace(SLOT, unsealed=Unsealed("job", 0, Version(1, 2), 100)),
        replace(SLOT, data=(data(1), data(2))),
        replace(SLOT, data=(data(1), data(2)), parity=(*parity(1), *parity(2)[1:])),
        replace(SLOT, counters=SlotCounters(bytes_sent=5)),
        replace(SLOT, trainer=replace(TRAINER, passed_step=7)),
        replace(SLOT, data=(data(1), replace(data(9), job="other"))),
    ],
    ids=["nothing", "unsealed", "sealed", "some parity", "counters", "passed", "other job"],
)
def test_steps_on_the_way_concern_the_group(audience: Audience, slot: SlotFacts) -> None:
    assert audience.of(facts(slot), {"job": GROUPS}, {}, PEERS) == PARTNERS


@pytest.mark.parametrize(
    "slot",
    [
        replace(SLOT, data=(data(1), data(2)), parity=(*parity(1), *parity(2))),
        replace(SLOT, data=()),
        replace(SLOT, parity=()),
        replace(SLOT, trainer=replace(TRAINER, skipped=1)),
        replace(SLOT, trainer=replace(TRAINER, waiting=True, staged=False)),
        replace(SLOT, trainer=None),
        replace(SLOT, address=""),
        replace(SLOT, short=("job",)),
    ],
    ids=["done", "lost", "parity lost", "skipped", "waits", "gone", "starts", "short"],
)
def test_what_all_judge_by_is_told_to_all(audience: Audience, slot: SlotFacts) -> None:
    assert audience.of(facts(slot), {"job": GROUPS}, {}, PEERS) == PEERS
    assert audience.of(facts(slot), {"job": GROUPS}, {}, PEERS) == PARTNERS


def test_a_restore_point_that_moves_is_concluded_by_all(audience: Audience) -> None:
    job = JobFacts("job", epoch=1, lineage=1, committed=Version(1, 1), committed_in=1)
    keepers = {"job": GROUPS}
    assert audience.of(facts(SLOT, job), keepers, {}, PEERS) == PEERS, "an unknown job"
    moved = replace(job, committed=Version(1, 2))
    assert audience.of(facts(SLOT, moved), keepers, {}, PEERS) == PARTNERS
    assert audience.of(facts(SLOT, replace(job, epoch=2)), keepers, {}, PEERS) == PEERS


def test_while_a_trainer_waits_anywhere_everything_counts(audience: Audience) -> None:
    elsewhere = {Home("n5", 0): SlotFacts(0, "h:3", replace(TRAINER, shard=5, waiting=True))}
    assert audience.of(facts(SLOT), {"job": GROUPS}, elsewhere, PEERS) == PEERS


def test_what_is_done_in_each_of_its_groups_counts(audience: Audience) -> None:
    """Of old ranks and of new ones: a version of the new may be done while the old one stays."""
    alone = Group((Member(7, Home("n0", 0)), Member(8, Home("n4", 0))), 0)
    keepers = {"job": (*GROUPS, alone)}
    assert audience.of(facts(SLOT), keepers, {}, PEERS) == PEERS
    done = replace(SLOT, data=(data(1), replace(data(2), shard=7)))
    assert audience.of(facts(done), keepers, {}, PEERS) == PEERS
    assert audience.of(facts(done), keepers, {}, PEERS) == PARTNERS | {"n4"}


def test_who_stands_in_is_a_partner(audience: Audience) -> None:
    home = Home("n6", 0)
    shelter = replace(GROUPS[0], members=(*GROUPS[0].members[:2], Member(2, home)))
    changed = replace(SLOT, data=(data(1), data(2)))
    audience.of(facts(SLOT), {"job": (shelter,)}, {}, PEERS)
    assert audience.of(facts(changed), {"job": (shelter,)}, {}, PEERS) == {"n1", "n6"}


def test_who_keeps_nothing_has_no_partners() -> None:
    audience = Audience()
    audience.of(facts(SlotFacts(0)), {}, {}, PEERS)
    assert audience.of(facts(SlotFacts(0)), {}, {}, PEERS) == frozenset()
