"""Commit, protection, retention, cadence, membership: facts in, conclusions out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotd.core.cadence import MARGIN_STEPS, NARROW_WINDOW, WIDEN_WINDOW, Window, judge
from snapshotd.core.claims import out_of_epoch
from snapshotd.core.commit import advance, merge
from snapshotd.core.membership import FORGET_FACTOR, Liveness, Membership
from snapshotd.core.protection import Slots, aborted, lacking, newest_protected, parity_homes
from snapshotd.core.retention import Retention, may_free_version
from snapshotd.metadata import (
    Cadence,
    DataHolding,
    Decision,
    DecisionId,
    Economy,
    Group,
    Home,
    JobFacts,
    Member,
    NodeFacts,
    ParityHolding,
    SlotFacts,
    TrainerFacts,
    Version,
    Vow,
)

JOB = "job"
A, B = Home("a", 0), Home("b", 0)
GROUP = Group((Member(0, A), Member(1, B)), 1)
EPOCH = DecisionId(1, "a")
DECISION = Decision(EPOCH, JOB, 2, (GROUP,), ("x", "y"))


def trainer(shard: int, passed_step: int = 0) -> TrainerFacts:
    return TrainerFacts(
        JOB, "run", 0, "xy"[shard], shard, 2, decision=EPOCH, staged=True, passed_step=passed_step
    )


def holding(shard: int, step: int, epoch: int = 1) -> DataHolding:
    return DataHolding(JOB, shard, Version(epoch, step), 1, b"%d" % shard)


def slots_with(*steps: int, parity: bool = True, passed_step: int = 0) -> dict[Home, SlotFacts]:
    """Both members have sealed `steps`, and stored their parity."""
    found = {}
    for shard, home in enumerate((A, B)):
        rows = tuple(
            ParityHolding(JOB, Version(1, s), place, 1, (b"0", b"1"), (1, 1))
            for s in steps
            for place, where in parity_homes(GROUP)
            if where == home and parity
        )
        data = tuple(holding(shard, s) for s in steps)
        found[home] = SlotFacts(0, "up", trainer(shard, passed_step), data, rows)
    return found


# -- merge


versions = st.one_of(st.none(), st.builds(Version, st.integers(0, 2), st.integers(0, 2)))


@st.composite
def job_facts(draw: st.DrawFn) -> JobFacts:
    """One id names one decision, one epoch has one that is released, what is pending is newer."""
    lineage = draw(st.integers(0, 2))
    newer = [DecisionId(e, n) for e in range(lineage + 1, 4) for n in "ab"]
    return JobFacts(
        job=JOB,
        world=draw(st.integers(0, 2)),
        epoch=draw(st.integers(0, 2)),
        lineage=lineage,
        committed=draw(versions),
        committed_in=draw(st.integers(0, 2)),
        decision=draw(st.sampled_from([None, replace(DECISION, id=DecisionId(lineage, "a"))])),
        cadence=draw(st.builds(Cadence, st.integers(1, 2), st.integers(0, 2))),
        economy=draw(st.builds(Economy, st.integers(0, 2), st.integers(0, 2))),
        pending=draw(st.sampled_from([None, *(replace(DECISION, id=i) for i in newer)])),
    )


jobs = job_facts()


@given(jobs, jobs, jobs)
def test_merge_is_commutative_associative_and_idempotent(
    a: JobFacts, b: JobFacts, c: JobFacts
) -> None:
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert merge(None, a) == a


# -- protection and commit


def test_a_decision_is_released_then_versions_are_committed() -> None:
    known = JobFacts(JOB, epoch=1, pending=DECISION)
    waiting = slots_with()
    waiting[B] = replace(waiting[B], trainer=replace(trainer(1), staged=False))
    assert advance(known, waiting) == known
    released = advance(known, slots_with())
    assert (released.lineage, released.world, released.committed) == (1, 2, None)
    assert advance(released, slots_with(3, parity=False)).committed is None
    committed = advance(released, slots_with(3, 4))
    assert (committed.committed, committed.committed_in) == (Version(1, 4), 1)
    assert advance(committed, slots_with(3)) == committed, "the watermark never moves back"


def test_a_refusal_is_never_released_and_kept_until_it_was_read() -> None:
    known = JobFacts(JOB, epoch=1, pending=replace(DECISION, refusal="no"))
    slots = slots_with()
    waiting = replace(trainer(0), waiting=True)
    assert advance(known, {**slots, A: replace(slots[A], trainer=waiting)}) == known
    assert advance(known, slots).pending is None


def test_protection_goes_on_beside_a_refusal() -> None:
    """Somebody starts one rank by the name of a job that trains on two."""
    other = Decision(DecisionId(2, "c"), JOB, 1, (), ("alone",), refusal="saved by 2 ranks")
    alone = TrainerFacts(JOB, "run", 0, "alone", 0, 1, waiting=True)
    known = replace(settled(Version(1, 3)), pending=other, epoch=2)
    slots = {**slots_with(4), Home("c", 0): SlotFacts(0, "up", alone)}
    after = advance(known, slots)
    assert (after.committed, after.pending) == (Version(1, 4), other)
    assert out_of_epoch(trainer(0), after) == ""


def test_protection_returns_once_those_who_were_to_restore_are_gone() -> None:
    """A rank of the other set ended before all had staged: it will never be released."""
    who = (Member(0, Home("c", 0)), Member(1, Home("d", 0)))
    other = Decision(DecisionId(2, "c"), JOB, 2, (Group(who, 1),), ("p", "q"), Version(1, 3))
    known = replace(settled(Version(1, 3)), pending=other, epoch=2)
    new = [TrainerFacts(JOB, "run", 0, name, i, 2, waiting=True) for i, name in enumerate("pq")]
    slots = {**slots_with(4), Home("c", 0): SlotFacts(0, "up", new[0])}
    unheard = {**slots, Home("d", 0): SlotFacts(0)}  # its SMP starts: it may have the trainer
    unsure = {**slots, Home("d", 0): SlotFacts(0, "up")}  # its SMP is younger than the decision
    there = {**slots, Home("d", 0): SlotFacts(0, "up", new[1])}
    left = SlotFacts(0, "up", vows=(Vow(JOB, 1, other.id),))  # it had staged: others saw that
    for waits in (slots, unheard, unsure, there, {**slots, Home("d", 0): left}):
        assert advance(known, waits, {"d": 2}) == known, "the restore may still be released"
        assert "being restored in epoch 2" in out_of_epoch(trainer(0), known)
    never = {**slots, Home("d", 0): SlotFacts(0, "up", vows=(Vow(JOB, 1),))}
    earlier = SlotFacts(0, "up", vows=(Vow(JOB, 1, DecisionId(2, "a")),))
    with_earlier = {**never, Home("e", 0): earlier}
    assert advance(known, with_earlier, {"d": 2}) == known, "that may be released"
    assert advance(known, never, {"a": 2, "d": 1}) == known, "its trainer may have come since"
    gone = advance(known, never, {"d": 2})
    assert (gone.committed, gone.pending, gone.epoch) == (Version(1, 4), None, 2)
    assert out_of_epoch(trainer(0), gone) == ""


def test_what_only_one_that_is_gone_had_staged_is_given_up() -> None:
    """Nobody else was to be answered, and others may train."""
    alone = Decision(
        DecisionId(2, "c"), JOB, 1, (Group((Member(0, Home("c", 0)),), 0),), ("p",), Version(1, 3)
    )
    known = replace(settled(Version(1, 3)), pending=alone, epoch=2)
    left = SlotFacts(0, "up", vows=(Vow(JOB, 1, alone.id),))
    after = advance(known, {**slots_with(4), Home("c", 0): left}, {"c": 2})
    assert (after.committed, after.pending, after.lineage) == (Version(1, 4), None, 1)
    young = {**slots_with(4), Home("c", 0): SlotFacts(0, "up", vows=(Vow(JOB, 2),))}
    assert advance(known, young, {"c": 2}) == known, "its trainer may come back"


def test_an_older_restore_that_is_pending_again_is_over_when_its_trainers_are_gone() -> None:
    """A later one hid it, and is over. Some node had not heard of that one, and tells of this."""
    who = (Member(0, Home("c", 0)), Member(1, Home("d", 0)))
    older = Decision(DecisionId(2, "c"), JOB, 2, (Group(who, 1),), ("p", "q"), Version(1, 3))
    after = replace(settled(Version(1, 3)), epoch=3)
    again = merge(after, replace(after, epoch=2, pending=older))
    assert (again.pending, again.epoch) == (older, 3), "nothing is known of it: it may be released"
    gone = SlotFacts(0, "up", vows=(Vow(JOB, 1),))

    def told(epoch: int) -> JobFacts:
        later = SlotFacts(0, "up", vows=(Vow(JOB, 1, DecisionId(epoch, "a")),))
        slots = {**slots_with(4), Home("d", 0): gone, Home("e", 0): later}
        return advance(again, slots, {"a": 3, "d": 2})

    assert told(3).pending is None, "that one is over, whoever had staged it"
    assert told(3).committed == Version(1, 4)
    assert told(4) == again, "of that one nothing has been heard"


def test_what_all_have_staged_is_released_also_for_who_hears_it_when_they_are_gone() -> None:
    who = (Member(0, Home("c", 0)), Member(1, Home("d", 0)))
    other = Decision(DecisionId(2, "c"), JOB, 2, (Group(who, 1),), ("p", "q"), Version(1, 3))
    known = replace(settled(Version(1, 3)), pending=other, epoch=2)
    left = SlotFacts(0, "up", vows=(Vow(JOB, 1, other.id),))
    after = advance(known, {**slots_with(4), Home("c", 0): left, Home("d", 0): left})
    assert (after.lineage, after.decision, after.pending) == (2, other, None)
    assert after.committed == Version(1, 3)


def test_a_restored_version_is_committed_again_in_the_new_groups() -> None:
    second = DecisionId(2, "a")
    decision = replace(DECISION, id=second, restore=Version(1, 3))
    slots = {
        h: replace(f, trainer=replace(f.trainer, decision=second))
        for h, f in slots_with(3).items()
        if f.trainer
    }
    known = JobFacts(JOB, 2, 2, 1, Version(1, 5), 1, pending=decision)
    after = advance(known, {h: replace(f, parity=()) for h, f in slots.items()})
    assert (after.committed, after.committed_in) == (Version(1, 3), 0)
    assert advance(after, slots).committed_in == 2


def test_what_is_lacking_is_named() -> None:
    slots = slots_with(3, parity=False)
    assert [h for h, _ in lacking(GROUP, JOB, Version(1, 3), slots)] == [A, B]
    del slots[B]
    assert (B, "is not live") in lacking(GROUP, JOB, Version(1, 3), slots)
    assert newest_protected(JOB, (GROUP,), slots) is None


def test_parity_of_other_bytes_does_not_protect() -> None:
    slots = slots_with(3)
    data = (replace(holding(0, 3), content_digest=b"other"),)
    slots[A] = replace(slots[A], data=data)
    assert newest_protected(JOB, (GROUP,), slots) is None


# -- retention


def settled(point: Version | None, epoch: int = 1) -> JobFacts:
    decision = replace(DECISION, id=DecisionId(epoch, "a"))
    return JobFacts(JOB, 2, epoch, epoch, point, epoch, decision)


def test_only_what_is_older_than_the_point_is_freed() -> None:
    job = settled(Version(1, 5))
    slots = slots_with(4, 5, 6)
    assert may_free_version(job, Version(1, 4), slots)
    assert not may_free_version(job, Version(1, 5), slots)
    assert not may_free_version(job, Version(1, 6), slots)


def test_nothing_is_freed_between_a_restore_and_its_commit() -> None:
    job = replace(settled(Version(1, 5), epoch=2), committed_in=0)
    assert not may_free_version(job, Version(1, 4), {})
    assert "went back" in may_free_version(job, Version(1, 6), {})
    pending = replace(settled(Version(1, 5)), pending=job.decision)
    assert not may_free_version(pending, Version(1, 6), {})


def test_a_node_that_has_only_its_record_frees_nothing() -> None:
    job = replace(settled(Version(1, 5)), decision=None)
    assert not may_free_version(job, Version(1, 4), {})


def test_a_fresh_start_frees_what_was_before() -> None:
    assert "fresh" in may_free_version(settled(None, epoch=2), Version(1, 4), {})


def test_a_version_one_member_passed_is_freed_by_all() -> None:
    slots = slots_with(5, 6, parity=False, passed_step=7)
    slots[B] = replace(slots[B], data=(holding(1, 5),))
    assert aborted(settled(None), Version(1, 6), slots) == B
    assert may_free_version(settled(Version(1, 5)), Version(1, 6), slots)
    slots[B] = replace(slots[B], trainer=trainer(1, 6))
    assert aborted(settled(None), Version(1, 6), slots) is None, "it may still seal it"


def test_a_member_that_lost_a_coded_version_did_not_pass_it() -> None:
    """Elsewhere the version may be the committed one, and the older one gone."""
    slots = slots_with(6, passed_step=7)
    slots[B] = replace(slots[B], data=())
    assert aborted(settled(None), Version(1, 6), slots) is None


def test_a_shard_that_moved_is_freed_once_it_is_protected_there() -> None:
    job, spare, slots = settled(Version(1, 5)), Home("c", 0), slots_with(5)
    row = slots[A].parity[0]

    def why(job: JobFacts, me: Home, held: DataHolding | ParityHolding, slots: Slots) -> str:
        return Retention(job, DECISION.groups, me, slots).may_free(held)

    assert "lives on a/0" in why(job, spare, holding(0, 5), slots)
    assert "do not use it" in why(job, spare, row, slots)
    assert not why(job, A, holding(0, 5), slots)
    assert not why(job, A, row, slots)
    for unsettled, seen in ((replace(job, committed_in=0), slots), (job, {A: slots[A]})):
        assert not why(unsettled, spare, holding(0, 5), seen)
        assert not why(unsettled, spare, row, seen)


def test_a_superseded_version_stays_while_it_is_spared() -> None:
    job, slots = settled(Version(1, 5)), slots_with(4, 5)
    sparing = Retention(job, DECISION.groups, A, slots, spared=[Version(1, 4)])
    assert not sparing.may_free(holding(0, 4))
    assert "superseded" in Retention(job, DECISION.groups, A, slots).may_free(holding(0, 4))


# -- cadence


def test_the_interval_widens_when_skips_recur_and_narrows_after_peace() -> None:
    def at(step: int, skipped: int) -> list[TrainerFacts]:
        return [replace(trainer(0, step), skipped=skipped), trainer(1, step)]

    window, cadence = judge(None, at(0, 0), Cadence(), 4)
    assert (window, cadence) == (Window(0, 0), Cadence())
    assert judge(window, at(WIDEN_WINDOW, 7), cadence, 4)[1] == cadence
    window, cadence = judge(window, at(WIDEN_WINDOW, 8), cadence, 4)
    assert cadence == Cadence(2, WIDEN_WINDOW + MARGIN_STEPS)
    later = cadence.from_step + 2 * NARROW_WINDOW
    assert judge(window, at(later, 8), cadence, 4)[1] == Cadence(1, later + MARGIN_STEPS)
    assert judge(window, at(later, 8 + NARROW_WINDOW), Cadence(4, 0), 4)[1] == Cadence(4, 0)
    assert judge(window, [], cadence, 4) == (window, cadence)
    assert judge(window, at(0, 0), cadence, 4)[0] == Window(0, 0), "a restart begins a window"


# -- membership


def membership() -> Membership:
    return Membership(
        cluster_id="c", node="a", boot="1", address="a:1",
        seeds={"a": "a:1", "b": "b:1"}, suspect_s=1.0, dead_s=3.0,
    )  # fmt: skip


def facts(node: str = "b", **changes: object) -> NodeFacts:
    base = NodeFacts("c", node, "1", 1, f"{node}:1")
    return replace(base, **changes)  # type: ignore[arg-type]  # the field names are the test's


def test_silence_makes_suspects_and_then_dead() -> None:
    who = membership()
    assert who.liveness("b", 0.0)[0] is Liveness.UNMET
    assert who.absent(0.0) == ("b",)
    assert who.hear(facts(members=(("c", "c:1"), ("a", "a:1"))), 10.0) is None
    assert set(who.addresses()) == {"b", "c"}, "met through b; never oneself"
    states = [who.liveness("b", now_s)[0] for now_s in (10.5, 11.5, 13.0)]
    assert states == [Liveness.LIVE, Liveness.SUSPECT, Liveness.DEAD]
    assert set(who.live(12.9)) == {"b"}
    assert who.live(13.0) == {}


def test_older_facts_do_not_replace_newer_ones() -> None:
    who = membership()
    who.hear(facts(boot="2", sequence=1), 1.0)
    who.hear(facts(boot="1", sequence=9), 2.0)
    assert who.live(2.0)["b"].boot == "2"
    assert who.liveness("b", 2.5)[1] == 1.5, "old news is no sign of life"


@pytest.mark.parametrize(
    ("changes", "fatal", "words"),
    [
        ({"protocol": 2}, False, "speaks protocol 2"),
        ({"cluster_id": "other"}, False, "cluster 'other'"),
        ({"node": "a", "boot": "2", "address": "z:1"}, True, "another node_id"),
        ({"node": "a", "boot": "1"}, False, "itself"),
        ({"boot": "2", "address": "z:1"}, True, "in use by a live daemon"),
    ],
)
def test_wrong_peers_are_refused(changes: dict[str, object], fatal: bool, words: str) -> None:
    who = membership()
    who.hear(facts(), 0.0)
    # The field names are the test's.
    refusal = who.hear(replace(facts(), **changes), 0.5)  # type: ignore[arg-type]
    assert refusal is not None
    assert refusal.fatal is fatal
    assert words in refusal.reason
    assert who.live(0.5)["b"].boot == "1"


def test_a_node_id_may_move_once_the_old_daemon_is_silent() -> None:
    who = membership()
    who.hear(facts(), 0.0)
    assert who.hear(facts(boot="2", address="z:1"), 2.0) is None


def test_a_replaced_node_is_forgotten_in_the_end_and_a_seed_never() -> None:
    who = membership()
    assert who.hear(facts("b", members=(("d", "d:1"),)), 0.0) is None
    assert who.hear(facts("c"), 0.0) is None
    who.forget(FORGET_FACTOR * 3.0)
    assert set(who.addresses()) == {"b", "c", "d"}, "they may come back for a while"
    who.forget(FORGET_FACTOR * 3.0 + 1)
    assert set(who.addresses()) == {"b"}
