"""The trainer, one process a rank, as an engineer would write it: FSDP2, AdamW, a Snapshotter.

Run by torchrun: ``torchrun ... -m snapshotd_client.demo.train --steps N --out DIR``.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import OneCycleLR

from snapshotd_client.demo.corpus import (
    VOCABULARY,
    WindowLoader,
    read_corpus,
    standard_library,
)
from snapshotd_client.demo.final import named_parts, write_final
from snapshotd_client.demo.gates import Gates
from snapshotd_client.demo.journal import Journal, Kind
from snapshotd_client.demo.model import Gpt, Shape, sharded_gpt
from snapshotd_client.demo.protection import Protection, protect

SEED: Final = 20
BATCH: Final = 4
PEAK_LEARNING_RATE: Final = 3e-3


@dataclass
class Training:
    """Everything that changes as training goes on, but for the generators of random numbers."""

    model: Gpt
    optimizer: torch.optim.AdamW
    scheduler: OneCycleLR
    loader: WindowLoader

    def parts(self) -> dict[str, object]:
        """What a snapshot must hold, by name."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def one_step(self) -> float:
        """Train on one batch; the mean loss over all ranks."""
        tokens, targets = self.loader.next_batch()
        logits = self.model(tokens)
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        return mean.item() / dist.get_world_size()


def build_training(steps: int, rank: int, world: int) -> Training:
    """The job as it stands before step 0; the same bytes every time for the same arguments."""
    shape = Shape()
    mesh = init_device_mesh("cpu", (world,))
    model = sharded_gpt(shape, mesh, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE)
    scheduler = OneCycleLR(optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=steps + 1)
    text = read_corpus(standard_library())
    loader = WindowLoader(text, context=shape.context, batch=BATCH, seed=SEED + rank)
    _seed_generators(SEED + 1000 + rank)
    return Training(model, optimizer, scheduler, loader)


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def final_parts(training: Training) -> Iterator[tuple[str, bytes]]:
    """Every byte of this rank's state, with names: parameters, optimizer, scheduler, RNG."""
    state = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "loader": training.loader.state_dict(),
        "rng": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        },
    }
    for name, leaf in named_parts(state):
        yield name, _leaf_bytes(leaf)


def _leaf_bytes(leaf: object) -> bytes:
    if isinstance(leaf, DTensor):
        leaf = leaf.to_local()
    if isinstance(leaf, Tensor):
        return leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, np.ndarray):
        return leaf.tobytes()
    # The repr of a float names it exactly; all other leaves are numbers, strings and None.
    return repr(leaf).encode()


def train(
    training: Training,
    protection: Protection,
    journal: Journal,
    gates: Gates,
    *,
    steps: int,
    step_s: float,
) -> None:
    """Train to the last step, from wherever the newest snapshot stands."""
    restored = protection.restore()
    journal.tell(
        Kind.READY,
        step=restored.step,
        tier=restored.tier,
        decoded_bytes=restored.decoded_bytes,
        copied_bytes=restored.copied_bytes,
        waited_s=restored.waited_s,
        staged_s=restored.staged_s,
        loaded_s=restored.loaded_s,
    )
    pace, step = threading.Event(), restored.step

    def held() -> None:
        protection.settle()
        committed, is_protected = protection.state()
        journal.tell(Kind.HELD, step=step, committed=committed, is_protected=is_protected)

    while step + 1 < steps:
        gates.wait(step + 1, held)
        step += 1
        began_s = time.monotonic()
        journal.tell(Kind.BEGIN, step=step)
        loss = training.one_step()
        protection.step(step, loss)
        # A floor under the step, so that on a fast machine too the faults fall among the steps.
        pace.wait(max(0.0, step_s - (time.monotonic() - began_s)))
        committed, is_protected = protection.state()
        journal.tell(
            Kind.STEP, step=step, loss=loss, committed=committed, is_protected=is_protected
        )
    gates.wait(steps, held)


def main() -> None:
    """Run one rank, from torchrun's environment."""
    arguments = _arguments()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    journal = Journal(
        arguments.out,
        rank=rank,
        node=os.environ.get("SNAPSHOTD_DEMO_NODE", ""),
        watcher=os.environ.get("SNAPSHOTD_DEMO_WATCHER", ""),
    )
    journal.tell(Kind.UP)
    dist.init_process_group("gloo")
    training = build_training(arguments.steps, rank, world)
    gates = Gates(arguments.store, os.environ["SNAPSHOTD_JOB"], arguments.steps, arguments.faults)
    with protect(training.parts(), unprotected=arguments.unprotected) as protection:
        train(training, protection, journal, gates, steps=arguments.steps, step_s=arguments.step_s)
    write_final(arguments.out / f"final-rank{rank}.bin", final_parts(training))
    journal.tell(Kind.DONE)
    dist.destroy_process_group()
    journal.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="journals and final state")
    parser.add_argument("--step-s", type=float, default=0.0, help="a step takes this long at least")
    parser.add_argument("--faults", type=int, default=0, help="that it waits for")
    parser.add_argument("--store", type=int, default=0, help="port of the store with their gates")
    parser.add_argument("--unprotected", action="store_true", help="train without snapshotd")
    return parser.parse_args()


if __name__ == "__main__":
    main()
