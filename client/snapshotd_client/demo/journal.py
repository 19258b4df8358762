"""What trainers tell: one JSON line an event, into a file of each rank and to whoever watches."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self, TypedDict, Unpack

SEND_TIMEOUT_S: Final = 5.0


class Kind(StrEnum):
    """What happened in a trainer."""

    UP = "up"  # the process began
    READY = "ready"  # it was restored, or begins anew, and trains from here
    BEGIN = "begin"  # a step began
    STEP = "step"  # a step ended
    HELD = "held"  # it waits for a fault to be over, with its newest snapshot protected
    DONE = "done"  # its final state is written


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one trainer.

    Attributes:
        time_s: wall clock, seconds since 1970.
        step: of BEGIN and STEP; of HELD the last one; for READY the step whose state was restored,
            -1 for a fresh start.
        tier: of READY: "local", "group", or "none".
        decoded_bytes: of READY: bytes of this shard rebuilt from the code.
        copied_bytes: of READY: bytes of this shard brought over whole from another node.
        waited_s: of READY: from the question to restore to its answer.
        staged_s: of READY: of that, to have this shard on its node, verified.
        loaded_s: of READY: from the answer until the state was back.
        committed: of STEP and HELD: the job's restore point as this rank knows it, -1 for none.
        is_protected: of STEP and HELD: whether that point is protected within the present groups.
    """

    kind: Kind
    rank: int
    node: str
    pid: int
    time_s: float
    step: int = -1
    loss: float = float("nan")
    tier: str = ""
    decoded_bytes: int = 0
    copied_bytes: int = 0
    waited_s: float = 0.0
    staged_s: float = 0.0
    loaded_s: float = 0.0
    committed: int = -1
    is_protected: bool = False

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read back what `to_line` wrote; ValueError or TypeError where it is something else."""
        fields = json.loads(line)
        return cls(**{**fields, "kind": Kind(fields["kind"])})


class Facts(TypedDict, total=False):
    """The fields of an event that its kind may carry; as in `Event`."""

    step: int
    loss: float
    tier: str
    decoded_bytes: int
    copied_bytes: int
    waited_s: float
    staged_s: float
    loaded_s: float
    committed: int
    is_protected: bool


class Journal:
    """A rank's events: appended to its file, and sent to the watcher's socket where there is one.

    A watcher that is gone does not hold the trainer up, one that is slow does so only once: the
    file has everything.
    """

    def __init__(self, directory: Path, *, rank: int, node: str, watcher: str = "") -> None:
        """`watcher` is the path of a listening stream socket, or empty."""
        self._rank, self._node = rank, node
        self._path = directory / f"rank{rank}.jsonl"
        self._watcher = _connected(watcher) if watcher else None

    def tell(self, kind: Kind, **facts: Unpack[Facts]) -> None:
        """Record one event now."""
        event = Event(kind, self._rank, self._node, os.getpid(), time.time(), **facts)
        line = event.to_line() + "\n"
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line)
        try:
            if self._watcher:
                self._watcher.sendall(line.encode())
        except OSError:
            # Part of a line may be out; nothing after it could be understood.
            self.close()

    def close(self) -> None:
        if self._watcher:
            self._watcher.close()
            self._watcher = None


def _connected(path: str) -> socket.socket | None:
    watcher = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    watcher.settimeout(SEND_TIMEOUT_S)
    try:
        watcher.connect(path)
    except OSError:
        watcher.close()
        return None
    return watcher
