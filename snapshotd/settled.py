"""A checked configuration as text, and back: what serves it does without what checks it.

The modules that check take 14 MiB, which a daemon would hold for as long as it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from snapshotd.config import Config

# No key of a configuration, nor a node's name, begins so.
_PATH: Final = "=path"
_SECTION: Final = "=section"


def to_text(config: Config) -> str:
    """All of its values, checked and with defaults."""
    return json.dumps(config, default=_plain)


def from_text(text: str) -> Config:
    """What `to_text` was given: the same attributes, without the methods of a model."""
    return cast("Config", json.loads(text, object_hook=_meant))


def _plain(value: Any) -> dict[str, Any]:
    return {_PATH: str(value)} if isinstance(value, Path) else {_SECTION: dict(value)}


def _meant(members: dict[str, Any]) -> Any:
    if _PATH in members:
        return Path(members[_PATH])
    return SimpleNamespace(**members[_SECTION]) if _SECTION in members else members
