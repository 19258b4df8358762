"""Merge the sources into one checked Config: flags beat variables beat the file beat defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from snapshotd.config.model import Config
from snapshotd.config.problems import explain
from snapshotd.config.sources import (
    DEFAULT,
    Origin,
    Setting,
    from_environ,
    from_file,
    from_flags,
    known_keys,
)


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that can be served, and where each of its values was set.

    Attributes:
        origins: dotted key to origin, for every key, defaults too.
    """

    config: Config
    origins: Mapping[str, Origin]

    def values(self) -> dict[str, Any]:
        """Dotted key to effective value, in the order of `origins`."""
        tree = self.config.model_dump()
        return {key: _value_at(tree, key) for key in self.origins}


def load(path: Path | None, flags: Mapping[str, str], environ: Mapping[str, str]) -> LoadedConfig:
    """Read, merge and check a configuration.

    Args:
        path: the TOML file; None for none.
        flags: dotted key to text, such as {"protection.parity": "2"}.
        environ: the process environment.

    Returns:
        The configuration with the origin of each value.

    Raises:
        ConfigError: names each wrong key, where it was set, what was expected and how to mend it.
    """
    settings = from_file(path) if path else {}
    settings |= from_environ(environ)
    settings |= from_flags(flags)
    try:
        config = Config.model_validate(_nested(settings))
    except ValidationError as error:
        raise explain(error, settings) from error
    keys = [*known_keys(), *(f"peers.{node}" for node in config.peers)]
    return LoadedConfig(config, {k: settings[k].origin if k in settings else DEFAULT for k in keys})


def _nested(settings: Mapping[str, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        section, dot, name = key.partition(".")
        inner = tree.setdefault(section, {}) if dot else tree
        if isinstance(inner, dict):  # else the section is a plain value, which is refused anyway
            inner[name or section] = setting.value
    return tree


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    section, dot, name = key.partition(".")
    return tree[section][name] if dot else tree[section]
