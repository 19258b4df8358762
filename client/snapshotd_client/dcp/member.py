"""This process as one rank of a job: asks what there is, hands steps over, waits for them.

Writers and readers of a process share one, as the daemon knows one trainer a slot.
"""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import torch.distributed as dist

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client import cuda
from snapshotd_client.asking import CONNECT_TIMEOUT_S, RestoreQuestion, attach_of, refusal_of
from snapshotd_client.buffers import Buffers
from snapshotd_client.capture import Capture
from snapshotd_client.channel import Channel
from snapshotd_client.copying import Load
from snapshotd_client.errors import (
    NoDaemon,
    NoSuchStep,
    ProtectionTimeout,
    Refused,
    WrongUse,
)
from snapshotd_client.flight import Cargo, Flight
from snapshotd_client.identity import Identity, identify
from snapshotd_client.launch import this_launch
from snapshotd_client.listening import Listening
from snapshotd_client.lock import TrainerLock
from snapshotd_client.news import News
from snapshotd_client.overlap import Watch
from snapshotd_client.waiting import Deadline
from snapshotd_client.wires import DaemonGone

#: For all ranks of a job to come, and for a step to be protected.
TIMEOUT_S: Final = 300.0
#: For the daemon to hear that this process leaves.
_LEAVE_S: Final = 1.0

_RANK_VARIABLES: Final = ("SNAPSHOTD_RANK", "RANK", "SNAPSHOTD_WORLD_SIZE", "WORLD_SIZE")


class Place(NamedTuple):
    """Who a writer or reader was told it works for; None is found out where it is needed."""

    job: str | None = None
    rank: int | None = None
    world_size: int | None = None
    local_rank: int | None = None
    run_dir: str | Path | None = None

    def identity(self) -> Identity:
        """Who that is now. Raises WrongUse: it is not known."""
        place = self
        told = self.rank is not None or self.world_size is not None
        told = told or any(map(os.environ.get, _RANK_VARIABLES))
        if not told and dist.is_available() and dist.is_initialized():
            place = self._replace(rank=dist.get_rank(), world_size=dist.get_world_size())
        return identify(os.environ, **place._asdict())


class _Entry(NamedTuple):
    """A way in to the daemon that was answered once."""

    lock: TrainerLock
    channel: Channel
    listening: Listening


