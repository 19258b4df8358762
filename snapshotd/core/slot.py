"""The SMP's mind: events of one slot in, instructions out.

No clock, no socket, no file. `snapshotd.flow.smp` reports what happened (a trainer attached, a
seal ended, orders came) and carries out what `instructions` returns, each exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from snapshotd.core.claims import out_of_epoch, stalled
from snapshotd.core.encoding import Coding, blocks_of, stripes_to_code
from snapshotd.core.holdings import Holding, Holdings
from snapshotd.core.instructions import (
    Answer,
    Deny,
    Encode,
    Free,
    Grant,
    Instruction,
    Rebuild,
    Stage,
)
from snapshotd.core.newcomers import check_newcomer
from snapshotd.core.pace import Pace
from snapshotd.core.protection import Slots, demanded, kept, unprotected
from snapshotd.core.release import should_adopt
from snapshotd.core.repair import Hopeless, lost_after_coding, shards_to_rebuild
from snapshotd.core.retention import Retention
from snapshotd.core.vows import Vows
from snapshotd.core.writing import Claim, Writing
from snapshotd.errors import RequestError
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Home,
    JobFacts,
    Orders,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Version,
)
from snapshotd.wire.protocol import ErrorCode

_NO_COUNTERS: Final = SlotCounters()
#: One committed, one in progress.
MIN_GENERATIONS: Final = 2


class SlotMachine:
    """State of one slot: its trainer, what it holds, what it was told."""

    def __init__(self, home: Home, generations: int) -> None:
        self.home = home
        self._generations = generations
        self._orders = Orders()
        self._vows = Vows()
        self.trainer: TrainerFacts | None = None
        self._holdings = Holdings()
        self._view: tuple[Orders, SlotFacts, Slots] | None = None
        self.writing = Writing()
        self._goal: Version | None = None  # of the restore that the trainer waits for
        self._coding = Coding()
        self._rebuilding: Pace[Rebuild] = Pace()
        self._hopeless = Hopeless()
        self.aborted = 0
        self.short: dict[str, int] = {}  # job -> bytes of the image for which room was lacking

    # -- what the slot publishes

    def facts(self, address: str, counters: SlotCounters) -> SlotFacts:
        data, parity = self._holdings.published()
        return SlotFacts(
            slot=self.home.slot,
            address=address,
            trainer=self._trainer_facts(),
            data=data,
            parity=parity,
            counters=replace(counters, aborted=self.aborted) if self.aborted else counters,
            short=tuple(sorted(self.short)),
            vows=self._vows.of(self._orders.jobs),
            unsealed=self.writing.unsealed(self.trainer),
        )

    # -- events: the supervisor

    @property
    def orders(self) -> Orders:
        """What the supervisor has told last."""
        return self._orders

    @orders.setter
    def orders(self, orders: Orders) -> None:
        self._orders = orders
        self._vows.follow(orders.jobs)

    # -- events: the trainer

    def attach(self, trainer: TrainerFacts) -> None:
        """A trainer whose predecessor, if any, is known to be dead.

        Raises:
            RequestError: its shard is taken, or it belongs to an epoch that is over.
        """
        check_newcomer(trainer, self.orders.job(trainer.job), self.home, self._slots())
        self.detach()
        self.writing = Writing(trainer.passed_step)
        self.trainer = replace(trainer, staged=trainer.decision is not None)

    def detach(self) -> None:
        """The trainer is gone; what it has sealed stays."""
        self.trainer = None
        self._goal = None
        self.writing = Writing()

    def ask_restore(self, *, allow_fresh: bool, reshard: bool = False) -> None:
        """The trainer waits for the job-wide answer; asking again while it waits changes nothing.

        Raises:
            RequestError: it has had its answer, and trains.
        """
        trainer = self._attached()
        if trainer.waiting:
            self.trainer = replace(trainer, allow_fresh=allow_fresh, reshard=reshard)
            return
        if trainer.decision is not None and trainer.staged:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"restore() of rank {trainer.shard} was answered in epoch {trainer.decision.epoch}",
                "Call restore() once; start the trainers again to go back",
            )
        self.trainer = replace(
            trainer, waiting=True, allow_fresh=allow_fresh, reshard=reshard, decision=None,
            staged=False, failure="", damaged=False,
        )  # fmt: skip

    def claim(self, step: int, image_bytes: int, until_s: float) -> None:
        """The trainer wants to write a step; Grant or Deny follows by `until_s`.

        Raises:
            RequestError: before restore(), or for a step that is not newer than the last.
        """
        self._restored()
        self.writing.want(Claim(step, image_bytes, until_s))

    def lends(self) -> None:
        """The trainer is to be lent memory, and there is none: as if it claimed a buffer."""
        self.writing.lends = True

    def passed(self, step: int, *, due: bool = True) -> None:
        """The trainer goes on without a snapshot of `step`."""
        trainer = self._restored()
        self.writing.give_up(step)
        self.trainer = replace(trainer, skipped=trainer.skipped + int(due))

    def stands(self, version: Version, image_bytes: int) -> None:
        """The trainer has written part of its buffer, which others may read from now on."""
        self.writing.stands(version, image_bytes)

    def sealed(self, holding: DataHolding) -> None:
        """A generation is complete and checksummed."""
        self.keep(holding)
        self.writing.sealed(holding.version)
        self._coding.sealed(holding.job, holding.version)

    # -- events: memory

    def keep(self, holding: Holding) -> None:
        """Verified bytes are here: adopted, sealed, staged or stored."""
        self._holdings.keep(holding)
        self._hopeless.kept(holding)

    def lose(self, holding: Holding) -> None:
        """The bytes did not verify, and are gone."""
        self._holdings.lose(holding)
        self._hopeless.lost(holding, self.orders.job(holding.job), self.home, self._slots())

    def no_room(self, job: str, image_bytes: int) -> None:
        """Something that this slot is to keep did not fit: do with less until `room`.

        A stand-in is passed over meanwhile. What the job's own slots keep in place of a lost one
        is no reason to take protection from all.
        """
        facts = self.orders.job(job)
        if facts is None or self.stands_in(job) or self.orders.keepers(facts) == kept(facts):
            self.short[job] = max(image_bytes, self.short.get(job, 0))

    def stands_in(self, job: str) -> bool:
        """Whether the job's groups are others: this slot keeps of it what a lost one kept."""
        facts = self.orders.job(job)
        if facts is None or facts.decision is None:
            return False
        groups = (*facts.decision.groups, *facts.keeping)
        return self.home not in {m.home for g in groups for m in g.members}

    def room(self, job: str) -> None:
        """There is room again for all generations and all parity."""
        self.short.pop(job, None)

    # -- events: work

    def staged(self, decision: DecisionId) -> None:
        """This slot's shard of the decided version is here and verified."""
        if self.trainer is not None and self.trainer.decision == decision:
            self.trainer = replace(self.trainer, staged=True)
            self._vows.staged(self.trainer.job, decision)

    def stage_failed(self, decision: DecisionId, reason: str, *, damaged: bool = False) -> None:
        """It cannot be had; the coordinator decides again. `damaged`: in the persistent tier."""
        if self.trainer is not None and self.trainer.decision == decision:
            self.trainer = replace(self.trainer, failure=reason, damaged=damaged)

    def encoded(self, task: Encode) -> None:
        """All rows of a stripe are stored where they belong."""
        self._coding.done(task)

    def encode_failed(self, task: Encode, now_s: float) -> None:
        """Some row is not stored; tried again after a pause that grows."""
        self._coding.failed(task, now_s)

    def rebuilt(self, task: Rebuild) -> None:
        """A lost shard is back, verified."""
        self._rebuilding.done(task)

    def rebuild_failed(self, task: Rebuild, now_s: float) -> None:
        """It is not; tried again after a pause that grows."""
        self._rebuilding.failed(task, now_s)
        self._hopeless.failed(task, self.orders.job(task.job), self._slots())

    # -- conclusions

    def next_wake_s(self) -> float | None:
        """When `instructions` may have something new without any event; never a time gone by."""
        times = [*self._coding.wakes_s(), *self._rebuilding.wakes_s()]
        if self.writing.claim is not None:
            times.append(self.writing.claim.until_s)
        return min(times, default=None)

    def instructions(self, now_s: float) -> list[Instruction]:
        """Everything that is to be done now."""
        return [
            *self._follow_decision(),
            *self._frees(),
            *self._judge_claim(now_s),
            *self._coding.startable(self._encodes(), now_s),
            *self._rebuilding.startable(self._rebuilds(), now_s),
        ]

    def why_not_protected(self, job: JobFacts) -> list[tuple[Home, str]]:
        """Who keeps the newest sealed version of this slot's shard from being committed."""
        sealed = self._holdings.versions(job.job)
        if self.trainer is None or not sealed:
            return []
        return unprotected(job, sealed[-1], self._slots())

    def _follow_decision(self) -> list[Instruction]:
        trainer = self.trainer
        job = self.orders.job(trainer.job) if trainer else None
        if trainer is None or job is None:
            return []
        for stated in (job.pending, job.decision):
            if stated is not None and should_adopt(trainer, stated, self._slots()):
                return self._adopt(trainer, stated)
        decision = job.decision
        if decision and trainer.waiting and trainer.staged and trainer.decision == decision.id:
            self.writing.begin_at(decision.restore.step + 1 if decision.restore else 0)
            self.trainer = replace(trainer, waiting=False)
            return [Answer(decision)]
        return []

    def _adopt(self, trainer: TrainerFacts, decision: Decision) -> list[Instruction]:
        self._goal = decision.restore
        adopted = replace(trainer, decision=decision.id, staged=False, failure="", damaged=False)
        if decision.refusal:
            self.trainer = replace(adopted, waiting=False)
            return [Answer(decision)]
        self.trainer = adopted
        if decision.restore is None:
            self.staged(decision.id)
            return []
        return [Stage(decision)]

    def _frees(self) -> list[Instruction]:
        slots = self._slots()
        found: list[Instruction] = []
        for job in self.orders.jobs:
            keepers, pressed = self.orders.keepers(job), job.job in self.short
            mine = self._holdings.of(job.job)
            buffers = 0 if pressed else self._generations - self._wants_buffer(job)
            retention = Retention(job, keepers, self.home, slots, pressed=pressed)
            retention = retention.sparing(mine, buffers)
            for held in mine:
                if self._brought_back(held):
                    continue
                reason = self._hopeless.given_up(job, held.version) or retention.may_free(held)
                if reason:
                    found.append(self._free(held, job, reason))
        return found

    def _brought_back(self, held: Holding) -> bool:
        """Whether the trainer waits to be given it, whatever became of the decision meanwhile."""
        trainer = self.trainer
        waits = trainer is not None and trainer.waiting and trainer.job == held.job
        return waits and held.version == self._goal

    def _wants_buffer(self, job: JobFacts) -> bool:
        """Whether the job's trainer here writes a generation, or will be granted one."""
        trainer = self.trainer
        if trainer is None or trainer.job != job.job:
            return False
        writing = self.writing
        claims = writing.claim is not None and not out_of_epoch(trainer, job)
        return claims or writing.filling is not None or writing.lends

    def _free(self, holding: Holding, job: JobFacts, reason: str) -> Free:
        newer = job.committed is None or holding.version > job.committed
        if newer and isinstance(holding, DataHolding):
            self.aborted += 1
        self.lose(holding)
        self._coding.forget(holding.job, holding.version)
        if not any(h.version == holding.version for h in self._holdings.of(job.job)):
            self._hopeless.forget(holding.job, holding.version)
        return Free(holding, reason)

    def _judge_claim(self, now_s: float) -> list[Instruction]:
        claim, trainer = self.writing.claim, self.trainer
        if claim is None or trainer is None:
            return []
        job = self.orders.job(trainer.job)
        reason = out_of_epoch(trainer, job)
        more = job.committed if job and job.handed_on else None  # what other ranks saved
        held = self._holdings.generations(trainer.job, trainer.shard, more)
        room = MIN_GENERATIONS if trainer.job in self.short else self._generations
        if not reason and self.writing.filling is None and held < room:
            assert job is not None, "out_of_epoch said so"
            version = Version(job.lineage, claim.step)
            self.writing.grant(version)
            size, cut = claim.image_bytes, blocks_of(demanded(job), self.home)
            return [Grant(trainer.job, trainer.shard, version, size, cut, claim.until_s)]
        reason = reason or stalled(trainer, job, self.home, self._slots())
        if not reason and now_s >= claim.until_s:
            missing = self.why_not_protected(job) if job else []
            waits_for = "".join(f"; {home} {why}" for home, why in missing[:3])
            reason = f"no buffer came free in time{waits_for}"
        if not reason:
            return []
        self.passed(claim.step)
        return [Deny(claim.step, reason)]

    def _rebuilds(self) -> list[Rebuild]:
        slots = self._slots()
        lost = [t for job in self.orders.jobs for t in lost_after_coding(job, self.home, slots)]
        return [*shards_to_rebuild(self.orders, self.home, self._holdings.shards()), *lost]

    def _encodes(self) -> list[Encode]:
        slots, tasks, unsealed = self._slots(), [], self.writing.unsealed(self.trainer)
        for job in self.orders.jobs:
            versions = self._holdings.versions(job.job)
            versions += [unsealed.version] if unsealed and unsealed.job == job.job else []
            if versions:
                tasks += stripes_to_code(job, self.orders.keepers(job), self.home, versions, slots)
        return tasks

    # -- small parts

    def _trainer_facts(self) -> TrainerFacts | None:
        if self.trainer is None:
            return None
        if self.trainer.passed_step != self.writing.passed:
            self.trainer = replace(self.trainer, passed_step=self.writing.passed)
        return self.trainer

    def _slots(self) -> Slots:
        """Everybody's facts, this slot's own as they are now rather than as last heard."""
        mine = self.orders.peers.get(self.home)
        here = self.facts(mine.address if mine else "", _NO_COUNTERS)
        if self._view is None or self._view[0] is not self.orders or self._view[1] != here:
            merged: Mapping[Home, SlotFacts] = {**self.orders.peers, self.home: here}
            self._view = self.orders, here, merged
        return self._view[2]

    def _attached(self) -> TrainerFacts:
        if self.trainer is None:
            raise RequestError(ErrorCode.OUT_OF_ORDER, "no trainer is attached", "Attach first")
        return self.trainer

    def _restored(self) -> TrainerFacts:
        trainer = self._attached()
        if trainer.waiting or trainer.decision is None:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                "step() was called before restore() had answered",
                "Call restore() once, before the first step",
            )
        return trainer
