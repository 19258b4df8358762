"""On which processors an SMP works, so that training does not feel it."""

from __future__ import annotations

from collections.abc import Collection, Set


def away_from(trainer: Set[int], allowed: Set[int], nodes: Collection[Set[int]]) -> frozenset[int]:
    """The processors to work on beside a trainer: none of its own where others are to be had.

    Of the others, those on its NUMA nodes: there its memory is, and its GPU where it was pinned
    with that in mind.

    Args:
        trainer: processors the trainer may run on; all that are allowed, where it is not pinned.
        allowed: those that the SMP may use.
        nodes: the processors of each NUMA node.
    """
    others = frozenset(allowed - trainer)
    near = frozenset().union(*(node for node in nodes if node & trainer))
    return others & near or others or frozenset(allowed)
