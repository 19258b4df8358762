"""One rank of a job in some layout: restores, trains, is protected, says what it holds.

What each rank finds it writes to a file, as JSON: digests of whole tensors by plain name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from snapshotd_client import Snapshotter
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.names import Names

WIDTH = 130


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width + 1)
        self.down = nn.Linear(4 * width + 1, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(torch.relu(self.down(torch.relu(self.up(x)))))


def build(kind, world, width):
    torch.manual_seed(7)
    model = Net(width)
    match kind:
        case "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        case "fsdp":
            mesh = init_device_mesh("cpu", (world,))
            for layer in (model.up, model.down):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        case "hsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2)))
        case "tp":
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    return model


def train(model, opt, step, world):
    """The same batch of 12 in every layout, each rank of data parallelism a share of it."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.rand(12, model_width(model), generator=generator)
    if not any(name == "tp" for name in sys.argv):
        batch = batch.chunk(world)[dist.get_rank()]
    loss = model(batch).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    found = loss.detach().clone()
    dist.all_reduce(found)
    return found.item() / world


def model_width(model):
    return next(m for m in model.modules() if isinstance(m, Net)).up.weight.shape[1]


def digests(states):
    names = Names(states).parameters
    found = {}
    for parameter in states["model"].parameters():
        name = names[id(parameter)]
        state = states["opt"].state.get(parameter, {})
        for key, tensor in {"": parameter, **state}.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            data = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{name} {key}"] = hashlib.sha256(data).hexdigest()
    return found


def main():
    given = json.loads(sys.argv[1])
    rank, world, kind = given["rank"], given["world"], sys.argv[2]
    out = {}
    dist.init_process_group(
        "gloo", init_method=f"file://{given['store']}", rank=rank, world_size=world
    )
    width = given.get("width", WIDTH)
    model = build(kind, world, width)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    states = {"model": model, "opt": opt}
    told = {"replicas": range(world)} if kind == "tp" else {}
    if given.get("spoil") == rank:
        with torch.no_grad():
            next(model.parameters()).view(-1)[5] += 1
    try:
        snap = Snapshotter(
            states, job="job", rank=rank, world_size=world,
            local_rank=given["slot"], run_dir=given["run_dir"], **told, **given.get("options", {}),
        )  # fmt: skip
        restored = snap.restore(**given.get("restore", {}))
        out["restored"] = None
        first = 0
        if restored is not None:
            out["restored"] = {**vars(restored)}
            out["came back"] = digests(states)
            first = restored.step + 1
        out["losses"] = []
        for step in range(first, first + given["steps"]):
            out["losses"].append(train(model, opt, step, world))
            snap.step(step, at=step, by=rank)
            snap.wait_protected(timeout_s=60)
        out["left"] = digests(states)
    except SnapshotdClientError as error:
        out["error"] = [type(error).__name__, str(error)]
    Path(given["out"]).write_text(json.dumps(out))
    dist.barrier()
    os._exit(0)  # as a job that is killed: nothing is closed


if __name__ == "__main__":
    main()
