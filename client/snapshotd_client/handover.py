"""Handing snapshots to the daemon: begun by a step, waited for by the next update, collected."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
from torch.utils.hooks import RemovableHandle

from snapshotd.wire.points import point
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import capture as capturing
from snapshotd_client import cuda
from snapshotd_client.accord import Accord
from snapshotd_client.buffers import Buffers, Reading
from snapshotd_client.channel import Channel
from snapshotd_client.copying import Load
from snapshotd_client.courier import Courier
from snapshotd_client.errors import SnapshotdClientError, StateChanged
from snapshotd_client.flight import Cargo, Flight
from snapshotd_client.identity import Identity
from snapshotd_client.layout import Layout
from snapshotd_client.overlap import Watch
from snapshotd_client.readying import Readying
from snapshotd_client.replicas import ReplicasOption
from snapshotd_client.staging import Staging
from snapshotd_client.trained import trained_ranges

log = logging.getLogger(__name__)

Overlap = Literal["on", "off"]

_MOST_SHOWN: Final = 5
#: So much is copied aside at most; where more must be copied at once, it goes to the daemon's
#: memory directly, and all of it before the step returns.
STAGED_BYTES: Final = 64 << 20
#: After so many torn snapshots in a row nothing is copied in the background any more.
TORN_IN_A_ROW: Final = 3


class Handover:
    """Copies state into segments, one snapshot at a time.

    Every method is the training thread's.

    Args:
        states: as given to Snapshotter.
        channel: used by a background thread while a snapshot is on its way; see `busy`.
        who: this trainer.
        max_stall_s: longest wait for the daemon in one snapshot, the copy not counted.
        overlap: "off" copies everything before `begin` returns.
        replicas: as in Snapshotter.
        accord: with the ranks that hold the same.

    Attributes:
        torn: snapshots that were discarded because the state moved under the copy.
        waited_s: how long the newest update of an optimizer waited for the copy.
    """

    def __init__(
        self,
        states: Mapping[str, object],
        channel: Channel,
        who: Identity,
        max_stall_s: float,
        overlap: Overlap,
        replicas: ReplicasOption = None,
        accord: Accord | None = None,
    ) -> None:
        self._channel = channel
        self._max_stall_s = max_stall_s
        self._accord = accord or Accord(who)
        self._planner = capturing.Planner(
            who.job, who.rank, who.world_size, states, replicas, self._accord
        )
        self._buffers = Buffers()
        self._staging = Staging()
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._planned: tuple[Layout, list[segment_pb2.StorageExtent]] | None = None
        self._flight: Flight | None = None
        self._readying: Readying | None = None
        self._spent: list[Reading] = []
        self._courier = Courier()
        self._overlap = overlap == "on"
        self._torn_in_a_row = 0
        self.torn = 0
        self.waited_s = 0.0
        self._hooks = _hook(states, self) if self._overlap else []

    @property
    def overlaps(self) -> bool:
        """Whether snapshots are copied in the background."""
        return self._overlap

    @property
    def busy(self) -> bool:
        """Whether a snapshot is on its way, and the channel in its hands."""
        return self._flight is not None and not self._flight.done.is_set()

    def unmap_later(self, image: Reading) -> None:
        """Have it closed while the next snapshots are made ready."""
        self._spent.append(image)

    def make_ready(self, segments: Sequence[tuple[str, int]], *, at_once: bool) -> None:
        """Do now what the first snapshot would do: plan it, map and touch where it may go.

        Args:
            segments: paths, and where their images start.
            at_once: all of it before this returns, not while training begins.
        """
        spent, self._spent = self._spent, []
        try:
            captured = self._planner.plan(0, {})
        except SnapshotdClientError:
            for image in spent:
                image.close()
            return  # what cannot be captured yet, a step will tell
        self._look_at(captured)
        self._readying = Readying(self._buffers, segments, captured.resting, spent)
        aside = self._overlap and _fits_aside(captured)
        if aside:
            self._staging.take(captured.moving)
            self._courier.start()
        if aside and not at_once:
            self._courier.take(self._readying)
        else:
            self._readying.fly()

    def begin(self, step: int, values: Mapping[str, object], number: int = 0) -> None:
        """Snapshot the state of a step; what became of it, `collect` says.

        Args:
            step: which one.
            values: keyword values.
            number: of this snapshot, as all ranks count them.

        Raises:
            ReplicasDiverged: ranks that should hold the same do not.
            StateChanged: a tensor has another shape or dtype than at the last snapshot.
        """
        assert self._flight is None, "the one before has been collected"
        captured = self._planner.plan(step, values)
        trained = self._look_at(captured)
        self._accord.check(step, number, captured.shared)
        point("trainer.step.planned")
        aside = self._overlap and _fits_aside(captured)
        cargo = Cargo(
            step=step,
            captured=captured,
            moving=self._staging.take(captured.moving) if aside else Load(captured.moving, ()),
            trained=trained,
            watch=Watch(captured.watched, captured.versions),
            stream=cuda.Stream(captured.devices),
        )
        self._flight = Flight(cargo, self._channel, self._buffers, self._max_stall_s)
        if aside:
            self._courier.take(self._flight)
        else:
            self._end_readying()
            self._flight.fly_at_once()

    def before_update(self) -> None:
        """An optimizer is about to write to its parameters: let the copy end first."""
        if cuda.is_capturing() and self._overlap:
            self._stop_overlapping("an optimizer's step is captured in a CUDA graph")
        flight = self._flight
        if flight is None or not self._courier.is_here:
            return
        began_s = time.perf_counter()
        flight.copied.wait()
        flight.judge()
        flight.hold_back()
        self.waited_s = time.perf_counter() - began_s

    def collect(self) -> Flight | None:
        """What became of the snapshot that was begun, once; None where there is none.

        Raises:
            BaseException: a bug of ours ended it, or the user did.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        flight.copied.wait()
        flight.judge()
        flight.done.wait()
        self._note_torn(flight)
        return flight

    def close(self) -> None:
        """Abandon what is on its way, and let go of all memory."""
        for hook in self._hooks:
            hook.remove()
        self._courier.close()
        self._buffers.close()
        for image in self._spent:
            image.close()

    def _end_readying(self) -> None:
        """Have the buffers to ourselves."""
        if self._readying is not None and self._courier.is_here:
            self._readying.abandon()
            self._readying.done.wait()

    def _note_torn(self, flight: Flight) -> None:
        self.torn += flight.torn
        self._torn_in_a_row = self._torn_in_a_row + 1 if flight.torn else 0
        if self._torn_in_a_row == TORN_IN_A_ROW:
            self._stop_overlapping(
                f"{TORN_IN_A_ROW} snapshots in a row were torn: something else than their "
                "optimizers writes to the parameters"
            )

    def _stop_overlapping(self, why: str) -> None:
        self._overlap = False
        log.warning("from now on step() copies everything before it returns: %s", why)

    def _look_at(self, captured: capturing.Capture) -> list[segment_pb2.StorageExtent]:
        """Check a plan that is new; its trained ranges."""
        if self._planned is None or self._planned[0] is not captured.layout:
            self._check_shapes(captured)
            ranges = trained_ranges(captured.manifest, captured.image_bytes)
            self._planned = captured.layout, ranges
        return self._planned[1]

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


def _fits_aside(captured: capturing.Capture) -> bool:
    return sum(piece.extent.nbytes for piece in captured.moving) <= STAGED_BYTES


def _hook(states: Mapping[str, object], handover: Handover) -> list[RemovableHandle]:
    """Have every optimizer of `states` wait before it writes."""
    mine = weakref.ref(handover)  # an optimizer outlives a Snapshotter that was dropped

    # A compiled step would take it in as it was when traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
    def wait(*_: object) -> None:
        held = mine()
        if held is not None:
            held.before_update()

    return [
        state.register_step_pre_hook(wait)
        for state in states.values()
        if isinstance(state, torch.optim.Optimizer) and hasattr(state, "_optimizer_step_pre_hooks")
    ]
