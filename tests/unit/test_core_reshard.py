"""Another number of ranks takes a job up: decided, kept, freed, and never mixed up."""

from __future__ import annotations

from dataclasses import replace

from snapshotd.core.commit import advance, stated
from snapshotd.core.encoding import stripes_to_code
from snapshotd.core.instructions import Free, Stage
from snapshotd.core.repair import shards_to_rebuild
from snapshotd.core.restore import Situation, decide
from snapshotd.core.retention import Retention, superseded
from snapshotd.core.shelter import Absence, keepers
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
    RefusalKind,
    SlotFacts,
    TrainerFacts,
    Version,
)
from tests.unit.test_core_layout import protected

JOB = "job"
SAVED = Version(1, 5)
HOMES = [Home(f"n{i}", 0) for i in range(4)]
FOUR = Group(tuple(Member(i, h) for i, h in enumerate(HOMES)), 1)
BY_FOUR = Decision(DecisionId(1, "n0"), JOB, 4, (FOUR,), ("a", "b", "c", "d"))
KNOWN = JobFacts(JOB, 4, 1, 1, SAVED, 1, decision=BY_FOUR)


def four(*lost: int, version: Version = SAVED) -> dict[Home, SlotFacts]:
    """What four ranks left behind, protected."""
    slots, _ = protected(FOUR, [bytes([i]) * 9_000 for i in range(4)])
    return {
        h: replace(
            f,
            data=tuple(replace(d, job=JOB, version=version, world=4) for d in f.data),
            parity=tuple(replace(p, job=JOB, version=version, world=4) for p in f.parity),
        )
        for h, f in slots.items()
        if HOMES.index(h) not in lost
    }


def asking(
    slots: dict[Home, SlotFacts], homes: list[Home], start: str = "2", **changes: object
) -> dict[Home, SlotFacts]:
    world = len(homes)
    for shard, home in enumerate(homes):
        trainer = TrainerFacts(
            JOB, "run", 0, f"{start}.{shard}", shard, world, waiting=True, reshard=True,
            launch=start,
        )  # fmt: skip
        trainer = replace(trainer, **changes)  # type: ignore[arg-type]
        slots[home] = replace(slots.get(home, SlotFacts(0, "up")), trainer=trainer)
    return slots


def decided(slots: dict[Home, SlotFacts], known: JobFacts | None = KNOWN) -> Decision:
    now = Situation(JOB, slots, known, (), 10.0, 0.0, "n0", 4, 1)
    outcome = decide(now)
    assert isinstance(outcome, Decision), outcome
    return outcome


def released(slots: dict[Home, SlotFacts], known: JobFacts, decision: Decision) -> JobFacts:
    """What is known once all slots have staged the decision."""
    for home, facts in slots.items():
        if facts.trainer is not None:
            trainer = replace(facts.trainer, decision=decision.id, staged=True)
            slots[home] = replace(facts, trainer=trainer)
    return advance(stated(known, decision), slots)


def test_two_take_up_what_four_saved() -> None:
    decision = decided(asking(four(), HOMES[:2]))
    assert (decision.restore, decision.world, decision.saved_world) == (SAVED, 2, 4)
    assert decision.saved_groups == (FOUR,)
    assert [g.shards for g in decision.groups] == [(0, 1)]


def test_a_lost_shard_that_can_be_decoded_is_no_reason_to_refuse() -> None:
    assert decided(asking(four(2), [HOMES[0], HOMES[1], HOMES[3]])).restore == SAVED
    refused = decided(asking(four(2, 3), HOMES[:2]))
    assert refused.refusal_kind is RefusalKind.LOST
    assert "step 5 (epoch 1), saved by 4 ranks: shard 2 is missing" in refused.refusal
    assert "shard 3 is missing" in refused.refusal


def test_where_not_all_can_take_it_up_it_is_refused_and_named() -> None:
    slots = asking(four(), HOMES[:2])
    trainer = slots[HOMES[1]].trainer
    assert trainer is not None
    slots[HOMES[1]] = replace(slots[HOMES[1]], trainer=replace(trainer, reshard=False))
    refused = decided(slots)
    assert refused.refusal_kind is RefusalKind.OTHER_WORLD
    assert "was saved by 4 ranks and 2 ask to restore it" in refused.refusal
    assert "not able to: rank 1" in refused.refusal
    anew = decided(asking(four(), HOMES[:2], reshard=False, allow_fresh=True))
    assert (anew.restore, anew.refusal) == (None, "")


