"""The ZeroMQ things below a channel: a line, with word of its breaking, and its end."""

from __future__ import annotations

import zmq
from google.protobuf.message import DecodeError
from zmq.utils.monitor import recv_monitor_message

from snapshotd.wire.v1 import trainer_pb2 as pb


class DaemonGone(Exception):  # an event within this package, not an error of the user's
    """The connection is down; it is found again by `poke`."""


class Line:
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


class Wires:
    """The ZeroMQ things of a channel, apart from it.

    A channel that is dropped without `close` closes them by a finalizer, which must not refer to
    it: a context that the garbage collector finds first would wait for its sockets for ever.
    """

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.line: Line | None = None  # to the SMP when up; to whoever is asked when down

    def open(self, endpoint: str) -> None:
        self.close_line()
        self.line = Line(self.context, endpoint)

    def close_line(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def close(self) -> None:
        self.close_line()
        self.context.term()
