"""`snapshotd run -- COMMAND`: a daemon beside a job, where no service manager starts one.

The daemon is started again when it dies while the command runs. A daemon that serves the run
directory already is used, and left running.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

from snapshotd.cli.options import Commands, add_config_options, flags, loaded
from snapshotd.cli.sidecar import Interrupted, Sidecar, is_served
from snapshotd.cli.signals import BorrowedSignals
from snapshotd.errors import CallerError

_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 30.0
_NOT_STARTED: Final = 127


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="run a command, usually torchrun, with a daemon beside it",
        usage="snapshotd run [options] -- COMMAND [ARGUMENT ...]",
        allow_abbrev=False,
    )
    add_config_options(parser)
    parser.add_argument(
        "--ready-timeout-s", type=float, default=60.0, metavar="S", help="daemon's start (60)"
    )
    parser.add_argument(
        "--stop-timeout-s", type=float, default=20.0, metavar="S", help="daemon's stop (20)"
    )
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.theirs
    if not command:
        raise CallerError("no command was given", "Write it after two dashes: -- torchrun ...")
    run_dir = loaded(arguments).config.run_dir
    environ = {**os.environ, "SNAPSHOTD_RUN_DIR": str(run_dir)}
    with BorrowedSignals(_FORWARDED) as signals:
        if is_served(run_dir):
            _say(f"a daemon serves {run_dir} already; it is used and left running")
            return run_beside(None, command, environ, signals)
        sidecar = Sidecar(_serve_command(arguments), run_dir, os.environ)
        return start_and_run(
            sidecar,
            command,
            environ,
            signals,
            ready_s=arguments.ready_timeout_s,
            stop_s=arguments.stop_timeout_s,
        )


def start_and_run(
    sidecar: Sidecar,
    command: Sequence[str],
    environ: Mapping[str, str],
    signals: BorrowedSignals,
    *,
    ready_s: float,
    stop_s: float,
) -> int:
    """Start the daemon, run the command, stop the daemon.

    Returns:
        The command's exit code; 128 + n where a signal n ended it, or came before it started.

    Raises:
        SnapshotdError: the daemon did not become ready; the command was not started.
    """
    try:
        sidecar.start(signals, ready_s)
    except Interrupted as interruption:
        return 128 + interruption.number
    try:
        return run_beside(_Keeper(sidecar), command, environ, signals)
    finally:
        if not sidecar.stop(stop_s):
            _say(
                f"the daemon, pid {sidecar.pid}, did not stop within {stop_s:g} s and is left; "
                f"end it with `kill -KILL {sidecar.pid}`; its segments survive that"
            )


def run_beside(
    keeper: _Keeper | None,
    command: Sequence[str],
    environ: Mapping[str, str],
    signals: BorrowedSignals,
) -> int:
    """Run the command to its end, passing signals on and keeping the daemon up."""
    try:
        child = subprocess.Popen(list(command), env=dict(environ))
    except OSError as error:
        _say(f"cannot start {command[0]}: {error.strerror}")
        return _NOT_STARTED
    ended = os.pidfd_open(child.pid)
    try:
        while True:
            watched = keeper.descriptors() if keeper else []
            pause_s = keeper.pause_s() if keeper else None
            readable, _, _ = select.select([ended, signals.fileno(), *watched], [], [], pause_s)
            for number in signals.take():
                _pass_on(number, child)
            if ended in readable:
                return _exit_code(child.wait())
            if keeper:
                keeper.look()
    finally:
        os.close(ended)


class _Keeper:
    """Starts a sidecar again, after a growing pause, when it has died."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        self._pause_s = _FIRST_PAUSE_S
        self._restart_at_s: float | None = None

    def descriptors(self) -> list[int]:
        """What to wait for: the daemon's end, while it runs."""
        return [self._sidecar.exit_descriptor] if self._restart_at_s is None else []

    def pause_s(self) -> float | None:
        """How long to wait at most; None for as long as it takes."""
        if self._restart_at_s is None:
            return None
        return max(0.0, self._restart_at_s - time.monotonic())

    def look(self) -> None:
        """Notice a death, or start again where the pause is over."""
        if self._restart_at_s is None:
            if self._sidecar.code is not None:
                self._note_death()
        elif time.monotonic() >= self._restart_at_s:
            self._restart_at_s = None
            self._sidecar.start_again()

    def _note_death(self) -> None:
        _say(
            f"the daemon ended with {self._sidecar.code}; the command goes on unprotected; "
            f"starting the daemon again in {self._pause_s:g} s"
        )
        self._restart_at_s = time.monotonic() + self._pause_s
        self._pause_s = min(_LAST_PAUSE_S, 2 * self._pause_s)


def _serve_command(arguments: argparse.Namespace) -> list[str]:
    file = ["--config", str(arguments.config)] if arguments.config else []
    settings = [part for k, v in flags(arguments).items() for part in ("--set", f"{k}={v}")]
    return [sys.executable, "-m", "snapshotd", "serve", *file, *settings]


def _pass_on(number: signal.Signals, child: subprocess.Popen[bytes]) -> None:
    # A terminal sends its interrupt to the whole foreground group, the command included; to pass
    # it on would interrupt the command's own clean-up.
    if number is signal.SIGINT and _in_foreground():
        return
    child.send_signal(number)


def _in_foreground() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # standard input is no terminal, or closed
        return False


def _exit_code(returned: int) -> int:
    return 128 - returned if returned < 0 else returned


def _say(text: str) -> None:
    print(f"snapshotd run: {text}", file=sys.stderr, flush=True)
