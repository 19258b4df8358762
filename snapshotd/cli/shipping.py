"""What export and import have in common: the trainer's half as a program, and how far it is."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final

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

if TYPE_CHECKING:
    from snapshotd.tier.store import Store

MODULE = "snapshotd_client.export"
#: Of what the trainer's side says on standard error, the end.
_TAIL_BYTES: Final = 64 << 10
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_EXPECTED: Final = "Give an absolute directory, or a URL like s3://bucket/path, as in persist.url"


def check_client(command: str) -> None:
    """Tensors are read and written by the trainer's side. Raises CallerError: it is not here."""
    if importlib.util.find_spec("snapshotd_client") is None or not importlib.util.find_spec(
        "torch"
    ):
        raise CallerError(
            f"snapshotd {command} takes torch and the trainer's side, which are not installed here",
            "pip install 'snapshotd[client]', or run it where a trainer runs",
        )


def tier(url: str, job: str) -> Store:
    """The steps of a job where a daemon could have them. Raises CallerError: it could not."""
    from pydantic import ValidationError  # noqa: PLC0415  see status.py

    from snapshotd.config.sections import Persist  # noqa: PLC0415
    from snapshotd.tier.store import Store  # noqa: PLC0415

    try:
        Persist(url=url)
    except ValidationError as error:
        raise CallerError(
            f"{url!r} is no persistent tier: {error.errors()[0]['msg']}", _EXPECTED
        ) from error
    if not url:
        raise CallerError("the persistent tier has no URL", _EXPECTED)
    return Store(url, job)


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
        remedy = "Name a directory whose parent is there and may be written to"
        if isinstance(error, FileExistsError):
            remedy = "Remove what an export that was killed has left, or name another directory"
        raise CallerError(f"{half} cannot be made: {error.strerror}", remedy) from error
    try:
        yield half
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk refuses, said as any other error. Raises SnapshotdError."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = "Make room, or choose another disk" if error.errno in _FULL else ""
        raise SnapshotdError(f"{place}{error.strerror or error}", remedy) from error


def trainers_side(request: dict[str, Any], progress: Progress, task: TaskID) -> dict[str, Any]:
    """Have the trainer's side do it; what it has done. Raises SnapshotdError."""
    command = [sys.executable, "-m", MODULE, json.dumps(request)]
    done: dict[str, Any] | None = None
    # A file, for nobody reads it before the end: a pipe would fill up.
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    now, total = answer["progress"]
                    progress.update(task, completed=now, total=total)
                done = answer.get("done", done)
            process.wait()
        except BaseException:
            process.kill()
            raise
        errors.seek(max(0, errors.tell() - _TAIL_BYTES))
        said = errors.read().decode(errors="replace").strip().splitlines()
    if process.returncode == 0 and done is not None:
        return done
    try:
        why = json.loads(said[-1])["error"]
    except (IndexError, ValueError, KeyError, TypeError):
        why = said[-1] if said else f"it ended with {process.returncode}"
    raise SnapshotdError(f"{request['what']} failed: {why}")
