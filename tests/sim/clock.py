"""Virtual time and the one source of chance: a queue of things to happen, in order."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable


class Clock:
    """What happens when. Two runs of one seed are the same run."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, happen))

    def about(self, mean_s: float) -> float:
        """A delay around `mean_s`, now and then much longer."""
        tail = 5.0 if self.random.random() < 0.05 else 1.0
        return mean_s * self.random.uniform(0.2, 1.8) * tail

    def run_until(self, end_s: float) -> None:
        while self._queue and self._queue[0][0] <= end_s:
            self.now_s, _, happen = heapq.heappop(self._queue)
            happen()
        self.now_s = end_s
