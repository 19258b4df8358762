"""A daemon started beside a job: outside the job's process tree, ready before the job starts."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from snapshotd.cli.signals import BorrowedSignals
from snapshotd.errors import CallerError, SnapshotdError
from snapshotd.memory.locks import DirectoryLock

_READY: Final = b"READY=1"
_MAX_NOTIFICATION_BYTES: Final = 4096
#: sun_path of a unix socket, without the terminating zero.
_MAX_SOCKET_PATH_BYTES: Final = 107


class Interrupted(SnapshotdError):
    """A signal came before the daemon was ready."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"{number.name} came before the daemon was ready")
        self.number = number


def is_served(run_dir: Path) -> bool:
    """Whether a live daemon owns `run_dir`."""
    if not run_dir.is_dir():
        return False
    try:
        with DirectoryLock(run_dir):
            return False
    except CallerError:
        return True


class Sidecar:
    """One daemon process, in a session of its own."""

    def __init__(self, command: Sequence[str], run_dir: Path, environ: Mapping[str, str]) -> None:
        """Describe it; nothing starts yet.

        Args:
            command: the daemon's command line.
            run_dir: the directory it will serve; made if absent.
            environ: the environment it gets, but for the notify socket and the watchdog, which
                concern whoever started this process.
        """
        self._command = command
        self._run_dir = run_dir
        self._environ = {k: v for k, v in environ.items() if not k.startswith("WATCHDOG_")}

    def start(self, signals: BorrowedSignals, bound_s: float) -> None:
        """Start it and wait until it serves.

        Raises:
            SnapshotdError: it ended, or was not ready in time, and is stopped.
            Interrupted: a signal came meanwhile; the daemon is stopped.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True, mode=0o770)
        address = _notify_address(self._run_dir)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notices:
            notices.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
            try:
                self._spawn({**self._environ, "NOTIFY_SOCKET": address})
                self._wait_ready(notices, signals, bound_s)
            finally:
                if not address.startswith("@"):
                    Path(address).unlink(missing_ok=True)

    def start_again(self) -> None:
        """Start it anew after its end, without waiting for it."""
        os.close(self._exit)
        self._spawn({k: v for k, v in self._environ.items() if k != "NOTIFY_SOCKET"})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_descriptor(self) -> int:
        """Readable once the daemon has ended."""
        return self._exit

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.poll()

    def stop(self, bound_s: float) -> bool:
        """Ask it to stop, and wait.

        Returns:
            False where it still runs after `bound_s`; it is then left alone.
        """
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(bound_s)
        except subprocess.TimeoutExpired:
            return False
        os.close(self._exit)
        return True

    def _spawn(self, environ: Mapping[str, str]) -> None:
        # A session of its own: no signal of the job's terminal or process group reaches it, and
        # no launcher that kills its own tree finds it.
        self._process = subprocess.Popen(
            self._command, env=dict(environ), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._exit = os.pidfd_open(self._process.pid)

    def _wait_ready(self, notices: socket.socket, signals: BorrowedSignals, bound_s: float) -> None:
        watched = [notices.fileno(), signals.fileno(), self._exit]
        deadline_s = time.monotonic() + bound_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            readable, _, _ = select.select(watched, [], [], left_s)
            if notices.fileno() in readable and _is_ready(notices.recv(_MAX_NOTIFICATION_BYTES)):
                return
            if signals.fileno() in readable and (received := signals.take()):
                self.stop(bound_s)
                raise Interrupted(received[0])
            if self._exit in readable:
                raise SnapshotdError(
                    f"the daemon ended with {self._process.wait()} before it was ready",
                    "Its own message above says why",
                )
        self.stop(bound_s)
        raise SnapshotdError(
            f"the daemon was not ready within {bound_s:g} s",
            "Look at its log; a large memory of old segments takes time, see --ready-timeout-s",
        )


def _is_ready(notification: bytes) -> bool:
    return _READY in notification.split(b"\n")


def _notify_address(run_dir: Path) -> str:
    name = f"notify-{secrets.token_hex(4)}.sock"
    path = str(run_dir / name)
    # A long directory does not fit into a socket address; an abstract name always does.
    return path if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES else f"@snapshotd-{name}"
