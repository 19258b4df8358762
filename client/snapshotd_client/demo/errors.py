"""Why a demo run cannot go on."""

from __future__ import annotations

from pathlib import Path


class DemoError(Exception):
    """A run did not do what it must; `logs` says where to read on."""

    def __init__(self, what: str, logs: Path | None = None) -> None:
        super().__init__(f"{what}; the logs are in {logs}" if logs else what)
