"""Which stripes a slot must code, and when to try again.

The first parity holder of a stripe codes it, as soon as it sees every member of the group sealed;
a row that its holder does not say it has is coded again, however it was lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snapshotd.core.instructions import Encode
from snapshotd.core.protection import Slots, data_at, parity_at, parity_homes
from snapshotd.core.retention import may_free_version
from snapshotd.core.stripes import stripe
from snapshotd.metadata import Decision, Group, Home, JobFacts, ParityHolding, Version

RETRY_FIRST_S = 0.1
RETRY_LAST_S = 2.0
HEARSAY_S = 1.0  # for a holder's facts to tell of a stored row, before it is sent once more


def stripes_to_code(
    job: JobFacts, home: Home, versions: Iterable[Version], slots: Slots
) -> list[Encode]:
    """The stripe that `home` codes, for each version of which a row is not stored.

    Args:
        job: as known now.
        home: the slot that asks.
        versions: whose data the slot holds, oldest first.
        slots: facts of all slots.
    """
    decision = job.decision
    if decision is None or job.lineage != decision.id.epoch:
        return []
    group = _group_at(decision, home)
    if group is None or group.parity == 0:
        return []
    wanted = [
        v
        for v in versions
        if (v == job.committed or v.epoch == job.lineage) and not may_free_version(job, v, slots)
    ]
    tasks = [_task(job, home, group, version, slots) for version in wanted]
    return [task for task in tasks if task is not None]


def _group_at(decision: Decision, home: Home) -> Group | None:
    homes = ((g, m.home) for g in decision.groups for m in g.members)
    return next((g for g, where in homes if where == home), None)


def _task(job: JobFacts, me: Home, group: Group, version: Version, slots: Slots) -> Encode | None:
    """What is to be coded of one version; None while a member is missing, or nothing is."""
    held = [data_at(slots, m.home, job.job, m.shard, version) for m in group.members]
    members = tuple(d for d in held if d is not None)
    if len(members) < group.size:
        return None
    index = next(i for i, m in enumerate(group.members) if m.home == me)
    digests = tuple(d.content_digest for d in members)
    rows = tuple(
        place.row
        for place, home in parity_homes(group)
        if place.stripe == index
        and _reachable(slots, home)
        and not _stored(parity_at(slots, home, job.job, version, place), digests)
    )
    sources = stripe(group.size, group.parity, index).sources
    if not rows or not all(_reachable(slots, group.members[s.position].home) for s in sources):
        return None
    return Encode(job.job, job.lineage, version, group, index, rows, members)


def _reachable(slots: Slots, home: Home) -> bool:
    facts = slots.get(home)
    return facts is not None and bool(facts.address)


def _stored(holding: ParityHolding | None, digests: tuple[bytes, ...]) -> bool:
    return holding is not None and holding.content_digests == digests


@dataclass(slots=True)
class _Pause:
    until_s: float
    delay_s: float


_Key = tuple[str, Version]


class Pace:
    """One coding of a version at a time, and pauses after it, longer after each failure."""

    def __init__(self) -> None:
        self._running: set[_Key] = set()
        self._pauses: dict[_Key, _Pause] = {}
        self._done: set[_Key] = set()
        self._judged_s = float("-inf")

    def startable(self, tasks: Iterable[Encode], now_s: float) -> list[Encode]:
        """Those tasks that are to be started now; they count as running from here on."""
        self._judged_s = now_s
        for key in self._done:
            # The holders' facts come a moment later; until then it is not coded again.
            self._pauses[key] = _Pause(now_s + HEARSAY_S, RETRY_FIRST_S)
        self._done.clear()
        started = [task for task in tasks if self._free(_key(task), now_s)]
        self._running.update(_key(task) for task in started)
        return started

    def done(self, task: Encode) -> None:
        """All rows are stored."""
        self._running.discard(_key(task))
        self._pauses.pop(_key(task), None)
        self._done.add(_key(task))

    def failed(self, task: Encode, now_s: float) -> None:
        """Some row is not."""
        key = _key(task)
        self._running.discard(key)
        last = self._pauses.get(key)
        delay_s = min(RETRY_LAST_S, last.delay_s * 2) if last else RETRY_FIRST_S
        self._pauses[key] = _Pause(now_s + delay_s, delay_s)

    def forget(self, job: str, version: Version) -> None:
        """Nobody needs the version any more."""
        self._pauses.pop((job, version), None)

    def wakes_s(self) -> list[float]:
        """When pauses end, those of the past left out."""
        return [p.until_s for p in self._pauses.values() if p.until_s > self._judged_s]

    def _free(self, key: _Key, now_s: float) -> bool:
        pause = self._pauses.get(key)
        return key not in self._running and (pause is None or now_s >= pause.until_s)


def _key(task: Encode) -> _Key:
    return (task.job, task.version)
