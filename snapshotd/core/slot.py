"""The SMP's mind: events of one slot in, instructions out.

No clock, no socket, no file. `snapshotd.flow.smp` reports what happened (a trainer attached, a
seal ended, orders came) and carries out what `instructions` returns, each exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from snapshotd.core.claims import out_of_epoch, stalled
from snapshotd.core.encoding import stripes_to_code
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
from snapshotd.core.pace import Pace
from snapshotd.core.protection import Slots, demanded, kept, lacking
from snapshotd.core.release import should_adopt
from snapshotd.core.repair import Hopeless, lost_after_coding, shards_to_rebuild
from snapshotd.core.retention import Retention
from snapshotd.core.vows import Vows
from snapshotd.errors import RequestError
from snapshotd.metadata import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
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
HOPELESS: Final = "its shard of it is lost, and cannot be put together any more"
#: One committed, one in progress.
MIN_GENERATIONS: Final = 2


@dataclass(frozen=True, slots=True)
class _Claim:
    step: int
    image_bytes: int
    until_s: float


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
        self._claim: _Claim | None = None
        self._filling: Version | None = None  # granted to the trainer, or being sealed
        self._lends = False  # memory, for which there was no room
        self._goal: Version | None = None  # of the restore that the trainer waits for
        self._passed = 0  # every due step below it was sealed or given up, but for _filling
        self._coding: Pace[Encode] = Pace()
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
        job = self.orders.job(trainer.job)
        if trainer.decision and job and job.lineage > trainer.decision.epoch:
            raise RequestError(
                ErrorCode.OUT_OF_ORDER,
                f"this trainer was restored in epoch {trainer.decision.epoch} of job "
                f"{trainer.job!r}, which is at epoch {job.lineage} now",
                "It is left over from an earlier run: end it",
            )
        for home, facts in self._slots().items():
            other = facts.trainer
            if other is None or home == self.home or other.job != trainer.job:
                continue
            if other.waiting and other.shard == trainer.shard and other.start == trainer.start:
                raise RequestError(
                    ErrorCode.DUPLICATE_RANK,
                    f"rank {trainer.shard} of job {trainer.job!r} is already waiting on {home}",
                    "Give each trainer its own RANK",
                )
        self._forget_trainer()
        self._passed = trainer.passed_step
        self.trainer = replace(trainer, staged=trainer.decision is not None)

    def detach(self) -> None:
        """The trainer is gone; what it has sealed stays."""
        self._forget_trainer()

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
        self._check_forward(step)
        if self._claim is not None:
            raise RequestError(ErrorCode.OUT_OF_ORDER, f"step {self._claim.step} is still claimed")
        self._claim = _Claim(step, image_bytes, until_s)
        self._passed = step
        self._lends = False

    def lends(self) -> None:
        """The trainer is to be lent memory, and there is none: as if it claimed a buffer."""
        self._lends = True

    def passed(self, step: int, *, due: bool = True) -> None:
        """The trainer goes on without a snapshot of `step`."""
        trainer = self._restored()
        if self._claim is not None and self._claim.step == step:
            self._claim = None
        if self._filling is not None and self._filling.step == step:
            self._filling = None
        self._passed = max(self._passed, step + 1)
        self.trainer = replace(trainer, skipped=trainer.skipped + int(due))

    def sealed(self, holding: DataHolding) -> None:
        """A generation is complete and checksummed."""
        self.keep(holding)
        if self._filling == holding.version:
            self._filling = None
            self._passed = max(self._passed, holding.version.step + 1)

    # -- events: memory

    def keep(self, holding: Holding) -> None:
        """Verified bytes are here: adopted, sealed, staged or stored."""
        self._holdings.keep(holding)

    def lose(self, holding: Holding) -> None:
        """The bytes did not verify, and are gone."""
        self._holdings.lose(holding)

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
        if self._claim is not None:
            times.append(self._claim.until_s)
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
        trainer = self.trainer
        sealed = self._holdings.versions(job.job)
        if job.decision is None or trainer is None or not sealed:
            return []
        if job.handed_on and sealed[-1] == job.committed:
            return []  # these ranks have saved nothing yet
        missing: list[tuple[Home, str]] = []
        slots = self._slots()
        for group in demanded(job):
            missing += lacking(group, job.job, sealed[-1], slots)
        return missing

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
            self._passed = decision.restore.step + 1 if decision.restore else 0
            self.trainer = replace(trainer, waiting=False)
            return [Answer(decision)]
        return []

    def _adopt(self, trainer: TrainerFacts, decision: Decision) -> list[Instruction]:
        self._goal = decision.restore
        adopted = replace(trainer, decision=decision.id, staged=False, failure="", damaged=False)
        if decision.refusal:
            self.trainer = replace(adopted, waiting=False)
            return [Answer(decision)]
        if decision.restore is None:
            self.trainer = replace(adopted, staged=True)
            return []
        self.trainer = adopted
        return [Stage(decision)]

    def _frees(self) -> list[Instruction]:
        slots = self._slots()
        found: list[Instruction] = []
        for job in self.orders.jobs:
            keepers = self.orders.keepers(job)
            judge = Retention(job, keepers, self.home, slots, pressed=job.job in self.short)
            retention = replace(judge, spared=self._spared(job, judge))
            for held in self._holdings.of(job.job):
                if self._brought_back(held):
                    continue
                lost = self._hopeless.given_up(job, held.version)
                reason = HOPELESS if lost else retention.may_free(held)
                if reason:
                    found.append(self._free(held, job, reason))
        return found

    def _brought_back(self, held: Holding) -> bool:
        """Whether the trainer waits to be given it, whatever became of the decision meanwhile."""
        trainer = self.trainer
        waits = trainer is not None and trainer.waiting and trainer.job == held.job
        return waits and held.version == self._goal

    def _spared(self, job: JobFacts, judge: Retention) -> list[Version]:
        """Superseded versions that may stay: those for which no buffer is wanted yet.

        None that another number of ranks saved than the restore point: part of it would go all
        the same, as nobody of these ranks is to keep it.
        """
        worlds = {h.version: h.world for h in self._holdings.of(job.job)}
        old = sorted(v for v in worlds if judge.superseded(v))
        held = {v for v, w in worlds.items() if w in (0, job.saved_world) or v not in old}
        old = [v for v in old if v in held]
        needed = len(held) - len(old) + self._wants_buffer(job)
        room = 0 if job.job in self.short else self._generations - needed
        return old[-room:] if room > 0 else []

    def _wants_buffer(self, job: JobFacts) -> bool:
        """Whether the job's trainer here writes a generation, or will be granted one."""
        trainer = self.trainer
        if trainer is None or trainer.job != job.job:
            return False
        claims = self._claim is not None and not out_of_epoch(trainer, job)
        return claims or self._filling is not None or self._lends

    def _buffers(self, job: str) -> int:
        """Generations that this slot may hold: while memory is short, no more than it must."""
        return MIN_GENERATIONS if job in self.short else self._generations

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
        claim, trainer = self._claim, self.trainer
        if claim is None or trainer is None:
            return []
        job = self.orders.job(trainer.job)
        reason = out_of_epoch(trainer, job)
        if (
            not reason
            and self._filling is None
            and self._generations_of(trainer, job) < self._buffers(trainer.job)
        ):
            assert job is not None, "out_of_epoch said so"
            self._claim = None
            self._filling = Version(job.lineage, claim.step)
            return [_grant(trainer, self._filling, claim)]
        reason = reason or stalled(self._group(job), self._slots())
        if not reason and now_s >= claim.until_s:
            reason = "no buffer came free in time" + self._waits_for(job)
        if not reason:
            return []
        self.passed(claim.step)
        return [Deny(claim.step, reason)]

    def _generations_of(self, trainer: TrainerFacts, job: JobFacts | None) -> int:
        """How many there are of the trainer's state; what other ranks saved takes memory, too."""
        more = job.committed if job and job.handed_on else None
        return self._holdings.generations(trainer.job, trainer.shard, more)

    def _waits_for(self, job: JobFacts | None) -> str:
        missing = self.why_not_protected(job) if job else []
        return "".join(f"; {home} {why}" for home, why in missing[:3])

    def _group(self, job: JobFacts | None) -> Group | None:
        if job is None or job.decision is None or self.trainer is None:
            return None
        group = job.decision.group_of(self.trainer.shard)
        if group is None or job.decision.home_of(self.trainer.shard) != self.home:
            return None
        return group

    def _rebuilds(self) -> list[Rebuild]:
        slots = self._slots()
        lost = [t for job in self.orders.jobs for t in lost_after_coding(job, self.home, slots)]
        return [*shards_to_rebuild(self.orders, self.home, self._holdings.shards()), *lost]

    def _encodes(self) -> list[Encode]:
        slots, tasks = self._slots(), []
        for job in self.orders.jobs:
            versions = self._holdings.versions(job.job)
            if versions:
                keepers = self.orders.keepers(job)
                tasks += stripes_to_code(job, keepers, self.home, versions, slots)
        return tasks

    # -- small parts

    @property
    def filling(self) -> Version | None:
        """What the trainer writes now, or what is being sealed."""
        return self._filling

    def _trainer_facts(self) -> TrainerFacts | None:
        if self.trainer is None:
            return None
        passed = self._filling.step if self._filling else self._passed
        if self.trainer.passed_step != passed:
            self.trainer = replace(self.trainer, passed_step=passed)
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

    def _check_forward(self, step: int) -> None:
        newest = max(self._passed, self._filling.step + 1 if self._filling else 0)
        if step < newest:
            raise RequestError(
                ErrorCode.STEP_BACKWARDS,
                f"step {step} comes after step {newest - 1}",
                "Give step() each step once, in growing order",
            )

    def _forget_trainer(self) -> None:
        self.trainer = None
        self._goal = None
        self._claim = None
        self._filling = None
        self._lends = False


def _grant(trainer: TrainerFacts, version: Version, claim: _Claim) -> Grant:
    return Grant(trainer.job, trainer.shard, version, claim.image_bytes, claim.until_s)
