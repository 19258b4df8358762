"""Options that several commands share: the configuration's flags, and where the daemon is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from snapshotd.config import LoadedConfig, load
from snapshotd.config.sources import known_keys
from snapshotd.errors import CallerError, ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    # argparse gives its subparsers no public type.
    Commands = Any

ADDRESS_FILE: Final = "address"

#: Shorter spellings of common keys; every key also has its own name as a flag.
_SHORT: Final[Mapping[str, tuple[str, ...]]] = {
    "protection.group_size": ("--group-size",),
    "protection.parity": ("--parity",),
}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add --config, one flag for each key, --peer and --set."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file")
    group = parser.add_argument_group(
        "configuration", "flags beat SNAPSHOTD_* variables, which beat the file"
    )
    for key, info in known_keys().items():
        spellings = dict.fromkeys((f"--{key}", f"--{key.replace('_', '-')}", *_SHORT.get(key, ())))
        description = (info.description or "").replace("%", "%%")
        group.add_argument(
            *spellings, action=_Keep, key=key, metavar=_metavar(key), help=description
        )
    group.add_argument(
        "--peer", action=_KeepPeer, metavar="NODE=HOST:PORT", help="a seed; repeatable"
    )
    group.add_argument(
        "--set", action=_KeepAny, metavar="KEY=VALUE", help="any key by its dotted name; repeatable"
    )


def loaded(arguments: argparse.Namespace) -> LoadedConfig:
    """The configuration of these arguments and this process's environment."""
    return load(arguments.config, flags(arguments), os.environ)


def flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Dotted key to text, of the flags that were given."""
    return getattr(arguments, "flags", None) or {}


def add_address_options(parser: argparse.ArgumentParser) -> None:
    """Add the ways to name a daemon, and the certificate to show to it."""
    parser.add_argument("--address", metavar="HOST:PORT", help="the daemon's address")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--run-dir", type=Path, metavar="DIR", help="a daemon's run directory")
    where.add_argument("--config", type=Path, metavar="FILE", help="a daemon's TOML file")
    parser.add_argument(
        "--timeout-s", type=float, default=5.0, metavar="S", help="give up after (default 5)"
    )


def daemon_address(arguments: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """Address of the daemon that is meant: --address, else what stands in its run directory.

    Raises:
        CallerError: no daemon has written its address there.
    """
    if arguments.address:
        return str(arguments.address)
    return read_address(run_dir(arguments, environ))


def read_address(run_dir: Path) -> str:
    """Address of the daemon that serves `run_dir`.

    Raises:
        CallerError: there is none, or its file cannot be read.
    """
    try:
        return (run_dir / ADDRESS_FILE).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CallerError(
            f"no daemon serves {run_dir}: cannot read {error.filename}: {error.strerror}",
            "Start one with `snapshotd serve`, or name another with --address, --run-dir, "
            "--config or SNAPSHOTD_RUN_DIR",
        ) from error


def default_directory(key: str) -> Path:
    """Default of a directory key."""
    return Path(known_keys()[key].default)


def run_dir(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Path:
    """The run directory that is meant, whether or not anybody serves it."""
    if arguments.run_dir:
        return Path(arguments.run_dir)
    if arguments.config:
        return load(arguments.config, {}, environ).config.run_dir
    return Path(environ.get("SNAPSHOTD_RUN_DIR") or default_directory("run_dir"))


def _metavar(key: str) -> str:
    return key.rpartition(".")[2].upper()


class _Keep(argparse.Action):
    """Keeps a flag's text under its dotted key, in `flags`; the last one given counts."""

    def __init__(self, option_strings: Sequence[str], key: str = "", **more: Any) -> None:
        # argparse derives a name for each option; all of ours are kept under one.
        super().__init__(option_strings, **{**more, "dest": "flags"})
        self._key = key

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002  argparse passes it
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        key, text = self.setting(str(values), option_string or "")
        given = flags(namespace)
        if key.startswith("peers.") and given.get(key, text) != text:
            raise ConfigError(
                f"the node id {key.removeprefix('peers.')} stands twice among the flags, with "
                f"{given[key]} and {text}; expected once",
                "Remove one of them",
            )
        namespace.flags = {**given, key: text}

    def setting(self, text: str, option: str) -> tuple[str, str]:  # noqa: ARG002  subclasses use it
        return self._key, text


class _KeepAny(_Keep):
    """KEY=VALUE."""

    def setting(self, text: str, option: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{option} {text} is not {self.metavar}", f"Write {option} {self.metavar}"
            )
        return key, value


class _KeepPeer(_KeepAny):
    """NODE=HOST:PORT."""

    def setting(self, text: str, option: str) -> tuple[str, str]:
        node, address = super().setting(text, option)
        return f"peers.{node}", address
