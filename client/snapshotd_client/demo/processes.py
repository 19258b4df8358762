"""Start programs, and be sure that all of them are gone at the end, orphans too."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

_PR_SET_CHILD_SUBREAPER: Final = 36
#: What these prefixes name would reach our programs from whoever runs the demo.
_FOREIGN_PREFIXES: Final = ("SNAPSHOTD_", "TORCHELASTIC_", "NOTIFY_SOCKET", "WATCHDOG_")
_FOREIGN_NAMES: Final = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
)


def clean_environment(**added: str) -> dict[str, str]:
    """This process's environment without another job's variables, with `added`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name not in _FOREIGN_NAMES
    }
    return {**kept, **added}


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that a Ctrl-C reaches only the demo.

    Args:
        command: program and arguments.
        environment: all of its variables.
        log: its output and errors are appended here.
    """
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_trees(programs: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """SIGKILL programs and all that they have started, at once; the ids of those killed.

    The programs go first, so that they cannot start their children again.
    """
    children = [child for program in programs for child in _descendants(program.pid)]
    for program in programs:
        program.kill()
    for child in children:
        _kill(child)
    for program in programs:
        program.wait()
    psutil.wait_procs(children, timeout=5)
    return [program.pid for program in programs] + [child.pid for child in children]


@contextmanager
def no_orphans() -> Iterator[None]:
    """End every process that was started inside the block, whoever its parent has become.

    While the block runs, orphans become children of this process instead of the machine's first
    one, so that none can slip away.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the reaper of orphans")
    try:
        yield
    finally:
        _end_descendants()
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _end_descendants() -> None:
    # Killing a parent may reveal new orphans; each round ends at least one process.
    while found := [p for p in _descendants(os.getpid()) if _runs(p)]:
        for process in found:
            _kill(process)
        psutil.wait_procs(found, timeout=5)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    # psutil compares the start time too: an id that was given to another process is left alone.
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
