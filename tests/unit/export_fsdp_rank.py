"""One rank of the export test: trains FSDP2, writes its image; rank 0 writes the whole tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from snapshotd_client import capture
from tests.unit.client_fsdp_rank import build, train


def main(rank: int, directory: Path) -> None:
    store = directory / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    states = build(init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), seed=1)
    train(states, 2)
    plan = capture.plan("job", rank, 2, 2, states, {})
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    (directory / f"{rank}.image").write_bytes(image)
    (directory / f"{rank}.manifest").write_text(str(plan.manifest_bytes))
    whole = {f"model.{n}": full(t) for n, t in states["model"].state_dict().items()}
    for index, entry in states["opt"].state_dict()["state"].items():
        whole |= {f"opt.state.{index}.{n}": full(t) for n, t in entry.items()}
    if rank == 0:
        torch.save(whole, directory / "whole.pt")
    dist.destroy_process_group()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
