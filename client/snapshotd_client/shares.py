"""How holders of the same bytes divide them. Pure: each computes its own share, and all agree."""

from __future__ import annotations

from typing import Final
from zlib import crc32

#: Shares begin and end at multiples of this, but for the last one's end.
UNIT_BYTES: Final = 64


def share(nbytes: int, index: int, count: int, name: str) -> tuple[int, int]:
    """The bytes [start, end) of a piece of `nbytes` that holder `index` of `count` stores.

    Holders' shares differ by UNIT_BYTES at most. Who has the longer ones depends on the name, so
    that it is not the same holder for all pieces.
    """
    units = -(-nbytes // UNIT_BYTES)
    each, over = divmod(units, count)
    turn = crc32(name.encode())

    def longer_before(holder: int) -> int:
        """How many of the holders before `holder` have one unit more."""
        first = turn % count
        # Those are first, first + 1, ... first + over - 1, modulo count.
        wrapped = max(0, first + over - count)
        return min(holder, wrapped) + max(0, min(holder, first + over) - first)

    start = each * index + longer_before(index)
    end = each * (index + 1) + longer_before(index + 1)
    return min(nbytes, start * UNIT_BYTES), min(nbytes, end * UNIT_BYTES)
