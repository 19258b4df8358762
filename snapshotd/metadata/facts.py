"""What trainers, slots, jobs and nodes say of themselves, and what SMPs are told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from snapshotd.metadata.nouns import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    ParityHolding,
    Unsealed,
    Version,
)
from snapshotd.wire.protocol import GRPC


@dataclass(frozen=True, slots=True)
class TrainerFacts:
    """What a slot knows of its trainer.

    `launch` is shared by all ranks of one start of the job, and by those of no other start; empty
    where the trainer cannot tell. `reshard`: it can take up what another number of ranks saved.
    `damaged`: the failure is one of bytes in the persistent tier, which will not heal.
    """

    job: str
    run_id: str
    restart_count: int
    incarnation: str
    shard: int
    world: int
    waiting: bool = False
    allow_fresh: bool = False
    decision: DecisionId | None = None
    staged: bool = False
    failure: str = ""
    passed_step: int = 0
    skipped: int = 0
    present: bool = True
    launch: str = ""
    reshard: bool = False
    damaged: bool = False

    @property
    def start(self) -> tuple[str, str, int]:
        """What trainers must have in common to restore together."""
        return (self.run_id, self.launch, self.world)


@dataclass(frozen=True, slots=True)
class SlotCounters:
    """Totals of one slot since its SMP started; bytes unless the name says otherwise.

    `repeated_total` counts snapshots whose trained tensors were those of the one before,
    `repeated_now` the newest ones of them without a break.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_copied: int = 0
    bytes_decoded: int = 0
    quarantined: int = 0
    aborted: int = 0
    allocated_bytes: int = 0
    repeated_total: int = 0
    repeated_now: int = 0


@dataclass(frozen=True, slots=True)
class Accusation:
    """What a slot holds against another node, and for how long it has cut it off.

    Attributes:
        node: the accused.
        what: the last misdeed, in words that follow "sent".
        count: misdeeds since they began.
        cut_off_s: length of the pause in force; 0 when there is none.
    """

    node: str
    what: str
    count: int
    cut_off_s: float


@dataclass(frozen=True, slots=True)
class Vow:
    """Of a job's decisions newer than epoch `since`, a slot has staged this one last, if any.

    Of older ones it does not know: its process is younger.
    """

    job: str
    since: int
    staged: DecisionId | None = None


@dataclass(frozen=True, slots=True)
class PersistFacts:
    """What a slot has to do with a job's steps in the persistent tier.

    Attributes:
        target: the step that all slots are to write now; stated by the home of shard 0 alone.
        written: this slot's shard of it is there, verified.
        gone: this slot does not have its shard of it any more.
        bytes_done: of the target, written and then read back: up to `bytes_total`.
        error: why it does not get on; it is tried again.
        published: newest whole step there, as the home of shard 0 knows it.
        published_unix_s: when that was whole.
    """

    job: str
    target: Version | None = None
    written: Version | None = None
    gone: Version | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    error: str = ""
    published: Version | None = None
    published_unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """What one SMP says of itself."""

    slot: int
    address: str = ""
    trainer: TrainerFacts | None = None
    data: tuple[DataHolding, ...] = ()
    parity: tuple[ParityHolding, ...] = ()
    counters: SlotCounters = field(default_factory=SlotCounters)
    short: tuple[str, ...] = ()  # jobs of which it lacks memory for all that it is to keep
    accused: tuple[Accusation, ...] = ()
    vows: tuple[Vow, ...] = ()  # of jobs whose restore is not over
    plane: str = GRPC  # by which its blocks are dialled
    persist: tuple[PersistFacts, ...] = ()
    unsealed: Unsealed | None = None

    def has_staged(self, decision: Decision) -> bool | None:
        """Whether it has ever brought its part of an unreleased decision here; None: unknown."""
        vow = next((v for v in self.vows if v.job == decision.job), None)
        if vow is not None and vow.staged == decision.id:
            return True
        return None if vow is None or vow.since >= decision.id.epoch else False

    def persists(self, job: str) -> PersistFacts | None:
        return next((p for p in self.persist if p.job == job), None)

    def jobs(self) -> frozenset[str]:
        """Jobs whose trainer or bytes are here."""
        trainers = [self.trainer.job] if self.trainer else []
        return frozenset([*trainers, *(d.job for d in self.data), *(p.job for p in self.parity)])


