"""One connection of the plane of plain sockets: frames over TCP, or over TLS.

A frame is a head, as many bytes as it says, and padding. Chunks go from the memory they lie in to
the socket, and from the socket to the memory they are meant for. All but `abort` is for one thread
at a time.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from enum import Enum
from threading import Event
from typing import Final, cast

from snapshotd.wire.protocol import MAX_CONTROL_BYTES

#: All of a frame is padded to this: the kernel copies twice as fast what begins at such a place.
ALIGNMENT: Final = 64
_HEAD: Final = struct.Struct(f">cI{ALIGNMENT - 5}x")
#: What is under way in the kernel: more of it only leaves the caches before it is received.
SEND_BUFFER_BYTES: Final = 1 << 19
_TIMEVAL: Final = struct.Struct("ll")
#: Silence after which the kernel asks whether the other end is still there, and between askings.
KEEPALIVE_S: Final = 30


class Kind(Enum):
    """What a frame holds."""

    READ = b"R"  # a ReadRequest: opens a Read
    RANGES = b"N"  # a RangesRequest; its chunks follow, each behind its digest, in one frame
    MESSAGE = b"M"  # a ReadReply, StoreRequest or StoreReply
    CHUNK = b"C"
    GO_ON = b"G"  # the holder is ready for the chunks of a Store
    REFUSED = b"X"  # UTF-8: why; nothing follows


class Stalled(Exception):
    """The other end sent or took nothing for as long as it may."""


class HungUp(Exception):
    """The other end closed the connection, or there is none to it any more."""


class NotAFrame(Exception):
    """What came is no frame, or one that nobody may send."""


class Connection:
    """A connected socket."""

    def __init__(self, connected: socket.socket, stall_s: float) -> None:
        """Take over a socket.

        Args:
            connected: a TCP socket; closed by `close`.
            stall_s: bound of one frame on its way.

        Raises:
            OSError: it is gone already; it is closed.
        """
        self._socket = connected
        self._stall_s = stall_s
        self._head = memoryview(bytearray(_HEAD.size))
        self._padding = memoryview(bytearray(ALIGNMENT))
        self._names: tuple[str, ...] = ()
        #: Set when it is broken off.
        self.ended = Event()
        try:
            _set(connected, stall_s)
        except OSError:
            connected.close()
            raise
        # TLS knows no flags.
        self._all: int = socket.MSG_WAITALL
        self._more: int = socket.MSG_MORE
        self._peer = _shown(connected)

    # -- who speaks

    def secure(self, context: ssl.SSLContext, server_side: bool) -> None:
        """Shake hands. Raises OSError, Stalled."""
        wrapped = context.wrap_socket(
            self._socket, server_side=server_side, do_handshake_on_connect=False
        )
        wrapped.settimeout(self._stall_s)
        self._socket = wrapped
        self._all = self._more = 0
        try:
            wrapped.do_handshake()
        except TimeoutError as error:
            raise Stalled from error
        shown = wrapped.getpeercert() or {}
        names = cast("tuple[tuple[str, str], ...]", shown.get("subjectAltName", ()))
        self._names = tuple(value for kind, value in names if kind == "DNS")

    @property
    def names(self) -> tuple[str, ...]:
        """DNS names of the other end's certificate; none without TLS."""
        return self._names

    @property
    def peer(self) -> str:
        """The address of the other end."""
        return self._peer

    # -- frames out

    def send(self, kind: Kind, body: bytes | memoryview = b"") -> None:
        """Send a frame. Raises Stalled, HungUp."""
        until_s = time.monotonic() + self._stall_s
        padding = -len(body) % ALIGNMENT
        self._send(_HEAD.pack(kind.value, len(body)), self._more if body else 0, until_s)
        if body:
            self._send(body, self._more if padding else 0, until_s)
        if padding:
            self._send(bytes(padding), 0, until_s)

    def _send(self, data: bytes | memoryview, flags: int, until_s: float) -> None:
        at = self._bounded(self._socket.send, data, flags)
        while at < len(data):  # as a rule, all went at once
            if time.monotonic() >= until_s:
                raise Stalled
            with memoryview(data)[at:] as rest:
                at += self._bounded(self._socket.send, rest, flags)

    # -- frames in

    def head(self) -> tuple[Kind, int]:
        """Kind and length of the next frame. Raises Stalled, HungUp, NotAFrame."""
        self._fill(self._head)
        kind, count = _HEAD.unpack(self._head)
        try:
            return Kind(kind), count
        except ValueError as error:
            raise NotAFrame from error

    def fill(self, target: memoryview) -> None:
        """Receive the rest of a frame, which is as long as `target`. Raises Stalled, HungUp."""
        self._fill(target)
        padding = -len(target) % ALIGNMENT
        if padding:
            self._fill(self._padding[:padding])

    def _fill(self, target: memoryview) -> None:
        until_s, at = time.monotonic() + self._stall_s, 0
        while at < len(target):
            with target[at:] as rest:
                got = self._bounded(self._socket.recv_into, rest, 0, self._all)
            if not got:
                raise HungUp("the connection was closed")
            at += got
            if at < len(target) and time.monotonic() >= until_s:
                raise Stalled

    def body(self, count: int, most: int = MAX_CONTROL_BYTES) -> bytes:
        """The rest of a frame that is no chunk. Raises Stalled, HungUp, NotAFrame."""
        if count > most:
            raise NotAFrame
        data = bytearray(count)
        with memoryview(data) as view:
            self.fill(view)
        return bytes(data)

    def wait(self, pause_s: float) -> None:
        """Send and receive nothing for so long, unless it is broken off."""
        if pause_s:
            self.ended.wait(pause_s)

    def _bounded(self, call: Callable[..., int], *arguments: object) -> int:
        try:
            return call(*arguments)
        except (TimeoutError, BlockingIOError) as error:
            raise Stalled from error
        except OSError as error:
            raise HungUp(error.strerror or str(error)) from error

    # -- its end

    def is_idle(self) -> bool:
        """Whether it stands, and nothing has come that nobody asked for."""
        if self.ended.is_set():
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_read_ahead(self) -> bool:
        """Whether bytes are here already that the kernel does not show any more."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def abort(self) -> None:
        """Break it off, also under the hands of a thread; it is still to be closed."""
        self.ended.set()
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            return  # the other end was first

    def close(self) -> None:
        """Nobody uses it any more; a second call does nothing."""
        self.ended.set()
        self._socket.close()


def _set(connected: socket.socket, stall_s: float) -> None:
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    # Bounds in the kernel: so one call waits for all of a chunk.
    bound = _TIMEVAL.pack(int(stall_s), int(stall_s % 1 * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)


def _shown(connected: socket.socket) -> str:
    try:
        host, port = connected.getpeername()[:2]
    except OSError:
        return "nowhere"
    return f"{host}:{port}"
