"""A Snapshotter in a loop that somebody else owns: one snapshot a step, one way back.

The way to the point where a snapshot stands may draw random numbers; there the generators are put
back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapshotd_client import rng
from snapshotd_client.owners import cuda_devices
from snapshotd_client.results import Restored
from snapshotd_client.snapshotter import Snapshotter


class Guard:
    """Protects one training.

    Args:
        states: as Snapshotter takes them.
        interval_steps: likewise.
        options: its other arguments.

    Attributes:
        snapshotter: for its status, and to close it.
    """

    def __init__(
        self, states: Mapping[str, object], interval_steps: int, options: Mapping[str, Any]
    ) -> None:
        self._devices = cuda_devices(states)
        self._rng: rng.RngState | None = None
        self._last_step = 0
        self.snapshotter = Snapshotter(states, interval_steps=interval_steps, **options)

    def restore(self) -> Restored | None:
        """As `Snapshotter.restore`; the generators are remembered as they are now."""
        restored = self.snapshotter.restore()
        if restored is not None:
            self._rng = rng.read(self._devices)
        return restored

    def begin_at(self, step: int) -> None:
        """Steps up to this one are over."""
        self._last_step = step

    def put_back_generators(self) -> None:
        """The point where the snapshot stands is reached."""
        assert self._rng is not None, "something was restored"
        rng.restore(self._rng, self._devices)

    def step(self, step: int) -> None:
        """Snapshot a step, unless it was the last one already."""
        if step > self._last_step:
            self._last_step = step
            self.snapshotter.step(step)
