"""The command `snapshotd`: find the command, run it, turn an error into a message and a code.

Exit codes: 0 done, 1 failed, 2 wrong input (usage, configuration), 130 interrupted; `export` and
`import` end with 128 and the number of the signal that ended them, `run` with the code of its
command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

import snapshotd
from snapshotd.cli import config_show, demo, drop, export, gc, import_, plan, run, serve, status
from snapshotd.errors import SnapshotdError, exit_code

_COMMANDS: Final = (
    serve, run, status, plan, drop, gc, export, import_, config_show, demo,
)  # fmt: skip
_FAILED: Final = 1
_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process where None.

    Returns:
        The exit code.
    """
    ours, theirs = split(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parser().parse_args(ours)
        arguments.theirs = theirs
        return int(arguments.handler(arguments))
    except SnapshotdError as error:
        print(f"snapshotd: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        # The reader of our output left, as `head` does. Python would complain once more when it
        # flushes at exit; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part our arguments from those of another program: `run`'s command, `demo`'s options."""
    match list(argv):
        case ["demo", *theirs]:
            return ["demo"], theirs
        case ["run", *rest] if "--" in rest:
            end = rest.index("--")
            return ["run", *rest[:end]], rest[end + 1 :]
        case ours:
            return ours, []


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="snapshotd", description=snapshotd.__doc__, allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"snapshotd {snapshotd.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    return top
