"""What a restore takes from the persistent tier, when memory cannot serve it.

Only the node that states the decision looks, so that all ranks follow one look; what it saw
comes in as a `TierView`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from snapshotd.core.protection import Slots
from snapshotd.metadata import Decision, Stored, StoredStep, Tier, Version


@dataclass(frozen=True)
class TierView:
    """The persistent tier as the stating node has seen it for the trainers that wait now.

    Attributes:
        where: its URL, for messages.
        stored: whole steps of the job; None where it was not looked yet, or could not be.
        error: why it could not be looked into, or why a shard could not be fetched.
        bad: steps that are damaged there, and how it was found.
    """

    where: str
    stored: Stored | None = None
    error: str = ""
    bad: Mapping[Version, str] = field(default_factory=dict)

    def candidates(self, world: int, *, able: bool) -> list[StoredStep]:
        """Good steps, newest first: where ranks are not `able` to take others', by so many."""
        steps = self.stored.steps if self.stored else ()
        found = (s for s in steps if (able or s.world == world) and s.version not in self.bad)
        return sorted(found, key=lambda s: s.version, reverse=True)

    def other_worlds(self, world: int) -> set[int]:
        """How many ranks saved the steps that `world` ranks cannot take."""
        return {s.world for s in (self.stored.steps if self.stored else ()) if s.world != world}

    def tried(self) -> list[str]:
        """What was found there, a line each, for a message that nothing can be restored."""
        if self.stored is None:
            return [f"the persistent tier {self.where} could not be looked into: {self.error}"]
        damaged = {**dict(self.stored.damaged), **self.bad}
        if not self.stored.steps and not damaged:
            return [f"the persistent tier {self.where} has no whole step of it"]
        lines = [
            f"the persistent tier {self.where}: {version}: {why}"
            for version, why in sorted(damaged.items(), reverse=True)
        ]
        if self.error:
            lines.append(f"the persistent tier {self.where}: {self.error}")
        return lines or [f"the persistent tier {self.where} has no step of this run of the job"]


@dataclass(frozen=True, slots=True)
class Fall:
    """What the tier has for a restore: at most one of these; none of them: nothing.

    Attributes:
        step: the one to take.
        wait: why that is not known yet: it must be looked.
        other_world: there are steps, of other numbers of ranks, and these cannot take them.
    """

    step: StoredStep | None = None
    wait: str = ""
    other_world: str = ""


def fall_through(
    view: TierView,
    lineage: Collection[Version],
    world: int,
    waited_s: float,
    patience_s: float,
    *,
    able: bool,
) -> Fall:
    """The newest good step among those of the `lineage` that `world` ranks can take.

    `able`: they can take up what another number of ranks saved.
    """
    if view.stored is None:
        if view.error and waited_s >= patience_s:
            return Fall()
        why = view.error or "it is being looked into"
        return Fall(wait=f"memory has nothing to restore; the persistent tier {view.where}: {why}")
    if view.error and waited_s >= 2 * patience_s:
        return Fall()  # there, and not to be had
    step = next((s for s in view.candidates(world, able=able) if s.version in lineage), None)
    others = set() if able else view.other_worlds(world)
    if step is not None or not others or view.bad:
        return Fall(step)
    saved = f"was saved to {view.where} by {max(others)} ranks, and {world} ask to restore it"
    return Fall(other_world=saved)


def learned(view: TierView, decision: Decision | None, slots: Slots) -> TierView:
    """What the failures of a decision to restore from the tier say of it."""
    if decision is None or decision.restore is None or decision.tier is not Tier.PERSISTENT:
        return view
    trainers = (f.trainer for f in slots.values())
    failed = [t for t in trainers if t and t.decision == decision.id and t.failure]
    for trainer in failed:
        if trainer.damaged:
            bad = {**view.bad, decision.restore: trainer.failure}
            return view if bad == view.bad else replace(view, bad=bad)
    if not failed or failed[0].failure == view.error:
        return view
    return replace(view, error=failed[0].failure)
