"""The shape of a simulated cluster, drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

#: Sizes and their weights: what a cluster costs grows faster than its square.
SIZES = {
    2: 400, 3: 400, 4: 160, 5: 25, 6: 10, 7: 5, 8: 3, 10: 1, 12: 0.6, 16: 0.25, 24: 0.08,
    32: 0.03, 48: 0.01, 64: 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """The shape of a simulated cluster.

    Attributes:
        losses: nodes whose memory may be lost between two commits; above `parity` state may be.
        faults_s: how long faults strike.
    """

    nodes: int
    slots_per_node: int
    group_size: int
    parity: int
    generations: int = 2
    spares: int = 0
    losses: int = 1
    faults_s: float = 2.0


def setup_of(seed: int) -> Setup:
    """Small clusters mostly; large ones, and long runs, ever rarer."""
    chance = random.Random(f"setup {seed}")
    (nodes,) = chance.choices(list(SIZES), list(SIZES.values()))
    wide = nodes > 4
    group_size = chance.choice([2, 3, 4, 5, 8]) if wide else chance.choice([nodes, nodes, 2])
    group_size = min(group_size, nodes)
    parity = chance.choice([m for m in (0, 1, 1, 1, 1, 2) if m < group_size])
    return Setup(
        nodes=nodes,
        slots_per_node=chance.choice([1, 1, 1, 1, 1, 2]) if nodes < 4 else 1,
        group_size=group_size,
        parity=parity,
        generations=chance.choice([2, 2, 3]),
        spares=chance.choice([0, 0, 0, 0, 1]),
        losses=chance.choice([parity, parity, parity, parity + 1]),
        faults_s=6.0 if chance.random() < 0.01 and not wide else chance.uniform(0.8, 1.5),
    )
