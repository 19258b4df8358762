"""Who keeps a restore point while nodes are lost, and how many more losses it survives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from snapshotd.core.encoding import stripes_to_code
from snapshotd.core.margin import further_losses
from snapshotd.core.protection import parity_homes
from snapshotd.core.recovery import Missing, survey
from snapshotd.core.repair import shards_to_rebuild
from snapshotd.core.shelter import Absence, keepers
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
    ParityHolding,
    SlotFacts,
    TrainerFacts,
    Version,
)

JOB, POINT = "job", Version(1, 5)
SIZE = 3 << 20


def decided(n: int, m: int, groups: int = 1) -> Decision:
    """Groups of n nodes; the nodes of group g are named by letter and g."""
    found = []
    for g in range(groups):
        members = [Member(g * n + i, Home(f"{chr(97 + i)}{g}", 0)) for i in range(n)]
        found.append(Group(tuple(members), m))
    return Decision(DecisionId(1, "a0"), JOB, n * groups, tuple(found), tuple("x" * n * groups))


def job_of(decision: Decision) -> JobFacts:
    return JobFacts(JOB, decision.world, 1, 1, POINT, 1, decision)


def data(shard: int) -> DataHolding:
    return DataHolding(JOB, shard, POINT, SIZE, b"%d" % shard)


def protected(*groups: Group) -> dict[Home, SlotFacts]:
    """Every member has sealed its shard and stored its parity."""
    found: dict[Home, SlotFacts] = {}
    for group in groups:
        digests = tuple(b"%d" % s for s in group.shards)
        sizes = (SIZE,) * group.size
        for member in group.members:
            rows = tuple(
                ParityHolding(JOB, POINT, place, SIZE, digests, sizes)
                for place, home in parity_homes(group)
                if home == member.home
            )
            before = found.get(member.home, SlotFacts(0, "up"))
            found[member.home] = replace(
                before, data=(*before.data, data(member.shard)), parity=(*before.parity, *rows)
            )
    return found


def without(slots: dict[Home, SlotFacts], *nodes: str) -> dict[Home, SlotFacts]:
    return {h: f for h, f in slots.items() if h.node not in nodes}


def away(decision: Decision, dead: str, overdue: str = "", spares: str = "") -> Absence:
    nodes = {m.home.node for g in decision.groups for m in g.members}
    gone = {*dead.split(), *overdue.split()}
    return Absence({*nodes, *spares.split()} - gone, gone, set(overdue.split()))


def nodes(group: Group) -> list[str]:
    return [m.home.node for m in group.members]


# -- keepers


def test_nothing_changes_while_all_live_or_nothing_is_settled() -> None:
    decision = decided(3, 1)
    job, slots = job_of(decision), protected(*decision.groups)
    assert keepers(job, slots, away(decision, "", spares="z0")) == decision.groups
    lost = away(decision, "b0", "b0", spares="z0")
    assert keepers(replace(job, committed=None), slots, lost) == decision.groups
    pending = replace(decision, id=DecisionId(2, "a"))
    assert keepers(replace(job, pending=pending), slots, lost) == decision.groups


def test_an_idle_node_takes_the_place_of_a_lost_one() -> None:
    decision = decided(3, 1)
    slots = without(protected(*decision.groups), "b0")
    (group,) = keepers(job_of(decision), slots, away(decision, "b0", spares="z0 y0"))
    assert nodes(group) == ["a0", "y0", "c0"]
    assert (group.shards, group.parity) == ((0, 1, 2), 1)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stand_in_without_room_is_passed_over(begun: bool) -> None:
    decision = decided(3, 1)
    slots = without(protected(*decision.groups), "b0")
    held = (data(1),) if begun else ()
    slots[Home("y0", 0)] = SlotFacts(0, "up", data=held, short=(JOB,))
    (group,) = keepers(job_of(decision), slots, away(decision, "b0", spares="z0 y0"))
    assert nodes(group) == ["a0", "z0", "c0"]
    first, *_ = keepers(job_of(decision), slots, away(decision, "b0", "b0", spares="y0"))
    assert nodes(first) == ["a0", "c0"], "nobody else comes: the group is shrunk"


def test_a_shrunk_group_keeps_as_many_rows_as_the_whole_one_did() -> None:
    """Where memory is short one row of two is kept: the two nodes that remain keep one, too."""
    decision = decided(3, 2)
    job = replace(job_of(decision), economy=Economy(1, 1))
    slots = without(protected(*decision.groups), "b0")
    shrunk, *copies = keepers(job, slots, away(decision, "b0", "b0"))
    assert (nodes(shrunk), shrunk.parity, shrunk.rows) == (["a0", "c0"], 1, 1)
    assert [nodes(c) for c in copies] == [["c0"], ["a0"]]


def test_a_stand_in_that_has_begun_keeps_its_place() -> None:
    decision = decided(3, 1)
    slots = without(protected(*decision.groups), "b0")
    slots[Home("z0", 0)] = SlotFacts(0, "up", data=(data(1),))
    (group,) = keepers(job_of(decision), slots, away(decision, "b0", spares="z0 y0"))
    assert nodes(group) == ["a0", "z0", "c0"]


def test_a_node_with_trainers_is_no_stand_in() -> None:
    decision = decided(3, 1)
    slots = without(protected(*decision.groups), "b0")
    slots[Home("z0", 0)] = SlotFacts(0, "up", TrainerFacts("other", "r", 0, "i", 0, 1))
    assert keepers(job_of(decision), slots, away(decision, "b0", spares="z0")) == decision.groups


def test_stand_ins_of_several_groups_are_different_nodes() -> None:
    decision = decided(3, 1, groups=2)
    slots = without(protected(*decision.groups), "b0", "c1")
    first, second = keepers(job_of(decision), slots, away(decision, "b0 c1", spares="y0 z0"))
    assert nodes(first) == ["a0", "y0", "c0"]
    assert nodes(second) == ["a1", "b1", "z0"]


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 2)])
def test_an_overdue_node_is_left_out_and_all_is_rebuilt_on_the_others(n: int, m: int) -> None:
    """Follow the orders that a shrunk group gives to their end, then lose m nodes more."""
    decision = decided(n, m)
    job = job_of(decision)
    slots = without(protected(*decision.groups), "a0")
    kept = keepers(job, slots, away(decision, "a0", overdue="a0"))
    assert "a0" not in {m.home.node for g in kept for m in g.members}
    orders = Orders((job,), slots, shelters={JOB: kept})
    rebuilt = {
        home: shards_to_rebuild(orders, home, {(d.job, d.shard, d.version) for d in facts.data})
        for home, facts in slots.items()
    }
    shrunk = protected(*kept)
    for home, tasks in rebuilt.items():
        assert {t.shard for t in tasks} == {
            d.shard for d in shrunk[home].data if d not in slots[home].data
        }
    coded = [t for h in shrunk for t in stripes_to_code(job, kept, h, [POINT], without(shrunk))]
    assert not coded, "all is stored there already"
    least = min(m, n - 2)
    assert further_losses(shrunk, JOB, POINT, range(n)) >= least
    for gone in itertools.combinations({h.node for h in shrunk}, least):
        origins = survey(without(shrunk, *gone), JOB, n, POINT, {})
        assert not any(isinstance(o, Missing) for o in origins)


def test_a_group_without_parity_has_nothing_to_rebuild_from() -> None:
    decision = decided(2, 0)
    slots = without(protected(*decision.groups), "a0")
    lost = away(decision, "a0", overdue="a0", spares="z0")
    assert keepers(job_of(decision), slots, lost) == decision.groups


# -- margin


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (4, 2), (5, 3), (3, 0)])
def test_the_margin_is_what_any_loss_leaves(n: int, m: int) -> None:
    """Against the truth: try every set of nodes."""
    slots = protected(decided(n, m).groups[0])
    for size in range(n):
        for gone in itertools.combinations(sorted({h.node for h in slots}), size):
            left = without(slots, *gone)
            said = further_losses(left, JOB, POINT, range(n))
            assert said == true_margin(left, n)


def true_margin(slots: dict[Home, SlotFacts], world: int) -> int:
    names = sorted({h.node for h in slots})
    for size in range(len(names) + 1):
        for gone in itertools.combinations(names, size):
            origins = survey(without(slots, *gone), JOB, world, POINT, {})
            if any(isinstance(o, Missing) for o in origins):
                return size - 1
    raise AssertionError("nothing can be lost by losing everything?")


def test_the_margin_counts_copies() -> None:
    slots = protected(decided(3, 1).groups[0])
    slots[Home("z0", 0)] = SlotFacts(0, "up", data=(data(1),))
    assert further_losses(slots, JOB, POINT, [1]) == 2
    assert further_losses(slots, JOB, POINT, range(3)) == 1
