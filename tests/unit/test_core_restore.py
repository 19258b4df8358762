"""The one answer to restore(): every branch of `decide`, adoption, release."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.board import Board, Policy
from snapshotd.core.membership import Membership
from snapshotd.core.release import released, should_adopt
from snapshotd.core.restore import (
    Situation,
    Wait,
    decide,
    stating_node,
    within_lineage,
)
from snapshotd.errors import CallerError
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Home,
    JobFacts,
    NodeFacts,
    RefusalKind,
    SlotFacts,
    Tier,
    TrainerFacts,
    Version,
)

JOB = "job"
HOMES = [Home("a", 0), Home("b", 0)]
SAVED = Version(1, 5)
KNOWN = JobFacts(JOB, 2, 1, 1, SAVED, 1)


def trainer(shard: int, **changes: object) -> TrainerFacts:
    base = TrainerFacts(JOB, "run", 0, f"t{shard}", shard, 2, waiting=True)
    return replace(base, **changes)  # type: ignore[arg-type]  # the field names are the test's


def slots(*versions: Version, **changes: object) -> dict[Home, SlotFacts]:
    return {
        home: SlotFacts(
            0,
            "up",
            trainer(shard, **changes),
            tuple(DataHolding(JOB, shard, v, 1, b"x") for v in versions),
        )
        for shard, home in enumerate(HOMES)
    }


def situation(held: dict[Home, SlotFacts], **changes: object) -> Situation:
    base = Situation(JOB, held, None, (), 10.0, 0.0, "a", 2, 0)
    return replace(base, **changes)  # type: ignore[arg-type]  # the field names are the test's


def decided(held: dict[Home, SlotFacts], **changes: object) -> Decision:
    outcome = decide(situation(held, **changes))
    assert isinstance(outcome, Decision), outcome
    return outcome


def reason(held: dict[Home, SlotFacts], **changes: object) -> str:
    outcome = decide(situation(held, **changes))
    assert isinstance(outcome, Wait), outcome
    return outcome.reason


def test_nobody_waits_nothing_is_decided() -> None:
    assert decide(situation(slots(waiting=False))) is None
    assert decide(situation(slots(present=False))) is None


def test_it_waits_for_all_ranks_of_one_run() -> None:
    held = slots()
    assert "1 of 2" in reason({HOMES[0]: held[HOMES[0]]})
    other = {HOMES[1]: replace(held[HOMES[1]], trainer=trainer(1, run_id="other"))}
    why = reason({**held, **other})
    assert "1 of 2 trainers of run 'run' have asked to restore; not yet: shard 1" in why
    assert "1 of 2 trainers of run 'other'" in why
    other = {HOMES[1]: replace(held[HOMES[1]], trainer=trainer(1, world=3))}
    assert "1 of 3 trainers of run 'run'" in reason({**held, **other})
    other = {HOMES[1]: replace(held[HOMES[1]], trainer=trainer(0))}
    assert "two trainers claim shard 0" in reason({**held, **other})


def test_what_is_left_over_of_an_earlier_start_completes_no_set_with_a_new_one() -> None:
    """They could not train together: their processes do not know each other."""
    old = slots(launch="one")
    new = {Home(f"z{h.node}", 0): f for h, f in slots(launch="two", incarnation="new").items()}
    left, begun = {HOMES[0]: old[HOMES[0]]}, {Home("zb", 0): new[Home("zb", 0)]}
    assert "1 of 2" in reason({**left, **begun})
    decision = decided({**left, **new})
    assert decision.incarnations == ("new", "new")
    known = JobFacts(JOB, 2, decision.id.epoch, pending=decision)
    assert decided({**old, **new}, known=known) is decision, "what was begun is ended first"


def test_a_new_job_starts_fresh() -> None:
    decision = decided(slots())
    assert (decision.id, decision.tier) == (DecisionId(1, "a"), Tier.NONE)
    assert decision.restore is None
    assert not decision.refusal


def test_absent_seeds_are_waited_for_before_a_fresh_start() -> None:
    assert "waiting 10 s" in reason(slots(), absent=("c",))
    assert decided(slots(), absent=("c",), waited_s=10.0).restore is None


def test_the_newest_whole_version_is_restored() -> None:
    held = slots(Version(1, 4), SAVED)
    decision = decided(held, known=KNOWN)
    assert (decision.restore, decision.tier) == (SAVED, Tier.LOCAL)
    assert decision.id.epoch == 2
    newer = DataHolding(JOB, 0, Version(1, 6), 1, b"x")
    held[HOMES[0]] = replace(held[HOMES[0]], data=(*held[HOMES[0]].data, newer))
    assert decided(held, known=KNOWN).restore == SAVED


def test_an_older_version_waits_for_absent_nodes() -> None:
    held = slots(Version(1, 4))
    assert "cannot be restored without node(s) c" in reason(held, known=KNOWN, absent=("c",))
    late = decided(held, known=KNOWN, absent=("c",), waited_s=10.0)
    assert late.restore == Version(1, 4)


def test_a_slot_that_is_starting_is_waited_for_like_an_absent_node() -> None:
    held = {**slots(), Home("c", 0): SlotFacts(0)}
    assert "without node(s) c/0" in reason(held, known=KNOWN)


def test_a_loss_is_refused_by_name_or_given_up_on_purpose() -> None:
    held = slots()
    held[HOMES[0]] = replace(held[HOMES[0]], data=(DataHolding(JOB, 0, SAVED, 1, b"x"),))
    refusal = decided(held, known=KNOWN).refusal
    assert decided(held, known=KNOWN).refusal_kind is RefusalKind.LOST
    assert "shard 1 is missing: no copy and no parity" in refusal
    willing = slots(allow_fresh=True)
    willing[HOMES[0]] = replace(willing[HOMES[0]], data=held[HOMES[0]].data)
    assert not decided(willing, known=KNOWN).refusal


def test_bytes_without_a_record_are_no_fresh_start() -> None:
    """All daemons lost their records: what is held may have been committed."""
    held = slots()
    held[HOMES[0]] = replace(held[HOMES[0]], data=(DataHolding(JOB, 0, SAVED, 1, b"x"),))
    assert "no record of it" in decided(held).refusal
    assert decided(held).id.epoch == 2, "the epoch of what is held is not used again"


def test_a_refusal_stands_until_all_ask_for_a_fresh_start() -> None:
    first = decided(slots(), known=KNOWN)
    assert first.refusal
    known = replace(KNOWN, pending=first, epoch=first.id.epoch)
    assert decided(slots(SAVED), known=known) is first
    again = decided(slots(allow_fresh=True), known=known)
    assert not again.refusal
    assert again.id > first.id


def test_a_refusal_that_fresh_cannot_heal_is_not_stated_again() -> None:
    held = slots(allow_fresh=True)
    first = decided(held, parity=3)
    assert "parity" in first.refusal
    assert first.refusal_kind is RefusalKind.CANNOT_PROTECT
    assert decided(held, parity=3, known=JobFacts(JOB, 2, 1, pending=first)) is first


def test_another_world_is_refused_unless_fresh() -> None:
    known = replace(KNOWN, world=3)
    refused = decided(slots(SAVED), known=known)
    assert "saved by 3 ranks and 2 ask" in refused.refusal
    assert refused.refusal_kind is RefusalKind.OTHER_WORLD
    # The cause, and not what follows from it.
    assert decided(slots(SAVED), known=known, parity=3).refusal_kind is RefusalKind.OTHER_WORLD
    fresh = decided(slots(SAVED, allow_fresh=True), known=known)
    assert fresh.restore is None
    assert not fresh.refusal
    assert fresh.refusal_kind is None
    unfit = decided(slots(SAVED, allow_fresh=True), known=known, parity=3)
    assert unfit.refusal_kind is RefusalKind.CANNOT_PROTECT


def test_another_worlds_uncommitted_shards_are_not_put_together() -> None:
    known = replace(KNOWN, world=3, committed=None)
    assert decided(slots(SAVED), known=known).restore is None


def test_a_job_begun_anew_never_goes_back_behind_its_beginning() -> None:
    fresh = JobFacts(JOB, 2, 2, 2)
    assert decided(slots(SAVED), known=fresh).restore is None
    assert not within_lineage(Version(1, 6), JobFacts(JOB, 2, 2, 2, SAVED))
    assert within_lineage(SAVED, JobFacts(JOB, 2, 2, 2, SAVED))


def test_a_decision_is_kept_until_a_slot_fails() -> None:
    first = decided(slots(SAVED), known=KNOWN)
    known = replace(KNOWN, pending=first, epoch=first.id.epoch)
    assert decided(slots(SAVED), known=known) is first
    failed = slots(decision=first.id, failure="rotten")
    assert decided(failed, known=known).id.epoch == first.id.epoch + 1
    reborn = slots(SAVED, incarnation="new")
    reborn[HOMES[1]] = replace(reborn[HOMES[1]], trainer=trainer(1))
    assert decided(reborn, known=known).id > first.id


def test_release_needs_every_incarnation() -> None:
    decision = decided(slots())
    held = slots(decision=decision.id, staged=True)
    assert released(decision, held)
    held[HOMES[1]] = replace(
        held[HOMES[1]],
        trainer=trainer(1, decision=decision.id, staged=True, incarnation="another life"),
    )
    assert not released(decision, held)


def test_adoption_never_leaves_a_staged_decision_that_may_be_released() -> None:
    small = decided(slots())
    great = replace(small, id=DecisionId(1, "b"))
    assert should_adopt(trainer(0), small, {})
    assert not should_adopt(trainer(0, waiting=False), small, {})
    assert not should_adopt(trainer(0, incarnation="stranger"), small, {})
    assert not should_adopt(trainer(0, decision=great.id), small, {})
    assert should_adopt(trainer(0, decision=small.id), great, {})
    staged = trainer(0, decision=small.id, staged=True)
    assert not should_adopt(staged, great, slots(decision=small.id, staged=True))
    assert should_adopt(staged, great, slots(decision=great.id))


def test_who_states_a_decision_has_a_trainer_of_its_own() -> None:
    """Two nodes without trainers could each have their decision staged nowhere or everywhere."""
    held = slots()
    held[Home("Aspare", 0)] = SlotFacts(0, "up")
    assert stating_node(held, JOB) == "a"
    assert stating_node({}, JOB) == ""


# -- the board


def board(records: tuple[JobFacts, ...] = ()) -> Board:
    who = Membership(
        cluster_id="c", node="a", boot="1", address="a:1", seeds={}, suspect_s=1.0, dead_s=3.0
    )
    found = Board(who, Policy(2, 0, 5.0, 4, replace_s=9.0), records)
    found.conclude(0.0)
    return found


def lone_trainer(**changes: object) -> SlotFacts:
    return SlotFacts(0, "up", trainer(0, world=1, **changes))


def test_the_board_states_releases_and_publishes_each_change_once() -> None:
    mind = board()
    before = mind.facts.sequence
    mind.slot_changed(lone_trainer(), 1.0)
    decision = mind.jobs()[0].pending
    assert decision is not None
    assert mind.facts.sequence == before + 1
    mind.conclude(2.0)
    assert mind.facts.sequence == before + 1
    mind.slot_changed(lone_trainer(decision=decision.id, staged=True), 3.0)
    assert mind.jobs()[0].lineage == 1
    mind.slot_changed(SlotFacts(0), 4.0)
    assert [f.trainer for f in mind.orders(4.0).peers.values()] == [None]


def test_drop_begins_a_lineage_in_which_nothing_is_held() -> None:
    mind = board((replace(KNOWN, cadence=KNOWN.cadence),))
    with pytest.raises(CallerError, match="no live node knows"):
        mind.drop("other", 0.0)
    mind.slot_changed(lone_trainer(), 1.0)
    with pytest.raises(CallerError, match="has trainers on a/0"):
        mind.drop(JOB, 1.0)
    mind.slot_changed(SlotFacts(0), 2.0)
    mind.drop(JOB, 3.0)
    job = mind.jobs()[0]
    assert job.lineage == job.epoch > KNOWN.epoch
    assert job.committed is None


def test_a_dropped_job_is_forgotten_once_nothing_is_left_of_it() -> None:
    mind = board((KNOWN,))
    held = SlotFacts(0, "up", data=(DataHolding(JOB, 0, SAVED, 1, b"x"),))
    mind.slot_changed(held, 1.0)
    mind.drop(JOB, 2.0)
    epoch = mind.jobs()[0].epoch
    mind.conclude(1000.0)
    assert mind.jobs(), "a slot still holds something, and must be told"
    mind.slot_changed(SlotFacts(0, "up"), 1001.0)
    told = [j.job for j in mind.facts.jobs]
    mind.conclude(1001.0 + mind.membership.memory_s)
    assert (told, mind.jobs(), mind.facts.jobs) == ([JOB], (), ())
    tombstone = JobFacts(JOB, epoch=epoch, lineage=epoch)
    mind.hear(NodeFacts("c", "b", "1", 1, "b:1", jobs=(tombstone,)), 1400.0)
    mind.conclude(1400.0)
    assert mind.jobs() == (), "one that has not forgotten it yet tells nobody who has"
    mind.slot_changed(held, 1401.0)
    assert mind.jobs()[0].dropped, "who finds something of it must know"
    mind.slot_changed(SlotFacts(0, "up"), 1402.0)
    mind.conclude(1402.0 + mind.membership.memory_s)
    mind.slot_changed(lone_trainer(), 2000.0)
    assert mind.jobs()[0].epoch > epoch, "its epochs are not used again"


def test_the_plan_says_what_is_missing() -> None:
    mind = board((KNOWN,))
    assert "knows a job" in mind.plan("other", 0.0)[2]
    held = DataHolding(JOB, 0, SAVED, 1, b"x")
    mind.slot_changed(SlotFacts(0, "up", data=(held,)), 0.0)
    version, origins, why = mind.plan(JOB, 0.0)
    assert version is None
    assert len(origins) == 2
    assert "no version" in why
    mind.slot_changed(SlotFacts(0, "up", data=(held, replace(held, shard=1))), 1.0)
    assert mind.plan(JOB, 1.0)[0] == SAVED


def test_a_left_over_trainer_completes_no_set_with_those_about_to_be_answered() -> None:
    held = slots()
    stated = decided(held)
    ready = trainer(0, decision=stated.id, staged=True)
    left_over = trainer(1, incarnation="of an earlier start")
    seen = {
        HOMES[0]: replace(held[HOMES[0]], trainer=ready),
        HOMES[1]: replace(held[HOMES[1]], trainer=replace(ready, shard=1, waiting=False)),
        Home("c", 0): SlotFacts(0, "up", left_over),
    }
    known = JobFacts(JOB, 2, stated.id.epoch, stated.id.epoch, None, 0, stated)
    assert "1 of 2 trainers" in reason(seen, known=known)