class Member:
    """One rank of a job. Whoever calls anything holds `guard`.

    Args:
        who: which rank.

    Attributes:
        guard: for one thread at a time.
        acquainted: this run has loaded what the job had, or knows that it had nothing.
    """

    def __init__(self, who: Identity) -> None:
        self.who = who
        self.guard = threading.RLock()
        self.acquainted = False
        self._news = News()
        self._buffers = Buffers()
        self._entry: _Entry | None = None
        self._reply: pb.Restored | None = None
        self._begun = -1  # newest step that any rank may have begun to save
        self._passed = 0  # every step below it this rank has saved, or will not
        self._saves = False  # since the daemons were asked

    # -- what there is

    def look(self, deadline: Deadline) -> pb.Restored:
        """What the job's daemons have for all ranks; all of them ask.

        Raises:
            Refused: as Snapshotter.restore; NoDaemon, WrongUse, ProtectionTimeout.
        """
        if self._saves:
            self.leave()  # a trainer is answered once; what it saved since, another one finds
        return self._enter(deadline)

    def step(self, deadline: Deadline) -> int | None:
        """The step that `look` finds; None where the job never had one."""
        decision = self.look(deadline).decision
        return decision.restore.step if decision.HasField("restore") else None

    def check_there(self, step: int | None, deadline: Deadline) -> pb.Restored:
        """As `look`, where a certain step, or any, must be there. Raises NoSuchStep, too."""
        found = self.step(deadline)
        reply = self._enter(deadline)
        if found is None:
            raise NoSuchStep(
                f"nothing was ever saved of job {self.who.job!r}",
                "Save a step first; newest_step() tells whether there is one",
            )
        if step is not None and found != step:
            raise NoSuchStep(
                f"step {step} was asked for, and the newest one that all ranks of job "
                f"{self.who.job!r} can have back is step {found}",
                "The memory keeps the newest protected step: load that one, or name none",
            )
        return reply

    def check_current(self, reply: pb.Restored) -> None:
        """Raise WrongUse where what was found is read after a save has begun."""
        if reply is not self._reply or self._saves:
            raise WrongUse(
                "a step was saved while another was loaded", "Load and save one after the other"
            )

    def ask(self, message: pb.ToDaemon, deadline: Deadline) -> pb.ToTrainer:
        """One question about what `look` found. Raises NoDaemon, Refused, WrongUse."""
        assert self._entry is not None, "it has just looked"
        try:
            return _reached(self._entry, deadline).ask(message, deadline.left_s())
        except DaemonGone as error:
            raise NoDaemon(
                f"the daemon went away while a step was loaded ({error})", "Load it again"
            ) from error

    # -- saving

    def begin(self, step: int, deadline: Deadline, *, replace: bool) -> None:
        """A step is about to be saved; all ranks say so.

        Raises:
            WrongUse: a step that is not newer than what there is, or state that would be lost.
        """
        if step <= self._begun and self._saves:
            self.leave()  # what was begun and is not committed is given up by a new start
        decision = self._enter(deadline).decision
        if decision.HasField("restore"):
            self._check_newer(step, decision.restore.step, replace=replace)
        self.acquainted = self._saves = True
        self._begun = step

    def _check_newer(self, step: int, there: int, *, replace: bool) -> None:
        job = self.who.job
        if not (self.acquainted or replace):
            raise WrongUse(
                f"job {job!r} has step {there} in memory, which this run has not loaded, and is "
                f"about to save step {step}",
                "Load it first; or begin under another job name, or with `snapshotd drop`. To go "
                "on from newer state of your own: SnapshotStorageWriter(replace=True)",
            )
        if step <= there:
            raise WrongUse(
                f"step {step} comes after step {there}, which job {job!r} has saved",
                "Give each save a step of its own, in growing order",
            )

    def save(self, captured: Capture, step: int, deadline: Deadline) -> None:
        """Hand this rank's part of a step to the daemon.

        Raises:
            NoDaemon: it is gone. Refused: it does not take it. ProtectionTimeout: it cannot now.
        """
        entry = self._present()
        flight = Flight(
            Cargo(
                step=step,
                captured=captured,
                moving=Load([], ()),
                trained=(),
                watch=Watch([]),
                stream=cuda.Stream(captured.devices),
            ),
            entry.channel,
            self._buffers,
            deadline.left_s(),
        )
        try:
            _reached(entry, deadline)
            flight.fly_at_once()
            if flight.error is not None:
                raise flight.error
        except DaemonGone as error:
            raise NoDaemon(
                f"the daemon went away while step {step} was saved ({error})",
                "Older steps are untouched; save the next one",
            ) from error
        finally:
            self._buffers.forget(captured.resting)
        self._passed = step + 1
        if flight.skipped:
            raise ProtectionTimeout(
                f"step {step} was not saved: {flight.skipped}",
                "See `snapshotd status` on this node; older steps are untouched, save the next one",
            )

    def pass_by(self, step: int, reason: str) -> None:
        """Tell the daemon that this rank saves nothing of a step, so that nobody waits for it."""
        if self._passed > step:
            return  # it knows
        entry, self._passed = self._present(), step + 1
        message = pb.ToDaemon()
        getattr(message, "pass").CopyFrom(pb.Pass(step=step, reason=reason[:200]))
        try:
            entry.channel.ask(message, _LEAVE_S)
        except (DaemonGone, Refused) as error:
            self._news.report(f"the daemon did not hear that step {step} is given up: {error}")

    def wait_committed(self, step: int, deadline: Deadline) -> None:
        """Until every group of the job protects a step. Raises ProtectionTimeout."""
        self._present().listening.wait_committed(step, deadline)

    # -- coming and going

    def _present(self) -> _Entry:
        if self._entry is None:
            raise WrongUse("this process has left the job", "Begin a save before it is written")
        return self._entry

    def _enter(self, deadline: Deadline) -> pb.Restored:
        if self._reply is not None:
            return self._reply
        self._entry = self._open()
        try:
            self._entry.lock.acquire()
            self._entry.channel.connect(deadline.slice_s(CONNECT_TIMEOUT_S))
            question = RestoreQuestion(self._entry.channel, required=True, report=self._news.report)
            reply = question.ask(allow_fresh=False, deadline=deadline)
            assert reply is not None, "a daemon is required"
            if reply.decision.WhichOneof("outcome") == "refusal":
                raise refusal_of(reply.decision)
        except BaseException:
            self.leave()
            raise
        self._news.forget_committed()
        self._reply = reply
        self._begun = reply.decision.restore.step if reply.decision.HasField("restore") else -1
        self._passed = self._begun + 1
        return reply

    def _open(self) -> _Entry:
        who, incarnation, launch = self.who, uuid.uuid4().hex, this_launch()

        def attach() -> pb.Attach:
            answered = self._reply.decision.id if self._reply is not None else None
            return attach_of(who, launch, answered, self._passed)

        channel = Channel(who.run_dir, who.local_rank, incarnation, attach, self._news.take)
        lock = TrainerLock(who.run_dir, who.local_rank, incarnation)
        return _Entry(lock, channel, Listening(channel, self._news))

    def leave(self) -> None:
        """Leave the daemon; what it holds stays."""
        entry, self._entry, self._reply, self._saves = self._entry, None, None, False
        self._buffers.close()
        if entry is None:
            return
        try:
            if entry.channel.up:
                entry.channel.ask(pb.ToDaemon(detach=pb.Detach()), _LEAVE_S)
        except (DaemonGone, Refused) as error:
            self._news.report(f"the daemon did not hear that this process leaves: {error}")
        finally:
            entry.lock.release()  # first: the daemon looks at it when the connection ends
            entry.channel.close()


def _reached(entry: _Entry, deadline: Deadline) -> Channel:
    """The channel, up: a daemon that was started again meanwhile is found. Raises NoDaemon."""
    with suppress(DaemonGone):
        entry.channel.drain()
    if not entry.channel.up:
        entry.channel.connect(deadline.slice_s(CONNECT_TIMEOUT_S))
    return entry.channel


_members: dict[tuple[int, Identity], Member] = {}
_guard: Final = threading.Lock()


def member_of(place: Place) -> Member:
    """This process as that rank; the same each time. Raises WrongUse: it is not known which."""
    who = place.identity()
    with _guard:
        return _members.setdefault((os.getpid(), who), Member(who))
