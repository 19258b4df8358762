"""`snapshotd gc`: remove segments and sockets that no live daemon owns.

A daemon owns a directory by the lock in it, and the kernel gives that lock up with the process.
What is removed cannot be restored from: a daemon that is only stopped owns nothing either.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotd.cli.options import ADDRESS_FILE, Commands, default_directory
from snapshotd.cli.units import in_bytes
from snapshotd.config import load
from snapshotd.errors import CallerError
from snapshotd.memory.locks import LOCK_NAME, DirectoryLock

_BLOCK_BYTES: Final = 512  # the unit of st_blocks, whatever the file system's own


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "gc",
        help="remove segments and sockets that no live daemon owns; a stopped daemon owns nothing",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="take the directories from it")
    parser.add_argument("--shm-dir", type=Path, metavar="DIR", help="segments")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="sockets")
    parser.add_argument("--dry-run", action="store_true", help="say it, do not do it")
    parser.set_defaults(handler=_gc)


@dataclass(frozen=True, slots=True)
class Finding:
    """One directory that was looked at.

    Attributes:
        freed_bytes: memory that its removal gives back.
        owner: why it is left alone; empty where nobody owns it.
    """

    path: Path
    files: int
    freed_bytes: int
    owner: str = ""


def collect(shm_dir: Path, run_dir: Path, *, dry_run: bool) -> Iterator[Finding]:
    """Remove what is unowned, slot by slot, then the sockets; only names that we make.

    Raises:
        CallerError: a directory may not be read or changed by this user.
    """
    try:
        if shm_dir.is_dir():
            yield from _collect_segments(shm_dir, dry_run=dry_run)
        if run_dir.is_dir():
            yield _collect_sockets(run_dir, dry_run=dry_run)
    except PermissionError as error:
        raise CallerError(
            f"{error.filename}: {error.strerror}", "Run it as the daemon's user, or as root"
        ) from error


def _gc(arguments: argparse.Namespace) -> int:
    shm_dir, run_dir = _directories(arguments, os.environ)
    freed_bytes = 0
    for finding in collect(shm_dir, run_dir, dry_run=arguments.dry_run):
        freed_bytes += finding.freed_bytes
        print(_sentence(finding, dry_run=arguments.dry_run))
    print(f"{in_bytes(freed_bytes)} {'would be freed' if arguments.dry_run else 'freed'}")
    return 0


def _sentence(finding: Finding, *, dry_run: bool) -> str:
    if finding.owner:
        return f"{finding.path}: left alone: {finding.owner}"
    verb = "would remove" if dry_run else "removed"
    return f"{finding.path}: {verb} {finding.files} files, {in_bytes(finding.freed_bytes)}"


def _collect_segments(shm_dir: Path, *, dry_run: bool) -> Iterator[Finding]:
    try:
        # A slot without an SMP may be one that a live daemon is about to start again.
        with DirectoryLock(shm_dir):
            for slot_dir in sorted(shm_dir.glob("slot-*")):
                if slot_dir.is_dir() and not slot_dir.is_symlink():
                    yield _collect_slot(slot_dir, dry_run=dry_run)
    except CallerError as error:
        yield Finding(shm_dir, 0, 0, owner=error.what)


def _collect_slot(slot_dir: Path, *, dry_run: bool) -> Finding:
    try:
        # Held until all is gone, so that no daemon adopts what is being removed.
        with DirectoryLock(slot_dir):
            return _remove_slot(slot_dir, dry_run=dry_run)
    except CallerError as error:
        return Finding(slot_dir, 0, 0, owner=error.what)


def _remove_slot(slot_dir: Path, *, dry_run: bool) -> Finding:
    files = [path.lstat() for path in slot_dir.iterdir() if path.name != LOCK_NAME]
    freed_bytes = sum(file.st_blocks for file in files) * _BLOCK_BYTES
    if not dry_run:
        shutil.rmtree(slot_dir)
    return Finding(slot_dir, len(files), freed_bytes)


def _collect_sockets(run_dir: Path, *, dry_run: bool) -> Finding:
    try:
        with DirectoryLock(run_dir):
            return _remove_sockets(run_dir, dry_run=dry_run)
    except CallerError as error:
        return Finding(run_dir, 0, 0, owner=error.what)


def _remove_sockets(run_dir: Path, *, dry_run: bool) -> Finding:
    # Locks stay: a trainer that outlived its daemon still holds its own. Job records stay too.
    found = [path for path in run_dir.iterdir() if _is_stale(path)]
    if not dry_run:
        for path in found:
            path.unlink()
    return Finding(run_dir, len(found), 0)


def _is_stale(path: Path) -> bool:
    return path.name == ADDRESS_FILE or stat.S_ISSOCK(path.lstat().st_mode)


def _directories(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Path, Path]:
    """Segments and sockets: flags, else the config file, else variables, else the defaults."""
    shm_dir, run_dir = arguments.shm_dir, arguments.run_dir
    if arguments.config:
        config = load(arguments.config, {}, environ).config
        return shm_dir or config.shm_dir, run_dir or config.run_dir
    return (
        shm_dir or Path(environ.get("SNAPSHOTD_SHM_DIR") or default_directory("shm_dir")),
        run_dir or Path(environ.get("SNAPSHOTD_RUN_DIR") or default_directory("run_dir")),
    )
