"""Planted faults of the protocol itself: each breaks one rule, and some law must see it.

A mutation replaces functions where the code looks them up, in `snapshotd.core`, or in the
simulated shell where the real rule lives in the shell (verifying, adopting, refusing a store).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from snapshotd.core import (
    commit,
    economy,
    encoding,
    membership,
    protection,
    recovery,
    release,
    repair,
    restore,
    retention,
    slot,
    worlds,
)
from snapshotd.core.instructions import Answer
from snapshotd.core.pace import Pace
from snapshotd.core.retention import Retention
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    SlotFacts,
    Version,
)

from . import coding as sim_coding
from . import memory
from . import slot as sim_slot

Patch = tuple[Any, str, Any]
Slots = Mapping[Home, SlotFacts]


@dataclass(frozen=True)
class Mutation:
    """A broken rule: what it forgets, the patches, and seeds that are known to show it."""

    name: str
    patches: Callable[[], list[Patch]]
    start: int
    seeds: int
    rare: str = ""  # a kind of fault that each of its runs has


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The protocol with this rule broken."""
    patches = [mock.patch.object(*patch) for patch in mutation.patches()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


# -- protection and commit


def _protected_without_parity() -> list[Patch]:
    real = protection.lacking

    def lacking(*args: Any) -> list[tuple[Home, str]]:
        return [found for found in real(*args) if "parity" not in found[1]]

    return [(protection, "lacking", lacking)]


def _parity_of_other_bytes() -> list[Patch]:
    """What was read of an image before it was sealed is not held against its record."""
    return [(memory, "as_recorded", lambda *_: True)]


def _coded_before_all_have_sealed() -> list[Patch]:
    """What was read is taken as it is: nobody waits for a record."""
    real = sim_coding.Reading._record

    def record(self: Any, home: Home, key: memory.Key) -> Any:
        image = self._early.get(self._task.group.shards.index(key[2]))
        if image is None:
            return real(self, home, key)
        return memory.data_holding(key[0], key[2], key[1], image, 0)

    return [
        (sim_coding.Reading, "_record", record),
        (sim_coding.Buffer, "when_over", lambda _, tell: tell(True)),
    ]


def _what_is_still_written_counts_as_sealed() -> list[Patch]:
    real = commit.newest_protected

    def sealed(facts: SlotFacts) -> SlotFacts:
        written = facts.unsealed
        if written is None:
            return facts
        held = DataHolding(written.job, written.shard, written.version, written.image_bytes, b"")
        return replace(facts, data=(*facts.data, held))

    def newest_protected(job: str, groups: Sequence[Group], slots: Slots) -> Version | None:
        return real(job, groups, {home: sealed(facts) for home, facts in slots.items()})

    return [(commit, "newest_protected", newest_protected)]


def _what_is_written_of_another_step_is_coded() -> list[Patch]:
    def unsealed_at(slots: Slots, home: Home, job: str, shard: int, _: Version) -> Any:
        written = slots[home].unsealed if home in slots else None
        same = written is not None and (written.job, written.shard) == (job, shard)
        return written if same else None

    return [(encoding, "unsealed_at", unsealed_at)]


def _commit_on_all_but_one() -> list[Patch]:
    def newest_protected(job: str, groups: Sequence[Group], slots: Slots) -> Version | None:
        found = {d.version for f in slots.values() for d in f.data if d.job == job}
        for version in sorted(found, reverse=True):
            lacks = [protection.lacking(g, job, version, slots) for g in groups]
            if lacks and all(len({home for home, _ in group}) <= 1 for group in lacks):
                return version
        return None

    return [(commit, "newest_protected", newest_protected)]


def _commit_of_an_older_epoch() -> list[Patch]:
    def newer(version: Version, known: JobFacts) -> bool:
        return known.committed is None or version != known.committed

    return [(commit, "_newer", newer)]


def _the_smaller_watermark_wins() -> list[Patch]:
    def key(facts: JobFacts) -> tuple[int, int, int, int]:
        committed = facts.committed or Version(0, -1)
        return (facts.lineage, facts.committed_in, -committed.step, facts.world)

    return [(commit, "_point_key", key)]


def _the_older_lineage_wins() -> list[Patch]:
    def key(facts: JobFacts) -> int:
        return -facts.lineage

    return [(commit, "_point_key", key)]


def _the_older_decision_wins() -> list[Patch]:
    real = commit.merge

    def merge(mine: JobFacts | None, theirs: JobFacts) -> JobFacts:
        merged = real(mine, theirs)
        decisions = [d for d in (mine and mine.decision, theirs.decision) if d is not None]
        return replace(merged, decision=min(decisions, key=lambda d: d.id, default=None))

    return [(commit, "merge", merge)]


# -- what is freed


def _free_when_a_newer_one_is_sealed() -> list[Patch]:
    real = Retention.may_free

    def may_free(self: Retention, held: Any) -> str:
        versions = [d.version for f in self.slots.values() for d in f.data]
        newer = any(v > held.version for v in versions)
        return real(self, held) or ("a newer one is sealed" if newer else "")

    return [(Retention, "may_free", may_free)]


def _free_before_the_new_groups_protect() -> list[Patch]:
    def settled(self: Retention) -> bool:
        return _in_its_lineage(self)

    return [(Retention, "_settled", property(settled))]


def _free_while_a_decision_is_pending() -> list[Patch]:
    real = Retention.may_free

    def may_free(self: Retention, held: Any) -> str:
        restoring = self.job.restoring
        if restoring and restoring.restore not in {None, held.version}:
            return "another version was decided"
        return real(self, held)

    return [(Retention, "may_free", may_free)]


def _abort_what_a_member_sealed() -> list[Patch]:
    def aborted(job: JobFacts, version: Version, slots: Slots) -> Home | None:
        for group in protection.demanded(job):
            for member in group.members:
                facts = slots.get(member.home)
                if facts and facts.trainer and facts.trainer.passed_step > version.step:
                    return member.home
        return None

    return [(retention, "aborted", aborted)]


def _what_was_lost_before_its_parity_came_counts_after_all() -> list[Patch]:
    return [(repair.Hopeless, "lost", lambda *_: None)]


def _abort_what_a_member_lost_since() -> list[Patch]:
    return [(protection, "was_coded", lambda *_: False)]


def _a_refusal_ends_protection() -> list[Patch]:
    return [(JobFacts, "restoring", property(lambda self: self.pending))]


def _a_restore_whose_trainers_are_gone_stays_pending() -> list[Patch]:
    return [(commit, "abandoned", lambda *_: False)]


def _who_has_not_heard_of_a_restore_gives_it_up() -> list[Patch]:
    real = release.abandoned

    def abandoned(decision: Decision, slots: Slots, _: object) -> bool:
        return real(decision, slots, {home.node: decision.id.epoch for home in slots})

    return [(commit, "abandoned", abandoned)]


def _who_adopts_a_fresh_start_is_silent_of_it() -> list[Patch]:
    real = slot.SlotMachine._adopt

    def adopt(mind: slot.SlotMachine, trainer: Any, decision: Decision) -> Any:
        before = dict(mind._vows._staged)
        instructions = real(mind, trainer, decision)
        mind._vows._staged = before
        return instructions

    return [(slot.SlotMachine, "_adopt", adopt)]


def _nothing_is_freed() -> list[Patch]:
    return [(slot.SlotMachine, "_frees", lambda _: [])]


# -- decisions


def _released_before_all_have_staged() -> list[Patch]:
    def released(decision: Decision, slots: Slots) -> bool:
        return any(
            f.trainer is not None and f.trainer.decision == decision.id and f.trainer.staged
            for f in slots.values()
        )

    return [(commit, "released", released)]


def _another_decision_after_staging() -> list[Patch]:
    return [(release, "_killed", lambda *_: True)]


def _an_answer_for_another_incarnation() -> list[Patch]:
    real = slot.should_adopt

    def adopt(trainer: Any, decision: Decision, slots: Slots) -> bool:
        if trainer.shard >= len(decision.incarnations) or decision.refusal:
            return real(trainer, decision, slots)
        names = list(decision.incarnations)
        names[trainer.shard] = trainer.incarnation
        return real(trainer, replace(decision, incarnations=tuple(names)), slots)

    def released(decision: Decision, slots: Slots) -> bool:
        staged = {
            f.trainer.shard
            for f in slots.values()
            if f.trainer and f.trainer.decision == decision.id and f.trainer.staged
        }
        return len(staged) == decision.world

    return [(slot, "should_adopt", adopt), (commit, "released", released)]


def _any_version_is_chosen() -> list[Patch]:
    return [(restore, "survey", lambda *_: ())]


def _what_was_given_up_is_chosen() -> list[Patch]:
    return [(restore, "within_lineage", lambda *_: True)]


def _no_patience() -> list[Patch]:
    return [(restore, "_not_heard", lambda _: ())]


def _an_epoch_that_was_used() -> list[Patch]:
    real = restore._stated

    def stated(now: Any, *args: Any, **kwargs: Any) -> Decision:
        known = now.known.lineage if now.known else 0
        decision = real(now, *args, **kwargs)
        return replace(decision, id=DecisionId(max(1, known), now.self_node))

    return [(restore, "_stated", stated)]


def _a_fresh_start_is_silent() -> list[Patch]:
    def refused(now: Any, trainers: Any, groups: Any, *_: Any) -> Decision:
        return restore._stated(now, trainers, groups)

    return [(restore, "_refused", refused)]


def _answered_twice() -> list[Patch]:
    real = slot.SlotMachine._follow_decision

    def follow(machine: Any) -> list[Any]:
        found = real(machine)
        return [i for i in found for _ in range(2 if isinstance(i, Answer) else 1)]

    return [(slot.SlotMachine, "_follow_decision", follow)]


# -- old messages


def _older_facts_replace_newer() -> list[Patch]:
    real = membership.Membership.hear

    def hear(self: Any, facts: Any, now_s: float) -> Any:
        refusal = real(self, facts, now_s)
        if refusal is None:
            self._peers[facts.node].facts = facts
            self._live = None
        return refusal

    return [(membership.Membership, "hear", hear)]


def _a_trainer_of_an_older_epoch_attaches() -> list[Patch]:
    real = slot.SlotMachine.attach

    def attach(self: Any, trainer: Any) -> None:
        orders, self.orders = self.orders, replace(self.orders, jobs=())
        try:
            real(self, trainer)
        finally:
            self.orders = orders

    return [(slot.SlotMachine, "attach", attach)]


def _a_store_of_an_older_epoch_is_taken() -> list[Patch]:
    return [(sim_slot.Slot, "_wanted", lambda *_: True)]


def _a_dead_trainer_is_heard() -> list[Patch]:
    def request(self: Any, incarnation: str, act: Callable[[Any], None]) -> bool:
        if self.machine is None or self.machine.trainer is None:
            return False
        owner = self.machine.trainer.incarnation
        self.cluster.oracle.requested(self.home, owner, incarnation)
        return True

    return [(sim_slot.Slot, "request", request)]


# -- bytes


def _nothing_is_verified() -> list[Patch]:
    return [
        (memory, "sound", lambda _: True),
        (sim_slot, "digest_differs", lambda *_: False),
    ]


def _adopted_and_not_kept() -> list[Patch]:
    """An SMP that starts does not say what lies in its memory."""
    real = sim_slot.Slot.start

    def start(self: Any) -> None:
        held = dict(self.memory)
        self.memory.clear()
        real(self)
        self.memory.update(held)

    return [(sim_slot.Slot, "start", start)]


def _decoded_from_the_wrong_block() -> list[Patch]:
    """Parity says what it was made of, so that nobody takes what comes out for a shard."""
    real = recovery.block_extent

    def extent(size: int, data: int, block: int) -> Any:
        return real(size, data, (block + 1) % data)

    return [(recovery, "block_extent", extent)]


# -- liveness


def _a_lost_shard_is_not_rebuilt() -> list[Patch]:
    return [(slot, "shards_to_rebuild", lambda *_: [])]


def _coded_once_only() -> list[Patch]:
    def failed(self: Any, task: Any, now_s: float) -> None:
        """It counts as running for ever."""

    return [(Pace, "failed", failed)]


def _who_waits_for_a_seal_is_told_nothing() -> list[Patch]:
    """... and waits for ever."""
    return [
        (sim_coding.Buffer, "over", lambda *_, **__: None),
        (sim_coding.Reading, "_fail", lambda *_: None),
    ]


def _coded_again_and_again() -> list[Patch]:
    return [(encoding, "coded_from", lambda *_: False)]


def _a_wake_in_the_past() -> list[Patch]:
    return [(Pace, "wakes_s", lambda self: [p.until_s for p in self._pauses.values()])]


def _a_claim_waits_for_ever() -> list[Patch]:
    return [
        (slot, "out_of_epoch", lambda *_: ""),
        (slot, "stalled", lambda *_: ""),
        (slot.SlotMachine, "_judge_claim", lambda *_: []),
    ]


def _the_dead_live_on() -> list[Patch]:
    real = membership.Membership.live

    def live(self: Any, now_s: float) -> Any:
        self._dead_s = 1e9
        return real(self, now_s)

    return [(membership.Membership, "live", live)]


# -- nodes lost for long, memory short


def _settled_with(holds: Callable[[Retention], bool]) -> list[Patch]:
    real = Retention._settled.func  # type: ignore[attr-defined]
    return [(Retention, "_settled", property(lambda self: holds(self) or real(self)))]


def _in_its_lineage(self: Retention) -> bool:
    return self.job.decision is not None and not self.job.restoring


def _who_stands_in_counts_before_it_holds_anything() -> list[Patch]:
    def holds(self: Retention) -> bool:
        moved = tuple(self.keepers) != protection.demanded(self.job)
        return moved and _in_its_lineage(self)

    return _settled_with(holds)


def _who_stood_in_frees_before_the_home_is_filled() -> list[Patch]:
    def holds(self: Retention) -> bool:
        groups = protection.demanded(self.job)
        back = tuple(self.keepers) == groups
        outside = all(m.home != self.me for g in groups for m in g.members)
        return back and outside and _in_its_lineage(self)

    return _settled_with(holds)


def _parity_is_never_taken_up_again() -> list[Patch]:
    real = economy.judge

    def judge(*args: Any, **kwargs: Any) -> Any:
        spell, saving = real(*args, **kwargs)
        present = kwargs["present"]
        return spell, present if saving.rows_less < present.rows_less else saving

    return [(economy, "judge", judge)]


def _no_generation_is_spared() -> list[Patch]:
    return [(Retention, "sparing", lambda judge, *_: judge)]


def _the_restore_point_is_hopeless() -> list[Patch]:
    real = repair.Hopeless.given_up

    def given_up(self: Any, job: JobFacts, version: Version) -> str:
        return real(self, replace(job, committed=None), version)

    return [(repair.Hopeless, "given_up", given_up)]


def _a_restore_under_pressure_frees_the_restore_point() -> list[Patch]:
    real = retention.superseded

    def superseded(
        job: JobFacts, version: Version, *, pressed: bool = False, kept: bool = False
    ) -> str:
        goal = job.restoring.restore if job.restoring else None
        older = pressed and goal is not None and version < goal
        return "pressed" if older else real(job, version, pressed=pressed, kept=kept)

    return [(retention, "superseded", superseded)]


def _what_others_saved_is_taken_for_ones_own() -> list[Patch]:
    def saved_world(slots: Slots, known: JobFacts | None, job: str, version: Version) -> int:
        return known.world if known is not None else 0

    return [(where, "saved_world", saved_world) for where in (restore, worlds)]


def _what_others_saved_is_committed_by_these() -> list[Patch]:
    def newer(version: Version, known: JobFacts) -> bool:
        if known.committed is not None and version == known.committed:
            return known.committed_in < known.lineage
        return version.epoch == known.lineage and version > (known.committed or Version(-1, -1))

    return [(commit, "_newer", newer)]


def _what_others_saved_is_freed_before_these_have_saved() -> list[Patch]:
    real = retention.superseded

    def superseded(
        job: JobFacts, version: Version, *, pressed: bool = False, kept: bool = False
    ) -> str:
        over = job.handed_on and version == job.committed and not job.restoring
        return "saved by others" if over else real(job, version, pressed=pressed, kept=kept)

    return [(retention, "superseded", superseded)]


def _never_protected_and_handed_on() -> list[Patch]:
    """The restore point that was protected gives way to one that another world was sent back to."""
    real = retention.superseded

    def superseded(
        job: JobFacts, version: Version, *, pressed: bool = False, kept: bool = False
    ) -> str:
        return real(job, version, pressed=pressed, kept=True)

    return [(retention, "superseded", superseded)]


#: From which seed each is looked for. The seeds show it in the present code, mostly the first; a
#: change of the code changes the courses of the runs, so some more are tried.
SEEDS = 60
STARTS: dict[Callable[[], list[Patch]], int] = {
    _protected_without_parity: 0,
    _parity_of_other_bytes: 3,
    _coded_before_all_have_sealed: 3,
    _what_is_still_written_counts_as_sealed: 19,
    _what_is_written_of_another_step_is_coded: 3,
    _who_waits_for_a_seal_is_told_nothing: 3,
    _commit_on_all_but_one: 0,
    _commit_of_an_older_epoch: 52,
    _the_smaller_watermark_wins: 112,
    _the_older_lineage_wins: 2,
    _the_older_decision_wins: 2,
    _free_when_a_newer_one_is_sealed: 0,
    _free_before_the_new_groups_protect: 6,
    _free_while_a_decision_is_pending: 174,
    _what_others_saved_is_taken_for_ones_own: 31096,
    _what_others_saved_is_freed_before_these_have_saved: 30449,
    _what_others_saved_is_committed_by_these: 17,
    _abort_what_a_member_sealed: 0,
    _what_was_lost_before_its_parity_came_counts_after_all: 3055,
    _a_restore_whose_trainers_are_gone_stays_pending: 256017,
    _who_has_not_heard_of_a_restore_gives_it_up: 20403,
    _who_adopts_a_fresh_start_is_silent_of_it: 12761,
    _nothing_is_freed: 2,
    _released_before_all_have_staged: 3,
    _an_answer_for_another_incarnation: 2,
    _any_version_is_chosen: 3,
    _an_epoch_that_was_used: 2,
    _a_fresh_start_is_silent: 20,
    _answered_twice: 0,
    _older_facts_replace_newer: 0,
    _a_dead_trainer_is_heard: 3,
    _nothing_is_verified: 27,
    _adopted_and_not_kept: 13,
    _decoded_from_the_wrong_block: 42,
    _coded_again_and_again: 0,
    _a_wake_in_the_past: 1,
    _a_claim_waits_for_ever: 0,
}

#: Those that only runs with a certain kind of fault show, and from which seed.
ALONE, SHORT = "job left alone", "memory short everywhere"
DAMAGED = "newest generation damaged"
DIRECTED: dict[Callable[[], list[Patch]], tuple[int, str]] = {
    _who_stands_in_counts_before_it_holds_anything: (0, ALONE),
    _who_stood_in_frees_before_the_home_is_filled: (0, ALONE),
    _parity_is_never_taken_up_again: (0, SHORT),
    _no_generation_is_spared: (0, DAMAGED),
    _a_restore_under_pressure_frees_the_restore_point: (151, SHORT),
    _a_lost_shard_is_not_rebuilt: (0, ALONE),
    _coded_once_only: (0, ALONE),
    _the_dead_live_on: (0, ALONE),
}

#: Broken rules that no law has seen in the seeds tried so far: what the simulator cannot show yet.
UNSEEN: list[Callable[[], list[Patch]]] = [
    _abort_what_a_member_lost_since,
    _another_decision_after_staging,
    _what_was_given_up_is_chosen,
    _no_patience,
    _a_trainer_of_an_older_epoch_attaches,
    _a_store_of_an_older_epoch_is_taken,
    _the_restore_point_is_hopeless,
    _a_refusal_ends_protection,
]


def _mutation(make: Callable[[], list[Patch]], start: int, rare: str = "") -> Mutation:
    return Mutation(make.__name__[1:].replace("_", " "), make, start, SEEDS, rare)


MUTATIONS = [
    *(_mutation(make, start) for make, start in STARTS.items()),
    *(_mutation(make, start, rare) for make, (start, rare) in DIRECTED.items()),
]
NOT_SEEN = [_mutation(make, 0) for make in UNSEEN]
