"""The trainer's connection to its node: bounded questions, and a return that never blocks.

Over ZeroMQ, on the calling thread. A connection is *up*, or it is *down* and being found again:
each `poke` of a down connection does one small step without waiting, so training never stands
still for a daemon that is away.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq

from snapshotd.wire.points import point
from snapshotd.wire.protocol import FRONT_SOCKET, PROTOCOL_VERSION
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.errors import Refused, no_daemon
from snapshotd_client.wires import DaemonGone, Wires

#: A question of the way back that got no answer by then is asked again, on a new socket.
_ASK_AGAIN_S: Final = 2.0
#: ... each time after twice as long, up to this: a node may be that busy.
_ASK_AGAIN_LAST_S: Final = 16.0
#: After the connection broke, before it is looked for again.
_BROKEN_PAUSE_S: Final = 0.05

#: Refusals that time may heal: an SMP that is starting, a namesake on a node that just died and
#: is not yet known to be dead.
_MAY_HEAL: Final = frozenset({"busy", "duplicate-rank"})
_REFUSED_PAUSE_S: Final = 0.25


class Channel:
    """Requests to the daemon of this node.

    Args:
        run_dir: the daemon's.
        slot: local rank.
        incarnation: random name of this life of the process.
        attach: what to attach with, asked for anew at each attach.
        on_progress: called with each unasked Progress.

    Attributes:
        newest: what the daemon said when this trainer attached that a restore may well name.
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
        self._wires = Wires()
        self._closing = weakref.finalize(self, self._wires.close)
        self._closing.atexit = False  # the process's end closes them, and a fork must not
        self._request = 0
        self._answers: dict[int, pb.ToTrainer] = {}  # that came while another was waited for
        self._up = False
        self._asked_s = float("-inf")
        self._patience_s = _ASK_AGAIN_S
        self._refusal: Refused | None = None
        self.why_down = "never connected"
        self.newest = pb.Image()

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
                zmq.select([], [], [], min(timeout_s, _BROKEN_PAUSE_S))
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
            self.newest = reply.attached.newest
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
