"""Done while the daemons decide: the live state surveyed, and had what they most likely name.

Nothing of it is taken for true: the image counts when the answer names it, and only then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Thread, get_native_id
from typing import Final

from google.protobuf.message import DecodeError

from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.buffers import Reading
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.owners import OPTIMIZER
from snapshotd_client.room import Room
from snapshotd_client.surveying import Survey, survey
from snapshotd_client.wires import DaemonGone

#: Of the threads that do it: the least there is.
_NICENESS: Final = 19


class Foreseen:
    """What the time of one question was used for.

    Attributes:
        live: the state before any of it is changed; None where it was not surveyed.
        room: for optimizer state that is not there yet.
    """

    def __init__(self) -> None:
        self.live: Survey | None = None
        self.room = Room()
        self._reading: Reading | None = None
        self._threads: list[Thread] = []
        self._over = False

    def look(self, newest: pb.Image, states: Mapping[str, object]) -> None:
        """Use the time, until `end`; what takes long goes on in threads.

        Args:
            newest: what the daemon holds; without a path, nothing.
            states: as given to Snapshotter.
        """
        if newest.path:
            with suppress(DaemonGone, SnapshotdClientError):  # it may have been let go of since
                self._reading = Reading(newest.path, newest.image_offset, newest.image_bytes)
                self._begin(self._reading.see)
        with suppress(SnapshotdClientError):  # which is met again where it matters
            self.live = survey(states)
        if self._reading is not None and self.live is not None:
            opening = bytes(self._reading.image[: newest.manifest_bytes])
            sizes = _sizes_of_new(opening, self.live)
            if sum(sizes) <= newest.image_bytes:
                self.room = Room(sizes)
                self._begin(self.room.touch)

    def end(self, path: str, offset: int, length: int) -> None:
        """The answer is there, and names these bytes: do no more."""
        self._stop()
        if self._reading is None or not self._reading.shows(path, offset, length):
            self.room = Room()  # the memory may be wanted otherwise

    def take(self, path: str, offset: int, length: int) -> Reading:
        """The bytes that the answer names. Raises as `Reading`."""
        if self._reading is not None and self._reading.shows(path, offset, length):
            reading, self._reading = self._reading, None
            return reading
        return Reading(path, offset, length)

    def let_go(self, close: Callable[[Reading], None]) -> None:
        """What was not taken is not wanted."""
        self._stop()
        reading, self._reading = self._reading, None
        if reading is not None:
            close(reading)

    def _stop(self) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()

    def _begin(self, work: Callable[[Callable[[], bool]], None]) -> None:
        def run() -> None:
            # The daemons, which stand back for training, have the answer to find.
            os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICENESS)
            work(lambda: self._over)

        thread = Thread(target=run, name="snapshotd-ahead", daemon=True)
        self._threads.append(thread)
        thread.start()


def _sizes_of_new(opening: bytes, live: Survey) -> list[int]:
    """Bytes of the memory that only optimizers' tensors need which are not live.

    Args:
        opening: what should be a manifest; nobody has verified it.
        live: what there is.
    """
    try:
        manifest = segment_pb2.Manifest.FromString(opening)
    except DecodeError:
        return []
    there = {(leaf.owner, leaf.name) for leaf in live.leaves.leaves}
    new: set[int] = set()
    other: set[int] = set()
    for entry in manifest.tensors:
        is_new = manifest.names.get(entry.owner) == OPTIMIZER and entry.device_type == "cpu"
        is_new = is_new and (entry.owner, entry.name) not in there
        (new if is_new else other).add(entry.extent)
    extents = [e for i, e in enumerate(manifest.extents) if i in new - other]
    return [extent.part.whole or extent.bytes for extent in extents]