@dataclass(frozen=True, slots=True)
class Cadence:
    """Snapshot every `interval`-th due step from `from_step` on; 1 while all is well."""

    interval: int = 1
    from_step: int = 0


@dataclass(frozen=True, slots=True)
class Economy:
    """Keep `rows_less` parity rows less than decided; the greater serial is the newer word."""

    serial: int = 0
    rows_less: int = 0


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a node knows of a job: its epoch, its restore point, its decisions.

    Attributes:
        epoch: newest epoch anyone decided, released or not.
        lineage: epoch of the newest decision released to all ranks; `committed` belongs to it.
        committed: the restore point ("watermark"), None before the first.
        committed_in: epoch in whose groups `committed` is protected; below `lineage` from a
            restore until the group has protected the restored step again.
        decision: the one released to all ranks, of epoch `lineage`: in its groups the job is
            protected. None where this node has no more than the restore point, or it was dropped.
        pending: the newest one stated since; a refusal, or not released yet. Not kept once nobody
            waits for it.
    """

    job: str
    world: int = 0
    epoch: int = 0
    lineage: int = 0
    committed: Version | None = None
    committed_in: int = 0
    decision: Decision | None = None
    cadence: Cadence = Cadence()
    economy: Economy = Economy()
    pending: Decision | None = None

    @property
    def restoring(self) -> Decision | None:
        """The decision that is about to be released to all ranks, which ends this lineage."""
        return None if self.pending is None or self.pending.refusal else self.pending

    @property
    def handed_on(self) -> bool:
        """Whether other ranks than those of now saved the restore point, in another number."""
        decision = self.decision
        if decision is None or not decision.saved_world:
            return False
        return self.committed == decision.restore

    @property
    def saved_world(self) -> int:
        """How many ranks saved the restore point."""
        decided = self.decision.saved_world if self.decision is not None else 0
        return decided if self.handed_on else self.world

    @property
    def keeping(self) -> tuple[Group, ...]:
        """The groups that were formed to keep the restore point."""
        if self.decision is None:
            return ()
        return self.decision.saved_groups if self.handed_on else self.decision.groups

    @property
    def dropped(self) -> bool:
        """Whether it was given up: all that is left is the epoch in which that was done."""
        nothing = self.decision is None and self.pending is None and self.committed is None
        return self.lineage > 0 and nothing


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """All that a node publishes; (boot, sequence) orders two of the same node."""

    cluster_id: str
    node: str
    boot: str
    sequence: int
    address: str
    members: tuple[tuple[str, str], ...] = ()
    slots: tuple[SlotFacts, ...] = ()
    jobs: tuple[JobFacts, ...] = ()
    protocol: int = 1

    def job(self, name: str) -> JobFacts | None:
        return next((j for j in self.jobs if j.job == name), None)


@dataclass(frozen=True)
class Orders:
    """What an SMP must know of the world; stated whole, again on each change.

    Attributes:
        jobs: all jobs this node knows of.
        peers: facts of every slot of every live node, this one's too.
        waits: job -> why no restore was decided yet.
        shelters: job -> the groups that keep its restore point, where they are not those decided:
            nodes are lost, or memory is short.
    """

    jobs: tuple[JobFacts, ...] = ()
    peers: Mapping[Home, SlotFacts] = field(default_factory=dict)
    waits: Mapping[str, str] = field(default_factory=dict)
    shelters: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)

    def job(self, name: str) -> JobFacts | None:
        return next((j for j in self.jobs if j.job == name), None)

    def keepers(self, job: JobFacts) -> tuple[Group, ...]:
        """The groups that are to keep the restore point now."""
        return self.shelters.get(job.job, job.keeping)
