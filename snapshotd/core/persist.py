"""Which step the persistent tier gets next, who writes what of it, and what may be deleted there.

The home of shard 0 leads: it alone knows what the tier holds, states the step that all are to
write now (`PersistFacts.target`), and makes it whole once every home says that its shard is there,
verified. Each shard is written by the home that holds it. Nothing here is needed for the job to
train, or to be protected: whoever fails says so, and is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from snapshotd.core.protection import Slots, data_at
from snapshotd.metadata import (
    DecisionId,
    Home,
    JobFacts,
    PersistFacts,
    Stored,
    StoredStep,
    Version,
)

#: The pause after something failed; each further one is twice as long.
RETRY_FIRST_S: Final = 1.0
RETRY_LAST_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the operator decided.

    Attributes:
        interval_s: a step is due so long after the last one; 0: not by time.
        every_steps: a step is due so many steps after the last one; 0: not by steps.
        keep_last: newest whole steps that are kept, at least 1.
        keep_every_nth: of all whole steps ever written, each nth is kept as well; 0: none.
    """

    interval_s: float
    every_steps: int
    keep_last: int
    keep_every_nth: int


@dataclass(frozen=True, slots=True)
class Look:
    """Find out what the tier holds of a job."""

    job: str


@dataclass(frozen=True, slots=True)
class Write:
    """Write this slot's shard, read it back, verify it."""

    job: str
    shard: int
    version: Version


@dataclass(frozen=True, slots=True)
class Stop:
    """Another step is to be written: give up what is being written of a job."""

    job: str


@dataclass(frozen=True, slots=True)
class Publish:
    """All shards are there: make the step whole, then delete what retention gives up."""

    job: str
    version: Version
    world: int
    number: int


Instruction = Look | Write | Stop | Publish


def removable(steps: Iterable[StoredStep], schedule: Schedule) -> list[Version]:
    """Whole steps that need not be kept any more; never the newest."""
    ordered = sorted(steps, key=lambda s: (s.number, s.version))
    nth = schedule.keep_every_nth
    old = ordered[: -max(1, schedule.keep_last)]
    return [s.version for s in old if not (nth and s.number % nth == 0)]


def leftovers(stored: Stored, whole: Version) -> list[Version]:
    """What dead attempts left behind: versions older than `whole` that never became whole."""
    return [v for v in stored.unfinished if v < whole]


def leads(job: JobFacts, home: Home) -> bool:
    """Whether this slot states what is written of a job."""
    return job.decision is not None and job.decision.home_of(0) == home


def due_in_s(
    schedule: Schedule, point: Version, last: tuple[Version, float] | None, unix_s: float
) -> float | None:
    """In how many seconds the restore point is to be written: 0 now, None not by time alone.

    `last`: the step that was begun last, or is the newest there, and when.
    """
    if last is None:
        return 0.0
    version, begun_s = last
    if point == version:
        return None
    # A job that went back behind it makes another history, which the tier does not have.
    far = point.step >= version.step + schedule.every_steps or point.step < version.step
    if schedule.every_steps and far:
        return 0.0
    if not schedule.interval_s:
        return None
    if unix_s < begun_s:
        return 0.0  # the clock was set back, or another node's is ahead: it tells nothing
    return max(0.0, schedule.interval_s - (unix_s - begun_s))


@dataclass(slots=True)
class _Pause:
    """Growing pauses between attempts."""

    until_s: float = 0.0
    next_s: float = RETRY_FIRST_S

    def failed(self, now_s: float) -> None:
        self.until_s = now_s + self.next_s
        self.next_s = min(RETRY_LAST_S, 2 * self.next_s)


@dataclass(slots=True)
class _Work:
    """What a slot does for one job in one epoch.

    Attributes:
        stored: what the tier holds; known to the leader, once it has looked.
        begun: the step that was stated last, and when.
        running: what is being written here.
        asking: a Look or a Publish is under way.
    """

    epoch: DecisionId
    told: PersistFacts
    stored: Stored | None = None
    begun: tuple[Version, float] | None = None
    running: Write | None = None
    asking: bool = False
    pause: _Pause = field(default_factory=_Pause)


