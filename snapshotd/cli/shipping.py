"""What export and import have in common: the trainer's half as a program, and how far it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from snapshotd.errors import CallerError, SnapshotdError

MODULE = "snapshotd_client.export"


def check_client(command: str) -> None:
    """Tensors are read and written by the trainer's side. Raises CallerError: it is not here."""
    if importlib.util.find_spec("snapshotd_client") is None or not importlib.util.find_spec(
        "torch"
    ):
        raise CallerError(
            f"snapshotd {command} takes torch and the trainer's side, which are not installed here",
            "pip install 'snapshotd[client]', or run it where a trainer runs",
        )


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress on standard error; standard output is for results."""
    from rich.console import Console  # noqa: PLC0415  only where something is drawn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its name when all is done, and is gone otherwise.

    Raises:
        CallerError: something is there already, or nothing can be made there.
    """
    if target.exists() or target.is_symlink():
        raise CallerError(f"{target} is there already", "Name a directory that does not exist")
    half = target.with_name(f".{target.name}.half")
    try:
        half.mkdir()
    except OSError as error:
        raise CallerError(
            f"{half} cannot be made: {error.strerror}",
            "Remove what an export that was killed has left, or name another directory",
        ) from error
    try:
        yield half
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def trainers_side(request: dict[str, Any], progress: Progress, task: TaskID) -> dict[str, Any]:
    """Have the trainer's side do it; what it has done. Raises SnapshotdError."""
    command = [sys.executable, "-m", MODULE, json.dumps(request)]
    done: dict[str, Any] | None = None
    # Nobody reads a pipe of errors meanwhile, and libraries may say more than it holds.
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            if "progress" in answer:
                now, total = answer["progress"]
                progress.update(task, completed=now, total=total)
            done = answer.get("done", done)
        process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if process.returncode == 0 and done is not None:
        return done
    try:
        why = json.loads(said[-1])["error"]
    except (IndexError, ValueError, KeyError, TypeError):
        why = said[-1] if said else f"it ended with {process.returncode}"
    raise SnapshotdError(f"{request['what']} failed: {why}")
