"""The trainer's connection to its node: bounded questions, and a return that never blocks.

Over ZeroMQ, on the calling thread. A connection is *up*, or it is *down* and being found again:
each `poke` of a down connection does one small step without waiting, so training never stands
still for a daemon that is away.
"""

from __future__ import annotations

import fcntl
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq
from google.protobuf.message import DecodeError
from zmq.utils.monitor import recv_monitor_message

from snapshotd.wire.points import point
from snapshotd.wire.protocol import FRONT_SOCKET, PROTOCOL_VERSION, trainer_lock_name
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.errors import NoDaemon, Refused, WrongUse

#: A question of the way back that got no answer by then is asked again, on a new socket.
_ASK_AGAIN_S: Final = 2.0
#: ... each time after twice as long, up to this: a node may be that busy.
_ASK_AGAIN_LAST_S: Final = 16.0
#: How long a trainer that is dying may hold its lock before its successor gives up.
_LOCK_PATIENCE_S: Final = 10.0
_LOCK_PAUSE_S: Final = 0.05

#: Refusals that time may heal: an SMP that is starting, a namesake on a node that just died and
#: is not yet known to be dead.
_MAY_HEAL: Final = frozenset({"busy", "duplicate-rank"})
_REFUSED_PAUSE_S: Final = 0.25


class DaemonGone(Exception):  # an event within this package, not an error of the user's
    """The connection is down; it is found again by `poke`."""


#: Lock files that this process holds, by process: a fork inherits the table and not the locks.
_HELD: set[tuple[int, Path]] = set()
_HELD_GUARD: Final = threading.RLock()  # a finalizer may run within


class TrainerLock:
    """A POSIX record lock that says: the trainer of this slot lives, and who it is.

    Not a flock: data-loader workers that fork must not inherit it. The kernel lets go of it when
    the process dies, however it dies. Such locks are the process's: a second descriptor of the
    file would take the lock as well, and give it up when it is closed. So within the process a
    table says what is held.
    """

    def __init__(self, run_dir: Path, slot: int, incarnation: str) -> None:
        self._path = run_dir / trainer_lock_name(slot)
        self._incarnation = incarnation
        self._letting_go: weakref.finalize[[], TrainerLock] | None = None

    @property
    def held(self) -> bool:
        return self._letting_go is not None

    def acquire(self) -> None:
        """Take the lock; a predecessor that is just dying is waited for.

        Raises:
            WrongUse: another trainer lives in this slot. NoDaemon: there is no run directory.
        """
        hold = _Hold(self._path.absolute())
        try:
            self._lock(hold)
        except BaseException:
            hold.end()
            raise
        self._letting_go = weakref.finalize(self, hold.end)
        self._letting_go.atexit = False

    def _lock(self, hold: _Hold) -> None:
        try:
            hold.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except OSError as error:
            raise no_daemon(self._path.parent, str(error)) from error
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while not _locked(hold.descriptor):
            if time.monotonic() >= deadline_s:
                raise WrongUse(
                    f"another live trainer holds {self._path}: two processes have this local rank",
                    "End it, or give each trainer of the node its own LOCAL_RANK",
                )
            # No event tells that another process let go; this happens once a start.
            zmq.select([], [], [], _LOCK_PAUSE_S)
        # The daemon lets nobody else attach in this slot.
        os.pwrite(hold.descriptor, text := f"{self._incarnation}\n".encode(), 0)
        os.ftruncate(hold.descriptor, len(text))
        point("trainer.lock.taken")

    def release(self) -> None:
        if self._letting_go is not None:
            self._letting_go()
            self._letting_go = None


