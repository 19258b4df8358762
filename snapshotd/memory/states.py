"""What a segment may hold and be, and the only table of its changes of state."""

from __future__ import annotations

from enum import Enum
from typing import Final

from snapshotd.wire.v1 import segment_pb2 as pb


class Kind(Enum):
    """What a segment's image is; values as in the wire's enum."""

    DATA = pb.SEGMENT_KIND_DATA
    PARITY = pb.SEGMENT_KIND_PARITY

    @property
    def label(self) -> str:
        """As in file names: data, parity."""
        return self.name.lower()


class State(Enum):
    """How far a segment is; values as in the wire's enum."""

    FREE = pb.SEGMENT_STATE_FREE
    WRITING = pb.SEGMENT_STATE_WRITING
    SEALED = pb.SEGMENT_STATE_SEALED


#: ::
#:
#:     FREE ──begin──► WRITING ──seal──► SEALED
#:      ▲                 │                │
#:      └──────free───────┴──────free──────┘
_NEXT: Final[dict[State, frozenset[State]]] = {
    State.FREE: frozenset({State.WRITING}),
    State.WRITING: frozenset({State.SEALED, State.FREE}),
    State.SEALED: frozenset({State.FREE}),
}


def check_change(name: str, now: State, wanted: State) -> None:
    """Refuse a change that is not in the table.

    Raises:
        ValueError: names the segment, its state and what it may become.
    """
    if wanted not in _NEXT[now]:
        allowed = ", ".join(sorted(state.name for state in _NEXT[now]))
        raise ValueError(
            f"segment {name} is {now.name}; it may become {allowed}, not {wanted.name}"
        )
