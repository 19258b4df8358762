"""The ZeroMQ sockets that trainers talk to: bounded frames in, one reply for each request out.

A frame that is no message, or too large, or of another version gets a `Refused` and changes
nothing. Sockets are files of the run directory, open to those who may write there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import zmq
import zmq.asyncio
from google.protobuf.message import DecodeError
from zmq.utils.monitor import recv_monitor_message

from snapshotd.errors import Busy, NoRoom, RequestError, SnapshotdError
from snapshotd.wire.protocol import MAX_CONTROL_BYTES, PROTOCOL_VERSION, ErrorCode
from snapshotd.wire.v1 import trainer_pb2 as pb

log = logging.getLogger(__name__)

#: A reply, or None when it will be sent later with `TrainerSocket.send`.
Handler = Callable[[bytes, pb.ToDaemon], Awaitable[pb.ToTrainer | None]]

#: Longest path a unix socket can have, less one for the terminator.
MAX_SOCKET_PATH_BYTES = 107


class TrainerSocket:
    """One ROUTER socket on `ipc://path`."""

    def __init__(self, context: zmq.asyncio.Context, path: Path) -> None:
        if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
            raise RequestError(
                ErrorCode.MALFORMED,
                f"the socket path {path} exceeds {MAX_SOCKET_PATH_BYTES} bytes",
                "Choose a shorter run_dir",
            )
        self.endpoint = f"ipc://{path}"
        self._path = path
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def bind(self) -> None:
        """Take the path over from a daemon that died there."""
        self._path.unlink(missing_ok=True)
        self._socket.bind(self.endpoint)

    async def serve(self, handle: Handler) -> None:
        """Answer requests one after another, for ever."""
        while True:
            parts = await self._socket.recv_multipart()
            identity = parts[0]
            reply = await _answer(identity, parts[1:], handle)
            if reply is not None:
                await self.send(identity, reply)

    async def disconnections(self, on_disconnect: Callable[[], None]) -> None:
        """Call back whenever some trainer's connection ended, for ever."""
        while True:
            await recv_monitor_message(self._monitor)
            on_disconnect()

    async def send(self, identity: bytes, message: pb.ToTrainer) -> None:
        """Send to a trainer; silently nothing when it is gone."""
        await self._socket.send_multipart([identity, message.SerializeToString()])

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()
        self._path.unlink(missing_ok=True)


async def _answer(identity: bytes, parts: list[bytes], handle: Handler) -> pb.ToTrainer | None:
    request = 0
    try:
        message = _parse(parts)
        request = message.request
        reply = await handle(identity, message)
    except SnapshotdError as error:
        log.warning("refused a trainer: %s", error)
        reply = pb.ToTrainer(refused=refused(error))
    if reply is not None:
        reply.request = request
    return reply


def refused(error: SnapshotdError) -> pb.Refused:
    """An error of ours as a trainer receives it."""
    code = ErrorCode.INTERNAL
    if isinstance(error, RequestError):
        code = error.code
    elif isinstance(error, NoRoom):
        code = ErrorCode.NO_ROOM
    elif isinstance(error, Busy):
        code = ErrorCode.BUSY
    return pb.Refused(code=code, what=error.what, remedy=error.remedy)


def _parse(parts: list[bytes]) -> pb.ToDaemon:
    if len(parts) != 1:
        raise RequestError(ErrorCode.MALFORMED, f"a message of {len(parts)} frames, one expected")
    message = pb.ToDaemon()
    try:
        message.ParseFromString(parts[0])
    except DecodeError as error:
        raise RequestError(
            ErrorCode.MALFORMED, f"{len(parts[0])} bytes that are no message of snapshotd"
        ) from error
    if message.protocol != PROTOCOL_VERSION:
        raise RequestError(
            ErrorCode.PROTOCOL_MISMATCH,
            f"the trainer speaks protocol {message.protocol}, this daemon {PROTOCOL_VERSION}",
            "Install the same version of snapshotd in the trainer's environment and on the node",
        )
    if message.request == 0 or message.WhichOneof("body") is None:
        raise RequestError(ErrorCode.MALFORMED, "a message without a number or a body")
    return message