class _Hold:
    """A place in the table, and the descriptor that holds the lock once there is one."""

    def __init__(self, path: Path) -> None:
        self._key = (os.getpid(), path)
        self.descriptor: int | None = None
        if not self._enter():
            gc.collect()  # one that was dropped without close() may still be waiting for that
            if not self._enter():
                raise WrongUse(
                    f"this process has a Snapshotter in the slot of {path} already",
                    "close() it first, or give each its own local_rank",
                )

    def _enter(self) -> bool:
        with _HELD_GUARD:
            if self._key in _HELD:
                return False
            _HELD.add(self._key)
            return True

    def end(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        with _HELD_GUARD:
            _HELD.discard(self._key)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except OSError:
        return False
    return True


def no_daemon(run_dir: Path, why: str) -> NoDaemon:
    """The error that says how to start a daemon."""
    return NoDaemon(
        f"no snapshotd answers in {run_dir} ({why})",
        "Start one on this node: `snapshotd serve --config FILE`, `systemctl start snapshotd`, or "
        "launch the job with `snapshotd run -- torchrun ...`; if it uses another directory, set "
        "SNAPSHOTD_RUN_DIR or pass run_dir=...",
    )


class _Line:
    """One DEALER socket, with word of its breaking."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)

    def send(self, message: pb.ToDaemon) -> None:
        self._socket.send(message.SerializeToString())

    def receive(self, timeout_s: float) -> pb.ToTrainer | None:
        """The next message; None when none came. Raises DaemonGone when the line broke."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(max(0, round(timeout_s * 1000))))
        if self._socket in ready:
            try:
                return pb.ToTrainer.FromString(self._socket.recv())
            except DecodeError as error:
                raise DaemonGone("it sent what is no message of snapshotd") from error
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            raise DaemonGone("it closed the connection")
        return None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()


class _Wires:
    """The ZeroMQ things of a channel, apart from it.

    A channel that is dropped without `close` closes them by a finalizer, which must not refer to
    it: a context that the garbage collector finds first would wait for its sockets for ever.
    """

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.line: _Line | None = None  # to the SMP when up; to whoever is asked when down

    def open(self, endpoint: str) -> None:
        self.close_line()
        self.line = _Line(self.context, endpoint)

    def close_line(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def close(self) -> None:
        self.close_line()
        self.context.term()


class Channel:
    """Requests to the daemon of this node.

    Args:
        run_dir: the daemon's.
        slot: local rank.
        incarnation: random name of this life of the process.
        attach: what to attach with, asked for anew at each attach.
        on_progress: called with each unasked Progress.
    """

    def __init__(
        self,
        run_dir: Path,
        slot: int,
        incarnation: str,
        attach: Callable[[], pb.Attach],
        on_progress: Callable[[pb.Progress], None],
    ) -> None:
        self._run_dir = run_dir
        self._slot = slot
        self.incarnation = incarnation
        self._attach = attach
        self._on_progress = on_progress
        self._wires = _Wires()
        self._closing = weakref.finalize(self, self._wires.close)
        self._closing.atexit = False  # the process's end closes them, and a fork must not
        self._request = 0
        self._answers: dict[int, pb.ToTrainer] = {}  # that came while another was waited for
        self._up = False
        self._asked_s = float("-inf")
        self._patience_s = _ASK_AGAIN_S
        self._refusal: Refused | None = None
        self.why_down = "never connected"

    @property
    def up(self) -> bool:
        return self._up

    def connect(self, timeout_s: float) -> None:
        """Find the slot's SMP and attach.

        Raises:
            NoDaemon: nobody answers in time. Refused: the daemon says no.
        """
        deadline_s = time.monotonic() + timeout_s
        if not (self._run_dir / FRONT_SOCKET).exists():
            raise no_daemon(self._run_dir, f"there is no socket {FRONT_SOCKET}")
        while not self._up:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 and self._refusal is not None:
                raise self._refusal
            if left_s <= 0:
                raise no_daemon(self._run_dir, self.why_down)
            self._step(min(left_s, self._patience_s))
            if self._refusal is not None:
                zmq.select([], [], [], min(max(0.0, left_s), _REFUSED_PAUSE_S))

    def poke(self) -> bool:
        """One step towards being up again, without waiting. Returns whether it is up.

        Raises:
            Refused: the daemon is there, and does not take this trainer back.
        """
        if not self._up:
            self._step(0.0)
        return self._up

    def ask(self, message: pb.ToDaemon, timeout_s: float) -> pb.ToTrainer:
        """One question, one answer.

        Raises:
            DaemonGone: the connection is or went down, or no answer came in time.
            Refused: the answer is no.
        """
        return self.answer(self.post(message), timeout_s)

    def answer(self, number: int, timeout_s: float) -> pb.ToTrainer:
        """The answer to a posted question; raises as `ask` does."""
        reply = self.wait(number, timeout_s)
        if reply is None:
            raise self._down(f"it did not answer within {timeout_s:.1f} s")
        return reply

    def post(self, message: pb.ToDaemon) -> int:
        """Send a question; its number. Raises DaemonGone."""
        if not self._up:
            raise DaemonGone(self.why_down)
        return self._send(message)

    def wait(self, number: int, timeout_s: float) -> pb.ToTrainer | None:
        """The answer to a posted question, if it comes in time. Raises DaemonGone, Refused."""
        deadline_s = time.monotonic() + timeout_s
        while number not in self._answers:
            left_s = deadline_s - time.monotonic()
            self._receive(max(0.0, left_s))
            if left_s <= 0 and number not in self._answers:
                return None
        return _granted(self._answers.pop(number))

    def listen(self, timeout_s: float) -> None:
        """Take in one unasked message, if one comes in time. Raises DaemonGone."""
        if self._up:
            self._receive(timeout_s)

    def drain(self) -> None:
        """Take in what has come unasked. Raises DaemonGone."""
        while self._up and self._receive(0.0):
            pass

    def close(self) -> None:
        self._up = False
        self._closing()

    # -- the way back

    def _step(self, timeout_s: float) -> None:
        """Ask for the SMP, or attach to it; or take in the answer to what was asked."""
        try:
            # What was answered since the last look comes first: between two steps more time may
            # pass than a question is given, and to ask anew is to throw the answer away.
            reply = self._wires.line.receive(0.0) if self._wires.line is not None else None
            if reply is None:
                self._ask_anew_if_late()
                assert self._wires.line is not None, "it was just opened, if it was not there"
                reply = self._wires.line.receive(timeout_s)
        except DaemonGone as error:
            self._down(str(error))
            if timeout_s > 0:
                zmq.select([], [], [], min(timeout_s, _LOCK_PAUSE_S))
            return
        if reply is None:
            self.why_down = "it does not answer"
            return
        self._follow(reply)

    def _ask_anew_if_late(self) -> None:
        if self._wires.line is not None:
            if time.monotonic() - self._asked_s <= self._patience_s:
                return
            self._patience_s = min(_ASK_AGAIN_LAST_S, self._patience_s * 2)
        self._open(f"ipc://{self._run_dir / FRONT_SOCKET}")
        self._send(pb.ToDaemon(find=pb.Find(slot=self._slot)))
        point("trainer.find.sent")

    def _follow(self, reply: pb.ToTrainer) -> None:
        body = reply.WhichOneof("body")
        if body == "found":
            point("trainer.find.answered")
            self._open(reply.found.endpoint)
            self._send(pb.ToDaemon(attach=self._attach()))
            point("trainer.attach.sent")
        elif body == "attached":
            self._up = True
            self._patience_s = _ASK_AGAIN_S
            self._refusal = None
            self.why_down = ""
            point("trainer.attach.answered")
        elif body == "refused":
            self.why_down = reply.refused.what
            self._refusal = Refused(reply.refused.code, reply.refused.what, reply.refused.remedy)
            self._wires.close_line()
            if reply.refused.code not in _MAY_HEAL:
                _granted(reply)

    def _open(self, endpoint: str) -> None:
        self._wires.open(endpoint)
        self._asked_s = time.monotonic()

    # -- messages

    def _send(self, message: pb.ToDaemon) -> int:
        assert self._wires.line is not None, "there is a line before anything is sent"
        self._request += 1
        message.protocol = PROTOCOL_VERSION
        message.request = self._request
        message.incarnation = self.incarnation
        self._wires.line.send(message)
        return self._request

    def _receive(self, timeout_s: float) -> bool:
        """Take in one message: a Progress is passed on, an answer kept until it is asked for."""
        if self._wires.line is None:
            raise DaemonGone(self.why_down)
        try:
            reply = self._wires.line.receive(timeout_s)
        except DaemonGone as error:
            raise self._down(str(error)) from error
        if reply is None:
            return False
        if reply.request:
            self._answers[reply.request] = reply
        elif reply.WhichOneof("body") == "progress":
            self._on_progress(reply.progress)
        return True

    def _down(self, why: str) -> DaemonGone:
        self._up = False
        self._answers.clear()
        self.why_down = why
        self._wires.close_line()
        self._asked_s = float("-inf")
        self._patience_s = _ASK_AGAIN_S
        return DaemonGone(why)


def _granted(reply: pb.ToTrainer) -> pb.ToTrainer:
    if reply.WhichOneof("body") == "refused":
        raise Refused(reply.refused.code, reply.refused.what, reply.refused.remedy)
    return reply
