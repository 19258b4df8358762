"""The bare torch objects within what frameworks wrap around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from snapshotd_client.errors import UnsupportedState


def bare_module(module: torch.nn.Module) -> torch.nn.Module:
    """The module within DistributedDataParallel and torch.compile: its names are the model's own.

    Raises:
        UnsupportedState: it is sharded by FSDP1, whose state is not captured.
    """
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), torch.nn.Module):
            module = module._orig_mod  # type: ignore[assignment]  # a module, as just seen
        else:
            break
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise UnsupportedState(
            f"the model {type(module).__name__} is sharded by FullyShardedDataParallel (FSDP1)",
            "Use FSDP2 (`fully_shard`).",
        )
    return module


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within a wrapper that keeps it as `optimizer`."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedState(
            f"the optimizer is a {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "Use an optimizer of torch's kind.",
        )
    return optimizer


def named(name: str, objects: Sequence[object]) -> dict[str, object]:
    """`name` for one object, `name_0`, `name_1`, ... for several."""
    if len(objects) == 1:
        return {name: objects[0]}
    return {f"{name}_{i}": value for i, value in enumerate(objects)}
