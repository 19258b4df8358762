"""Handing one snapshot to the daemon: claim a buffer, copy, say that it is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from snapshotd.wire.points import point
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client import capture as capturing
from snapshotd_client.buffers import Buffers
from snapshotd_client.channel import Channel
from snapshotd_client.errors import StateChanged
from snapshotd_client.identity import Identity
from snapshotd_client.trained import trained_ranges
from snapshotd_client.wires import DaemonGone

#: Of the time a step may wait, the daemon gets this part to find a buffer; the rest is for its
#: answers to arrive.
_PATIENCE: Final = 0.7
_LEAST_S: Final = 0.05
_MOST_SHOWN: Final = 5


class Handover:
    """Copies state into segments, one snapshot at a time."""

    def __init__(self, channel: Channel, who: Identity, max_stall_s: float) -> None:
        self._channel = channel
        self._who = who
        self._max_stall_s = max_stall_s
        self._buffers = Buffers()
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def take(self, step: int, states: Mapping[str, object], values: Mapping[str, object]) -> str:
        """Snapshot the state of a step.

        Returns:
            Why the daemon has no buffer for it; empty when it was handed over.

        Raises:
            DaemonGone, Refused: as the channel says.
            StateChanged: a tensor has another shape or dtype than at the last snapshot.
        """
        who = self._who
        captured = capturing.plan(who.job, who.rank, who.world_size, step, states, values)
        self._check_shapes(captured)
        point("trainer.step.planned")
        claim = pb.Claim(
            step=step,
            image_bytes=captured.image_bytes,
            patience_s=self._max_stall_s * _PATIENCE,
        )
        asked_s = time.monotonic()
        number = self._channel.post(pb.ToDaemon(claim=claim))
        point("trainer.claim.sent")
        reply = self._channel.answer(number, self._max_stall_s)
        left_s = self._max_stall_s - (time.monotonic() - asked_s)
        if reply.WhichOneof("body") != "granted":
            point("trainer.claim.skipped")
            return reply.skip.reason
        point("trainer.claim.granted")
        self._write(captured, reply.granted)
        written = pb.Written(
            step=step,
            buffer=reply.granted.buffer,
            image_bytes=captured.image_bytes,
            manifest_bytes=captured.manifest_bytes,
            trained=trained_ranges(captured.manifest, captured.image_bytes),
        )
        number = self._channel.post(pb.ToDaemon(written=written))
        point("trainer.written.sent")
        self._channel.answer(number, max(_LEAST_S, left_s))
        point("trainer.written.answered")
        return ""

    def close(self) -> None:
        self._buffers.close()

    def _write(self, captured: capturing.Capture, granted: pb.Granted) -> None:
        try:
            with self._buffers.writing(
                granted.path, granted.image_offset, captured.image_bytes
            ) as image:
                point("trainer.buffer.mapped")
                captured.write(image)
                point("trainer.image.copied")
        except OSError as error:
            raise DaemonGone(f"its segment cannot be mapped: {error}") from error

    def _check_shapes(self, captured: capturing.Capture) -> None:
        """A tensor may come or go; one that stays keeps its shape and dtype."""
        shapes = {t.name: (t.dtype, tuple(t.shape)) for t in captured.manifest.tensors}
        changed = [
            f"{name}: {self._shapes[name][0]}{list(self._shapes[name][1])} became "
            f"{now[0]}{list(now[1])}"
            for name, now in shapes.items()
            if name in self._shapes and self._shapes[name] != now
        ]
        if changed:
            rest = len(changed) - _MOST_SHOWN
            more = f" and {rest} more" if rest > 0 else ""
            raise StateChanged(
                "the state changed its form since the last snapshot: "
                + "; ".join(changed[:_MOST_SHOWN])
                + more,
                "Keep tensors of changing shape out of the snapshot, or pass them as values to "
                "step()",
            )
        self._shapes = shapes
