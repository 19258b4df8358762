"""Protection is given up in steps while memory is short, and taken up again."""

from __future__ import annotations

from dataclasses import replace

from snapshotd.core.commit import advance, merge
from snapshotd.core.economy import GIVE_UP_S, TAKE_UP_S, Spell, judge
from snapshotd.core.protection import demanded, parity_homes
from snapshotd.core.retention import superseded
from snapshotd.core.slot import SlotMachine
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Economy,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    SlotFacts,
    Version,
)

JOB, POINT = "job", Version(1, 5)
HOMES = tuple(Home(name, 0) for name in "abc")
GROUP = Group(tuple(Member(i, h) for i, h in enumerate(HOMES)), 2)
DECISION = Decision(DecisionId(1, "a"), JOB, 3, (GROUP,), ("x", "y", "z"))
FACTS = JobFacts(JOB, 3, 1, 1, POINT, 1, DECISION)


def life(shorts: list[bool], step_s: float, parity: int = 2) -> list[int]:
    """Rows given up after each look."""
    spell: Spell | None = None
    economy, found = Economy(), []
    for number, short in enumerate(shorts):
        spell, economy = judge(
            spell, short=short, present=economy, parity=parity, now_s=number * step_s
        )
        found.append(economy.rows_less)
    return found


def test_rows_are_given_up_one_by_one_and_taken_up_one_by_one() -> None:
    assert life([True] * 4, GIVE_UP_S) == [0, 1, 2, 2]
    assert life([True] * 3 + [False] * 4, TAKE_UP_S) == [0, 1, 2, 2, 1, 0, 0]
    assert life([True, False] * 4, TAKE_UP_S) == [0] * 8, "short for a moment is not short"
    assert life([True] * 4, GIVE_UP_S, parity=0) == [0] * 4


def test_the_newest_word_of_the_newest_lineage_holds() -> None:
    one = replace(FACTS, economy=Economy(1, 1))
    two = replace(FACTS, economy=Economy(2, 0))
    assert merge(one, two).economy == merge(two, one).economy == Economy(2, 0)
    newer = replace(FACTS, lineage=2)
    assert merge(one, newer).economy == Economy()


def test_rows_that_are_not_kept_are_not_waited_for() -> None:
    data = {
        home: SlotFacts(0, "up", data=(DataHolding(JOB, i, Version(1, 6), 1, b"%d" % i),))
        for i, home in enumerate(HOMES)
    }
    assert advance(FACTS, data).committed == POINT
    local = replace(FACTS, economy=Economy(1, 2))
    assert advance(local, data).committed == Version(1, 6)
    (group,) = demanded(replace(FACTS, economy=Economy(1, 1)))
    assert {place.row for place, _ in parity_homes(group)} == {0}
    assert group.data == GROUP.data, "the code is the same, so nothing is computed anew"


def test_a_short_slot_says_so_and_keeps_no_spares() -> None:
    mind = SlotMachine(HOMES[0], 3)
    mind.orders = Orders((FACTS,))
    mind.no_room(JOB, 100)
    assert mind.facts("a", SlotFacts(0).counters).short == (JOB,)
    mind.room(JOB)
    assert mind.facts("a", SlotFacts(0).counters).short == ()


def test_what_is_kept_in_place_of_a_lost_slot_takes_nothing_from_the_job() -> None:
    mind = SlotMachine(GROUP.members[0].home, 2)
    shrunk = replace(GROUP, members=GROUP.members[:2])
    mind.orders = Orders((FACTS,), shelters={JOB: (shrunk,)})
    mind.no_room(JOB, 100)
    assert not mind.short
    stand_in = SlotMachine(Home("spare", 0), 2)
    moved = replace(GROUP, members=(*GROUP.members[:2], Member(2, stand_in.home)))
    stand_in.orders = Orders((FACTS,), shelters={JOB: (moved,)})
    stand_in.no_room(JOB, 100)
    assert stand_in.short, "it says so, and is passed over"


def test_a_restore_under_pressure_takes_no_memory_from_the_restore_point() -> None:
    """What it brings back may be newer, and not protected yet: until then nothing else is owed."""
    newer = replace(DECISION, id=DecisionId(2, "a"), restore=Version(1, 6))
    pending = replace(FACTS, epoch=2, pending=newer)
    assert not superseded(pending, POINT, pressed=True)
    assert not superseded(pending, Version(1, 4))
    assert superseded(pending, Version(1, 4), pressed=True)
