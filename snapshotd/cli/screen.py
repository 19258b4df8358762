"""Where tables are printed: the terminal, or a pipe that has no width of its own."""

from __future__ import annotations

import os
import sys
from typing import Final

from rich.console import Console

_WIDE_COLUMNS: Final = 240


def screen() -> Console:
    """The terminal as wide as it is; a pipe gets long lines, so that they can be searched.

    COLUMNS overrides both.
    """
    is_pipe = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_WIDE_COLUMNS if is_pipe else None)