class Persistence:
    """One slot's share in the persistent tier. Pure: events in, instructions out."""

    def __init__(self, home: Home, schedule: Schedule) -> None:
        self._home = home
        self._schedule = schedule
        self._work: dict[str, _Work] = {}
        self._wakes_s: list[float] = []

    def facts(self) -> tuple[PersistFacts, ...]:
        return tuple(self._work[name].told for name in sorted(self._work))

    def next_wake_s(self) -> float | None:
        """When `instructions` may have something new without any event."""
        return min(self._wakes_s, default=None)

    # -- events

    def looked(self, job: str, stored: Stored) -> None:
        """What the tier holds of a job."""
        work = self._work.get(job)
        if work is not None:
            work.asking = False
            self._know(work, stored)

    def wrote(self, task: Write) -> None:
        """This slot's shard is there, verified."""
        self._ended(task, written=task.version, error="")

    def gone(self, task: Write, reason: str) -> None:
        """This slot cannot write its shard of that version: it has it no more."""
        self._ended(task, gone=task.version, error=reason)

    def stopped(self, task: Write) -> None:
        """The writing was given up as told."""
        self._ended(task)

    def progressed(self, task: Write, done: int, total: int) -> None:
        """Bytes written and read back, of as many."""
        work = self._work.get(task.job)
        if work is not None and work.running == task:
            work.told = replace(work.told, bytes_done=done, bytes_total=total, error="")

    def hindered(self, task: Write, reason: str) -> None:
        """The writing failed for now, and is tried again."""
        work = self._work.get(task.job)
        if work is not None and work.running == task:
            work.told = replace(work.told, error=reason)

    def published(self, job: str, version: Version, stored: Stored) -> None:
        """The step is whole, and the tier holds this."""
        work = self._work.get(job)
        if work is None:
            return
        work.asking, work.pause = False, _Pause()
        self._know(work, stored)
        if work.told.target == version:
            work.told = replace(work.told, target=None, error="")

    def failed(self, job: str, reason: str, now_s: float) -> None:
        """A Look or a Publish failed, and is tried again after a pause."""
        work = self._work.get(job)
        if work is not None:
            work.asking = False
            work.pause.failed(now_s)
            work.told = replace(work.told, error=reason)

    # -- conclusions

    def instructions(
        self, jobs: Iterable[JobFacts], slots: Slots, now_s: float, unix_s: float
    ) -> list[Instruction]:
        """Everything that is to be done now."""
        self._wakes_s = []
        found: list[Instruction] = []
        mine = {job.job: job for job in jobs if self._shard(job) is not None}
        for name in set(self._work) - set(mine):
            work = self._work[name]
            if work.running is not None:
                found.append(Stop(name))
            elif not work.asking:
                del self._work[name]
        for job in mine.values():
            if not job.restoring:
                found += self._of(job, slots, now_s, unix_s)
        return found

    def _of(self, job: JobFacts, slots: Slots, now_s: float, unix_s: float) -> list[Instruction]:
        assert job.decision is not None, "a home of it was looked for"
        work = self._work.get(job.job)
        if work is None:
            work = _Work(job.decision.id, PersistFacts(job.job))
            self._work[job.job] = work
        if work.epoch != job.decision.id:
            # Other homes: what they have written of older steps is found in the tier.
            work.epoch, work.stored, work.pause = job.decision.id, None, _Pause()
            work.told = replace(work.told, target=None, written=None, gone=None)
        found: list[Instruction] = []
        if leads(job, self._home):
            found += self._lead(job, work, slots, now_s, unix_s)
        leader = job.decision.home_of(0)
        target = work.told.target
        if leader is not None and leader != self._home:
            told = slots[leader].persists(job.job) if leader in slots else None
            target = told.target if told else None
        return [*found, *self._follow(job, work, target)]

    def _lead(
        self, job: JobFacts, work: _Work, slots: Slots, now_s: float, unix_s: float
    ) -> list[Instruction]:
        assert job.decision is not None
        if work.asking:
            return []
        if now_s < work.pause.until_s:
            self._wakes_s.append(work.pause.until_s)
            return []
        if work.stored is None:
            work.asking = True
            return [Look(job.job)]
        target = work.told.target
        if target is not None:
            states = self._states(job, work, slots)
            if all(s is not None and s.written == target for s in states):
                work.asking = True
                return [Publish(job.job, target, job.decision.world, self._number(work.stored))]
            lost = any(s is not None and s.gone == target for s in states)
            stuck = any(s is not None and s.error for s in states)
            if lost:
                work.pause.failed(now_s)
                self._wakes_s.append(work.pause.until_s)
            if not lost and not (stuck and self._due(job, work, now_s, unix_s)):
                return []
            work.told = replace(work.told, target=None)
            if lost:
                work.begun = None
                return []
        # What another number of ranks saved is theirs: these homes hold no shards of it.
        following = None if job.handed_on else self._resumable(job, work.stored, slots)
        if following is None and self._due(job, work, now_s, unix_s):
            following = job.committed
        if following is not None:
            work.begun = following, unix_s
            work.told = replace(work.told, target=following)
        return []

    def _follow(self, job: JobFacts, work: _Work, target: Version | None) -> list[Instruction]:
        told, shard = work.told, self._shard(job)
        assert shard is not None
        if work.running is not None:
            wanted = work.running.version if target is None else target
            return [] if work.running == Write(job.job, shard, wanted) else [Stop(job.job)]
        if target is None or target in (told.written, told.gone):
            return []
        work.running = Write(job.job, shard, target)
        work.told = replace(told, bytes_done=0, bytes_total=0)
        return [work.running]

    def _due(self, job: JobFacts, work: _Work, now_s: float, unix_s: float) -> bool:
        """Whether the restore point is to be written now; never one that others saved."""
        point, stored = job.committed, work.stored
        if (
            point is None
            or stored is None
            or job.handed_on
            or any(s.version == point for s in stored.steps)
        ):
            return False
        newest = max(stored.steps, key=lambda s: s.number, default=None)
        last = work.begun or ((newest.version, newest.unix_s) if newest else None)
        left_s = due_in_s(self._schedule, point, last, unix_s)
        if left_s:
            self._wakes_s.append(now_s + left_s)
        return left_s == 0

    def _resumable(self, job: JobFacts, stored: Stored, slots: Slots) -> Version | None:
        """A version that was begun, is newer than all whole ones, and can still be finished."""
        assert job.decision is not None
        newest = max((s.version for s in stored.steps), default=None)
        members = [m for g in job.decision.groups for m in g.members]
        for version in sorted(stored.unfinished, reverse=True):
            if newest is not None and version <= newest:
                return None
            if job.committed is None or version > job.committed:
                continue
            if all(data_at(slots, m.home, job.job, m.shard, version) for m in members):
                return version
        return None

    def _states(self, job: JobFacts, work: _Work, slots: Slots) -> list[PersistFacts | None]:
        """What the home of each shard says."""
        assert job.decision is not None
        homes = [m.home for g in job.decision.groups for m in g.members]
        return [
            work.told
            if home == self._home
            else (slots[home].persists(job.job) if home in slots else None)
            for home in homes
        ]

    def _number(self, stored: Stored) -> int:
        return 1 + max((s.number for s in stored.steps), default=-1)

    def _know(self, work: _Work, stored: Stored) -> None:
        work.stored = stored
        newest = max(stored.steps, key=lambda s: s.number, default=None)
        if newest is not None:
            work.told = replace(
                work.told, published=newest.version, published_unix_s=newest.unix_s, error=""
            )

    def _shard(self, job: JobFacts) -> int | None:
        groups = job.decision.groups if job.decision else ()
        return next((m.shard for g in groups for m in g.members if m.home == self._home), None)

    def _ended(self, task: Write, **told: object) -> None:
        work = self._work.get(task.job)
        if work is not None and work.running == task:
            work.running = None
            work.told = replace(work.told, **told)  # type: ignore[arg-type]  # its own fields
