"""Which step is written next, by whom; what is deleted: facts in, instructions out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.persist import (
    Look,
    Persistence,
    Publish,
    Schedule,
    Stop,
    Write,
    due_in_s,
    leftovers,
    removable,
)
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    PersistFacts,
    SlotFacts,
    Stored,
    StoredStep,
    Version,
)

A, B = Home("a", 0), Home("b", 0)
GROUP = Group((Member(0, A), Member(1, B)), 1)
DECISION = Decision(DecisionId(5, "a"), "job", 2, (GROUP,), ("x", "y"))
EACH = Schedule(0.0, 1, 2, 0)


def job(step: int, epoch: int = 5) -> JobFacts:
    return JobFacts("job", 2, 5, 5, Version(epoch, step), 5, DECISION)


def slots(
    told: PersistFacts | None = None, *versions: Version, home: Home = B
) -> dict[Home, SlotFacts]:
    data = {
        h: tuple(DataHolding("job", s, v, 9, b"d") for v in versions) for s, h in enumerate((A, B))
    }
    persist = (told,) if told else ()
    return {
        h: SlotFacts(0, "x:1", data=data[h], persist=persist if h == home else ()) for h in data
    }


def stored(*steps: int, unfinished: tuple[Version, ...] = ()) -> Stored:
    return Stored(
        tuple(StoredStep(Version(5, s), 2, n, 100.0) for n, s in enumerate(steps)), unfinished
    )


def leader(schedule: Schedule = EACH, found: Stored | None = None) -> Persistence:
    mind = Persistence(A, schedule)
    assert mind.instructions([job(3)], slots(), 0.0, 100.0) == [Look("job")]
    assert mind.instructions([job(3)], slots(), 0.0, 100.0) == [], "it is looking"
    mind.looked("job", found or stored())
    return mind


def test_the_leader_states_a_step_all_write_it_and_it_is_published_once() -> None:
    mind = leader()
    mine = Write("job", 0, Version(5, 3))
    assert mind.instructions([job(3)], slots(), 0.0, 100.0) == [mine]
    (told,) = mind.facts()
    assert told.target == Version(5, 3)
    other = Persistence(B, EACH)
    seen = slots(told, home=A)
    his = Write("job", 1, Version(5, 3))
    assert other.instructions([job(3)], seen, 0.0, 100.0) == [his]
    assert other.instructions([job(3)], seen, 0.0, 100.0) == [], "it is under way"
    mind.wrote(mine)
    assert mind.instructions([job(4)], slots(), 0.0, 100.0) == [], "the other one is not done"
    other.wrote(his)
    whole = slots(other.facts()[0])
    publish = Publish("job", Version(5, 3), 2, 0)
    assert mind.instructions([job(4)], whole, 0.0, 100.0) == [publish]
    assert mind.instructions([job(4)], whole, 0.0, 100.0) == []
    mind.published("job", Version(5, 3), stored(3))
    assert mind.facts()[0].published == Version(5, 3)
    assert mind.instructions([job(3)], whole, 0.0, 100.0) == [], "it is there already"
    assert mind.instructions([job(4)], whole, 0.0, 100.0) == [Write("job", 0, Version(5, 4))]


def test_a_step_that_a_home_has_no_more_is_given_up_and_another_one_chosen_after_a_pause() -> None:
    mind = leader()
    mind.instructions([job(3)], slots(), 0.0, 100.0)
    gone = slots(PersistFacts("job", gone=Version(5, 3)))
    assert mind.instructions([job(9)], gone, 0.0, 100.0) == []
    assert mind.next_wake_s() == 1.0
    assert mind.instructions([job(9)], gone, 0.9, 100.0) == []
    # The writing of the old one is stopped, then that of the new one begins.
    assert mind.instructions([job(9)], gone, 1.0, 101.0) == [Stop("job")]
    mind.stopped(Write("job", 0, Version(5, 3)))
    assert mind.instructions([job(9)], gone, 1.0, 101.0) == [Write("job", 0, Version(5, 9))]


def test_what_was_begun_is_finished_first_where_it_can_be() -> None:
    begun = Version(5, 2)
    mind = leader(found=stored(1, unfinished=(Version(5, 0), begun)))
    held = slots(None, begun, Version(5, 3))
    assert mind.instructions([job(3)], held, 0.0, 100.0) == [Write("job", 0, begun)]
    mind = leader(found=stored(1, unfinished=(begun,)))
    found = mind.instructions([job(3)], slots(), 0.0, 100.0)
    assert found == [Write("job", 0, Version(5, 3))], "nobody holds what was begun"


def test_an_error_keeps_the_step_until_the_next_one_is_due() -> None:
    mind = leader(Schedule(60.0, 0, 2, 0))
    mind.instructions([job(3)], slots(), 0.0, 100.0)
    failing = slots(PersistFacts("job", error="forbidden"))
    assert mind.instructions([job(9)], failing, 0.0, 159.0) == []
    assert mind.facts()[0].target == Version(5, 3)
    mind.instructions([job(9)], failing, 0.0, 160.0)
    assert mind.facts()[0].target == Version(5, 9)


def test_a_look_that_failed_is_repeated_after_growing_pauses() -> None:
    mind = Persistence(A, EACH)
    now_s = 0.0
    for pause_s in (1.0, 2.0, 4.0):
        assert mind.instructions([job(3)], slots(), now_s, 100.0) == [Look("job")]
        mind.failed("job", "forbidden", now_s)
        assert mind.facts()[0].error == "forbidden"
        assert mind.instructions([job(3)], slots(), now_s, 100.0) == []
        assert mind.next_wake_s() == now_s + pause_s
        now_s += pause_s


def test_other_homes_begin_with_a_look_and_what_they_wrote_before_does_not_count() -> None:
    mind = leader()
    mine = Write("job", 0, Version(5, 3))
    mind.instructions([job(3)], slots(), 0.0, 100.0)
    mind.wrote(mine)
    swapped = Group((Member(0, A), Member(1, Home("c", 0))), 1)
    later = replace(
        job(3),
        lineage=6,
        decision=replace(DECISION, id=DecisionId(6, "a"), groups=(swapped,)),
    )
    assert mind.instructions([later], slots(), 0.0, 100.0) == [Look("job")]
    assert mind.facts() == (PersistFacts("job"),)


def test_a_slot_that_is_no_home_of_the_job_stops() -> None:
    mind = leader()
    mind.instructions([job(3)], slots(), 0.0, 100.0)
    assert mind.instructions([], slots(), 0.0, 100.0) == [Stop("job")]
    mind.stopped(Write("job", 0, Version(5, 3)))
    assert mind.instructions([], slots(), 0.0, 100.0) == []
    assert mind.facts() == ()


@pytest.mark.parametrize(
    ("interval_s", "every", "step", "unix_s", "left_s"),
    [
        (60.0, 0, 9, 100.0, 60.0),
        (60.0, 0, 9, 159.0, 1.0),
        (60.0, 0, 9, 160.0, 0.0),
        (60.0, 0, 9, 0.0, 0.0),  # the clock was set back
        (60.0, 5, 7, 101.0, 59.0),
        (60.0, 5, 8, 101.0, 0.0),
        (0.0, 5, 7, 999.0, None),
        (0.0, 5, 2, 101.0, 0.0),  # it went back behind what is there
        (60.0, 1, 3, 999.0, None),  # it is there
    ],
)
def test_when_a_step_is_due(
    interval_s: float, every: int, step: int, unix_s: float, left_s: float | None
) -> None:
    schedule = Schedule(interval_s, every, 1, 0)
    assert due_in_s(schedule, Version(5, step), (Version(5, 3), 100.0), unix_s) == left_s


def test_the_first_step_is_due_at_once() -> None:
    assert due_in_s(Schedule(60.0, 0, 1, 0), Version(5, 0), None, 100.0) == 0.0


def test_retention_keeps_the_last_and_each_nth_and_never_nothing() -> None:
    steps = stored(*range(10)).steps
    assert removable(steps, Schedule(1.0, 0, 2, 0)) == [Version(5, s) for s in range(8)]
    kept = removable(steps, Schedule(1.0, 0, 2, 4))
    assert kept == [Version(5, s) for s in (1, 2, 3, 5, 6, 7)]
    assert removable(steps[:1], Schedule(1.0, 0, 1, 0)) == []
    assert removable(steps, Schedule(1.0, 0, 0, 0))[-1] == Version(5, 8)


def test_leftovers_are_older_than_the_whole_step() -> None:
    dead = (Version(4, 9), Version(5, 2), Version(5, 7))
    assert leftovers(stored(unfinished=dead), Version(5, 3)) == [Version(4, 9), Version(5, 2)]


def test_what_another_number_of_ranks_saved_is_not_written_by_these() -> None:
    """Their shards are others: a step that was begun with them could never be made whole."""
    handed = replace(DECISION, restore=Version(4, 3), saved_world=3)
    point = replace(job(3), committed=Version(4, 3), decision=handed)
    assert point.handed_on
    unfinished = stored(unfinished=(Version(4, 3),))
    mind = Persistence(A, EACH)
    held = slots(None, Version(4, 3))
    assert mind.instructions([point], held, 0.0, 100.0) == [Look("job")]
    mind.looked("job", unfinished)
    assert mind.instructions([point], held, 0.0, 100.0) == []
    assert mind.facts()[0].target is None
    own = replace(job(4), decision=handed)
    mind.instructions([own], slots(None, Version(5, 4)), 1.0, 101.0)
    assert mind.facts()[0].target == Version(5, 4)
