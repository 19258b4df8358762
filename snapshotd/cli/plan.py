"""`snapshotd plan`: what restore() would answer now. Nothing is done."""

from __future__ import annotations

import argparse
import os

from snapshotd.cli.options import Commands, add_address_options, daemon_address
from snapshotd.cli.trust import identity


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="what a job would be restored from; exits with 1 where it cannot be",
        allow_abbrev=False,
    )
    parser.add_argument("job", metavar="JOB")
    add_address_options(parser)
    parser.add_argument("--json", action="store_true", help="the whole PlanReply message")
    parser.set_defaults(handler=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from snapshotd.cli.render import message_json, plan_tables  # noqa: PLC0415
    from snapshotd.cli.screen import screen  # noqa: PLC0415
    from snapshotd.rpc.operator import fetch_plan  # noqa: PLC0415  see status.py

    plan = fetch_plan(
        daemon_address(arguments, os.environ),
        arguments.job,
        arguments.timeout_s,
        identity(arguments, os.environ),
    )
    if arguments.json:
        print(message_json(plan))
    else:
        console = screen()
        for part in plan_tables(plan):
            console.print(part)
    return 0 if plan.restorable else 1
