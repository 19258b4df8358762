"""The supervisor's mind: facts of this node and of the others in, what to publish and order out.

No clock, no socket, no thread: time is passed in, and the caller sends what the board says. The
board is told of three things: another node's facts, a change of one of its own slots, and the
passing of time. After each it draws all conclusions; `sequence` grows when what it publishes has
changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from itertools import chain

from snapshotd.core import economy
from snapshotd.core.audience import Audience
from snapshotd.core.cadence import Window, judge
from snapshotd.core.commit import advance, merge_all, stated
from snapshotd.core.membership import Membership, Refusal
from snapshotd.core.protection import Slots
from snapshotd.core.recovery import Missing, Origin, candidates, survey
from snapshotd.core.restore import (
    Situation,
    Wait,
    decide,
    stating_node,
    waiting_shards,
    within_lineage,
)
from snapshotd.core.shelter import Absence, keepers, nodes_of
from snapshotd.core.tier import TierView, learned
from snapshotd.core.worlds import saved_world
from snapshotd.errors import CallerError
from snapshotd.metadata import (
    Decision,
    Group,
    Home,
    JobFacts,
    NodeFacts,
    Orders,
    SlotFacts,
    Stored,
    Version,
)
from snapshotd.wire.protocol import MAX_EPOCH, MAX_JOBS


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided, as far as the board needs it."""

    group_size: int
    parity: int
    patience_s: float
    max_interval: int
    replace_s: float
    epoch_floor: int = 0
    tier: str = ""  # URL of the persistent tier
    give_up_s: float = economy.GIVE_UP_S
    take_up_s: float = economy.TAKE_UP_S


@dataclass(slots=True)
class _Notes:
    """What this node notes of a job beside its facts.

    Attributes:
        wait: why its restore waits, in words.
        waiting: the trainers that wait for an answer, by incarnation, since `waiting_since_s`.
        spell: of memory that is short, or suffices.
        window: of steps, to judge the cadence by.
        shelter: the groups that keep its restore point, where they are not those decided.
        looks: whether it waits for a look into the persistent tier.
        tier: what was seen there for those that wait.
        traceless_since_s: since when nobody holds anything of it, once it was dropped.
    """

    wait: str = ""
    waiting: tuple[str, ...] = ()
    waiting_since_s: float = 0.0
    spell: economy.Spell | None = None
    window: Window | None = None
    shelter: tuple[Group, ...] = ()
    looks: bool = False
    tier: TierView | None = None
    traceless_since_s: float | None = None