def test_while_all_of_another_number_of_ranks_train_none_is_taken_from_them() -> None:
    slots = four()
    for shard, home in enumerate(HOMES):
        trains = TrainerFacts(JOB, "run", 0, "abcd"[shard], shard, 4, decision=BY_FOUR.id)
        slots[home] = replace(slots[home], trainer=replace(trains, staged=True))
    two = [Home("n0", 1), Home("n1", 1)]
    refused = decided(asking(dict(slots), two))
    assert refused.refusal_kind is RefusalKind.OTHER_WORLD
    assert "trains on 4 ranks now, and 2 ask" in refused.refusal
    slots[HOMES[3]] = replace(slots[HOMES[3]], trainer=None)  # what is left over does not train
    assert decided(asking(slots, two)).restore == SAVED


def test_who_may_begin_anew_still_takes_up_what_is_there() -> None:
    assert decided(asking(four(), HOMES[:2], allow_fresh=True)).restore == SAVED
    assert decided(asking(four(2, 3), HOMES[:2], allow_fresh=True)).restore is None


def test_a_crash_before_the_first_commit_goes_back_to_the_same_version_into_any_world() -> None:
    slots = asking(four(), HOMES[:2])
    known = released(slots, KNOWN, decided(slots))
    assert (known.world, known.saved_world, known.committed) == (2, 4, SAVED)
    assert known.handed_on
    other = decided(asking(four(3), HOMES[:3], "3"), known)
    assert (other.restore, other.saved_world, other.saved_groups) == (SAVED, 4, (FOUR,))
    again = decided(asking(four(), HOMES[:2], "3"), known)
    assert (again.restore, again.saved_world) == (SAVED, 4)
    refused = decided(asking(four(), HOMES[:2], "3", reshard=False), known)
    assert refused.refusal_kind is RefusalKind.OTHER_WORLD
    back = decided(asking(four(), HOMES, "3", reshard=False), known)
    assert (back.restore, back.saved_world, back.saved_groups) == (SAVED, 0, ())


def test_what_others_saved_is_never_committed_in_the_groups_of_these() -> None:
    """Whatever it looks like: here two of the four shards would do, without any parity."""
    slots = asking(four(), HOMES[:2])
    decision = replace(decided(slots), groups=(Group(FOUR.members[:2], 0),))
    known = released(slots, KNOWN, decision)
    assert advance(known, slots).committed_in < known.lineage
    newer = Version(decision.id.epoch, 6)
    for shard, home in enumerate(HOMES[:2]):
        more = DataHolding(JOB, shard, newer, 1, b"x", 2)
        slots[home] = replace(slots[home], data=(*slots[home].data, more))
    known = advance(known, slots)
    assert (known.committed, known.committed_in) == (newer, decision.id.epoch)
    assert not known.handed_on
    assert known.keeping == decision.groups


def test_shards_of_another_world_are_not_taken_for_ones_own() -> None:
    """Both that came back of an older snapshot have the numbers of these two ranks."""
    newer = Version(2, 9)
    two = Group(FOUR.members[:2], 1)
    decision = Decision(DecisionId(2, "n0"), JOB, 2, (two,), ("e", "f"), SAVED, saved_world=4)
    known = JobFacts(JOB, 2, 2, 2, newer, 2, decision=decision)
    refused = decided(asking(four(2, 3), HOMES[:2], reshard=False), known)
    assert refused.refusal_kind is RefusalKind.LOST


def test_old_shards_stay_and_are_rebuilt_until_these_ranks_have_a_restore_point() -> None:
    slots = asking(four(), HOMES[:2])
    known = released(slots, KNOWN, decided(slots))
    for home, facts in slots.items():
        judge = Retention(known, known.keeping, home, slots)
        assert not any(judge.may_free(held) for held in (*facts.data, *facts.parity))
    orders = Orders((known,), slots)
    assert not [t for h in HOMES for t in shards_to_rebuild(orders, h, _held(slots, h))]
    slots[HOMES[3]] = SlotFacts(0, "up")
    (task,) = shards_to_rebuild(orders, HOMES[3], set())
    assert (task.shard, task.version) == (3, SAVED)
    assert stripes_to_code(known, known.keeping, HOMES[0], [SAVED], four()) == []
    some = four()
    some[HOMES[0]] = replace(some[HOMES[0]], parity=())
    (code,) = stripes_to_code(known, known.keeping, HOMES[0], [SAVED], some)
    assert code.group == FOUR


