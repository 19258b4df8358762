"""One rank of the export test: trains, writes its image; rank 0 writes the whole tensors.

What is whole, and what it is called, torch itself says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh

from snapshotd_client import capture
from tests.unit import client_fsdp_rank, client_replica_rank
from tests.unit.ranks import leave


def main(kind: str, rank: int, world: int, directory: Path) -> None:
    store = directory / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        states = client_fsdp_rank.build(mesh, seed=1)
        client_fsdp_rank.train(states, 2)
    else:
        states = client_replica_rank.build(1, kind)
        torch.manual_seed(100 + rank)
        client_replica_rank.train(states, 2)
    plan = capture.plan("job", rank, world, 2, states, {})
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    (directory / f"{rank}.image").write_bytes(image)
    (directory / f"{rank}.manifest").write_text(str(plan.manifest_bytes))
    options = StateDictOptions(full_state_dict=True)
    model, opt = get_state_dict(states["model"], states["opt"], options=options)
    if rank == 0:
        torch.save({"model": model, "opt": opt}, directory / "whole.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