class Board:
    """Facts and conclusions of one node."""

    def __init__(
        self, membership: Membership, policy: Policy, records: Iterable[JobFacts] = ()
    ) -> None:
        self.membership = membership
        self._policy = policy
        self._slots: dict[int, SlotFacts] = {}
        self._jobs = {job.job: job for job in records}
        self._notes: defaultdict[str, _Notes] = defaultdict(_Notes)
        self._epoch_floor = policy.epoch_floor
        self._sequence = 0
        self._published: NodeFacts | None = None
        self._audience = Audience()
        #: Something was heard from which nothing has been concluded yet.
        self.unheeded = False

    # -- events

    def hear(self, facts: NodeFacts, now_s: float) -> Refusal | None:
        """Note facts of another node, to conclude from; a refusal says why they do not count."""
        known = self.membership.known(facts.node, now_s)
        refusal = self.membership.hear(facts, now_s)
        # A heartbeat of a live node brings no news; what time brings is concluded at our own.
        news = known is None or (known.boot, known.sequence) != (facts.boot, facts.sequence)
        self.unheeded |= refusal is None and news
        return refusal

    def slot_changed(self, facts: SlotFacts, now_s: float) -> None:
        """One of this node's SMPs states its facts."""
        self._slots[facts.slot] = facts
        self.conclude(now_s)

    def drop(self, job: str, now_s: float) -> None:
        """The operator gives a job up: a lineage of its own, in which nothing is held.

        Raises:
            CallerError: nobody knows the job, or a trainer of it lives.
        """
        known = self._jobs.get(job)
        if known is None:
            raise CallerError(f"no live node knows a job {job!r}", "See `snapshotd status`")
        slots = self.slots(now_s).items()
        living = [str(h) for h, f in slots if f.trainer and f.trainer.job == job]
        if living:
            raise CallerError(f"job {job!r} has trainers on {', '.join(living)}", "End it first")
        epoch = known.epoch + 1
        if epoch > MAX_EPOCH:
            raise CallerError(f"job {job!r} is at epoch {known.epoch}, after which there is none")
        self._jobs[job] = JobFacts(job, epoch=epoch, lineage=epoch)
        self.conclude(now_s)

    def conclude(self, now_s: float) -> None:
        """Draw every conclusion the facts allow now."""
        self.unheeded = False
        self.membership.forget(now_s)
        live = self.membership.live(now_s)
        self._forget_dropped(now_s)
        for name in self._job_names(live):
            self._conclude_job(name, live, now_s)
        self._publish(now_s)

    def tier_seen(self, job: str, stored: Stored | None, error: str, now_s: float) -> None:
        """What the persistent tier holds of a job, or why that is not known."""
        view = self._notes[job].tier
        if view is not None:
            self._notes[job].tier = replace(view, stored=stored, error=error)
            self.conclude(now_s)

    # -- what the caller sends

    def tier_wanted(self, now_s: float) -> frozenset[str]:
        """Jobs for whose restore this node is to look into the persistent tier."""
        slots, me = self.slots(now_s), self.membership.node
        return frozenset(
            job for job, n in self._notes.items() if n.looks and stating_node(slots, job) == me
        )

    @property
    def facts(self) -> NodeFacts:
        """What this node publishes."""
        assert self._published is not None, "conclude() has never run"
        return self._published

    def orders(self, now_s: float) -> Orders:
        """What this node's SMPs must know."""
        jobs = tuple(self._jobs[j] for j in sorted(self._jobs))
        waits = {job: n.wait for job, n in self._notes.items() if n.wait}
        shelters = {job: n.shelter for job, n in self._notes.items() if n.shelter}
        return Orders(jobs, self.slots(now_s), waits, shelters)

    def keepers(self, job: JobFacts) -> tuple[Group, ...]:
        """The groups that are to keep a job's restore point now."""
        return self._notes[job.job].shelter or job.keeping

    def audience(self, peers: Set[str], now_s: float) -> Set[str]:
        """Which of `peers` must hear what is published now before the next heartbeat."""
        keepers = {}
        for name, job in self._jobs.items():
            decided = (d.groups for d in (job.decision, job.pending) if d is not None)
            # Those that keep it are as a rule those that were decided.
            keepers[name] = [*dict.fromkeys(chain(self.keepers(job), *decided))]
        return self._audience.of(self.facts, keepers, self.slots(now_s), peers)

    def slots_needed(self) -> frozenset[int]:
        """Slots of this node that are to keep something."""
        return frozenset(
            member.home.slot
            for job in self._jobs.values()
            if job.committed is not None
            for group in self.keepers(job)
            for member in group.members
            if member.home.node == self.membership.node
        )

    def jobs(self) -> tuple[JobFacts, ...]:
        """All jobs this node knows of."""
        return tuple(self._jobs[j] for j in sorted(self._jobs))

    def slots(self, now_s: float) -> dict[Home, SlotFacts]:
        """Facts of every slot of every live node, this one's among them."""
        everyone = {self.membership.node: tuple(self._slots.values())}
        for node, facts in self.membership.live(now_s).items():
            everyone[node] = facts.slots
        return {Home(n, s.slot): s for n, slots in everyone.items() for s in slots}

    def coordinator(self, now_s: float) -> str:
        """The live node with the lowest id."""
        return min([self.membership.node, *self.membership.live(now_s)])

    def plan(self, job: str, now_s: float) -> tuple[Version | None, tuple[Origin, ...], str]:
        """What a restore would choose: version, each shard's origin, reason. Changes nothing."""
        slots = self.slots(now_s)
        known = self._jobs.get(job)
        if known is None:
            return None, (), f"no live node knows a job {job!r}"
        homes = {m.shard: m.home for g in known.keeping for m in g.members}
        worst: tuple[Origin, ...] = ()
        for version in [v for v in candidates(slots, job) if within_lineage(v, known)]:
            origins = survey(slots, job, saved_world(slots, known, job, version), version, homes)
            if not any(isinstance(o, Missing) for o in origins):
                return version, origins, ""
            worst = worst or origins
        reason = "no version can be put together from what is held"
        if self._policy.tier:
            reason += f"; a restore would look into {self._policy.tier}"
        return None, worst, reason

    # -- conclusions

    def _forget_dropped(self, now_s: float) -> None:
        """A job that was given up, and of which nobody holds anything, is not told of for ever.

        Its epochs are not used again.
        """
        dropped = [j for j in self._jobs.values() if j.dropped]
        left = {name for s in self.slots(now_s).values() for name in s.jobs()} if dropped else ()
        for job in dropped:
            notes = self._notes[job.job]
            if job.job in left or notes.traceless_since_s is None:
                notes.traceless_since_s = None if job.job in left else now_s
            elif now_s - notes.traceless_since_s >= self.membership.memory_s:
                self._epoch_floor = max(self._epoch_floor, job.epoch + 1)
                del self._jobs[job.job], self._notes[job.job]

    def _job_names(self, live: Mapping[str, NodeFacts]) -> list[str]:
        here = {name for s in self._slots.values() for name in s.jobs()}
        told = (j for facts in live.values() for j in facts.jobs)
        # Of one that was given up, only who still holds something of it must know.
        named = {j.job for j in told if not j.dropped or j.job in here} | set(self._jobs)
        asked = {f.trainer.job for f in self._slots.values() if f.trainer}
        elsewhere = {s.trainer.job for n in live.values() for s in n.slots if s.trainer}
        # Those that trainers of this node ask for first, others as far as there is room.
        new = [*sorted(asked - set(self._jobs)), *sorted((named | elsewhere) - set(self._jobs))]
        return sorted({*self._jobs, *new[: max(0, MAX_JOBS - len(self._jobs))]})

    def _conclude_job(self, job: str, live: Mapping[str, NodeFacts], now_s: float) -> None:
        slots = self.slots(now_s)
        told = {node: j for node, f in live.items() if (j := f.job(job))}
        known = merge_all([*told.values(), *self._known(job)])
        coordinating = self.coordinator(now_s) == self.membership.node
        known = self._decide(job, known, slots, now_s)
        if known is None:
            return
        heard = {node: j.epoch for node, j in told.items()} | {self.membership.node: known.epoch}
        known = advance(known, slots, heard)
        if coordinating:
            known = self._judge_economy(self._judge_cadence(known, slots), slots, now_s)
        self._jobs[job] = known
        self._shelter(known, slots, live, now_s)

    def _shelter(
        self, job: JobFacts, slots: Slots, live: Mapping[str, NodeFacts], now_s: float
    ) -> None:
        """Where the restore point is to be kept, while nodes that kept it are lost."""
        dead = self.membership.dead(nodes_of(job.keeping), now_s)
        patience_s = self._policy.replace_s
        absence = Absence(
            live={self.membership.node, *live},
            dead=dead,
            overdue={n for n in dead if self.membership.silence_s(n, now_s) >= patience_s},
        )
        groups = keepers(job, slots, absence)
        self._notes[job.job].shelter = () if groups == job.keeping else groups

    def _known(self, job: str) -> tuple[JobFacts, ...]:
        return (self._jobs[job],) if job in self._jobs else ()

    def _decide(
        self,
        job: str,
        known: JobFacts | None,
        slots: Mapping[Home, SlotFacts],
        now_s: float,
    ) -> JobFacts | None:
        """Every node sees why a restore waits; one alone states the decision."""
        waited_s = self._waited_s(job, slots, now_s)
        notes = self._notes[job]
        if notes.tier is not None:
            notes.tier = learned(notes.tier, known.pending if known else None, slots)
        outcome = decide(
            Situation(
                job=job,
                slots=slots,
                known=known,
                absent=self.membership.absent(now_s),
                patience_s=self._policy.patience_s,
                waited_s=waited_s,
                self_node=self.membership.node,
                group_size=self._policy.group_size,
                parity=self._policy.parity,
                epoch_floor=self._epoch_floor,
                tier=notes.tier,
            )
        )
        notes.wait = outcome.reason if isinstance(outcome, Wait) else ""
        notes.looks = isinstance(outcome, Wait) and outcome.looks
        if isinstance(outcome, Decision) and stating_node(slots, job) == self.membership.node:
            return stated(known, outcome)
        return known

    def _waited_s(self, job: str, slots: Mapping[Home, SlotFacts], now_s: float) -> float:
        waiting = waiting_shards(slots, job)
        notes = self._notes[job]
        if notes.waiting != waiting:
            notes.waiting, notes.waiting_since_s = waiting, now_s
            notes.tier = TierView(self._policy.tier) if self._policy.tier and waiting else None
        return now_s - notes.waiting_since_s

    def _judge_cadence(self, known: JobFacts, slots: Mapping[Home, SlotFacts]) -> JobFacts:
        decision = known.decision
        training = [
            f.trainer
            for f in slots.values()
            if f.trainer and decision and f.trainer.decision == decision.id and f.trainer.staged
        ]
        notes = self._notes[known.job]
        notes.window, cadence = judge(
            notes.window, training, known.cadence, self._policy.max_interval
        )
        return known if cadence == known.cadence else replace(known, cadence=cadence)

    def _judge_economy(self, known: JobFacts, slots: Slots, now_s: float) -> JobFacts:
        decision = known.decision
        if decision is None or known.restoring:
            return known
        homes = {m.home for g in decision.groups for m in g.members}
        notes = self._notes[known.job]
        notes.spell, saving = economy.judge(
            notes.spell,
            short=any(known.job in f.short for h, f in slots.items() if h in homes),
            present=known.economy,
            parity=max((g.parity for g in decision.groups), default=0),
            now_s=now_s,
            give_up_s=self._policy.give_up_s,
            take_up_s=self._policy.take_up_s,
        )
        return known if saving == known.economy else replace(known, economy=saving)

    def _publish(self, now_s: float) -> None:
        who = self.membership
        content = NodeFacts(
            cluster_id=who.cluster_id,
            node=who.node,
            boot=who.boot,
            sequence=self._sequence,
            address=who.address,
            members=who.members(now_s),
            slots=tuple(self._slots[s] for s in sorted(self._slots)),
            jobs=self.jobs(),
        )
        if content != self._published:
            self._sequence += 1
            self._published = replace(content, sequence=self._sequence)
