"""Which nodes are not to be trusted with blocks now, from what they did to this slot.

A node that sends what cannot be right gets a *strike*; each whole good block takes one back. Three
strikes within a minute cut it off: for a pause nothing is read from it and nothing it sends is
stored. After the pause it is on probation: one more strike and the pause is twice as long, one
good block and all is forgotten. So one flipped bit in an honest node's memory cuts nobody off,
and a node that lies without end costs ever less.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from snapshotd.metadata import Accusation

#: So many strikes within so many seconds cut a node off.
MAX_STRIKES: Final = 3
WINDOW_S: Final = 60.0
FIRST_PAUSE_S: Final = 10.0
LAST_PAUSE_S: Final = 320.0
#: Nodes that are remembered; beyond, the one that was struck longest ago is forgotten.
MAX_ACCUSED: Final = 64


class Misdeed(StrEnum):
    """What a node did, in words that follow "sent"."""

    WRONG_BYTES = "bytes that do not match their digests"
    WRONG_RECORD = "records that contradict themselves or its facts"
    WRONG_STRIPE = "parity that is not the code of its group"
    WRONG_STREAM = "other parts, or more or fewer bytes, than it had announced"
    STALLED = "nothing for longer than a stream may stand still"


@dataclass(slots=True)
class _File:
    """What is held against one node."""

    strikes_s: list[float]
    total: int = 0
    last: Misdeed = Misdeed.WRONG_BYTES
    pause_s: float = 0.0
    until_s: float = float("-inf")


class Trust:
    """The strikes of one slot against other nodes. Pure: time is passed in."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def strike(self, node: str, misdeed: Misdeed, now_s: float) -> None:
        """A node did what no honest node does."""
        self._forget(now_s)
        file = self._files.pop(node, None) or _File([])
        self._files[node] = file  # the newest is the last
        if len(self._files) > MAX_ACCUSED:
            del self._files[next(iter(self._files))]
        file.total += 1
        file.last = misdeed
        if now_s < file.until_s:
            return  # of a stream that was under way when it was cut off
        file.strikes_s = [*(s for s in file.strikes_s if now_s - s < WINDOW_S), now_s]
        if file.pause_s or len(file.strikes_s) >= MAX_STRIKES:
            file.pause_s = min(LAST_PAUSE_S, file.pause_s * 2) or FIRST_PAUSE_S
            file.until_s = now_s + file.pause_s
            file.strikes_s = []

    def good(self, node: str, now_s: float) -> None:
        """A whole block of a node was what it had to be."""
        file = self._files.get(node)
        if file is None or now_s < file.until_s:
            return
        file.strikes_s = file.strikes_s[1:]
        if file.pause_s or not file.strikes_s:
            del self._files[node]

    def cut_off_s(self, node: str, now_s: float) -> float:
        """For how many seconds more a node is cut off; 0 when it is not."""
        file = self._files.get(node)
        return max(0.0, file.until_s - now_s) if file else 0.0

    def accusations(self, now_s: float) -> tuple[Accusation, ...]:
        """What this slot tells all others; it changes with events and at `next_change_s` only."""
        self._forget(now_s)
        return tuple(
            Accusation(node, file.last.value, file.total, self._pause(file, now_s))
            for node, file in sorted(self._files.items())
        )

    def next_change_s(self, now_s: float) -> float | None:
        """When `accusations` changes by itself."""
        times = [t for f in self._files.values() for t in (f.until_s, _forgotten_s(f))]
        return min((t for t in times if t > now_s), default=None)

    def _pause(self, file: _File, now_s: float) -> float:
        return file.pause_s if now_s < file.until_s else 0.0

    def _forget(self, now_s: float) -> None:
        self._files = {n: f for n, f in self._files.items() if now_s < _forgotten_s(f)}


def _forgotten_s(file: _File) -> float:
    """A node on probation is remembered for as long again as it was cut off."""
    probation_s = file.until_s + max(WINDOW_S, file.pause_s) if file.pause_s else float("-inf")
    return max([probation_s, *(s + WINDOW_S for s in file.strikes_s)])
