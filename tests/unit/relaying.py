"""Ranks of several layouts in one process, without communication; an executor of ranges."""

from __future__ import annotations

from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import capture
from snapshotd_client.apply import apply
from snapshotd_client.identity import Identity
from snapshotd_client.relayout import Relayout
from snapshotd_client.surveying import survey


@contextmanager
def rank_of(rank, world):
    """torch believes that this process is that rank; nothing can be sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(full, mesh, placements):
    """This rank's DTensor of a whole tensor; `mesh` None: the whole, plain."""
    if mesh is None:
        return full.clone()
    # Not the public one: it remembers the answer for an equal mesh, which another rank had here.
    shape, offset = _compute_local_shape_and_global_offset(
        full.shape, mesh.shape, mesh.get_coordinate(), placements
    )
    local = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def mesh_of(shape, *names):
    """A mesh of all ranks; its dimensions are called "d0" and so on if not otherwise."""
    # torch keeps what it knows of a mesh for the next equal one: here that is another rank's.
    names = [f"{n}{dist.get_rank()}" for n in names or [f"d{i}_" for i in range(len(shape))]]
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names))


def image_of(states, rank, world, values=None, **options):
    """(image, manifest bytes) as the planner makes it."""
    plan = capture.plan("job", rank, world, 7, states, values or {}, **options)
    image = bytearray(b"\xee" * plan.image_bytes)
    plan.write(memoryview(image))
    return bytes(image), plan.manifest_bytes


def executed(ranges, images, length):
    """What a daemon makes of a Fill; refuses what it would refuse."""
    made = bytearray(length)
    at = 0
    for shard, offset, count, to in zip(
        ranges.shards.tolist(), ranges.offsets.tolist(), ranges.lengths.tolist(),
        ranges.to.tolist(), strict=True,
    ):  # fmt: skip
        assert count >= 1
        assert at <= to <= to + count <= length
        assert 0 <= offset <= offset + count <= len(images[shard])
        made[to : to + count] = images[shard][offset : offset + count]
        at = to + count
    return made


def who(rank, world):
    return Identity("job", "job", 0, rank, world, rank, None)


def manifests_of(images):
    return {
        shard: segment_pb2.Manifest.FromString(image[:length])
        for shard, (image, length) in images.items()
    }


def relaid(images, states, rank, world, *, strict=True):
    """Restore `states` from images of another layout.

    Returns:
        the keyword values, the plan of the image, and what did not fit.
    """
    whole = {shard: image for shard, (image, _) in images.items()}
    relayout = Relayout(manifests_of(images), states, who(rank, world), survey(states))
    ranges, places, length = relayout.skeletons()
    read = executed(ranges, whole, length)
    plan = relayout.plan({s: bytes(read[at : at + n]) for s, (at, n) in places.items()})
    if strict:
        assert not relayout.problems, relayout.problems
    image = executed(plan.ranges, whole, plan.image_bytes)
    for offset, text in plan.texts:
        image[offset : offset + len(text)] = text
    values = apply(
        memoryview(image), plan.manifest_bytes, job="job", world=world, shard=rank, states=states,
        on_rng=world == len(images),
    )  # fmt: skip
    return values, plan, relayout.problems
