"""The SMP's mind: each event, each refusal, each instruction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from snapshotd.core.instructions import Answer, Deny, Encode, Free, Grant, Rebuild, Stage
from snapshotd.core.pace import HEARSAY_S
from snapshotd.core.protection import parity_homes
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import RequestError
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
from snapshotd.wire.protocol import ErrorCode

JOB = "job"
ME, OTHER = Home("a", 0), Home("b", 0)
GROUP = Group((Member(0, ME), Member(1, OTHER)), 1)
DECISION = Decision(DecisionId(1, "a"), JOB, 2, (GROUP,), ("t0", "t1"))
RELEASED = JobFacts(JOB, 2, 1, 1, decision=DECISION)
COUNTERS = SlotCounters()


def trainer(shard: int = 0, **changes: object) -> TrainerFacts:
    base = TrainerFacts(JOB, "run", 0, f"t{shard}", shard, 2)
    return replace(base, **changes)  # type: ignore[arg-type]  # the field names are the test's


def data(shard: int, step: int, epoch: int = 1) -> DataHolding:
    return DataHolding(JOB, shard, Version(epoch, step), 1, b"%d" % shard)


def orders(job: JobFacts = RELEASED, *steps: int) -> Orders:
    """What the supervisor says: the other member is up and has sealed `steps`."""
    held = tuple(data(1, s) for s in steps)
    there = SlotFacts(0, "b:1", trainer(1, decision=DECISION.id, staged=True), held)
    return Orders((job,), {ME: SlotFacts(0, "a:1"), OTHER: there})


def machine(generations: int = 2) -> SlotMachine:
    """A slot whose trainer was restored (to a fresh start) and trains."""
    mind = SlotMachine(ME, generations)
    mind.attach(trainer())
    mind.ask_restore(allow_fresh=False)
    mind.orders = orders()
    assert mind.instructions(0.0) == []
    assert mind.instructions(0.0) == [Answer(DECISION)]
    return mind


def passed_step(mind: SlotMachine) -> int:
    published = mind.facts("a:1", COUNTERS).trainer
    assert published is not None
    return published.passed_step


def test_requests_out_of_order_are_refused() -> None:
    mind = SlotMachine(ME, 2)
    with pytest.raises(RequestError, match="no trainer is attached"):
        mind.ask_restore(allow_fresh=False)
    mind.attach(trainer())
    with pytest.raises(RequestError, match=r"before restore\(\)") as caught:
        mind.claim(0, 1, 1.0)
    assert caught.value.code is ErrorCode.OUT_OF_ORDER
    mind = machine()
    mind.claim(3, 1, 1.0)
    with pytest.raises(RequestError, match="step 3 is still claimed"):
        mind.claim(4, 1, 1.0)


def test_steps_never_go_backwards() -> None:
    mind = machine()
    mind.passed(3)
    with pytest.raises(RequestError) as caught:
        mind.claim(3, 1, 1.0)
    assert caught.value.code is ErrorCode.STEP_BACKWARDS
    mind.claim(4, 1, 1.0)


def test_a_leftover_trainer_and_a_duplicate_rank_are_refused() -> None:
    mind = SlotMachine(ME, 2)
    mind.orders = orders(replace(RELEASED, lineage=2))
    with pytest.raises(RequestError, match="left over") as caught:
        mind.attach(trainer(decision=DECISION.id))
    assert caught.value.code is ErrorCode.OUT_OF_ORDER
    waiting = SlotFacts(0, "b:1", trainer(0, waiting=True))
    mind.orders = Orders((RELEASED,), {OTHER: waiting})
    with pytest.raises(RequestError, match="already waiting on b/0") as caught:
        mind.attach(trainer())
    assert caught.value.code is ErrorCode.DUPLICATE_RANK


def test_restore_is_answered_once() -> None:
    mind = machine()
    with pytest.raises(RequestError, match="was answered in epoch 1"):
        mind.ask_restore(allow_fresh=False)


def test_asking_again_while_waiting_keeps_what_is_staged() -> None:
    mind = SlotMachine(ME, 2)
    mind.attach(trainer())
    mind.ask_restore(allow_fresh=False)
    mind.orders = orders(replace(RELEASED, lineage=0, decision=None, pending=DECISION))
    mind.instructions(0.0)
    mind.ask_restore(allow_fresh=True)
    assert mind.trainer is not None
    assert mind.trainer.staged
    assert mind.trainer.allow_fresh


def test_a_restore_is_staged_then_answered_when_released() -> None:
    restoring = replace(DECISION, id=DecisionId(2, "a"), restore=Version(1, 7))
    mind = SlotMachine(ME, 2)
    mind.attach(trainer())
    mind.ask_restore(allow_fresh=False)
    mind.orders = orders(replace(RELEASED, pending=restoring))
    assert mind.instructions(0.0) == [Stage(restoring)]
    mind.keep(data(0, 7))
    mind.staged(restoring.id)
    assert mind.instructions(0.0) == [], "nobody is answered before all have staged"
    job = replace(RELEASED, lineage=2, committed=Version(1, 7), decision=restoring)
    mind.orders = orders(job)
    assert mind.instructions(0.0) == [Answer(restoring)]
    assert passed_step(mind) == 8


def test_what_was_staged_stays_while_the_trainer_waits() -> None:
    """A decision that seems abandoned for a moment may be released yet."""
    elsewhere = Home("c", 0)
    moved = replace(DECISION, id=DecisionId(2, "a"), restore=Version(1, 7))
    held = data(0, 7)
    mind = SlotMachine(elsewhere, 2)
    mind.attach(trainer())
    mind.ask_restore(allow_fresh=False)
    job = replace(RELEASED, committed=Version(1, 7), committed_in=1)
    peers = {
        home: SlotFacts(
            0,
            "up",
            None,
            (data(shard, 7),),
            (ParityHolding(JOB, Version(1, 7), place, 1, (b"0", b"1"), (1, 1)),),
        )
        for shard, home in enumerate((ME, OTHER))
        for place, where in parity_homes(GROUP)
        if where == home
    }
    mind.orders = Orders((replace(job, pending=moved),), peers)
    assert mind.instructions(0.0) == [Stage(moved)]
    mind.keep(held)
    mind.staged(moved.id)
    mind.orders = Orders((job,), peers)
    assert mind.instructions(0.0) == []
    mind.detach()
    assert mind.instructions(0.0) == [Free(held, "shard 0 lives on a/0 now")]


def test_a_failed_stage_is_published_and_a_refusal_answered_at_once() -> None:
    restoring = replace(DECISION, restore=Version(1, 7))
    mind = SlotMachine(ME, 2)
    mind.attach(trainer())
    mind.ask_restore(allow_fresh=False)
    mind.orders = orders(replace(RELEASED, lineage=0, decision=None, pending=restoring))
    mind.instructions(0.0)
    mind.stage_failed(restoring.id, "rotten")
    assert mind.trainer is not None
    assert mind.trainer.failure == "rotten"
    refusal = replace(DECISION, id=DecisionId(2, "a"), refusal="lost")
    mind.orders = orders(replace(RELEASED, lineage=0, decision=None, pending=refusal))
    assert mind.instructions(0.0) == [Answer(refusal)]
    mind.ask_restore(allow_fresh=True)  # after a refusal the trainer may ask otherwise


def test_claims_are_granted_while_buffers_are_free_and_denied_in_time() -> None:
    mind = machine(generations=1)
    mind.claim(0, 9, 1.0)
    assert mind.instructions(0.0) == [Grant(JOB, 0, Version(1, 0), 9, 1, 1.0)]
    assert passed_step(mind) == 0
    mind.sealed(data(0, 0))
    assert passed_step(mind) == 1
    mind.claim(1, 9, 1.0)
    assert mind.instructions(0.5) == []
    assert mind.next_wake_s() == 1.0
    (denied,) = mind.instructions(1.0)
    assert isinstance(denied, Deny)
    assert "b/0 has not sealed shard 1" in denied.reason
    assert passed_step(mind) == 2


def test_waiting_for_a_member_that_is_down_is_given_up_at_once() -> None:
    mind = machine(generations=1)
    mind.sealed(data(0, 0))
    mind.orders = Orders((RELEASED,), {ME: SlotFacts(0, "a:1"), OTHER: SlotFacts(0)})
    mind.claim(1, 9, 100.0)
    assert mind.instructions(0.0) == [Deny(1, "b/0 does not take part now")]


def test_claims_of_an_epoch_that_is_over_are_denied() -> None:
    mind = machine()
    pending = replace(RELEASED, epoch=2, pending=replace(DECISION, id=DecisionId(2, "a")))
    mind.orders = orders(pending)
    mind.claim(0, 9, 9.0)
    assert mind.instructions(0.0) == [Deny(0, "the job is being restored in epoch 2")]


def test_a_step_that_is_being_sealed_is_not_passed_by_later_ones() -> None:
    """Otherwise the others would drop it as aborted while its checksums are computed."""
    mind = machine()
    mind.claim(0, 9, 1.0)
    mind.instructions(0.0)
    mind.passed(1, due=False)
    assert passed_step(mind) == 0
    mind.claim(2, 9, 9.0)
    assert mind.instructions(0.1) == [], "one buffer is filled at a time"
    mind.passed(0)  # the seal of step 0 fails: the claim of step 2 must still be answered
    assert mind.instructions(0.2) == [Grant(JOB, 0, Version(1, 2), 9, 1, 9.0)]


def test_a_seal_that_outlives_its_trainer_leaves_the_next_one_alone() -> None:
    mind = machine()
    mind.claim(0, 9, 1.0)
    mind.instructions(0.0)
    mind.detach()
    mind.attach(trainer(incarnation="t0'"))
    mind.sealed(data(0, 0))
    assert passed_step(mind) == 0
    assert mind.facts("a:1", COUNTERS).data == (data(0, 0),)


def test_what_is_superseded_is_freed_once_when_its_buffer_is_wanted() -> None:
    mind = machine()
    mind.keep(data(0, 0))
    mind.sealed(data(0, 1))
    mind.orders = orders(replace(RELEASED, committed=Version(1, 1), committed_in=1), 1)
    assert not [i for i in mind.instructions(0.0) if isinstance(i, Free)], "it is a spare"
    mind.claim(2, 9, 1.0)
    freed, granted = (i for i in mind.instructions(0.0) if isinstance(i, Free | Grant))
    assert isinstance(freed, Free)
    assert freed.holding == data(0, 0)
    assert granted == Grant(JOB, 0, Version(1, 2), 9, 1, 1.0)
    assert not [i for i in mind.instructions(0.0) if isinstance(i, Free)]


def test_a_claim_that_is_denied_costs_no_spare() -> None:
    mind = machine()
    mind.keep(data(0, 0))
    mind.sealed(data(0, 1))
    over = replace(
        RELEASED, committed=Version(1, 1), committed_in=2, epoch=2, lineage=2,
        decision=replace(DECISION, id=DecisionId(2, "a")),
    )  # fmt: skip
    mind.orders = orders(over, 1)
    mind.claim(2, 9, 1.0)
    denied, *coding = mind.instructions(0.0)
    assert denied == Deny(2, "the job is in epoch 2, and this trainer is of another")
    assert not [i for i in coding if isinstance(i, Free)]


def test_more_superseded_versions_than_buffers_are_not_kept() -> None:
    mind = machine()
    for step in range(3):
        mind.keep(data(0, step))
    mind.orders = orders(replace(RELEASED, committed=Version(1, 2), committed_in=1), 2)
    freed = [i for i in mind.instructions(0.0) if isinstance(i, Free)]
    assert [f.holding for f in freed] == [data(0, 0)]


def encoding(mind: SlotMachine, now_s: float) -> list[Encode]:
    return [i for i in mind.instructions(now_s) if isinstance(i, Encode)]


def test_encoding_starts_once_and_is_tried_again_with_growing_pauses() -> None:
    mind = machine()
    mind.sealed(data(0, 0))
    assert encoding(mind, 0.0) == [], "the other member has not sealed"
    mind.orders = orders(RELEASED, 0)
    (task,) = encoding(mind, 0.0)
    assert (task.stripe, task.rows) == (0, (0,))
    assert encoding(mind, 0.0) == []
    mind.encode_failed(task, 1.0)
    first = mind.next_wake_s()
    assert first is not None
    assert encoding(mind, 1.0) == []
    assert encoding(mind, first) == [task]
    mind.encode_failed(task, first)
    second = mind.next_wake_s()
    assert second is not None
    assert second - first > first - 1.0


def test_a_coded_stripe_is_not_coded_again_before_its_holders_can_have_said_so() -> None:
    mind = machine()
    mind.sealed(data(0, 0))
    mind.orders = orders(RELEASED, 0)
    (task,) = encoding(mind, 0.0)
    mind.encoded(task)
    assert encoding(mind, 5.0) == []
    assert mind.next_wake_s() == 5.0 + HEARSAY_S
    assert encoding(mind, 5.0 + HEARSAY_S) == [task], "nobody has it after all"


def test_it_never_asks_to_be_woken_in_the_past() -> None:
    """A pause that is over, for a stripe that cannot be coded now, is no reason to spin."""
    mind = machine()
    mind.sealed(data(0, 0))
    mind.orders = orders(RELEASED, 0)
    (task,) = encoding(mind, 0.0)
    mind.encode_failed(task, 0.0)
    mind.orders = orders(RELEASED)
    assert encoding(mind, 50.0) == []
    assert mind.next_wake_s() is None


def test_a_slot_without_a_trainer_goes_on_coding_what_it_holds() -> None:
    mind = machine()
    mind.sealed(data(0, 0))
    mind.detach()
    mind.orders = orders(RELEASED, 0)
    assert len(encoding(mind, 0.0)) == 1


def test_a_lost_shard_of_the_restore_point_is_rebuilt_and_tried_again_after_a_pause() -> None:
    mind = machine()
    mind.orders = orders(replace(RELEASED, committed=Version(1, 0), committed_in=1), 0)
    wanted = Rebuild(JOB, 0, Version(1, 0))
    assert mind.instructions(1.0) == [wanted], "it is committed, and not here"
    assert mind.instructions(1.1) == [], "it is being rebuilt"
    mind.rebuild_failed(wanted, 1.2)
    wake_s = mind.next_wake_s()
    assert wake_s is not None
    assert mind.instructions(wake_s) == [wanted]
    mind.keep(data(0, 0))
    mind.rebuilt(wanted)
    assert not any(isinstance(i, Rebuild) for i in mind.instructions(9.0))
