"""A bound of bytes a second, as times at which bytes may go: a token bucket."""

from __future__ import annotations

from typing import Final

#: What may go at once after a pause: this long a time's bytes.
BURST_S: Final = 0.05

#: Of the time after which a peer takes a stream for stalled, what a chunk waits for its turn at
#: most. Who codes waits for his own turn behind that of whom he reads from, and needs time besides.
_WAITING_PART: Final = 1 / 3


def most_streams(bytes_per_s: int, stall_s: float, chunk_bytes: int) -> int | None:
    """How many streams may take turns, so that no peer takes one that waits for stalled.

    Args:
        bytes_per_s: of all of them; 0: no bound.
        stall_s: when a peer does.
        chunk_bytes: of one turn.

    Returns:
        At least 1; None where nothing waits.
    """
    if not bytes_per_s:
        return None
    return max(1, int(bytes_per_s * stall_s * _WAITING_PART / chunk_bytes))


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
