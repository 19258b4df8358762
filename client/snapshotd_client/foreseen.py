"""Done while the daemons decide: the live state surveyed, and the image mapped that they may name.

Nothing of it is taken for true: the image counts when the answer names it, and only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.buffers import Reading
from snapshotd_client.capture import Survey, survey
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.wires import DaemonGone


class Foreseen:
    """What one question's time was used for.

    Attributes:
        live: the state before any of it is changed; None where it was not looked at.
    """

    def __init__(self) -> None:
        self.live: Survey | None = None
        self._reading: Reading | None = None

    def look(self, newest: pb.Image, states: Mapping[str, object]) -> None:
        """Use the time.

        Args:
            newest: what the daemon holds; without a path, nothing.
            states: as given to Snapshotter.
        """
        if newest.path:
            with suppress(DaemonGone, SnapshotdClientError):  # it may have been let go of since
                self._reading = Reading(newest.path, newest.image_offset, newest.image_bytes)
                self._reading.see()
        with suppress(SnapshotdClientError):  # which is met again where it matters
            self.live = survey(states)

    def take(self, path: str, offset: int, length: int) -> Reading:
        """The bytes that the answer names. Raises as `Reading`."""
        if self._reading is not None and self._reading.shows(path, offset, length):
            reading, self._reading = self._reading, None
            return reading
        return Reading(path, offset, length)

    def let_go(self, close: Callable[[Reading], None]) -> None:
        """What was not taken is not wanted."""
        reading, self._reading = self._reading, None
        if reading is not None:
            close(reading)
