"""Lightning: a fit with validation, accumulation and a scheduler, protected by a callback.

Alone: `python lightning_fit.py`. On two ranks: `torchrun --nproc-per-node 2 lightning_fit.py`.
"""

import argparse
import os

import torch
from fingerprint import fingerprint
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snapshotd_client.integrations.lightning import SnapshotCallback  # 1


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        if self.trainer.is_global_zero:
            step = self.trainer.global_step
            print(f"batch after step {step} loss {loss.item()!r}\n", end="", flush=True)
        return loss

    def validation_step(self, batch, index):
        inputs, targets = batch
        self.log("validation", nn.functional.mse_loss(self.net(inputs), targets), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "validation"},
        }


def with_noise(rows):
    inputs, targets = map(torch.stack, zip(*rows, strict=True))
    return inputs + torch.randn_like(inputs) / 10, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="lightning-fit")
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed_everything(20, verbose=False)
    data = TensorDataset(torch.randn(96, 32), torch.randn(96, 1))
    training = DataLoader(data, batch_size=4, shuffle=True, collate_fn=with_noise)
    validation = DataLoader(data, batch_size=32)
    module = Regression()
    protection = SnapshotCallback()  # 2
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accumulate_grad_batches=2,
        val_check_interval=8,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy="ddp" if "LOCAL_WORLD_SIZE" in os.environ else "auto",
        default_root_dir=arguments.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[protection],  # 3
    )
    trainer.fit(module, training, validation)
    if protection.restored is not None:
        print(f"resumed after step {protection.restored.step}\n", end="", flush=True)
    states = (module.state_dict(), trainer.optimizers[0].state_dict())
    schedulers = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
    print(f"final {fingerprint(*states, schedulers)}\n", end="", flush=True)


if __name__ == "__main__":
    main()
