"""DistributedDataParallel in a plain script; torchdata's StatefulDataLoader keeps the data's place.

`torchrun --rdzv-id my-job --nproc-per-node 2 ddp.py`.
"""

import argparse

import torch
import torch.distributed as dist
from fingerprint import fingerprint, seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from snapshotd_client import Snapshotter


def with_noise(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = map(torch.stack, zip(*rows, strict=True))
    return inputs + torch.randn_like(inputs) / 10, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seed(20)
    data = TensorDataset(torch.randn(96, 32), torch.randn(96, 1))
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    seed(21 + rank)  # each rank its own dropout
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
    sampler = StatefulDistributedSampler(data, seed=20)
    # A generator of its own: an iterator that is made anew must not take numbers from the model's.
    loader = StatefulDataLoader(
        data, batch_size=4, sampler=sampler, collate_fn=with_noise, generator=torch.Generator()
    )

    states = {"model": parallel, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with Snapshotter(states) as snap:
        restored = snap.restore()
        step, epoch = (restored.step + 1, restored.values["epoch"]) if restored else (0, 0)
        if restored and rank == 0:
            print(f"resumed after step {restored.step}\n", end="", flush=True)
        for now in range(epoch, arguments.epochs):
            sampler.set_epoch(now)
            for inputs, targets in loader:
                loss = nn.functional.mse_loss(parallel(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                snap.step(step, epoch=now)
                if rank == 0:
                    print(f"step {step} loss {loss.item()!r}\n", end="", flush=True)
                step += 1
    states = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    print(f"final {fingerprint(*states)}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
