"""Everything the demo waits for, in one place: trainers' events, ready daemons, ended programs."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from snapshotd_client.demo.journal import Event

_MESSAGE_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class Ready:
    """A daemon serves (sd_notify's READY=1)."""

    name: str


@dataclass(frozen=True)
class Exited:
    """A watched program ended by itself."""

    name: str
    code: int


Message = Event | Ready | Exited


class Inbox:
    """Messages in the order they arrive; nothing is looked at again and again.

    Not thread-safe. `close` removes the sockets.
    """

    def __init__(self, directory: Path) -> None:
        """Sockets lie in `directory`; its path must be short (a socket's has 107 bytes)."""
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[Message] = deque()
        self.watcher = str(directory / "events.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.watcher)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def notify_address(self, name: str) -> str:
        """Path for NOTIFY_SOCKET of the daemon `name`; its readiness arrives as `Ready(name)`."""
        path = self._directory / f"notify-{name}.sock"
        path.unlink(missing_ok=True)
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(str(path))
        self._selector.register(
            receiver, selectors.EVENT_READ, lambda: self._take_notice(receiver, name)
        )
        return str(path)

    def watch(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Have the end of `process` arrive as `Exited`, unless somebody waited for it first."""
        descriptor = os.pidfd_open(process.pid)

        def ended() -> None:
            self._drop(descriptor)
            # Whoever waited for it already ended it on purpose.
            if process.returncode is None:
                self._waiting.append(Exited(name, process.wait()))

        self._selector.register(descriptor, selectors.EVENT_READ, ended)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None when none comes within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not self._waiting:
            left_s = deadline_s - time.monotonic()
            ready = self._selector.select(left_s) if left_s > 0 else []
            if not ready:
                return None
            for key, _ in ready:
                key.data()
        return self._waiting.popleft()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)
        self._selector.close()
        for path in self._directory.glob("*.sock"):
            path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        trainer, _ = self._listener.accept()
        begun = bytearray()
        self._selector.register(
            trainer, selectors.EVENT_READ, lambda: self._take_events(trainer, begun)
        )

    def _take_events(self, trainer: socket.socket, begun: bytearray) -> None:
        """Take whole lines; `begun` keeps the line that has not ended yet."""
        content = b""
        with suppress(ConnectionResetError):
            content = trainer.recv(_MESSAGE_BYTES)
        if not content:
            # A trainer that was killed while it wrote leaves a line without end: not an event.
            self._drop(trainer)
            return
        begun += content
        *lines, rest = begun.split(b"\n")
        begun[:] = rest
        self._waiting.extend(Event.from_line(line.decode()) for line in lines)

    def _take_notice(self, receiver: socket.socket, name: str) -> None:
        if b"READY=1" in receiver.recv(_MESSAGE_BYTES).splitlines():
            self._waiting.append(Ready(name))

    def _drop(self, source: object) -> None:
        if isinstance(source, socket.socket):
            self._selector.unregister(source)
            source.close()
        elif isinstance(source, int):
            self._selector.unregister(source)
            os.close(source)
