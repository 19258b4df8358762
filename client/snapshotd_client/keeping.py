"""Snapshots on their way: begun, collected, waited for, and missed where the daemon is away."""

from __future__ import annotations

from collections.abc import Mapping

from snapshotd_client.channel import Channel
from snapshotd_client.errors import ProtectionTimeout, Refused, WrongUse
from snapshotd_client.handover import Handover
from snapshotd_client.news import News
from snapshotd_client.waiting import Deadline
from snapshotd_client.wires import DaemonGone


class Keeping:
    """What became of the snapshots of one trainer.

    Args:
        channel: to the daemon.
        handover: hands them over.
        news: what the daemon told.

    Attributes:
        alone: no daemon was there when the run began: none is looked for.
        missed: snapshots that were due and not taken.
        snapshot_step: the newest one handed over; None before the first.
    """

    def __init__(self, channel: Channel, handover: Handover, news: News) -> None:
        self._channel = channel
        self._handover = handover
        self._news = news
        self.alone = False
        self.missed = 0
        self.snapshot_step: int | None = None

    def snapshot(self, step: int, number: int, values: Mapping[str, object]) -> None:
        """Hand over the state of a step; as `Handover.begin`.

        Raises:
            StateChanged, ReplicasDiverged, UnsupportedState: of the state.
        """
        self.collect()
        try:
            if not self._channel.poke():
                raise DaemonGone(self._channel.why_down)
            self._channel.drain()
        except DaemonGone as error:
            self.miss(step, f"protected: the daemon is gone ({error})")
        except Refused as error:
            self.miss(step, f"protected: {error}")
        else:
            self._handover.begin(step, values, number)
            self.collect(wait=False)

    def collect(self, *, wait: bool = True) -> None:
        """Take note of what became of the snapshot before.

        Args:
            wait: for it where it is on its way; else it is left on its way.
        """
        if not wait and self._handover.busy:
            return
        flight = self._handover.collect()
        if flight is None:
            return
        if flight.error is not None and not isinstance(flight.error, DaemonGone | Refused):
            raise flight.error
        if isinstance(flight.error, DaemonGone):
            self.miss(flight.step, f"protected: the daemon is gone ({flight.error})")
        elif flight.error is not None:
            self.miss(flight.step, f"protected: {flight.error}")
        elif flight.skipped:
            self.miss(flight.step, f"snapshotted: {flight.skipped}")
        else:
            self.snapshot_step = flight.step
            self._news.handed_over(flight.step)

    def miss(self, step: int, why: str) -> None:
        """A step that is due is not what its snapshot would make it."""
        self.missed += 1
        self._news.report(f"step {step} is not {why}")

    def _why(self) -> str:
        if not self._channel.up:
            return f"no daemon answers ({self._channel.why_down})"
        return self._news.why()

    def listen(self, timeout_s: float) -> None:
        """Take in news, and find the daemon again if it is away."""
        try:
            if not self.alone and self._channel.poke():
                self._channel.listen(timeout_s)
            elif timeout_s > 0:
                Deadline(timeout_s).sleep()
        except DaemonGone as error:
            self._news.report(f"the daemon is gone ({error})")
        except Refused as error:
            self._news.report(f"the daemon does not take this trainer back: {error}")

    def wait_protected(self, step: int | None, timeout_s: float) -> int:
        """As `Snapshotter.wait_protected`."""
        self.collect()
        wanted = self.snapshot_step if step is None else step
        if wanted is None:
            raise WrongUse("no snapshot was taken yet", "Call step() first, or name a step")
        deadline = Deadline(timeout_s)
        while True:
            self.listen(deadline.slice_s(0.25))
            if self._news.is_committed(wanted):
                return int(self._news.progress.committed.step)
            if self._channel.up and self._news.given_up(wanted):
                raise ProtectionTimeout(
                    f"step {wanted} will not be protected: some rank has no snapshot of it",
                    "Train on: the next snapshot that every rank takes will be",
                )
            if deadline.over:
                raise ProtectionTimeout(
                    f"step {wanted} was not protected within {timeout_s:.1f} s: {self._why()}",
                    "See `snapshotd status` on this node",
                )
