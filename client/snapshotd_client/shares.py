"""How holders of the same bytes divide them. Pure: each computes its own share, and all agree."""

from __future__ import annotations

from typing import Final

import xxhash

#: Shares begin and end at multiples of this, but for the last one's end.
UNIT_BYTES: Final = 64


def share(nbytes: int, index: int, count: int, name: str) -> tuple[int, int]:
    """The bytes [start, end) of a piece of `nbytes` that holder `index` of `count` stores.

    Holders' shares of a piece differ by less than two units. Who comes first, and who has the
    longer ones, depends on the name, so that it is not the same holder for all pieces.
    """
    units = -(-nbytes // UNIT_BYTES)
    each, over = divmod(units, count)
    turn, more = divmod(xxhash.xxh3_64_intdigest(name.encode()), count)
    place = (index + turn) % count
    # One unit more have the places more, more + 1, ... more + over - 1, modulo count.
    wrapped = max(0, more + over - count)

    def start(at: int) -> int:
        longer = min(at, wrapped) + max(0, min(at, more + over) - more)
        return min(nbytes, (each * at + longer) * UNIT_BYTES)

    return start(place), start(place + 1)
