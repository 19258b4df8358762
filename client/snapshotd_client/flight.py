"""One snapshot on its way: claimed, copied, judged, and published or given up.

Everything but the judgement may run on a thread of its own, which then has the channel to itself
until `done`. It is published only after the thread that trains has said that nothing moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from queue import SimpleQueue
from typing import Final

from snapshotd.wire.points import point
from snapshotd.wire.protocol import grain_bytes
from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.buffers import Buffers
from snapshotd_client.capture import Capture
from snapshotd_client.channel import Channel
from snapshotd_client.copying import ROUND_BYTES, Load
from snapshotd_client.cuda import Stream
from snapshotd_client.errors import Refused
from snapshotd_client.overlap import Watch
from snapshotd_client.safepoint import soon
from snapshotd_client.wires import DaemonGone

#: Of the time a step may wait, the daemon gets this part to find a buffer; the rest is for its
#: answers to arrive.
_PATIENCE: Final = 0.7
_LEAST_S: Final = 0.05
#: So much more of the image is worth a word to the daemon, which seals and codes what stands.
_TELL_BYTES: Final = ROUND_BYTES


class Abandoned(Exception):  # an event within this package, not an error of the user's
    """Nobody wants the snapshot any more."""


class Verdict(Enum):
    """What the training thread says of the bytes that were copied."""

    WHOLE = auto()
    TORN = auto()
    UNWANTED = auto()


@dataclass(frozen=True, eq=False)
class Cargo:
    """What a snapshot is made of.

    Attributes:
        captured: its plan.
        moving: the part that was copied aside, or is copied at once.
        trained: as in Written.
        watch: on the part that is copied in the background.
        stream: what the devices had been asked when the step ended.
    """

    step: int
    captured: Capture
    moving: Load
    trained: Sequence[segment_pb2.StorageExtent]
    watch: Watch
    stream: Stream


class Flight:
    """Takes one snapshot to the daemon.

    Args:
        cargo: what to copy.
        channel: nobody else may use it until `done` is set.
        buffers: likewise.
        max_stall_s: longest wait for the daemon, the copy not counted.

    Attributes:
        copied: set when nothing of the live state is read any more, whatever came of it.
        done: set at the very end.
        skipped: why there is no snapshot of this step; empty where there is one.
        torn: the state moved under the copy.
        error: what ended it, of the daemon's doings or ours.
    """

    def __init__(
        self, cargo: Cargo, channel: Channel, buffers: Buffers, max_stall_s: float
    ) -> None:
        self.step = cargo.step
        self.copied = threading.Event()
        self.done = threading.Event()
        self.skipped = ""
        self.torn = False
        self.error: BaseException | None = None
        self._cargo = cargo
        self._channel = channel
        self._buffers = buffers
        self._max_stall_s = max_stall_s
        self._trainer = threading.get_ident()
        self._verdicts: SimpleQueue[Verdict] = SimpleQueue()
        self._judged = False
        self._abandoned = False
        self._told = 0  # of the image, to the daemon

    def judge(self) -> None:
        """Say whether the copied state has moved: by the thread that trains, once it is copied."""
        if not self._judged:
            self._judged = True
            moved = self._cargo.watch.moved()
            self._verdicts.put(Verdict.TORN if moved else Verdict.WHOLE)

    def hold_back(self) -> None:
        """Order what the devices do from now on behind the copy."""
        self._cargo.stream.hold_back()

    def abandon(self) -> None:
        """End it soon, unpublished."""
        self._abandoned = True
        self._verdicts.put(Verdict.UNWANTED)

    def fly_at_once(self) -> None:
        """The whole way, by the thread that trains: nothing can move meanwhile."""
        self._judged = True
        self._verdicts.put(Verdict.WHOLE)
        self.fly()

    def fly(self) -> None:
        """The whole way; errors are kept for who collects it."""
        try:
            self._fly()
        except (DaemonGone, Refused) as error:
            self.error = error
        except Abandoned:
            self.skipped = "it was abandoned"
        except BaseException as error:  # noqa: BLE001  # raised again by who collects it
            self.error = error
        finally:
            self.copied.set()
            self.done.set()

    def _fly(self) -> None:
        cargo = self._cargo
        asked_s = time.monotonic()
        granted = self._claim()
        left_s = self._max_stall_s - (time.monotonic() - asked_s)
        if granted is None:
            point("trainer.claim.skipped")
            return
        point("trainer.claim.granted")
        try:
            self._copy(granted)
        finally:
            cargo.stream.join()  # before that nobody else may have the buffer
        point("trainer.image.copied")
        if not self._judged:
            soon(self.judge, self._trainer)
        match self._verdicts.get():
            case Verdict.WHOLE:
                self._say_written(granted, max(_LEAST_S, left_s))
            case Verdict.TORN:
                self.torn = True
                self.skipped = "the state was written to while it was copied"
                self._pass()
            case Verdict.UNWANTED:
                raise Abandoned

    def _claim(self) -> pb.Granted | None:
        claim = pb.Claim(
            step=self.step,
            image_bytes=self._cargo.captured.image_bytes,
            patience_s=self._max_stall_s * _PATIENCE,
        )
        number = self._channel.post(pb.ToDaemon(claim=claim))
        point("trainer.claim.sent")
        reply = self._channel.answer(number, self._max_stall_s)
        if reply.WhichOneof("body") == "granted":
            return reply.granted
        self.skipped = reply.skip.reason
        return None

    def _copy(self, granted: pb.Granted) -> None:
        captured, stream = self._cargo.captured, self._cargo.stream
        blocks = _blocks(granted, captured.image_bytes)

        def go_on(stands: int) -> None:
            self._go_on(granted, stands, stands * blocks)

        try:
            target = self._buffers.target(granted.path, granted.image_offset, captured.image_bytes)
        except OSError as error:
            raise DaemonGone(f"its segment cannot be mapped: {error}") from error
        point("trainer.buffer.mapped")
        # Devices first: they copy while the processor does.
        stream.start(target, self._cargo.moving, captured.resting, granted.block_bytes)
        for text in captured.texts:
            target.put_text(*text)
        target.put(self._cargo.moving, self._check)
        # Of what devices copy, too, it stands only when they have.
        check = self._check if stream.devices else go_on
        target.put(captured.resting, check, granted.block_bytes)
        self.copied.set()
        for stands in stream.standing():
            go_on(stands)

    def _check(self, _stands: int) -> None:
        if self._abandoned:
            raise Abandoned

    def _go_on(self, granted: pb.Granted, stands: int, in_all: int) -> None:
        """Between two pieces of the last load: say what the daemon may read already.

        Args:
            granted: the buffer.
            stands: bytes of the start of each block.
            in_all: the same of all blocks.
        """
        self._check(stands)
        if in_all - self._told >= _TELL_BYTES:
            self._told = in_all
            copied = pb.Copied(step=self.step, buffer=granted.buffer, block_bytes=stands)
            self._channel.post(pb.ToDaemon(copied=copied))
            point("trainer.copied.sent")

    def _say_written(self, granted: pb.Granted, timeout_s: float) -> None:
        captured = self._cargo.captured
        written = pb.Written(
            step=self.step,
            buffer=granted.buffer,
            image_bytes=captured.image_bytes,
            manifest_bytes=captured.manifest_bytes,
            trained=self._cargo.trained,
        )
        number = self._channel.post(pb.ToDaemon(written=written))
        point("trainer.written.sent")
        self._channel.answer(number, timeout_s)
        point("trainer.written.answered")

    def _pass(self) -> None:
        message = pb.ToDaemon()
        getattr(message, "pass").CopyFrom(pb.Pass(step=self.step, reason=self.skipped))
        self._channel.ask(message, self._max_stall_s)


def _blocks(granted: pb.Granted, image_bytes: int) -> int:
    """How many blocks the image has; raises DaemonGone where that cannot be."""
    if not 0 < granted.block_bytes < image_bytes:
        return 1
    if granted.block_bytes < (grain := grain_bytes(image_bytes)):
        raise DaemonGone(f"it granted blocks of {granted.block_bytes} bytes; a grain has {grain}")
    return -(-image_bytes // granted.block_bytes)
