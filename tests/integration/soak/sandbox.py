"""A world of its own for a run: processes, mounts and networks that end with it, whatever happens.

The program starts itself anew inside fresh user, mount, network and process-id namespaces
(util-linux's `unshare`). There it is the first process: all others are its descendants, their
mounts and networks are seen by nobody else, and the kernel ends every one of them with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

INSIDE = "SOAK_INSIDE"
_NEEDS = (
    "The soak needs Linux with namespaces for users, mounts, networks and processes (as root, or "
    "where unprivileged user namespaces are allowed), util-linux's `unshare`, and a /dev/net/tun "
    "that this user may open; a container needs --privileged"
)
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_libc = ctypes.CDLL(None, use_errno=True)


class CannotRunHere(Exception):
    """This machine does not allow what the soak needs; says what."""


def enter(arguments: Sequence[str], log_dir: Path) -> int:
    """Run this program again inside the namespaces; its exit status.

    Raises:
        CannotRunHere: the machine does not allow them.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        raise CannotRunHere(f"`unshare` is not installed. {_NEEDS}")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise CannotRunHere(f"/dev/net/tun cannot be opened. {_NEEDS}")
    inside = [unshare, "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork"]
    inside += ["--mount-proc", "--kill-child"]
    probe = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise CannotRunHere(f"unshare fails: {probe.stderr.strip()}. {_NEEDS}")
    process = subprocess.Popen(
        [*inside, sys.executable, "-m", "tests.integration.soak", *arguments],
        env={**os.environ, INSIDE: str(log_dir)},
    )
    # What is inside hears a Ctrl-C itself, and ends in good order. A SIGTERM is handed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(p, signal.SIGTERM) for p in _ids(children)])
    return process.wait()


def _ids(children: Path) -> list[int]:
    return [int(pid) for pid in children.read_text().split()]


def make_network(address: str, mtu: int) -> tuple[int, int]:
    """A network namespace with one interface, whose other end is read and written here.

    Returns:
        Descriptors of the namespace, and of the interface's other end.
    """

    def make() -> tuple[int, int]:
        _check(_libc.unshare(_NEW_NETWORK))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), interface(
            address, mtu
        )

    return _in_a_thread(make)


def interface(address: str, mtu: int) -> int:
    """An interface of this thread's network namespace; the descriptor of its other end."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"sd0", 0x1001))  # TUNSETIFF: TUN, NO_PI
    control = _Control()
    control.up(b"lo")
    control.set_address(0x8916, address)  # SIOCSIFADDR
    control.set_address(0x891C, "255.255.255.0")  # SIOCSIFNETMASK
    control.set(0x8922, b"sd0", struct.pack("i", mtu))  # SIOCSIFMTU
    control.up(b"sd0")
    return tun


class _Control:
    """ioctl(2) on interfaces, see netdevice(7)."""

    def __init__(self) -> None:
        import socket

        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def set(self, request: int, name: bytes, value: bytes) -> None:
        fcntl.ioctl(self._socket, request, struct.pack("16s24s", name, value))

    def set_address(self, request: int, address: str) -> None:
        numbers = bytes(int(part) for part in address.split("."))
        self.set(request, b"sd0", struct.pack("HH4s", 2, 0, numbers))  # AF_INET

    def up(self, name: bytes) -> None:
        self.set(0x8914, name, struct.pack("h", 0x41))  # SIOCSIFFLAGS: UP, RUNNING


def spawn(
    network: int | None, arguments: Sequence[str], environ: Mapping[str, str], log: Path
) -> int:
    """Start a program in a network namespace (None: in ours) and a session of its own; its pid."""

    def start() -> int:
        if network is not None:
            _check(_libc.setns(network, _NEW_NETWORK))
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *arguments],
            dict(environ),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )

    return _in_a_thread(start)


def sockets_in(network: int) -> list[str]:
    """TCP sockets of a network namespace that are not about to vanish by themselves."""

    def look() -> list[str]:
        _check(_libc.setns(network, _NEW_NETWORK))
        found = []
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
                state = line.split()[3]
                # Owned ones: what the kernel still closes for a process that is gone has no inode.
                if state != "06" and line.split()[9] != "0":
                    found.append(f"{name} {line.split()[1]} state {state}")
        return found

    return _in_a_thread(look)


def mount_memory(where: Path, size_bytes: int) -> None:
    """A tmpfs of its own."""
    where.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=0770".encode()
    _check(_libc.mount(b"soak", str(where).encode(), b"tmpfs", 0, options))


def unmount(where: Path) -> None:
    _check(_libc.umount2(str(where).encode(), 0))


def mounts_below(where: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [m for line in lines if (m := line.split()[1]).startswith(str(where))]


class Reaper:
    """Buries every process that ends, and tells whoever waits for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._early: dict[int, int] = {}
        self._loop.add_signal_handler(signal.SIGCHLD, self._bury)

    def end_of(self, pid: int) -> asyncio.Future[int]:
        """Done when the process has ended: its exit status, negative for a signal."""
        if pid not in self._ends:
            self._ends[pid] = self._loop.create_future()
            if pid in self._early:
                self._ends[pid].set_result(self._early.pop(pid))
        return self._ends[pid]

    def _bury(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            waiting = self._ends.pop(pid, None)
            if waiting is None:
                self._early[pid] = code
            elif not waiting.cancelled():
                waiting.set_result(code)


async def ended(pid: int) -> None:
    """Wait for the end of any process, be it a child or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.add_reader(descriptor, lambda: over.done() or over.set_result(None))
    try:
        await over
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _in_a_thread(call: Callable[[], T]) -> T:
    """A namespace belongs to a thread; this one is thrown away with it."""
    result: list[T] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as caught:  # noqa: BLE001  # raised again in the caller's thread
            error.append(caught)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
