"""Which certificate a command shows to a daemon: that of the daemon of this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotd.cli.options import run_dir
from snapshotd.config import load
from snapshotd.errors import CallerError
from snapshotd.wire.protocol import TLS_FILE

if TYPE_CHECKING:
    from snapshotd.rpc.tls import Identity


def identity(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Identity | None:
    """From [tls] of --config, else as the daemon of the run directory says; None without TLS.

    Raises:
        ConfigError: the files are not fit for it.
    """
    # It brings gRPC; see status.py.
    from snapshotd.rpc.tls import Identity, TlsFiles  # noqa: PLC0415

    if arguments.config:
        config = load(arguments.config, {}, environ).config
        configured = TlsFiles.of(config.tls)
        return Identity.load(configured, config.cluster_id) if configured else None
    told = _told(run_dir(arguments, environ) / TLS_FILE)
    if told is None:
        return None
    files = TlsFiles(*(Path(told[key]) for key in ("ca", "cert", "key")))
    return Identity.load(files, told["cluster_id"])


def _told(path: Path) -> dict[str, str] | None:
    try:
        told: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CallerError(
            f"cannot tell which certificate to show: {path}: {error}",
            "Name the daemon's configuration by --config",
        ) from error
    return told
