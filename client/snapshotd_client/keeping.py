"""Snapshots on their way: begun, collected, waited for, and missed where the daemon is away."""

from __future__ import annotations

from collections.abc import Mapping

from snapshotd_client.channel import Channel
from snapshotd_client.errors import Refused, WrongUse
from snapshotd_client.handover import Handover
from snapshotd_client.listening import Listening
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
        listening: hears the daemon.
        missed: snapshots that were due and not taken.
        snapshot_step: the newest one handed over; None before the first.
    """

    def __init__(self, channel: Channel, handover: Handover, news: News) -> None:
        self._channel = channel
        self._handover = handover
        self._news = news
        self.listening = Listening(channel, news)
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

    def wait_protected(self, step: int | None, timeout_s: float) -> int:
        """As `Snapshotter.wait_protected`."""
        self.collect()
        wanted = self.snapshot_step if step is None else step
        if wanted is None:
            raise WrongUse("no snapshot was taken yet", "Call step() first, or name a step")
        return self.listening.wait_committed(wanted, Deadline(timeout_s))
