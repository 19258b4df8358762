"""A rank's training state of a chosen size: parameters with AdamW's moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from snapshotd_client import Snapshotter
from tests.integration.cluster import Node

#: fp32 parameters, and AdamW's two moments of each.
BYTES_A_PARAMETER = 12
_WIDTH = 1024


@dataclass(slots=True)
class Training:
    """About `size` bytes in fp32 parameters and AdamW moments, all of it touched.

    Attributes:
        tensors: how many parameters; 0 for layers of 4 MiB.
    """

    size: int
    tensors: int = 0
    parameters: list[torch.nn.Parameter] = field(init=False)
    model: torch.nn.ParameterList = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        count = self.tensors or max(self.size // (BYTES_A_PARAMETER * _WIDTH * _WIDTH), 1)
        elements = max(self.size // (BYTES_A_PARAMETER * count), 1)
        torch.manual_seed(self.size % 1000)
        self.parameters = [torch.nn.Parameter(torch.rand(elements)) for _ in range(count)]
        self.model = torch.nn.ParameterList(self.parameters)
        self.new_optimizer()
        for parameter in self.parameters:
            parameter.grad = torch.rand(1).expand(elements).contiguous()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters) * BYTES_A_PARAMETER // 4

    def new_optimizer(self) -> None:
        """One that has not stepped yet, as after a start."""
        self.optimizer = torch.optim.AdamW(self.parameters)

    def states(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def live(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        moments: list[Any] = [
            value for entry in self.optimizer.state.values() for value in entry.values()
        ]
        return [*(p.detach() for p in self.parameters), *moments]

    def change(self) -> None:
        """As little as a step must change for the daemon to see that training goes on."""
        with torch.no_grad():
            self.parameters[0][:1] += 1

    def lose(self) -> None:
        """What a new process has: memory that was touched, and other bytes in it."""
        for tensor in self.live():
            tensor.zero_()

    def attach(
        self, node: Node, rank: int, world: int, more: dict[str, object] | None = None
    ) -> Snapshotter:
        return Snapshotter(
            {**(more or {}), **self.states()},
            job="bench",
            rank=rank,
            world_size=world,
            local_rank=0,
            run_dir=node.run_dir,
            max_stall_s=30.0,
        )
