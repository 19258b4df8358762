"""What the events of a run mean: who runs where, how far it is, how it came back. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snapshotd_client.demo.journal import Event, Kind


@dataclass(frozen=True)
class Times:
    """Where the time went from a fault to new progress, seconds; each until the last rank has it.

    Attributes:
        detection: from the fault until new trainers run: noticed, the others ended, all started.
        rendezvous: until they have found each other, built their state and asked to restore.
        plan: until the daemons answer, the next part not counted.
        rebuild: until the shard that took longest was on its node, verified.
        load: until all have their state back.
        steps: until a step has ended that never had before.
    """

    detection: float
    rendezvous: float
    plan: float
    rebuild: float
    load: float
    steps: float


@dataclass(frozen=True)
class Outcome:
    """One row of the table: one fault and how the job came through it.

    Attributes:
        run: name of the run.
        fault: what was done to it.
        lost: what was gone after that.
        step: that was in flight.
        time_s: wall clock of the fault, seconds since 1970.
        tier: of memory the job came back from; "-" where it never stopped.
        recomputed_steps: completed before the fault and computed again.
        first_new_step_s: from the fault to the end of the first step never completed before.
        decoded_bytes: of lost shards, rebuilt from the code.
        copied_bytes: of shards that were whole on one node and wanted on another.
        remark: what else was seen.
        times: what `first_new_step_s` is made of; None where the job never stopped.
    """

    run: str
    fault: str
    lost: str
    step: int
    time_s: float
    tier: str
    recomputed_steps: int
    first_new_step_s: float
    decoded_bytes: int
    copied_bytes: int
    remark: str = ""
    times: Times | None = None


@dataclass(frozen=True)
class Recovery:
    """How a job came back after a fault; `moved_ranks` now run on another node than before."""

    step: int
    tier: str
    decoded_bytes: int
    copied_bytes: int
    moved_ranks: int
    first_new_time_s: float
    times: Times


class Disagreement(Exception):
    """Ranks of one job were restored to different steps or from different tiers."""


class Record:
    """All events of one run so far."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.events: list[Event] = []

    def take(self, event: Event) -> None:
        self.events.append(event)

    @property
    def newest_step(self) -> int:
        """The newest step that some rank has completed; -1 before the first."""
        return max((e.step for e in self.events if e.kind is Kind.STEP), default=-1)

    @property
    def done(self) -> bool:
        """Whether every rank has written its final state."""
        return len({e.rank for e in self.events if e.kind is Kind.DONE}) == self.world

    def node_of(self, rank: int) -> str:
        """The node on which the newest process of a rank runs; KeyError before there is one."""
        nodes = {e.rank: e.node for e in self.events}
        return nodes[rank]

    def restarts_since(self, time_s: float) -> int:
        """Trainers that began after `time_s`."""
        return sum(e.kind is Kind.UP and e.time_s > time_s for e in self.events)

    def recovery(self, fault_s: float, newest_step: int) -> Recovery | None:
        """How the job came back from a fault; None while it has not made new progress.

        Args:
            fault_s: wall clock of the fault.
            newest_step: newest step completed before it.

        Raises:
            Disagreement: the ranks did not resume from the same state.
        """
        later = [e for e in self.events if e.time_s > fault_s]
        restarted = next((i for i, e in enumerate(later) if e.kind is Kind.READY), len(later))
        first_new = next(
            (e for e in later[restarted:] if e.kind is Kind.STEP and e.step > newest_step), None
        )
        starts = {e.rank: e for e in later if e.kind is Kind.READY}
        if first_new is None or len(starts) < self.world:
            return None
        if len({(e.step, e.tier) for e in starts.values()}) > 1:
            found = {rank: (e.step, e.tier) for rank, e in sorted(starts.items())}
            raise Disagreement(f"ranks resumed from different (step, tier): {found}")
        before = {e.rank: e.node for e in self.events if e.time_s <= fault_s}
        return Recovery(
            step=starts[0].step,
            tier=starts[0].tier,
            decoded_bytes=sum(e.decoded_bytes for e in starts.values()),
            copied_bytes=sum(e.copied_bytes for e in starts.values()),
            moved_ranks=sum(before[rank] != e.node for rank, e in starts.items()),
            first_new_time_s=first_new.time_s,
            times=_times(fault_s, later, [*starts.values()], first_new.time_s),
        )


def _times(
    fault_s: float, later: Sequence[Event], starts: Sequence[Event], first_new_s: float
) -> Times:
    """Of a recovery, from the last starts of all ranks."""
    lives = {(e.rank, e.pid) for e in starts}
    began = [e.time_s for e in later if e.kind is Kind.UP and (e.rank, e.pid) in lives]
    up_s = max(began, default=fault_s)
    asked_s = max(e.time_s - e.loaded_s - e.waited_s for e in starts)
    answered_s = max(e.time_s - e.loaded_s for e in starts)
    ready_s = max(e.time_s for e in starts)
    rebuild_s = min(max(e.staged_s for e in starts), answered_s - asked_s)
    return Times(
        detection=up_s - fault_s,
        rendezvous=asked_s - up_s,
        plan=answered_s - asked_s - rebuild_s,
        rebuild=rebuild_s,
        load=ready_s - answered_s,
        steps=first_new_s - ready_s,
    )


def loss_curve(events: Sequence[Event]) -> list[tuple[float, int, float]]:
    """(wall clock, step, loss) of rank 0 in the order it happened, recomputed steps included."""
    return [(e.time_s, e.step, e.loss) for e in events if e.kind is Kind.STEP and e.rank == 0]
