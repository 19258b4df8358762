"""A point in time that waits are measured against."""

from __future__ import annotations

import threading
import time


class Deadline:
    """`timeout_s` from now."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end_s

    def left_s(self) -> float:
        """What is left, at least 0."""
        return self.slice_s(self.timeout_s)

    def slice_s(self, most_s: float) -> float:
        """What is left, at most `most_s`, at least 0."""
        return max(0.0, min(most_s, self._end_s - time.monotonic()))

    def sleep(self) -> None:
        """Wait it out, for want of any event to wait for."""
        threading.Event().wait(self.slice_s(self.timeout_s))