def _held(slots: dict[Home, SlotFacts], home: Home) -> set[tuple[str, int, Version]]:
    return {(d.job, d.shard, d.version) for d in slots[home].data}


def test_a_node_lost_meanwhile_is_stood_in_for() -> None:
    slots = asking(four(), HOMES[:2])
    known = released(slots, KNOWN, decided(slots))
    del slots[HOMES[3]]
    idle = Home("n9", 0)
    slots[idle] = SlotFacts(0, "up")
    (kept,) = keepers(known, slots, Absence({"n0", "n1", "n2", "n9"}, {"n3"}, set()))
    assert [m.home for m in kept.members] == [*HOMES[:3], idle]
    del slots[idle]
    found = keepers(known, slots, Absence({"n0", "n1", "n2"}, {"n3"}, {"n3"}))
    assert [g.shards for g in found] == [(0, 1, 2), (3,), (3,)]


def test_older_generations_make_room_for_the_first_of_the_new_world() -> None:
    """Else two old ones would leave no buffer, and nothing would ever be committed."""
    slots = asking(four(), HOMES[:2])
    known = released(slots, KNOWN, decided(slots))
    older = Version(1, 4)
    assert known.committed_in == 1, "as protected as it was"
    assert superseded(known, older)
    assert not superseded(known, SAVED)
    never = replace(known, committed_in=0)
    assert not superseded(never, older)
    judge = Retention(never, never.keeping, HOMES[0], slots)
    assert judge.superseded(older), "it is seen to be whole"
    gone = {h: f for h, f in slots.items() if h != HOMES[3]}
    assert not Retention(never, never.keeping, HOMES[0], gone).superseded(older)
    machine = SlotMachine(HOMES[0], 2)
    for version in (older, SAVED):
        machine.keep(DataHolding(JOB, 0, version, 1, b"x", 4))
    decision = known.decision
    assert decision is not None
    machine.attach(
        TrainerFacts(JOB, "run", 0, "2.0", 0, 2, decision=decision.id, passed_step=6, launch="2")
    )
    machine.orders = Orders((known,), slots)
    assert not any(isinstance(i, Free) for i in machine.instructions(0.0))
    machine.claim(6, 1, 10.0)
    freed = [i for i in machine.instructions(0.0) if isinstance(i, Free)]
    assert [i.holding.version for i in freed] == [older]
    assert machine.writing.filling == Version(known.lineage, 6)


def test_before_a_slot_says_staged_it_tries_its_part_of_the_old_shards() -> None:
    slots = asking(four(), HOMES[:2])
    decision = decided(slots)
    machine = SlotMachine(HOMES[1], 2)
    machine.attach(TrainerFacts(JOB, "run", 0, "2.1", 1, 2, launch="2"))
    machine.ask_restore(allow_fresh=False, reshard=True)
    machine.orders = Orders((stated(KNOWN, decision),), slots)
    (task,) = machine.instructions(0.0)
    assert isinstance(task, Stage)
    assert list(task.to_try(1)) == [1, 3]
    facts = machine.facts("up", slots[HOMES[1]].counters)
    assert facts.trainer is not None
    assert not facts.trainer.staged


def test_what_a_trainer_is_lent_takes_the_place_of_a_spare_generation() -> None:
    slots = asking(four(), HOMES[:2])
    known = released(slots, KNOWN, decided(slots))
    older, decision = Version(1, 4), known.decision
    machine = SlotMachine(HOMES[0], 2)
    for version in (older, SAVED):
        machine.keep(DataHolding(JOB, 0, version, 1, b"x", 4))
    assert decision is not None
    machine.attach(TrainerFacts(JOB, "run", 0, "2.0", 0, 2, decision=decision.id, passed_step=6))
    machine.orders = Orders((known,), slots)
    machine.lends()
    freed = [i for i in machine.instructions(0.0) if isinstance(i, Free)]
    assert [i.holding.version for i in freed] == [older]
