"""What is owed to the user at a moment: a version, the groups that keep it, what was lost since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from snapshotd.core.recovery import Missing, candidates, survey, world_of
from snapshotd.core.restore import within_lineage
from snapshotd.core.stripes import places
from snapshotd.metadata import (
    DataHolding,
    Group,
    Home,
    JobFacts,
    ParityHolding,
    SlotFacts,
    Version,
)

from .memory import Key, Memory, digest


@dataclass
class Promise:
    """A version that `bearable` further memories of each group may be lost of.

    Attributes:
        parts: what each home of the groups must keep for it.
        lost: homes that lost a part since, by no decision of the protocol.
    """

    point: JobFacts
    version: Version
    groups: tuple[Group, ...]
    bearable: int
    lost: set[Home] = field(default_factory=set)
    parts: dict[Home, tuple[Key, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self._all_parts()

    def lower(self, bearable: int, memories: Mapping[Home, Memory]) -> None:
        """Memory is short: from now on less is promised."""
        self.bearable = min(self.bearable, bearable)
        self.parts = self._all_parts()
        for home in list(self.lost):
            self.refilled(home, memories.get(home, {}))

    def refilled(self, home: Home, memory: Memory) -> None:
        """A home that lost a part may have all of it again."""
        keys = self.parts.get(home, ())
        if all(k in memory and digest(memory[k].image) == memory[k].check for k in keys):
            self.lost.discard(home)

    def _all_parts(self) -> dict[Home, tuple[Key, ...]]:
        return {
            member.home: self._parts(group, member.shard)
            for group in self.groups
            for member in group.members
        }

    def _parts(self, group: Group, shard: int) -> tuple[Key, ...]:
        job, version = self.point.job, self.version
        mine = places(group, group.position(shard)) if self.bearable else ()
        kept = [place for place in mine if place.row < self.bearable]
        return ((job, version, shard), *((job, version, place) for place in kept))

    def owed(self, away: Iterable[Home] = ()) -> bool:
        """Whether it stands, also if all of `away` counted as lost."""
        lost = self.lost.union(away)
        return all(sum(m.home in lost for m in g.members) <= self.bearable for g in self.groups)

    def lacking(self, memories: Mapping[Home, Memory]) -> dict[Home, list[Key]]:
        """Homes that do not keep all their part, lost ones not among them."""
        nothing: Memory = {}
        absent = {
            home: [k for k in keys if k not in memories.get(home, nothing)]
            for home, keys in self.parts.items()
            if home not in self.lost
        }
        return {home: keys for home, keys in absent.items() if keys}

    def broken_by(self, memories: Mapping[Home, Memory], *, further: bool = True) -> str:
        """Which further losses, each bearable, would leave nothing to go back to; empty if none.

        Args:
            memories: what lies where, whole.
            further: whether to try losses that did not happen; else only what is there counts.
        """
        slots = facts_of(memories)
        for group in self.groups:
            homes = [m.home for m in group.members]
            left = self.bearable - sum(h in self.lost for h in homes)
            if left < 0:
                return ""
            there = [h for h in homes if h not in self.lost]
            for taken in combinations(there, left if further else 0):
                if not self._restorable({h: f for h, f in slots.items() if h not in taken}):
                    return f"the loss of {', '.join(map(str, taken))}" if taken else "what was lost"
        return ""

    def older_is_whole(self, memories: Mapping[Home, Memory]) -> bool:
        """Whether a version before it could be restored too."""
        slots = facts_of(memories)
        for version in candidates(slots, self.point.job):
            if version < self.version and within_lineage(version, self.point):
                world = world_of(slots, self.point.job, version)
                origins = survey(slots, self.point.job, world, version, {})
                if not any(isinstance(o, Missing) for o in origins):
                    return True
        return False

    def _restorable(self, slots: Mapping[Home, SlotFacts]) -> bool:
        job = self.point.job
        for version in candidates(slots, job):
            if version != self.version and not within_lineage(version, self.point):
                continue
            origins = survey(slots, job, world_of(slots, job, version), version, {})
            if origins and not any(isinstance(o, Missing) for o in origins):
                return True
        return False


class Shelter(Promise):
    """What those who remain protect while nobody trains: any `bearable` nodes more may be lost."""

    def __init__(
        self, point: JobFacts, version: Version, groups: tuple[Group, ...], bearable: int,
        memories: Mapping[Home, Memory],
    ) -> None:  # fmt: skip
        self._held = {
            home: tuple(key for key in memory if key[1] == version)
            for home, memory in memories.items()
        }
        super().__init__(point, version, groups, bearable)

    def _all_parts(self) -> dict[Home, tuple[Key, ...]]:
        return {home: keys for home, keys in self._held.items() if keys}

    def owed(self, away: Iterable[Home] = ()) -> bool:
        """Whether it stands, also if all of `away` counted as lost."""
        return len(self._lost_nodes(away)) <= self.bearable

    def _lost_nodes(self, away: Iterable[Home] = ()) -> set[str]:
        return {home.node for home in self.lost.union(away) if home in self.parts}

    def broken_by(self, memories: Mapping[Home, Memory], *, further: bool = True) -> str:
        """Which further losses, each bearable, would leave nothing to go back to; empty if none."""
        slots, lost = facts_of(memories), self._lost_nodes()
        there = sorted({home.node for home in slots} - lost)
        for taken in combinations(there, self.bearable - len(lost) if further else 0):
            if not self._restorable({h: f for h, f in slots.items() if h.node not in taken}):
                return f"the loss of {', '.join(taken)}" if taken else "what was lost"
        return ""


def facts_of(memories: Mapping[Home, Memory]) -> dict[Home, SlotFacts]:
    """What undamaged bytes lie in every memory, as facts."""
    found = {}
    for home, memory in memories.items():
        held = [b.holding for b in memory.values() if digest(b.image) == b.check]
        found[home] = SlotFacts(
            home.slot,
            address="there",
            data=tuple(h for h in held if isinstance(h, DataHolding)),
            parity=tuple(h for h in held if isinstance(h, ParityHolding)),
        )
    return found
