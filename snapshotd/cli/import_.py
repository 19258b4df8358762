"""`snapshotd import`: a checkpoint of torch.distributed.checkpoint as a job's start."""

from __future__ import annotations

import argparse
import mmap
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from snapshotd.cli.options import Commands
from snapshotd.errors import CallerError
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
    from snapshotd.cli.shipping import bars, check_client, trainers_side  # noqa: PLC0415  it draws
    from snapshotd.rpc.checks import check_job, check_rank, check_step  # noqa: PLC0415
    from snapshotd.tier.store import Store  # noqa: PLC0415  see status.py

    check_client("import")
    check_job(arguments.job)
    check_step(max(0, arguments.step))
    check_rank(0, arguments.world)
    store = Store(arguments.url, arguments.job)
    steps = store.look().steps
    if steps:
        raise CallerError(
            f"{arguments.url} has steps of a job {arguments.job!r} already",
            "Give the new job another name",
        )
    version = Version(int(time.time()), arguments.step)
    with TemporaryDirectory(prefix="snapshotd-import-") as scratch, bars() as progress:
        request = {
            "what": "import",
            "checkpoint": str(arguments.directory.absolute()),
            "directory": scratch,
            "job": arguments.job,
            "step": arguments.step,
            "world": arguments.world,
        }
        done = trainers_side(request, progress, progress.add_task("read", total=None))
        for shard, (path, manifest_bytes) in enumerate(done["images"]):
            _write(store, version, arguments.world, shard, Path(path), manifest_bytes, progress)
        store.publish(version, arguments.world, 0)
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
