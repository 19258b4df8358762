"""What the daemon tells unasked: taken in, and waited for until a step is committed."""

from __future__ import annotations

from snapshotd_client.channel import Channel
from snapshotd_client.errors import ProtectionTimeout, Refused
from snapshotd_client.news import News
from snapshotd_client.waiting import Deadline
from snapshotd_client.wires import DaemonGone


class Listening:
    """Hears the daemon of one trainer, and finds it again where it is away.

    Args:
        channel: to the daemon.
        news: takes what it tells.

    Attributes:
        alone: no daemon was there when the run began: none is looked for.
    """

    def __init__(self, channel: Channel, news: News) -> None:
        self._channel = channel
        self._news = news
        self.alone = False

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

    def wait_committed(self, step: int, deadline: Deadline) -> int:
        """Wait until a step that was handed over is committed.

        Returns:
            The committed step, `step` or newer.

        Raises:
            ProtectionTimeout: not in time, and says whom it waits for; or never, because some
                rank skipped the step.
        """
        while True:
            self.listen(deadline.slice_s(0.25))
            if self._news.is_committed(step):
                return int(self._news.progress.committed.step)
            if self._channel.up and self._news.given_up(step):
                raise ProtectionTimeout(
                    f"step {step} will not be protected: some rank has no snapshot of it",
                    "Train on: the next snapshot that every rank takes will be",
                )
            if deadline.over:
                raise ProtectionTimeout(
                    f"step {step} was not protected within {deadline.timeout_s:.1f} s: "
                    f"{self._why()}",
                    "See `snapshotd status` on this node",
                )

    def _why(self) -> str:
        if not self._channel.up:
            return f"no daemon answers ({self._channel.why_down})"
        return self._news.why()
