"""A restore that memory cannot serve falls through to the persistent tier: all branches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.board import Board, Policy
from snapshotd.core.membership import Membership
from snapshotd.core.tier import TierView, learned
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Home,
    JobFacts,
    RefusalKind,
    SlotFacts,
    Stored,
    StoredStep,
    Tier,
    Version,
)
from tests.unit.test_core_restore import HOMES, JOB, decided, reason, slots, trainer

OLD, NEW = Version(3, 5), Version(3, 8)
BOTH = Stored((StoredStep(OLD, 2, 0), StoredStep(NEW, 2, 1)), (Version(3, 9),))
SEEN = TierView("s3://b", BOTH)


def test_memory_goes_first() -> None:
    held = Version(1, 1)
    decision = decided(slots(held), tier=SEEN)
    assert (decision.restore, decision.tier) == (held, Tier.LOCAL)


def test_the_newest_whole_step_under_an_epoch_that_is_newer() -> None:
    decision = decided(slots(), tier=SEEN)
    assert (decision.restore, decision.tier) == (NEW, Tier.PERSISTENT)
    assert decision.id.epoch > NEW.epoch


def test_absent_nodes_may_still_bring_it() -> None:
    assert "absent" in reason(slots(), tier=SEEN, absent=("absent",))
    assert decided(slots(), tier=SEEN, absent=("absent",), waited_s=10.0).restore == NEW


def test_it_waits_for_the_look_and_an_unseen_tier_is_never_a_fresh_start() -> None:
    assert "looked into" in reason(slots(), tier=TierView("s3://b"))
    unseen = TierView("s3://b", error="forbidden")
    assert "forbidden" in reason(slots(), tier=unseen)
    refused = decided(slots(), tier=unseen, waited_s=10.0)
    assert refused.refusal_kind is RefusalKind.LOST
    assert "s3://b could not be looked into: forbidden" in refused.refusal
    fresh = decided(slots(allow_fresh=True), tier=unseen, waited_s=10.0)
    assert fresh.restore is None
    assert not fresh.refusal


def test_an_empty_tier_is_a_fresh_start() -> None:
    decision = decided(slots(), tier=TierView("s3://b", Stored((), (OLD,))))
    assert decision.restore is None
    assert not decision.refusal


@pytest.mark.parametrize("restores", [True, False])
def test_no_epoch_of_a_dead_attempt_is_used_again(*, restores: bool) -> None:
    """Where the clock does not keep from it, either: with another history under the same name."""
    left = Version(NEW.epoch + 5, 1)
    steps = (StoredStep(NEW, 2, 1),) if restores else ()
    decision = decided(slots(), tier=TierView("s3://b", Stored(steps, (left,))))
    assert decision.restore == (NEW if restores else None)
    assert decision.id.epoch > left.epoch


def test_a_step_whose_index_is_damaged_is_no_fresh_start() -> None:
    damaged = ((NEW, "it is no index"),)
    refused = decided(slots(), tier=TierView("s3://b", Stored(damaged=damaged)))
    assert refused.refusal_kind is RefusalKind.LOST
    assert f"s3://b: {NEW}: it is no index" in refused.refusal
    assert refused.id.epoch > NEW.epoch
    assert not decided(slots(allow_fresh=True), tier=TierView("b", Stored(damaged=damaged))).refusal
    older = TierView("s3://b", Stored((StoredStep(OLD, 2),), damaged=damaged))
    assert decided(slots(), tier=older).restore == OLD


def test_what_the_job_gave_up_is_not_taken_from_there() -> None:
    dropped = JobFacts(JOB, epoch=4, lineage=4)
    assert decided(slots(), tier=SEEN, known=dropped).restore is None
    went_on = JobFacts(JOB, 2, 4, 4, OLD, 4)
    assert decided(slots(), tier=SEEN, known=went_on).restore == OLD


def test_another_world_is_refused_by_name() -> None:
    three = TierView("s3://b", Stored((StoredStep(NEW, 3),)))
    refused = decided(slots(), tier=three)
    assert refused.refusal_kind is RefusalKind.OTHER_WORLD
    assert "by 3 ranks, and 2 ask" in refused.refusal
    assert not decided(slots(allow_fresh=True), tier=three).refusal


def test_who_can_takes_the_newest_whole_step_of_any_number_of_ranks() -> None:
    mixed = TierView("s3://b", Stored((StoredStep(OLD, 2, 0), StoredStep(NEW, 3, 1))))
    decision = decided(slots(reshard=True), tier=mixed)
    assert (decision.restore, decision.tier) == (NEW, Tier.PERSISTENT)
    assert (decision.world, decision.saved_world, decision.saved_groups) == (2, 3, ())
    same = decided(slots(), tier=mixed)
    assert (same.restore, same.saved_world) == (OLD, 0)
    # One of them cannot: for all of them only what two ranks saved will do.
    some = slots(reshard=True)
    facts = some[HOMES[1]]
    assert facts.trainer is not None
    some[HOMES[1]] = replace(facts, trainer=replace(facts.trainer, reshard=False))
    assert decided(some, tier=mixed).restore == OLD
    three = TierView("s3://b", Stored((StoredStep(NEW, 3),)))
    assert "2 ask to restore it; not able to: rank 1" in decided(some, tier=three).refusal
    damaged = replace(mixed, bad={NEW: "cut"})
    assert decided(slots(reshard=True), tier=damaged).restore == OLD
    nothing = replace(three, bad={NEW: "cut"})
    refused = decided(slots(reshard=True), tier=nothing)
    assert refused.refusal_kind is RefusalKind.LOST
    assert "cut" in refused.refusal


def test_until_these_ranks_have_a_restore_point_the_tier_is_gone_back_to() -> None:
    three = TierView("s3://b", Stored((StoredStep(NEW, 3),)))
    first = decided(slots(reshard=True), tier=three)
    known = JobFacts(JOB, 2, first.id.epoch, first.id.epoch, NEW, 0, decision=first)
    assert (known.handed_on, known.saved_world, known.keeping) == (True, 3, ())
    again = decided(slots(reshard=True, incarnation="new"), tier=three, known=known)
    assert (again.restore, again.saved_world) == (NEW, 3)
    assert again.id.epoch > first.id.epoch


def pending(restore: Version, **failure: object) -> tuple[Decision, dict[Home, SlotFacts]]:
    decision = Decision(DecisionId(9, "a"), JOB, 2, (), ("t0", "t1"), restore, tier=Tier.PERSISTENT)
    held = slots()
    failed = trainer(1, decision=decision.id, failure="shard 1: it differs", **failure)
    return decision, {**held, HOMES[1]: replace(held[HOMES[1]], trainer=failed)}


def test_damage_sends_all_to_the_next_older_step_and_in_the_end_names_what_was_tried() -> None:
    decision, held = pending(NEW, damaged=True)
    view = learned(SEEN, decision, held)
    assert view.bad == {NEW: "shard 1: it differs"}
    known = JobFacts(JOB, epoch=9, pending=decision)
    following = decided(held, tier=view, known=known)
    assert (following.restore, following.tier) == (OLD, Tier.PERSISTENT)
    assert following.id.epoch == 10
    decision, held = pending(OLD, damaged=True)
    view = learned(view, decision, held)
    refused = decided(held, tier=view, known=JobFacts(JOB, epoch=9, pending=decision))
    assert refused.refusal_kind is RefusalKind.LOST
    assert "step 8" in refused.refusal
    assert "step 5" in refused.refusal


def test_a_failure_that_may_heal_is_tried_again_and_refused_in_the_end() -> None:
    decision, held = pending(NEW)
    view = learned(SEEN, decision, held)
    known = JobFacts(JOB, epoch=9, pending=decision)
    assert decided(held, tier=view, known=known).restore == NEW
    refused = decided(held, tier=view, known=known, waited_s=20.0)
    assert "it differs" in refused.refusal
    assert learned(SEEN, None, held) is SEEN


def board() -> Board:
    who = Membership(
        cluster_id="c", node="a", boot="1", address="a:1", seeds={}, suspect_s=1, dead_s=2
    )
    return Board(who, Policy(2, 0, 10.0, 8, 60.0, tier="s3://b"))


def test_the_stating_node_is_asked_to_look_once_for_those_that_wait() -> None:
    mind = board()
    for shard in (0, 1):
        mind.slot_changed(SlotFacts(shard, "up", trainer(shard)), 0.0)
    assert mind.tier_wanted(0.0) == {JOB}
    mind.tier_seen(JOB, None, "forbidden", 1.0)
    assert mind.tier_wanted(1.0) == {JOB}
    assert "forbidden" in mind.orders(1.0).waits[JOB]
    mind.tier_seen(JOB, BOTH, "", 2.0)
    assert mind.tier_wanted(2.0) == frozenset()
    (facts,) = mind.jobs()
    assert facts.pending is not None
    assert (facts.pending.restore, facts.pending.tier) == (NEW, Tier.PERSISTENT)


def test_nobody_looks_before_all_wait() -> None:
    mind = board()
    mind.slot_changed(SlotFacts(0, "up", trainer(0)), 0.0)
    assert mind.tier_wanted(0.0) == frozenset(), "not before all wait"
