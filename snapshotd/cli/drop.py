"""`snapshotd drop`: make all nodes forget a job and free its memory."""

from __future__ import annotations

import argparse
import os

from snapshotd.cli.options import Commands, add_address_options, daemon_address
from snapshotd.cli.trust import identity
from snapshotd.cli.units import in_bytes
from snapshotd.errors import CallerError


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "drop", help="forget a job on all nodes and free its memory", allow_abbrev=False
    )
    parser.add_argument("job", metavar="JOB")
    add_address_options(parser)
    parser.add_argument("--yes", action="store_true", help="yes, its snapshots are lost")
    parser.set_defaults(handler=_drop)


def _drop(arguments: argparse.Namespace) -> int:
    address = daemon_address(arguments, os.environ)
    if not arguments.yes:
        raise CallerError(
            f"dropping {arguments.job} destroys its snapshots on all nodes for good",
            "Repeat the command with --yes if that is meant",
        )
    from snapshotd.rpc.operator import drop  # noqa: PLC0415  see status.py

    reply = drop(address, arguments.job, arguments.timeout_s, identity(arguments, os.environ))
    print(
        f"dropped {arguments.job}: all nodes forget it, a later start of it is a fresh one; "
        f"{in_bytes(reply.freed_bytes)} freed on {address}"
    )
    return 0
