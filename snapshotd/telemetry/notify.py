"""Tell the service manager how the daemon is, by the sd_notify protocol.

The protocol is one datagram of KEY=VALUE lines to the unix socket named by NOTIFY_SOCKET;
see sd_notify(3). It needs no library. Without that variable every message goes nowhere.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Final, Self

_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Sends states to a service manager; a message that cannot be sent is lost, never an error.

    The manager may be gone, as when the shell that started a sidecar was killed; the daemon goes
    on without it.
    """

    def __init__(self, address: str | None) -> None:
        """`address` is a path, "@name" for an abstract socket, or None to send nothing."""
        self._address = _socket_address(address) if address else None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        return cls(environ.get("NOTIFY_SOCKET"))

    def ready(self, status: str = "") -> bool:
        """Start-up is over: trainers and peers are served."""
        return self.send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def stopping(self) -> bool:
        """Shutdown has begun."""
        return self.send("STOPPING=1")

    def watchdog(self) -> bool:
        """The main loop turns; due every `watchdog_interval_s`."""
        return self.send("WATCHDOG=1")

    def status(self, text: str) -> bool:
        """One line that `systemctl status` shows."""
        return self.send(f"STATUS={_line(text)}")

    def send(self, *assignments: str) -> bool:
        """Send KEY=VALUE lines in one datagram, without waiting.

        Returns:
            Whether the kernel took it; False without a manager, or when it does not listen.
        """
        if self._address is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            try:
                sender.sendto("\n".join(assignments).encode(), self._address)
            except OSError:
                return False
        return True


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """How often to call `Notifier.watchdog`: half of what the manager allows, as it advises.

    Args:
        environ: the process environment (WATCHDOG_USEC, WATCHDOG_PID).
        pid: this process; a watchdog meant for another process is not ours.

    Returns:
        Seconds, or None where no watchdog waits for this process.
    """
    allowed = environ.get("WATCHDOG_USEC", "")
    meant_for = environ.get("WATCHDOG_PID", str(pid))
    if not allowed.isdecimal() or int(allowed) == 0 or meant_for != str(pid):
        return None
    return int(allowed) / _MICROSECONDS / 2


def _socket_address(address: str) -> str:
    return f"\0{address[1:]}" if address.startswith("@") else address


def _line(text: str) -> str:
    # A line break would start another assignment.
    return " ".join(text.split())
