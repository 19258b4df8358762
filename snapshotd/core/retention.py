"""What a slot must keep, and what it may free.

The rule: a generation is dropped only when a newer one is committed within the present groups.
So there is always a common restore point, also in the time between a restore and the first
commit after it. Even then the newest superseded generation stays until its buffer is wanted: it
costs nothing, and is what a job falls back to when the newest one turns out damaged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from snapshotd.core.protection import Slots, aborted, demanded, lacking, parity_homes
from snapshotd.metadata import DataHolding, Group, Home, JobFacts, ParityHolding, Version


def may_free_version(job: JobFacts, version: Version, slots: Slots) -> str:
    """Why no node needs the bytes of `version` any more; empty while they must be kept."""
    return superseded(job, version) or _given_up(job, version, slots)


def superseded(
    job: JobFacts, version: Version, *, pressed: bool = False, kept: bool = False
) -> str:
    """What has taken the place of `version` as the restore point; empty where nothing has.

    A restore that is being decided may fall back to any version. Only where it is `pressed` for
    memory are those given up that are older than what it brings back, and than the restore point:
    what it brings back may not be protected yet. What other ranks saved is never protected in the
    groups of these: it takes the place of what is older once it was in those that keep it, or
    where they are seen to hold all of it now (`kept`).
    """
    point = job.committed
    handed_on = job.handed_on and (kept or job.committed_in > 0)
    if point is None or (job.committed_in != job.lineage and not handed_on):
        return ""
    if _undecided(job):
        goal = job.restoring.restore if job.restoring and pressed else None
        older = goal is not None and version < min(goal, point)
        return f"the restore of {goal} needs its memory" if older else ""
    return f"superseded by {point}" if version < point else ""


def _given_up(job: JobFacts, version: Version, slots: Slots) -> str:
    """Why the job will never go back to `version`."""
    point = job.committed
    if _undecided(job) or version.epoch > job.lineage or version == point:
        return ""
    if version.epoch < job.lineage and point is None:
        return "the job started fresh"
    if version.epoch < job.lineage:
        return f"the job went back to {point}" if point is not None and version > point else ""
    if point is not None and version < point:
        return ""
    passer = aborted(job, version, slots)
    return f"{passer} passed it without sealing it" if passer else ""


def _undecided(job: JobFacts) -> bool:
    """A restore is being decided and may want anything; or this node has only its record."""
    if job.decision is None:
        return job.committed is not None
    return job.restoring is not None


@dataclass(frozen=True)
class Retention:
    """Judges what one slot holds of one job.

    Attributes:
        job: as known now.
        keepers: the groups that keep its restore point now.
        me: the slot.
        slots: facts of all slots.
        spared: superseded versions whose buffers nobody wants yet.
        pressed: memory is short.
    """

    job: JobFacts
    keepers: Sequence[Group]
    me: Home
    slots: Slots
    spared: Collection[Version] = ()
    pressed: bool = False

    def may_free(self, held: DataHolding | ParityHolding) -> str:
        """Why this slot may free a sealed shard or parity block; empty while it must keep it."""
        reason = _given_up(self.job, held.version, self.slots)
        if not reason and held.version not in self.spared:
            reason = self.superseded(held.version)
        if reason:
            return reason
        why = self._elsewhere(held) if isinstance(held, DataHolding) else self._unused(held)
        return why if why and self._settled else ""

    def sparing(self, mine: Iterable[DataHolding | ParityHolding], buffers: int) -> Retention:
        """The same, but superseded versions stay for whose buffers there is no use yet.

        None that another number of ranks saved than the restore point: part of it would go all
        the same, as nobody of these ranks is to keep it.

        Args:
            mine: what the slot holds of the job.
            buffers: how many versions it may hold.
        """
        worlds = {held.version: held.world for held in mine}
        old = sorted(v for v in worlds if self.superseded(v))
        held = {v for v, w in worlds.items() if w in (0, self.job.saved_world) or v not in old}
        old = [v for v in old if v in held]
        room = buffers - (len(held) - len(old))
        return replace(self, spared=old[-room:] if room > 0 else ())

    def superseded(self, version: Version) -> str:
        """What has taken the place of a version, as far as this slot sees; empty for nothing."""
        kept = self.job.handed_on and self._kept
        return superseded(self.job, version, pressed=self.pressed, kept=kept)

    def _elsewhere(self, held: DataHolding) -> str:
        """Where a shard lives, if not here: this is only a spare copy."""
        members = [m for g in self._groups_of(held.version) for m in g.members]
        homes = [m.home for m in members if m.shard == held.shard]
        if self.me in homes:
            return ""
        return f"shard {held.shard} lives on {homes[-1]} now" if homes else "it is nobody's shard"

    def _unused(self, held: ParityHolding) -> str:
        groups = self._groups_of(held.version)
        used = ((p, h) for g in groups for p, h in parity_homes(g))
        return "" if (held.place, self.me) in used else "the present groups do not use it"

    def _groups_of(self, version: Version) -> tuple[Group, ...]:
        """The groups that may need a version; stand-ins keep the restore point only."""
        if version == self.job.committed:
            return tuple(self.keepers)
        return (*demanded(self.job), *self.keepers)

    @cached_property
    def _settled(self) -> bool:
        """Whether what moved, or stands in, is needed no more."""
        return self.job.committed_in == self.job.lineage and self._kept

    @cached_property
    def _kept(self) -> bool:
        """Whether the keepers hold all that they are to hold of the restore point."""
        job, point = self.job, self.job.committed
        if job.decision is None or point is None or job.restoring:
            return False
        return not any(lacking(g, job.job, point, self.slots) for g in self.keepers)
