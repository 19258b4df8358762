"""The same small training in several layouts, and what its state is whatever the layout."""

from __future__ import annotations

import hashlib

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

from snapshotd_client.names import Names

WIDTH = 130


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width + 2)
        self.down = nn.Linear(4 * width + 2, width)
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
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copy", "part"))
            fully_shard(model, mesh=mesh)
        case "tp":
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    return model


def train(kind, model, opt, step, world):
    """The same batch of 24 in every layout, each rank of data parallelism a share of it."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.rand(24, model_width(model), generator=generator)
    if kind != "tp":
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
