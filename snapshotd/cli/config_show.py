"""`snapshotd config show`: the effective configuration, and where each value was set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotd.cli.options import Commands, add_config_options, loaded
from snapshotd.config import LoadedConfig

if TYPE_CHECKING:
    from rich.table import Table


def register(commands: Commands) -> None:
    """Add the command."""
    config = commands.add_parser("config", help="look at the configuration", allow_abbrev=False)
    verbs = config.add_subparsers(required=True, metavar="VERB")
    show = verbs.add_parser(
        "show", help="print each key's effective value and origin", allow_abbrev=False
    )
    add_config_options(show)
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(handler=_show)


def _show(arguments: argparse.Namespace) -> int:
    effective = loaded(arguments)
    if arguments.json:
        print(json.dumps(as_json(effective), indent=2))
    else:
        from snapshotd.cli.screen import screen  # noqa: PLC0415  see status.py

        screen().print(as_table(effective))
    return 0


def as_json(effective: LoadedConfig) -> dict[str, Any]:
    """Dotted key to value and origin."""
    return {
        key: {"value": _plain(value), "origin": str(effective.origins[key])}
        for key, value in effective.values().items()
    }


def as_table(effective: LoadedConfig) -> Table:
    """Key, value, origin; one row each."""
    from rich import box  # noqa: PLC0415  see status.py
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for key, value in effective.values().items():
        shown = "not set" if value is None else str(_plain(value))
        table.add_row(key, shown, str(effective.origins[key]))
    return table


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
