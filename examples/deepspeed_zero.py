"""DeepSpeed ZeRO 1 and 2, with Snapshotter itself.

`DS_ACCELERATOR=cpu torchrun --rdzv-id my-job --nproc-per-node 2 deepspeed_zero.py --stage 2`.
"""

import argparse
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from fingerprint import fingerprint, seed
from torch import nn

from snapshotd_client import Snapshotter


class Counters:
    """What the engine counts."""

    NAMES = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self.engine, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self.engine, name, value)


def states_of(engine: Any) -> dict[str, object]:
    """The module, and this rank's part of the optimizer with its fp32 master weights."""
    inner = engine.optimizer.optimizer
    masters = [p.detach() for group in inner.param_groups for p in group["params"]]
    return {
        "module": engine.module,
        "optimizer": inner,
        "engine": Counters(engine),
        **{f"master_{i}": master for i, master in enumerate(masters)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    seed(20)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": arguments.stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    seed(21 + rank)
    with Snapshotter(states_of(engine)) as snap:
        restored = snap.restore()
        if restored and rank == 0:
            print(f"resumed after step {restored.step}\n", end="", flush=True)
        for step in range(restored.step + 1 if restored else 0, arguments.steps):
            for _ in range(engine.gradient_accumulation_steps()):
                inputs = torch.randn(4, 32, dtype=torch.bfloat16)
                loss = (engine(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
                engine.backward(loss)
                engine.step()
            snap.step(step)
            if rank == 0:
                print(f"step {step} loss {loss.item()!r}\n", end="", flush=True)
    trees = [
        s if isinstance(s, torch.Tensor) else s.state_dict() for s in states_of(engine).values()
    ]
    print(f"final {fingerprint(*trees)}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
