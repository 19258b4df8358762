"""How much of the protection is given up while memory is short, and when it is taken up again.

In steps: the slot that lacks room frees its spare generations at once; when that does not help,
the coordinator has every group keep one parity row less, and one more after each further wait,
until snapshots are local only. A row that is not kept is one node less whose loss is survived;
those that stay need not be computed anew. When every slot has room for everything again, the
rows come back one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from snapshotd.metadata import Economy

#: Memory must be short for this long before a row is given up.
GIVE_UP_S: Final = 3.0
#: ... and suffice for this long before one is taken up again.
TAKE_UP_S: Final = 10.0


def given_up(economy: Economy) -> str:
    """What protection lacks, in words; empty where it lacks nothing."""
    rows = economy.rows_less
    return f"{rows} parity block(s) a stripe are not kept to save memory" if rows else ""


@dataclass(frozen=True, slots=True)
class Spell:
    """Since when memory has been short, or has sufficed."""

    short: bool
    since_s: float


def judge(
    spell: Spell | None,
    *,
    short: bool,
    present: Economy,
    parity: int,
    now_s: float,
    give_up_s: float = GIVE_UP_S,
    take_up_s: float = TAKE_UP_S,
) -> tuple[Spell, Economy]:
    """The spell to go on with and the economy to follow, unchanged where nothing is to be done.

    Args:
        spell: None at a job's first call.
        short: whether a slot of the job lacks room now.
        present: the economy in force.
        parity: rows that the job's groups keep while all is well.
        now_s: the present time.
        give_up_s: how long memory is short before a row is given up.
        take_up_s: how long it suffices before one is taken up again.
    """
    if spell is None or spell.short != short:
        return Spell(short, now_s), present
    change = 1 if short else -1
    waits_s = give_up_s if short else take_up_s
    rows_less = present.rows_less + change
    if now_s - spell.since_s < waits_s or not 0 <= rows_less <= parity:
        return spell, present
    return Spell(short, now_s), Economy(present.serial + 1, rows_less)
