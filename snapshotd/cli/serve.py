"""`snapshotd serve`: be the daemon of this node until told to stop."""

from __future__ import annotations

import argparse

from snapshotd.cli.options import Commands, add_config_options, loaded
from snapshotd.telemetry import logs


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve", help="run this node's daemon in the foreground", allow_abbrev=False
    )
    add_config_options(parser)
    parser.set_defaults(handler=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    config = loaded(arguments).config
    logs.configure(config.log_level, config.log_format, config.node_id)
    # Only now: the daemon brings gRPC and ZeroMQ, which no other command waits for.
    from snapshotd.daemon import serve  # noqa: PLC0415

    return serve(config)
