"""A bound of bytes a second, as times at which bytes may go: a token bucket."""

from __future__ import annotations

from typing import Final

#: What may go at once after a pause: this long a time's bytes.
BURST_S: Final = 0.05


class Bucket:
    """Says how long to wait before so many bytes may go; 0 bytes a second: no bound at all."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # when all that was taken so far has had its time

    def take(self, count: int, now_s: float) -> float:
        """Take `count` bytes; returns the seconds to wait before they go.

        Who asks later waits for those who asked before, so all together keep the bound.
        """
        if not self._bytes_per_s:
            return 0.0
        begin_s = max(self._free_s, now_s - BURST_S)
        self._free_s = begin_s + count / self._bytes_per_s
        return max(0.0, begin_s - now_s)
