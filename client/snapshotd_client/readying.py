"""Makes segments ready to be written to: mapped, touched, page-locked before the first snapshot.

What a restore has read is unmapped on the way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from snapshotd_client.buffers import Buffers, Reading
from snapshotd_client.copying import Load

log = logging.getLogger(__name__)


class Readying:
    """Done once; takes some seconds for each 10 GiB, so after a restore another thread does it.

    Args:
        buffers: nobody else may use them until `done` is set.
        segments: paths, and where their images start.
        load: what will be copied there.
        spent: images that were restored from, to be unmapped.
    """

    def __init__(
        self,
        buffers: Buffers,
        segments: Sequence[tuple[str, int]],
        load: Load,
        spent: Sequence[Reading] = (),
    ) -> None:
        self.done = threading.Event()
        self._buffers = buffers
        self._segments = segments
        self._load = load
        self._spent = spent
        self._abandoned = False

    def fly(self) -> None:
        """All of it; where it cannot be, the first copy is slower."""
        try:
            for image in self._spent:
                image.close()
            for path, offset in self._segments:
                self._buffers.make_ready(path, offset, self._load, lambda: self._abandoned)
        except (OSError, ValueError) as error:
            log.info("a segment is not made ready: %s", error)
        finally:
            self.done.set()

    def abandon(self) -> None:
        """Leave the rest as it is."""
        self._abandoned = True
