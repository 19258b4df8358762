"""A loop in the style of torchtitan: FSDP2, containers with state_dict, one mapping of all states.

`torchrun --rdzv-id my-job --nproc-per-node 2 titan.py`. The mapping that torchtitan gives to
torch.distributed.checkpoint is the one that Snapshotter takes; give it the model parts and the
optimizers themselves where you have them, so that they are copied while training goes on.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fingerprint import fingerprint, seed
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from snapshotd_client import Snapshotter


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.silu(self.up(self.norm(x)))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.output = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class Tokens(Stateful):
    """An endless stream of token ids, each data-parallel rank its own part."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(rank)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(128, (4, 33), generator=self.generator)
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


@dataclass
class TrainState(Stateful):
    """What the loop counts."""

    step: int = 0
    tokens_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    def __init__(self, steps: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        seed(20)
        self.model = Transformer(vocabulary=128, width=64, layers=2)
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        seed(21 + rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self.scheduler = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 5))
        self.loader = Tokens(rank)
        self.state = TrainState()
        self.steps = steps

    def states(self) -> dict[str, object]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.scheduler,
            "dataloader": self.loader,
            "train_state": self.state,
        }

    def train_step(self) -> float:
        tokens, labels = next(self.loader)
        loss = nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.state.step += 1
        self.state.tokens_seen += tokens.numel()
        return loss.item()

    def train(self, snap: Snapshotter) -> None:
        if (restored := snap.restore()) is not None and dist.get_rank() == 0:
            print(f"resumed after step {restored.step}\n", end="", flush=True)
        while self.state.step < self.steps:
            loss = self.train_step()
            snap.step(self.state.step)
            if dist.get_rank() == 0:
                print(f"step {self.state.step} loss {loss!r}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainer = Trainer(arguments.steps)
    with Snapshotter(trainer.states()) as snap:
        trainer.train(snap)
    trees = [s.state_dict() for s in trainer.states().values()]
    print(f"final {fingerprint(*trees)}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
