"""`snapshotd status`: what the daemon of a node holds, protects and waits for."""

from __future__ import annotations

import argparse
import os

from snapshotd.cli.options import Commands, add_address_options, daemon_address
from snapshotd.cli.trust import identity


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "status", help="members, shards, jobs, memory and health", allow_abbrev=False
    )
    add_address_options(parser)
    parser.add_argument("--json", action="store_true", help="the whole NodeStatus message")
    parser.set_defaults(handler=_status)


def _status(arguments: argparse.Namespace) -> int:
    # gRPC takes its time to import; only the commands that speak to a daemon pay for it. And what
    # draws tables is in nobody's memory for as long as a daemon runs.
    from snapshotd.cli.render import message_json, status_tables  # noqa: PLC0415
    from snapshotd.cli.screen import screen  # noqa: PLC0415
    from snapshotd.rpc.operator import fetch_status  # noqa: PLC0415

    status = fetch_status(
        daemon_address(arguments, os.environ), arguments.timeout_s, identity(arguments, os.environ)
    )
    if arguments.json:
        print(message_json(status))
    else:
        console = screen()
        for part in status_tables(status):
            console.print(part)
    return 0
