"""The Snapshotter as the demo's trainer uses it, and its absence in the reference run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Start:
    """Where training begins: after `step`, or anew when that is -1."""

    step: int = -1
    tier: str = "none"
    rebuilt_bytes: int = 0


class Protection(Protocol):
    """What the training loop asks of whoever keeps its state safe."""

    def restore(self) -> Start: ...

    def step(self, step: int, loss: float) -> None: ...

    def state(self) -> tuple[int, bool]:
        """The job's restore point (-1: none), and whether it is protected now."""
        ...


class Unprotected:
    """No snapshots: the reference run."""

    def restore(self) -> Start:
        return Start()

    def step(self, step: int, loss: float) -> None:
        """Keep nothing."""

    def state(self) -> tuple[int, bool]:
        return -1, False


@contextmanager
def protect(parts: Mapping[str, object], *, unprotected: bool) -> Iterator[Protection]:
    """Yield the protection of a run: a Snapshotter over `parts`, or none."""
    if unprotected:
        yield Unprotected()
        return
    raise NotImplementedError
