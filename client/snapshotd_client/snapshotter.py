"""The public face: `Snapshotter`, called by hooks in the training step.

It decides nothing about the job. It captures state at step boundaries, hands it to the daemon of
this node, and brings back what the daemons decided to restore. Every wait is bounded, and a
daemon that is away costs training nothing but its protection.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.accord import Accord
from snapshotd_client.asking import CONNECT_TIMEOUT_S, attach_of, prepared
from snapshotd_client.channel import Channel
from snapshotd_client.errors import (
    NoDaemon,
    Refused,
    WrongUse,
)
from snapshotd_client.handover import Handover, Overlap
from snapshotd_client.identity import identify
from snapshotd_client.keeping import Keeping
from snapshotd_client.launch import this_launch
from snapshotd_client.lock import TrainerLock
from snapshotd_client.news import News
from snapshotd_client.owners import check_states
from snapshotd_client.predicting import predict_image_bytes
from snapshotd_client.replicas import Replicas, ReplicasOption
from snapshotd_client.results import Restored, Status
from snapshotd_client.returning import Returning
from snapshotd_client.wires import DaemonGone

log = logging.getLogger(__name__)

RESTORE_TIMEOUT_S = 300.0
#: Of a run that is on its own: no rank of a job can join it half way.
_ALONE = "this run began without a daemon; it is protected from its next start on"


class Snapshotter:
    """Keeps a training process's newest state safe in the memory of its group of nodes.

    Args:
        states: name -> nn.Module, Optimizer, tensor, or anything with state_dict and
            load_state_dict. Names are part of the snapshot.
        interval_steps: snapshot every that many steps.
        job: name under which a restarted run finds its snapshots; else SNAPSHOTD_JOB, else
            torchrun's run id.
        rank, world_size, local_rank: else SNAPSHOTD_*, else torchrun's variables.
        run_dir: the daemon's; else SNAPSHOTD_RUN_DIR, else /run/snapshotd.
        required: whether it is an error when no daemon is there, or a warning. Without one when
            `restore` is called, the whole run goes unprotected.
        max_stall_s: longest time one snapshot waits for the daemon, the copy itself not counted.
        overlap: "on" has `step` return at once, copy in the background, and the next step of a
            captured optimizer wait for the rest. "off" copies everything before `step` returns:
            for training that writes to parameters between two optimizer steps in ways torch does
            not count (`.data`, foreign kernels, replayed CUDA graphs).
        replicas: the ranks that hold the same plain tensors as this one, as a process group or
            a list; or these by the name of a state. Each then stores a share of them. DTensors
            and modules wrapped in DistributedDataParallel, with torch's optimizers, need none.
        check_replicas_every: replicas are compared at the first snapshot; and, where this is
            given, at every that many snapshots, all ranks together.

    Raises:
        UnsupportedState: a value of `states` cannot be captured.
        WrongUse: job, rank or world are not known.
        NoDaemon: no daemon answers, and it is required.
        Refused: the daemon does not take this trainer; says why (no room, duplicate rank, ...).
    """

    def __init__(
        self,
        states: Mapping[str, object],
        *,
        interval_steps: int = 1,
        job: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        local_rank: int | None = None,
        run_dir: str | Path | None = None,
        required: bool = True,
        max_stall_s: float = 1.0,
        overlap: Overlap = "on",
        replicas: ReplicasOption = None,
        check_replicas_every: int = 0,
    ) -> None:
        if overlap not in ("on", "off"):
            raise WrongUse(f"overlap is {overlap!r}", 'It is "on" or "off"')
        if interval_steps < 1 or max_stall_s <= 0:
            raise WrongUse(
                f"interval_steps is {interval_steps}, max_stall_s is {max_stall_s}",
                "Both are at least 1 and above 0",
            )
        if check_replicas_every < 0:
            raise WrongUse(
                f"check_replicas_every is {check_replicas_every}", "It is 0 or more snapshots"
            )
        check_states(states)
        self._states = dict(states)
        self._replicas = replicas
        self._interval_steps = interval_steps
        self._max_stall_s = max_stall_s
        self._who = identify(
            os.environ,
            job=job,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            run_dir=run_dir,
        )
        Replicas(self._states, replicas, self._who.rank, self._who.world_size)  # says what is wrong
        self._launch = this_launch()
        self._decision: node_pb2.DecisionId | None = None
        self._alone = False  # restore() found no daemon, and none is required
        self._news = News()
        self._next_step = 0
        self._blocked_s = 0.0
        self._closed = False
        self._required = required
        incarnation = uuid.uuid4().hex
        self._lock = TrainerLock(self._who.run_dir, self._who.local_rank, incarnation)
        self._channel = Channel(
            self._who.run_dir,
            self._who.local_rank,
            incarnation,
            self._attach,
            self._news.take,
        )
        self._handover = Handover(
            self._states,
            self._channel,
            self._who,
            max_stall_s,
            overlap,
            replicas,
            Accord(self._who, check_replicas_every),
        )
        self._keeping = Keeping(self._channel, self._handover, self._news)
        self._returning = Returning(
            self._channel,
            self._lock,
            self._who,
            self._states,
            required=required,
            report=self._news.report,
            spent=self._handover.unmap_later,
        )
        try:
            self._connect()
        except BaseException:
            self._let_go()
            raise

    # -- the public face

    def restore(
        self,
        on_lost: Literal["raise", "fresh"] = "raise",
        timeout_s: float = RESTORE_TIMEOUT_S,
        *,
        strict: bool = True,
    ) -> Restored | None:
        """Bring back the job's newest restorable step, the same on all ranks; call it once, first.

        Args:
            on_lost: "fresh" starts anew where a job that had snapshots cannot be restored; all
                ranks must say so. The old snapshots are then given up.
            timeout_s: longest wait for all ranks and for the daemons' decision.
            strict: False leaves as it is what the snapshot does not have, or has in another
                shape, and passes over what only it has: `Restored.skipped` lists both.

        Returns:
            None on the very first start of a job; and, where no daemon is required, when none
            is there: then with a warning, for the job may well have snapshots.

        Raises:
            SnapshotLost: the job had a restore point and it cannot be restored; says, shard by
                shard, what was found and what is lacking.
            WorldChanged: another number of ranks made the restore point, and some rank cannot
                take that up.
            CannotProtect: the job's nodes are too few for the parity; `on_lost` does not help.
            StateMismatch: the snapshot is of another model, or this layout cannot hold it;
                nothing live was changed.
            NoDaemon: no daemon answers in time, and it is required.
            ProtectionTimeout: no decision in time; says what it waits for.
        """
        if on_lost not in ("raise", "fresh"):
            raise WrongUse(f"on_lost is {on_lost!r}", 'It is "raise" or "fresh"')
        self._check_open()
        found = self._returning.come_back(
            allow_fresh=on_lost == "fresh", strict=strict, timeout_s=timeout_s
        )
        if found is None:
            self._alone = self._keeping.listening.alone = True
            warnings.warn(
                "restore() has no daemon to ask: nothing is restored, also where the job has "
                f"snapshots; {_ALONE}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._decision, restored = found
        self._news.forget_committed()
        self._next_step = restored.step + 1 if restored else 0
        # Who comes back is in a hurry.
        self._handover.make_ready(prepared(self._channel), at_once=restored is None)
        point("trainer.restore.finished")
        return restored

    def step(self, step: int, **values: object) -> None:
        """Snapshot the state after `optimizer.step()` of `step`, if one is due.

        Never raises for what happens to a daemon, and never waits longer than `max_stall_s` for
        one: then this snapshot is skipped, counted in `status()`, and logged.

        Args:
            step: must grow from call to call; the first may be any.
            values: come back as `Restored.values`; anything that pickles.

        Raises:
            WrongUse: before `restore`, or a step that does not grow.
            StateChanged: a tensor has another shape or dtype than at the last snapshot.
            ReplicasDiverged: ranks that should hold the same bytes do not.
        """
        self._check_open()
        if self._decision is None and not self._alone and (self._required or self._channel.up):
            raise WrongUse("step() before restore()", "Call restore() once, before the first step")
        if step < 0:
            raise WrongUse(f"step {step} is negative", "Count steps from 0")
        if step < self._next_step:
            raise WrongUse(
                f"step {step} comes after step {self._next_step - 1}",
                "Give step() each step once, in growing order; after a restore go on with "
                "restored.step + 1",
            )
        self._next_step = step + 1
        self._keeping.collect(wait=False)
        if not self._news.due(step, self._interval_steps):
            return
        if self._alone:
            self._keeping.miss(step, f"protected: {_ALONE}")
            return
        began_s = time.perf_counter()
        self._keeping.snapshot(step, step // self._interval_steps, values)
        self._blocked_s = time.perf_counter() - began_s

    def wait_protected(self, step: int | None = None, timeout_s: float = 60.0) -> int:
        """Wait until a snapshot is committed: protected by every group of the job.

        Args:
            step: the newest one handed over where none is given.
            timeout_s: longest wait.

        Returns:
            The committed step, `step` or newer.

        Raises:
            ProtectionTimeout: not in time, and says whom it waits for; or never, because some
                rank skipped the step.
        """
        self._check_open()
        return self._keeping.wait_protected(step, timeout_s)

    def status(self) -> Status:
        """How far this rank's state is protected, without waiting.

        What is on its way to the daemon at this moment is told of once it is there.
        """
        self._check_open()
        if not self._handover.busy:
            self._keeping.collect()
            self._keeping.listening.listen(0.0)
        progress = self._news.progress
        return Status(
            connected=self._channel.up,
            why_not_connected=self._channel.why_down,
            snapshot_step=self._keeping.snapshot_step,
            committed_step=progress.committed.step if progress.HasField("committed") else None,
            is_protected=progress.is_protected and self._channel.up,
            why_not=progress.why_not or self._news.reported,
            waits_for=tuple(progress.waits_for),
            skipped=self._keeping.missed,
            repeated=progress.repeated_now,
            torn=self._handover.torn,
            blocked_s=self._blocked_s,
            waited_s=self._handover.waited_s,
        )

    def close(self) -> None:
        """Leave the daemon; what it holds stays. A second call does nothing."""
        if self._closed:
            return
        try:
            self._keeping.collect()
            if self._channel.up:
                number = self._channel.post(pb.ToDaemon(detach=pb.Detach()))
                point("trainer.detach.sent")
                self._channel.answer(number, self._max_stall_s)
                point("trainer.detach.answered")
        except (DaemonGone, Refused) as error:
            log.info("the daemon did not hear of the end of this trainer: %s", error)
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- connecting

    def _connect(self) -> None:
        try:
            self._lock.acquire()
            self._channel.connect(CONNECT_TIMEOUT_S)
        except NoDaemon as error:
            if self._required:
                raise
            warnings.warn(
                f"training is not protected unless a daemon is there when restore() is called: "
                f"{error}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _attach(self) -> pb.Attach:
        who = self._who
        attach = attach_of(who, self._launch, self._decision, self._next_step)
        attach.predicted_image_bytes = predict_image_bytes(
            self._states, self._replicas, who.rank, who.world_size
        )
        return attach

    def _let_go(self) -> None:
        self._closed = True
        # The lock first: the daemon looks at it when the connection ends.
        self._lock.release()
        point("trainer.lock.released")
        self._handover.close()  # which uses the channel until then
        self._channel.close()

    def _check_open(self) -> None:
        if self._closed:
            raise WrongUse("this Snapshotter is closed", "Make a new one")
