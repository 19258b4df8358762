"""`snapshotd export`: a step as files that are read without snapshotd."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Final

from snapshotd.cli.options import Commands, add_address_options, daemon_address
from snapshotd.cli.signals import Ending
from snapshotd.cli.trust import identity
from snapshotd.errors import CallerError, DamagedBytes, PeerError
from snapshotd.metadata import Version

if TYPE_CHECKING:
    from rich.progress import Progress

    from snapshotd.rpc.channels import Peer
    from snapshotd.wire.v1 import node_pb2 as pb
    from snapshotd.wire.v1.segment_pb2 import SealRecord

#: Images that are read at once from a store.
_AT_ONCE: Final = 4
#: The same from memory. More, because an image is kept for as long as it is being read; yet each
#: takes a thread, and several descriptors.
_AT_ONCE_FROM_MEMORY: Final = 64


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a step as a checkpoint that torch or safetensors reads by itself",
        description="Writes a step of a job into a new directory DIR. The images of all shards are "
        "brought beside it first, so it takes twice the size of the state there.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--job", help="which job; needless where there is one only")
    parser.add_argument("--step", default="newest", help="a step, or newest (the default)")
    parser.add_argument("--format", choices=("dcp", "safetensors"), default="dcp")
    parser.add_argument(
        "--from",
        dest="url",
        metavar="URL",
        help="the persistent tier, as in persist.url; without it: from the memory of the daemons",
    )
    add_address_options(parser)
    parser.set_defaults(handler=_export)


Image = Iterator["SealRecord | memoryview | bytes"]


@dataclass(frozen=True)
class Source:
    """Where the shards of one step are; `image` gives a shard's record, then its image."""

    job: str
    version: Version
    world: int
    at_once: int
    image: Callable[[int], Image]


def _export(arguments: argparse.Namespace) -> int:
    from snapshotd.cli.shipping import (  # noqa: PLC0415  it draws
        bars,
        check_client,
        disk_errors,
        trainers_side,
        unfinished,
    )

    check_client("export")
    arguments.step = _wanted(arguments.step)
    source: Source = _memory(arguments) if arguments.url is None else _tier(arguments)
    target = arguments.directory.absolute()
    with (
        disk_errors(),
        Ending() as ending,
        unfinished(target) as half,
        ending.breakable(),
        bars() as progress,
    ):
        images = half / ".images"
        images.mkdir()
        manifests = _bring(source, images, progress)
        request = {
            "what": "export",
            "images": [str(images / str(shard)) for shard in range(source.world)],
            "manifest_bytes": manifests,
            "format": arguments.format,
            "directory": str(half),
        }
        done = trainers_side(request, progress, progress.add_task("write", total=None))
        for image in images.iterdir():
            image.unlink()
        images.rmdir()
    for name in done["diverged"]:
        print(f"warning: replicas differ: {name}; the first was taken")
    print(
        f"{source.version} of job {source.job}: {done['tensors']} tensors, {done['objects']} other "
        f"values, {done['bytes']} bytes in {target}"
    )
    return 0


def _bring(source: Source, images: Path, progress: Progress) -> list[int]:
    """All images as files named by their shards; the lengths of their manifests."""
    task, over = progress.add_task("fetch", total=0), Event()

    def one(shard: int) -> int:
        manifest_bytes = 0
        with (images / str(shard)).open("xb") as file:
            for part in source.image(shard):
                if over.is_set():
                    break
                if isinstance(part, (bytes, memoryview)):
                    file.write(part)
                    progress.advance(task, len(part))
                else:
                    manifest_bytes = part.manifest_bytes
                    known = progress.tasks[task].total or 0
                    progress.update(task, total=known + part.image_bytes)
        return manifest_bytes

    with ThreadPoolExecutor(source.at_once) as pool:
        try:
            return list(pool.map(one, range(source.world)))
        except BaseException:
            over.set()  # or all that is under way would be waited for
            raise


