"""`snapshotd import`: a checkpoint of torch.distributed.checkpoint as a job's start."""

from __future__ import annotations

import argparse
import mmap
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from snapshotd.cli.options import Commands
from snapshotd.cli.signals import Ending
from snapshotd.errors import CallerError, SnapshotdError
from snapshotd.metadata import Version

if TYPE_CHECKING:
    from rich.progress import Progress

    from snapshotd.tier.store import Store


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "import",
        help="make a checkpoint of torch.distributed.checkpoint the start of a job",
        description="Writes the checkpoint in DIR to the persistent tier, as the step that a job "
        "which has nothing in memory restores. Its top-level keys must be the names that the job "
        "gives to Snapshotter, and under each what that object's state_dict() returns. The whole "
        "state is read into memory.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--to", dest="url", metavar="URL", required=True, help="as in persist.url")
    parser.add_argument("--step", type=int, default=0, help="the step it stands for (0)")
    parser.add_argument(
        "--world", type=int, default=1, help="ranks of the job; each gets all of the state (1)"
    )
    parser.set_defaults(handler=_import)


def _import(arguments: argparse.Namespace) -> int:
    from snapshotd.cli.shipping import (  # noqa: PLC0415  it draws
        bars,
        check_client,
        disk_errors,
        tier,
        trainers_side,
    )
    from snapshotd.rpc.checks import MAX_WORLD, check_job  # noqa: PLC0415
    from snapshotd.wire.protocol import MAX_STEP  # noqa: PLC0415

    check_client("import")
    check_job(arguments.job)
    if not 0 <= arguments.step <= MAX_STEP:
        raise CallerError(f"--step {arguments.step}", f"Give a step of 0 to {MAX_STEP}")
    if not 1 <= arguments.world <= MAX_WORLD:
        raise CallerError(f"--world {arguments.world}", f"Give 1 to {MAX_WORLD} ranks")
    store = tier(arguments.url, arguments.job)
    stored = store.look()
    if stored.steps or stored.damaged:
        raise CallerError(
            f"{arguments.url} has steps of a job {arguments.job!r} already",
            "Give the new job another name",
        )
    version = Version(int(time.time()), arguments.step)
    with (
        disk_errors(),
        Ending() as ending,
        TemporaryDirectory(prefix="snapshotd-import-") as scratch,
        ending.breakable(),
        bars() as progress,
    ):
        request = {
            "what": "import",
            "checkpoint": str(arguments.directory.absolute()),
            "directory": scratch,
            "job": arguments.job,
            "step": arguments.step,
            "world": arguments.world,
        }
        done = trainers_side(request, progress, progress.add_task("read", total=None))
        try:
            for shard, (path, manifest_bytes) in enumerate(done["images"]):
                _write(store, version, arguments.world, shard, Path(path), manifest_bytes, progress)
            store.publish(version, arguments.world, 0)
        except BaseException:
            with suppress(SnapshotdError):  # what came before says more
                store.remove([version])
            raise
    print(f"job {arguments.job} starts from {version}, in {arguments.url}")
    return 0


def _write(
    store: Store,
    version: Version,
    world: int,
    shard: int,
    path: Path,
    manifest_bytes: int,
    progress: Progress,
) -> None:
    from snapshotd.coding.digest import content_digest, grain_digests  # noqa: PLC0415
    from snapshotd.rpc.convert import version_to  # noqa: PLC0415
    from snapshotd.wire.v1.segment_pb2 import SealRecord  # noqa: PLC0415

    task = progress.add_task(f"write shard {shard}", total=None)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping,
        memoryview(mapping) as image,
    ):
        digests = grain_digests(image)
        record = SealRecord(
            job=store.job,
            world=world,
            shard=shard,
            version=version_to(version),
            image_bytes=len(image),
            manifest_bytes=manifest_bytes,
            grain_digests=digests,
            content_digest=content_digest(digests),
        )
        store.write(
            image, record, 0.0, lambda at, total: progress.update(task, completed=at, total=total)
        )
    path.unlink()
