"""`snapshotd demo`: become the demonstration program of the trainer's side."""

from __future__ import annotations

import argparse
import os
import sys

from snapshotd.cli.options import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="train on four local nodes, break them, compare every byte",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    # Another program, not an import: the daemon's package never loads torch.
    command = [sys.executable, "-m", "snapshotd_client.demo", *arguments.theirs]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606  our own interpreter, arguments as a list
