"""Many seeds, many faults: the promises hold after each event, and peace returns."""

from __future__ import annotations

import random

import pytest

from .cluster import Cluster, Setup

SEEDS = 200


def setup_of(seed: int) -> Setup:
    """Shapes in turn: 2 to 4 nodes, 1 or 2 slots, parity 0 to 2, with and without spares."""
    chance = random.Random(seed)
    nodes = chance.choice([2, 2, 3, 3, 4])
    parity = chance.choice([m for m in (0, 1, 1, 1, 2) if m < nodes])
    return Setup(
        nodes=nodes,
        slots_per_node=chance.choice([1, 1, 2]) if nodes < 4 else 1,
        parity=parity,
        generations=chance.choice([2, 3]),
        spares=chance.choice([0, 0, 1]),
        max_losses=chance.choice([parity, parity, parity + 1]),
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_promises_hold_under_faults(seed: int) -> None:
    cluster = Cluster(seed, setup_of(seed))
    cluster.run(faults_s=6.0, calm_s=60.0)
