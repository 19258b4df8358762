"""What the daemon has told, and what was logged of it: troubles when they begin, change and end."""

from __future__ import annotations

import logging

from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb

log = logging.getLogger(__name__)


class News:
    """The newest Progress, and the trouble that was reported last.

    Attributes:
        progress: replaced whole, so that any thread may read it.
        reported: the present trouble; empty while there is none.
    """

    def __init__(self) -> None:
        self.progress = pb.Progress()
        self.reported = ""
        self._regained: int | None = None  # first step handed over after a trouble

    def take(self, progress: pb.Progress) -> None:
        """The daemon tells how far things are."""
        # A daemon that starts anew knows less than was told here already, and that stands: only
        # another restore, of another process, goes back behind a restore point.
        known = self.progress.committed
        if _order(progress.committed) < _order(known):
            progress.committed.CopyFrom(known)
        before, self.progress = self.progress, progress
        if progress.repeated_now and not before.repeated_now:
            log.warning(
                "the newest snapshots hold the very same tensors: either training stands still, "
                "or the objects given to Snapshotter are not those that are trained"
            )
        elif before.repeated_now and not progress.repeated_now:
            log.info("the daemon sees the tensors change again from snapshot to snapshot")
        regained = self._regained
        if regained is not None and progress.is_protected and progress.committed.step >= regained:
            log.info("protected again: step %d is committed", progress.committed.step)
            self._regained = None

    def forget_committed(self) -> None:
        """A restore has decided: what was committed before is of the life before."""
        self.progress.ClearField("committed")

    def due(self, step: int, interval_steps: int) -> bool:
        """Whether a step is to be snapshotted: the daemons may have all ranks skip more."""
        cadence = self.progress.cadence
        if cadence.interval > 1 and step >= cadence.from_step:
            interval_steps *= cadence.interval
        return step % interval_steps == 0

    def is_committed(self, step: int) -> bool:
        """Whether that step, or a newer one, is the restore point, and protected."""
        progress = self.progress
        reached = progress.HasField("committed") and progress.committed.step >= step
        return reached and progress.is_protected

    def given_up(self, step: int) -> bool:
        """Whether the daemon has let go of a snapshot that was handed over."""
        progress = self.progress
        held = any(version.step == step for version in progress.sealed)
        return step < progress.passed_step and not held

    def why(self) -> str:
        """What the newest snapshot waits for, for people."""
        return "; ".join([*self.progress.waits_for, self.progress.why_not]) or "no reason known"

    def report(self, what: str) -> None:
        """Log a trouble when it begins or changes, not at every step."""
        kind = what.partition(": ")[2]
        if kind != self.reported:
            self.reported, self._regained = kind, None
            log.warning("%s", what)

    def handed_over(self, step: int) -> None:
        """A snapshot went well: the trouble, if any, is over once it is committed."""
        if self.reported:
            self.reported, self._regained = "", step


def _order(version: segment_pb2.Version) -> tuple[int, int]:
    return version.epoch, version.step