def _tier(arguments: argparse.Namespace) -> Source:
    from snapshotd.cli.shipping import tier  # noqa: PLC0415  it draws

    if not arguments.job:
        raise CallerError("--from takes --job", "Name the job whose step is to be exported")
    store = tier(arguments.url, arguments.job)
    stored = store.look()
    steps = {s.version: s for s in stored.steps}
    if not steps:
        why = "".join(f"; {damage}" for _, damage in stored.damaged)
        raise DamagedBytes(
            f"{arguments.url} has no whole step of a job {arguments.job!r}{why}",
            "Correct --from or --job, or wait until the daemons have written one",
        )
    version = _chosen(arguments.step, list(steps), arguments.url)

    def image(shard: int) -> Image:
        record = store.indexed_seal(version, shard)
        yield record
        yield from store.read(version, record)

    return Source(arguments.job, version, steps[version].world, _AT_ONCE, image)


def _memory(arguments: argparse.Namespace) -> Source:
    from snapshotd.rpc.fetching import fetch_image  # noqa: PLC0415  see status.py
    from snapshotd.rpc.operator import fetch_facts, fetch_status  # noqa: PLC0415

    who = identity(arguments, os.environ)
    status = fetch_status(daemon_address(arguments, os.environ), arguments.timeout_s, who)
    job = _job(status, arguments.job)
    live = [m.address for m in status.members if m.state in ("live", "suspect")]
    held = _held([fetch_facts(node, arguments.timeout_s, who) for node in live], job.job)
    point = Version(job.committed.epoch, job.committed.step)
    version = _chosen(arguments.step, [v for v in held if v <= point], "memory")
    missing = [str(s) for s in range(job.world) if s not in held[version]]
    if missing:
        raise PeerError(
            f"{version} of job {job.job!r} is not whole in memory: no live node has shard "
            f"{', '.join(missing)}",
            "Wait until lost shards are rebuilt (`snapshotd status`), or export from the "
            "persistent tier by --from",
        )

    def image(shard: int) -> Image:
        peer, size = held[version][shard]
        return fetch_image(
            status.cluster_id, peer, job.job, version, shard, size, arguments.timeout_s, who
        )

    return Source(job.job, version, job.world, min(job.world, _AT_ONCE_FROM_MEMORY), image)


def _job(status: pb.NodeStatus, name: str | None) -> pb.JobFacts:
    """The job that is meant, which has a restore point."""
    jobs = {j.job: j for j in status.jobs if j.HasField("committed")}
    if name is None and len(jobs) != 1:
        raise CallerError(
            f"jobs with a snapshot here: {', '.join(sorted(jobs)) or 'none'}", "Name one by --job"
        )
    found = jobs.get(name) if name else next(iter(jobs.values()))
    if found is None:
        raise CallerError(f"no snapshot of a job {name!r} is known here", "See `snapshotd status`")
    return found


def _held(nodes: list[pb.NodeFacts], job: str) -> dict[Version, dict[int, tuple[Peer, int]]]:
    """Of each version, for each shard that a live slot has: which one, and the image's bytes."""
    from snapshotd.rpc.channels import Peer  # noqa: PLC0415  see status.py
    from snapshotd.wire.protocol import GRPC  # noqa: PLC0415

    held: dict[Version, dict[int, tuple[Peer, int]]] = {}
    for node, slot in ((facts.node, s) for facts in nodes for s in facts.slots if s.address):
        peer = Peer(node, slot.address, slot.plane or GRPC)
        for data in (data for data in slot.data if data.job == job):
            version = Version(data.version.epoch, data.version.step)
            held.setdefault(version, {})[data.shard] = peer, data.image_bytes
    return held


def _wanted(text: str) -> int | None:
    """A step, None for the newest."""
    try:
        return None if text == "newest" else int(text)
    except ValueError as error:
        remedy = "Name a step by its number, or say newest"
        raise CallerError(f"--step {text[:40]}", remedy) from error


def _chosen(step: int | None, versions: list[Version], where: str) -> Version:
    """The newest version, or the newest of a step."""
    found = [v for v in versions if step in (None, v.step)]
    if not found:
        there = ", ".join(str(v.step) for v in sorted(versions)) or "none"
        named = "newest" if step is None else step
        raise DamagedBytes(f"step {named} is not in {where}; there: {there}")
    return max(found)
