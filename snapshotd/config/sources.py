"""Where values come from: a TOML file, the environment, flags; flat, and each with its origin.

Keys are dotted: "listen", "protection.parity", "peers.n1". A node id may itself hold dots, so a
key is split at its first dot only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from snapshotd.config.model import Config
from snapshotd.errors import ConfigError

PREFIX: Final = "SNAPSHOTD_"
#: Read by trainers, not by the daemon. SNAPSHOTD_RUN_DIR is read by both.
CLIENT_VARIABLES: Final = frozenset(
    PREFIX + name for name in ("JOB", "RUN_DIR", "RANK", "WORLD_SIZE", "LOCAL_RANK")
)

_TABLE: Final = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?")
_ASSIGNMENT: Final = re.compile(r"""\s*((?:[\w.-]+|"[^"]*"|'[^']*'|\s*\.\s*)+?)\s*=""")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was set, and what to touch to change it."""

    kind: str  # default, file, variable, flag
    where: str  # "/etc/snapshotd.toml:12", "SNAPSHOTD_LISTEN", "--listen"

    def __str__(self) -> str:
        return {"default": "default", "file": self.where}.get(
            self.kind, f"{self.kind} {self.where}"
        )

    @property
    def remedy(self) -> str:
        """What to do where the value is wrong."""
        return {
            "file": f"Mend {self.where}",
            "variable": f"Change or unset the variable {self.where}",
            "flag": f"Change the flag {self.where}",
        }.get(self.kind, "Set it in the file, by a variable, or by a flag")


DEFAULT: Final = Origin("default", "")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as one source states it."""

    value: Any
    origin: Origin


def known_keys() -> dict[str, FieldInfo]:
    """All dotted keys but those of [peers], with their descriptions and types."""
    keys: dict[str, FieldInfo] = {}
    for name, info in Config.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.update({f"{name}.{k}": v for k, v in info.annotation.model_fields.items()})
        elif name != "peers":
            keys[name] = info
    return keys


def variable_name(key: str) -> str:
    """Name of the environment variable for `key`."""
    section, dot, name = key.partition(".")
    if section == "peers" and dot:
        return f"{PREFIX}PEERS__{name}"
    return PREFIX + key.upper().replace(".", "__")


def from_text(key: str, text: str) -> Any:
    """A variable's or flag's text in the type of `key`; unchanged where it does not fit.

    What does not fit is refused later, with all other problems.
    """
    info = known_keys().get(key)
    annotation = info.annotation if info else str
    kind = next((k for k in (int, float) if k in (annotation, *get_args(annotation))), str)
    try:
        return kind(text)
    except ValueError:
        return text


def from_file(path: Path) -> dict[str, Setting]:
    """Read a TOML file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the config file {path}: {error}", "Check --config"
        ) from error
    lines = _lines_of_keys(text)
    for key, numbers in lines.items():
        if len(numbers) > 1:
            noun = "the node id" if key.startswith("peers.") else "the key"
            where = " and ".join(map(str, numbers))
            raise ConfigError(
                f"{path}: {noun} {key} is set twice, in lines {where}; expected once",
                "Remove one of the lines",
            )
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "Mend that line") from error
    return {key: Setting(value, _file_origin(path, lines, key)) for key, value in _flatten(tree)}


def from_environ(environ: Mapping[str, str]) -> dict[str, Setting]:
    """Read SNAPSHOTD_* variables; SNAPSHOTD_PEERS is a comma-separated list of node=address."""
    known = {variable_name(key): key for key in known_keys()}
    settings: dict[str, Setting] = {}
    for variable, text in environ.items():
        origin = Origin("variable", variable)
        if variable == PREFIX + "PEERS":
            for node, address in parse_peers(text, origin):
                settings[f"peers.{node}"] = Setting(address, origin)
        elif variable.startswith(PREFIX + "PEERS__"):
            settings["peers." + variable.removeprefix(PREFIX + "PEERS__")] = Setting(text, origin)
        elif variable in known:
            key = known[variable]
            settings[key] = Setting(from_text(key, text), origin)
        elif variable.startswith(PREFIX) and variable not in CLIENT_VARIABLES:
            key = variable.removeprefix(PREFIX).lower().replace("__", ".")
            settings[key] = Setting(text, origin)
    return settings


def from_flags(flags: Mapping[str, str]) -> dict[str, Setting]:
    """Take flags, dotted key to text."""
    return {
        key: Setting(from_text(key, text), Origin("flag", _flag(key)))
        for key, text in flags.items()
    }


def parse_peers(text: str, origin: Origin) -> Iterator[tuple[str, str]]:
    """Split "n0=host:port,n1=host:port".

    Raises:
        ConfigError: an entry is not node=address, or a node id stands twice.
    """
    seen: set[str] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        node, equals, address = entry.partition("=")
        if not equals or not node:
            raise ConfigError(
                f"{entry!r} ({origin}) names no peer; expected node_id=host:port", origin.remedy
            )
        if node in seen:
            raise ConfigError(f"the node id {node} stands twice ({origin})", origin.remedy)
        seen.add(node)
        yield node, address


def _flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", v) for inner, v in value.items())
        else:
            yield name, value


def _flag(key: str) -> str:
    if key.startswith("peers."):
        return f"--peer {key.removeprefix('peers.')}=..."
    return "--" + key.replace("_", "-") if key in known_keys() else f"--set {key}=..."


def _file_origin(path: Path, lines: Mapping[str, list[int]], key: str) -> Origin:
    numbers = lines.get(key)
    return Origin("file", f"{path}:{numbers[0]}" if numbers else str(path))


def _lines_of_keys(text: str) -> dict[str, list[int]]:
    """Line numbers where each dotted key is set.

    Only for messages: it knows tables and one-line assignments, which is all that this
    configuration has; tomllib decides what the file says.
    """
    lines: dict[str, list[int]] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.fullmatch(line):
            table = _unquoted(header[1]) + "."
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault(table + _unquoted(assignment[1]), []).append(number)
    return lines


def _unquoted(name: str) -> str:
    return name.replace('"', "").replace("'", "").replace(" ", "")
