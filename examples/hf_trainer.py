"""Hugging Face Trainer: a GPT-2 from scratch on made-up text, protected by three lines.

Alone: `python hf_trainer.py`. On two ranks: `torchrun --nproc-per-node 2 hf_trainer.py`.
"""

import argparse

import torch
from fingerprint import fingerprint
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from snapshotd_client.integrations.hf import SnapshotCallback  # 1


class Text(Dataset):
    """Token ids that depend on their index, masked by chance as they are drawn."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(32) * (index + 3)) % 128
        noise = torch.rand(32) < 0.1
        return {"input_ids": torch.where(noise, 127, ids), "labels": ids}


class Told(TrainerCallback):
    """Prints every loss, exactly."""

    def on_log(self, args, state, control, logs=None, **given):
        if "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']!r}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="hf-trainer")
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(20)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    )
    training = TrainingArguments(
        output_dir=arguments.out,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_steps=4,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model, training, train_dataset=Text(), eval_dataset=Text(), callbacks=[Told()]
    )
    protection = SnapshotCallback(trainer)  # 2
    trainer.add_callback(protection)  # 3
    result = trainer.train()
    if protection.restored is not None:
        print(f"resumed after step {protection.restored.step}\n", end="", flush=True)
    history = [
        {k: v for k, v in h.items() if "second" not in k and "runtime" not in k}
        for h in trainer.state.log_history
    ]
    states = (model.state_dict(), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict())
    print(f"final {fingerprint(*states, history, result.training_loss)}\n", end="", flush=True)


if __name__ == "__main__":
    main()
