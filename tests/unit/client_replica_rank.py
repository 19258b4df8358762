"""One rank of the replica test: DDP stores a share each, puts them together, tells faults."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from snapshotd_client import ReplicasDiverged
from snapshotd_client import accord as accord_module
from snapshotd_client.accord import Accord
from snapshotd_client.apply import apply
from snapshotd_client.assembling import assemble, is_divided
from snapshotd_client.capture import Planner
from snapshotd_client.exact import same_bits
from snapshotd_client.identity import Identity
from snapshotd_client.leaves import local_piece
from snapshotd_client.predicting import predict_image_bytes
from tests.unit.ranks import leave

WORLD = 4


def build(seed, kind="ddp"):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 7))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard")))
    # A scale that each rank has for itself: nobody says that it is the same.
    return {
        "model": model,
        "opt": torch.optim.AdamW(model.parameters(), lr=0.01),
        "own": torch.full((16,), float(dist.get_rank())),
    }


def train(states, steps):
    for _ in range(steps):
        states["opt"].zero_grad()
        states["model"](torch.rand(8, 64)).square().mean().backward()
        states["opt"].step()


def shared_tensors(states):
    parameters = list(states["model"].parameters())
    moments = [states["opt"].state[p][k] for p in parameters for k in states["opt"].state[p]]
    return [local_piece(t) for t in parameters + moments]


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    accord_module.MEET_S = 3.0
    who = Identity("job", "job", 0, rank, WORLD, rank, None)
    for kind, holders in (("ddp", 4), ("hsdp", 2)):
        first = build(1, kind)
        predicted = predict_image_bytes(first, None, rank, WORLD)
        torch.manual_seed(100 + rank)
        train(first, 3)
        accord = Accord(who, check_every=2)
        planner = Planner("job", rank, WORLD, first, accord=accord)
        plan = planner.plan(3, {"by": rank})
        accord.check(3, 3, plan.shared)
        assert plan.image_bytes <= predicted
        stored = [e.bytes for e in plan.manifest.extents if e.HasField("part")]
        # FSDP's counts of steps are plain tensors: nothing keeps them alike.
        shared = [t for t in shared_tensors(first) if kind == "ddp" or t.dim()]
        whole = sum(t.nbytes for t in shared)
        assert sum(e.part.whole for e in plan.manifest.extents) == whole
        assert abs(sum(stored) * holders / whole - 1) < 0.01, (stored, whole)
        image = bytearray(plan.image_bytes)
        plan.write(memoryview(image))
        expected = [t.clone() for t in shared_tensors(first)]
        buffers = [b.clone() for b in first["model"].buffers()]

        second = build(2, kind)
        manifest = plan.manifest
        assert is_divided(manifest)
        made, length, received = assemble(memoryview(bytes(image)), manifest, 30.0)
        assert received == whole - sum(stored)
        with memoryview(made) as view:
            values = apply(view, length, job="job", world=WORLD, shard=rank, states=second)
        assert values == {"by": rank}
        assert all(map(same_bits, expected, shared_tensors(second)))
        assert all(map(same_bits, buffers, second["model"].buffers()))
        assert second["own"].tolist() == [float(rank)] * 16

        # One rank's memory goes wrong: all of its holders are told, by name.
        sick = next(iter(second["model"].parameters()))
        if rank == 2:
            with torch.no_grad():
                local_piece(sick).view(-1)[3] += 1
        again = Planner("job", rank, WORLD, second, accord=accord).plan(4, {"by": rank})
        accord.check(5, 5, again.shared)  # not due
        told = ""
        try:
            accord.check(4, 4, again.shared)
        except ReplicasDiverged as error:
            told = str(error)
        assert bool(told) == (kind == "ddp" or rank in (0, 2)), (kind, rank)
        if told:
            assert "0.weight: ranks [" in told, told
        if kind == "ddp":
            assert "ranks [2] differ from the rest of [0, 1, 2, 3]" in told, told

        # A rank that finds other pieces than it agreed on stores all of its own.
        if rank == 1:
            first["opt"].state.popitem()
        alone = Planner("job", rank, WORLD, first, accord=accord).plan(6, {})
        assert is_divided(alone.manifest) == (rank != 1), (kind, rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
