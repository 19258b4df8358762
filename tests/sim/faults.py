"""The faults of a run: an explicit list, drawn from the seed before anything happens.

What a fault strikes is a number between 0 and 1 that chooses among what is there when it strikes.
So a list stays meaningful when some of its entries are left out.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from .setup import Setup


class Fault(NamedTuple):
    """One thing that goes wrong.

    Attributes:
        at_s: when.
        kind: what; one of KINDS.
        where: chooses the target.
        other: a second choice, of a target or of what follows.
        for_s: how long it lasts, or how long until what died comes back.
    """

    at_s: float
    kind: str
    where: float = 0.0
    other: float = 0.0
    for_s: float = 0.0


#: Every kind of fault, and its weight.
KINDS = {
    "messages dropped": 3, "messages delayed": 3, "messages duplicated": 2,
    "messages reordered": 3,
    "partition": 3, "one-way partition": 3, "partition of facts": 2, "partition of blocks": 2,
    "SMP killed": 6, "supervisor killed": 4, "supervisor killed, records lost": 2,
    "node crashed": 3, "node rebooted, memory lost": 2,
    "node rebooted, memory and records lost": 2,
    "node replaced, old name": 2, "node replaced, new name": 3,
    "slow node": 3,
    "trainer killed": 5, "snapshot torn": 4, "snapshot skipped": 3, "job relaunched": 3,
    "trainer left over": 3, "world size changed": 1,
    "launcher and daemons restarted": 2,
    "out of memory": 2,
    "bit flipped in data": 4, "bit flipped in parity": 4,
}  # fmt: skip

#: The part of all runs in which the world size changes, whatever else is drawn.
RESIZED = 0.2

#: Not struck by a fault of their own: seen and counted when they happen.
SEEN = ("late trainer message", "late store of an older epoch", "late facts of a dead process")


def draw(seed: int, setup: Setup) -> tuple[Fault, ...]:
    """Some kinds of faults a run, densely: combinations matter more than variety within a run."""
    chance = random.Random(f"faults {seed}")
    kinds = chance.sample(list(KINDS), chance.choice([3, 5, 8, len(KINDS)]))
    weights = [KINDS[k] for k in kinds]
    gap_s = chance.choice([0.05, 0.1, 0.2])
    faults = []
    at_s = chance.choice([0.0, 0.4, 0.6])  # mostly once there is something to lose
    while at_s < setup.faults_s:
        (kind,) = chance.choices(kinds, weights)
        where, other = round(chance.random(), 3), round(chance.random(), 3)
        faults.append(
            Fault(round(at_s, 3), kind, where, other, round(chance.uniform(0.05, 0.8), 2))
        )
        at_s += chance.expovariate(1 / gap_s)
    if setup.rare:
        at_s = round(setup.rare_s, 3)
        where, other = round(chance.random(), 3), round(chance.random(), 3)
        begins_s = at_s - chance.choice([0.0, 0.0, 0.2, 0.5])  # mostly there is a restore point
        ends_s = at_s + chance.choice([0.0, 0.0, 2.0])  # ... and mostly nothing strikes after it
        faults = [f for f in faults if begins_s < f.at_s < ends_s]
        faults.append(Fault(at_s, setup.rare, where, other, round(chance.uniform(0.05, 0.8), 2)))
    return tuple(sorted([*faults, *_resizes(seed, setup)]))


def _resizes(seed: int, setup: Setup) -> list[Fault]:
    """In some runs the job comes back with other numbers of ranks, once or twice more."""
    chance = random.Random(f"resizes {seed}")
    if setup.rare or chance.random() > RESIZED:
        return []
    times = sorted(chance.uniform(0.4, setup.faults_s) for _ in range(chance.choice([1, 1, 2])))
    return [
        Fault(round(at_s, 3), "world size changed", round(chance.random(), 3), 0.9, 0.1)
        for at_s in times
    ]
