"""When a node tells the others that it lives: at every heartbeat, and all nodes at one time.

To wake for a message costs more than to read it. So a node whose beat is due before long beats with
the first peer that does, and from then on all of them beat within the time that a message takes.
No clocks are compared: whoever is first sets the time, and who hears of nobody keeps his own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: Of a heartbeat; a beat is that much early at most, so peers cannot make a node beat faster.
_LEAST: Final = 0.5


class Rhythm:
    """Pure: time is passed in."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._last_s = float("-inf")

    @property
    def due_s(self) -> float:
        """When this node must beat at the latest."""
        return self._last_s + self._period_s

    def joins(self, now_s: float) -> bool:
        """Whether to beat now, as a peer has just done."""
        return now_s >= self._last_s + _LEAST * self._period_s

    def beat(self, now_s: float) -> None:
        self._last_s = now_s


def visits(node: str, peers: Iterable[str]) -> frozenset[str]:
    """Of the other nodes, those that `node` goes to where neither has news; it waits for the rest.

    To be gone to costs more than to go, so it goes to half of them. For a while two nodes may not
    know the same `peers`: then both of them may go, or neither.
    """
    order = sorted({node, *peers})
    mine = order.index(node)
    return frozenset(p for i, p in enumerate(order) if (i - mine) % 2 == (i > mine) and i != mine)
