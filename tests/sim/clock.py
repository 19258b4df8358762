"""Virtual time: a queue of things to happen, in order; and delays drawn by chance."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable


class Clock:
    """What happens when. Two runs of one seed and one list of faults are the same run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, happen))

    def run_until(self, end_s: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end_s:
            self.now_s, _, happen = heapq.heappop(queue)
            happen()
        self.now_s = end_s


def about(chance: random.Random, mean_s: float) -> float:
    """A delay around `mean_s`, now and then much longer."""
    delay_s = mean_s * (0.2 + 1.6 * chance.random())
    return delay_s * 5.0 if chance.random() < 0.05 else delay_s
