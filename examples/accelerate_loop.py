"""Accelerate: a loop of one's own with accumulation, validation and a scheduler.

Alone: `python accelerate_loop.py`. On two ranks: `torchrun --nproc-per-node 2 accelerate_loop.py`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from fingerprint import fingerprint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapshotd_client.integrations.accelerate import AcceleratorSnapshots  # 1


def with_noise(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = map(torch.stack, zip(*rows, strict=True))
    return inputs + torch.randn_like(inputs) / 10, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(20)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = TensorDataset(torch.randn(96, 32), torch.randn(96, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=with_noise)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    with AcceleratorSnapshots(accelerator, loader) as snapshots:  # 2
        if (restored := snapshots.restore()) is not None:
            print(f"resumed after step {restored.step}\n", end="", flush=True)
        for _ in snapshots.epochs(arguments.epochs):  # 3
            for inputs, targets in snapshots.batches():  # 4
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                mean = accelerator.reduce(loss.detach(), "mean").item()
                accelerator.print(f"batch after step {snapshots.steps} loss {mean!r}")
    states = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    print(f"final {fingerprint(*states)}\n", end="", flush=True)


if __name__ == "__main__":
    main()
