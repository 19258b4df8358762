"""When a slot's facts are told: news at once, mere counting not more often than now and then.

Whoever hears facts states orders, orders wake every slot, and a slot that moves blocks has counted
on meanwhile. If that were news, facts would go round for as long as blocks move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from snapshotd.metadata import SlotFacts

#: Facts of which only the counters differ are told so long after the last ones.
COUNTERS_S: Final = 1.0


class News:
    """What was told last. Pure: time is passed in."""

    def __init__(self) -> None:
        self._told: SlotFacts | None = None
        self._told_s = 0.0
        #: When facts that were held back are to be told; None when there are none.
        self.due_s: float | None = None

    def to_tell(self, facts: SlotFacts, now_s: float) -> bool:
        """Whether these facts are to be told now; if so, they count as told."""
        old, self.due_s = self._told, None
        if facts == old:
            return False
        if old is not None and replace(_uncounted(facts), counters=old.counters) == _uncounted(old):
            due_s = self._told_s + COUNTERS_S
            if now_s < due_s:
                self.due_s = due_s
                return False
        self._told, self._told_s = facts, now_s
        return True


def _uncounted(facts: SlotFacts) -> SlotFacts:
    """Without how far a write into the persistent tier has come."""
    return replace(facts, persist=tuple(replace(p, bytes_done=0) for p in facts.persist))
