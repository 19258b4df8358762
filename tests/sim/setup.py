"""The shape of a simulated cluster, drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

#: Sizes and their weights: what a cluster costs grows faster than its square.
SIZES = {
    2: 400, 3: 400, 4: 160, 5: 25, 6: 10, 7: 5, 8: 3, 10: 1, 12: 0.6, 16: 0.25, 24: 0.08,
    32: 0.03, 48: 0.01, 64: 0.01,
}  # fmt: skip


#: Kinds that some runs have, once: what follows takes long, or ends what the others test.
RARE = {"job left alone": 0.05, "newest generation damaged": 0.04, "memory short everywhere": 0.04}
AFTER_S = {"job left alone": 2.0, "newest generation damaged": 0.5, "memory short everywhere": 0.8}


@dataclass(frozen=True)
class Setup:
    """The shape of a simulated cluster.

    Attributes:
        losses: nodes whose memory may be lost between two commits; above `parity` state may be.
        faults_s: how long faults strike.
        rare: a kind of fault that strikes once, at `rare_s`; empty in most runs.
        early: part of the snapshots that take long to be written, and may be read meanwhile.
    """

    nodes: int
    slots_per_node: int
    group_size: int
    parity: int
    generations: int = 2
    spares: int = 0
    losses: int = 1
    faults_s: float = 2.0
    rare: str = ""
    rare_s: float = 0.0
    early: float = 0.0


def setup_of(seed: int, rare: str = "") -> Setup:
    """Small clusters mostly; large ones, and long runs, ever rarer; `rare` may be set."""
    chance = random.Random(f"setup {seed}")
    (nodes,) = chance.choices(list(SIZES), list(SIZES.values()))
    wide = nodes > 4
    group_size = chance.choice([2, 3, 4, 5, 8]) if wide else chance.choice([nodes, nodes, 2])
    group_size = min(group_size, nodes)
    parity = chance.choice([m for m in (0, 1, 1, 1, 1, 2) if m < group_size])
    setup = Setup(
        nodes=nodes,
        slots_per_node=chance.choice([1, 1, 1, 1, 1, 2]) if nodes < 4 else 1,
        group_size=group_size,
        parity=parity,
        generations=chance.choice([2, 2, 3]),
        spares=chance.choice([0, 0, 0, 0, 1]),
        losses=chance.choice([parity, parity, parity, parity + 1]),
        faults_s=6.0 if chance.random() < 0.01 and not wide else chance.uniform(0.8, 1.5),
        early=random.Random(f"early {seed}").choice([0.0, 0.0, 0.5, 1.0]),
    )
    (drawn,) = chance.choices(["", *RARE], [1 - sum(RARE.values()), *RARE.values()])
    rare = rare or drawn
    if not rare:
        return setup
    rare_s = chance.uniform(0.9, 1.9)
    parity = max(1, parity)
    return replace(
        setup, parity=parity, spares=chance.choice([0, 1, 2]), losses=max(parity, setup.losses),
        faults_s=rare_s + AFTER_S[rare], rare=rare, rare_s=rare_s,
    )  # fmt: skip
