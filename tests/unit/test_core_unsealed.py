"""An image that its trainer still writes: when a slot says so, and when it codes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.encoding import SOBER_SNAPSHOTS, Coding
from snapshotd.core.instructions import Answer, Encode, Grant
from snapshotd.core.pace import RETRY_FIRST_S
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
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Unsealed,
    Version,
)

JOB, STEP, V, SIZE = "job", 4, Version(1, 4), 90
HOMES = tuple(Home(name, 0) for name in "abc")
A, B, C = HOMES
COUNTERS = SlotCounters()


def job(group: Group) -> JobFacts:
    decision = Decision(DecisionId(1, "a"), JOB, group.size, (group,), tuple("xyz"[: group.size]))
    return JobFacts(JOB, group.size, 1, 1, decision=decision)


GROUP = Group(tuple(Member(i, h) for i, h in enumerate(HOMES)), 1)
TRAINS = job(GROUP)


def trainer(shard: int, incarnation: str = "") -> TrainerFacts:
    return TrainerFacts(JOB, "run", 0, incarnation or "xyz"[shard], shard, 3)


def data(shard: int, version: Version = V) -> DataHolding:
    return DataHolding(JOB, shard, version, SIZE, b"%d" % shard, 3)


def writes(shard: int, version: Version = V) -> SlotFacts:
    return SlotFacts(0, "up", unsealed=Unsealed(JOB, shard, version, SIZE))


def orders(*others: SlotFacts, facts: JobFacts = TRAINS) -> Orders:
    return Orders((facts,), {A: SlotFacts(0, "up"), **dict(zip((B, C), others, strict=False))})


def machine(facts: JobFacts = TRAINS) -> SlotMachine:
    """A slot whose trainer has a buffer for the step, in orders that name nobody else."""
    mind = SlotMachine(A, 2)
    mind.attach(trainer(0))
    mind.ask_restore(allow_fresh=False)
    mind.orders = orders(facts=facts)
    mind.instructions(0.0)
    assert isinstance(mind.instructions(0.0)[0], Answer)
    mind.claim(STEP, SIZE, 1.0)
    return mind


def granted(facts: JobFacts = TRAINS) -> SlotMachine:
    mind = machine(facts)
    (grant,) = mind.instructions(0.0)
    assert isinstance(grant, Grant)
    return mind


def readable(mind: SlotMachine) -> Unsealed | None:
    return mind.facts("up", COUNTERS).unsealed


def encoding(mind: SlotMachine, now_s: float) -> list[Encode]:
    return [i for i in mind.instructions(now_s) if isinstance(i, Encode)]


def standing() -> SlotMachine:
    mind = granted()
    mind.stands(V, SIZE)
    return mind


def test_what_stands_is_said_until_it_is_sealed() -> None:
    mind = granted()
    assert readable(mind) is None, "nothing is written yet"
    mind.stands(V, SIZE)
    assert readable(mind) == Unsealed(JOB, 0, V, SIZE)
    published = mind.facts("up", COUNTERS).trainer
    assert published is not None
    assert published.passed_step == STEP, "it has passed nothing by that"
    mind.sealed(data(0))
    assert readable(mind) is None
    assert mind.facts("up", COUNTERS).data == (data(0),)


def test_what_stands_is_not_said_any_more_once_it_is_given_up() -> None:
    mind = standing()
    mind.passed(STEP - 1)
    assert readable(mind) is not None, "of another step"
    mind.passed(STEP)
    assert readable(mind) is None


def test_what_a_trainer_wrote_that_is_gone_is_not_said() -> None:
    mind = standing()
    mind.detach()
    assert readable(mind) is None
    mind.attach(trainer(0, "x'"))
    assert readable(mind) is None
    mind.stands(V, SIZE)
    assert readable(mind) is None, "a word of the one before"


def test_only_of_what_is_filled_anything_stands() -> None:
    mind = granted()
    mind.stands(Version(1, STEP + 1), SIZE)
    mind.stands(Version(2, STEP), SIZE)
    assert readable(mind) is None
    mind.stands(V, SIZE)
    mind.sealed(data(0))
    mind.stands(V, SIZE)
    assert readable(mind) is None, "a late word"
    mind.claim(STEP + 1, SIZE, 1.0)
    mind.instructions(0.0)
    assert readable(mind) is None, "nothing of the next one stands"


def test_a_seal_of_another_version_changes_nothing_of_what_stands() -> None:
    mind = standing()
    mind.sealed(data(0, Version(1, STEP - 1)))
    assert readable(mind) == Unsealed(JOB, 0, V, SIZE)


def test_its_own_image_is_coded_while_it_is_written() -> None:
    mind = granted()
    mind.orders = orders(writes(1), writes(2))
    assert encoding(mind, 0.0) == [], "nothing of it stands"
    mind.stands(V, SIZE)
    assert encoding(mind, 0.0) == [Encode(JOB, 1, V, GROUP, 0, (0,), (SIZE,) * 3, early=True)]


@pytest.mark.parametrize(
    "others",
    [
        (writes(1, Version(1, STEP - 1)), writes(2)),
        (SlotFacts(0, "up", data=(data(1, Version(1, STEP - 1)),)), writes(2)),
        (writes(1),),
    ],
    ids=["writes another", "has sealed another", "is gone"],
)
def test_its_own_image_is_not_coded_before_all_others_can_be_read(
    others: tuple[SlotFacts, ...],
) -> None:
    mind = standing()
    mind.orders = orders(*others)
    assert encoding(mind, 0.0) == []


def test_what_is_coded_early_is_not_coded_a_second_time_meanwhile() -> None:
    mind = standing()
    mind.orders = orders(writes(1), writes(2))
    assert len(encoding(mind, 0.0)) == 1
    assert encoding(mind, 9.0) == []
    mind.orders = orders(SlotFacts(0, "up", data=(data(1),)), writes(2))
    assert encoding(mind, 9.0) == [], "others seal"
    mind.sealed(data(0))
    assert encoding(mind, 9.0) == [], "it seals itself"
    mind.orders = orders(*(SlotFacts(0, "up", data=(data(i),)) for i in (1, 2)))
    assert encoding(mind, 9.0) == []


def sealed_by(mind: SlotMachine, *others: int) -> None:
    mind.orders = orders(*(SlotFacts(0, "up", data=(data(i),)) for i in others))


def test_what_failed_early_is_tried_again_once_all_have_sealed() -> None:
    mind = standing()
    mind.orders = orders(writes(1), writes(2))
    (task,) = encoding(mind, 0.0)
    mind.encode_failed(task, 1.0)
    assert encoding(mind, 9.0) == [], "it was sent in vain once"
    mind.sealed(data(0))
    assert encoding(mind, 9.0) == [], "others still write"
    sealed_by(mind, 1, 2)
    assert encoding(mind, 9.0) == [replace(task, early=False)]


def test_after_one_that_came_to_nothing_some_are_coded_once_they_are_sealed() -> None:
    """Ranks that stand still before they seal do so again: all would be sent twice."""
    coding = Coding()
    early = Encode(JOB, 1, V, GROUP, 0, (0,), (SIZE,) * 3, early=True)
    assert coding.startable([early], 0.0) == [early]
    coding.failed(early, 0.0)
    for step in range(SOBER_SNAPSHOTS):
        version = Version(1, STEP + step)
        ahead = replace(early, version=version)
        late = replace(ahead, early=False)
        assert coding.startable([ahead], 9.0 + step) == []
        coding.sealed(JOB, version)
        assert coding.startable([late], 9.0 + step) == [late]
        coding.done(late)
    again = replace(early, version=Version(1, STEP + SOBER_SNAPSHOTS))
    assert coding.startable([again], 99.0) == [again]


def test_a_failure_after_the_seals_says_nothing_of_coding_early() -> None:
    coding = Coding()
    late = Encode(JOB, 1, V, GROUP, 0, (0,), (SIZE,) * 3)
    assert coding.startable([late], 0.0) == [late]
    coding.failed(late, 0.0)
    early = replace(late, version=Version(1, STEP + 1), early=True)
    assert coding.startable([early], 0.0) == [early]


def test_what_was_coded_early_is_not_coded_again_once_it_is_sealed() -> None:
    """Until its holders can have said so; its own row it has itself."""
    mind = standing()
    mind.orders = orders(writes(1), writes(2))
    (task,) = encoding(mind, 0.0)
    mind.sealed(data(0))
    mind.encoded(task)
    assert encoding(mind, 0.0) == []


def test_of_what_was_given_up_no_pause_is_left() -> None:
    """Nobody holds such a version, so nobody frees it."""
    mind = standing()
    mind.orders = orders(writes(1), writes(2))
    (task,) = encoding(mind, 0.0)
    mind.passed(STEP)
    mind.encode_failed(task, 0.0)
    assert mind.next_wake_s() == RETRY_FIRST_S
    assert encoding(mind, 9.0) == []
    assert mind.next_wake_s() is None
    assert not mind._coding._pauses


@pytest.mark.parametrize(
    ("group", "blocks"),
    [
        (GROUP, 2),
        (replace(GROUP, parity=2), 1),
        (replace(GROUP, parity=0), 1),
        (Group(GROUP.members[1:], 1), 1),
    ],
    ids=["two of three", "one of three", "no parity", "not in the group"],
)
def test_a_grant_says_in_how_many_blocks_the_image_is_coded(group: Group, blocks: int) -> None:
    (grant,) = machine(job(group)).instructions(0.0)
    assert isinstance(grant, Grant)
    assert grant.blocks == blocks
