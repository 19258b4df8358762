"""The Snapshotter as the demo's trainer uses it, and its absence in the reference run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from snapshotd_client import ProtectionTimeout, Snapshotter


@dataclass(frozen=True)
class Start:
    """Where training begins: after `step`, or anew when that is -1."""

    step: int = -1
    tier: str = "none"
    decoded_bytes: int = 0
    copied_bytes: int = 0
    waited_s: float = 0.0
    staged_s: float = 0.0
    loaded_s: float = 0.0


class Protection(Protocol):
    """What the training loop asks of whoever keeps its state safe."""

    def restore(self) -> Start: ...

    def step(self, step: int, loss: float) -> None: ...

    def state(self) -> tuple[int, bool]:
        """The job's restore point (-1: none), and whether it is protected now."""
        ...

    def settle(self) -> None:
        """Wait until what was kept last is protected, or cannot be."""


class Unprotected:
    """No snapshots: the reference run."""

    def restore(self) -> Start:
        return Start()

    def step(self, step: int, loss: float) -> None:
        """Keep nothing."""

    def state(self) -> tuple[int, bool]:
        return -1, False

    def settle(self) -> None:
        """Nothing is kept."""


class Protected:
    """Snapshots at every step."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def restore(self) -> Start:
        restored = self._snapshotter.restore()
        if restored is None:
            return Start()
        return Start(
            step=restored.step,
            tier=restored.tier,
            decoded_bytes=restored.bytes_decoded,
            copied_bytes=restored.bytes_copied,
            waited_s=restored.waited_s,
            staged_s=restored.staged_s,
            loaded_s=restored.loaded_s,
        )

    def step(self, step: int, loss: float) -> None:
        self._snapshotter.step(step, loss=loss)

    def state(self) -> tuple[int, bool]:
        status = self._snapshotter.status()
        committed = -1 if status.committed_step is None else status.committed_step
        return committed, status.is_protected

    def settle(self) -> None:
        with suppress(ProtectionTimeout):
            self._snapshotter.wait_protected()


@contextmanager
def protect(parts: Mapping[str, object], *, unprotected: bool) -> Iterator[Protection]:
    """Yield the protection of a run: a Snapshotter over `parts`, or none."""
    if unprotected:
        yield Unprotected()
    else:
        with Snapshotter(parts, interval_steps=1) as snapshotter:
            yield Protected(snapshotter)
