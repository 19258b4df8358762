"""`snapshotd serve`: check the configuration, and become the daemon of this node."""

from __future__ import annotations

import argparse
import os
import sys

from snapshotd import settled
from snapshotd.cli.options import Commands, add_config_options, loaded


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve", help="run this node's daemon in the foreground", allow_abbrev=False
    )
    add_config_options(parser)
    parser.set_defaults(handler=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    config = loaded(arguments).config
    # The same process from here on, for whoever started it, without the modules of a command. Its
    # own file, as a command line has a bound.
    handed = os.memfd_create("snapshotd-settings", 0)
    with open(handed, "w", encoding="utf-8", closefd=False) as file:
        file.write(settled.to_text(config))
    os.lseek(handed, 0, os.SEEK_SET)
    daemon = ("-m", "snapshotd.daemon", config.node_id, str(handed))
    os.execv(sys.executable, (sys.executable, *daemon))  # noqa: S606  nothing for a shell in it
