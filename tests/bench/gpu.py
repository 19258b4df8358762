"""Snapshots of state on a CUDA device: the copy against a page-locked one, and what training feels.

`copy`: from `step()` to an update that comes at once, and the device done, against the best rate
at which the same bytes went from the device into page-locked memory. `training`: a transformer of
about a billion parameters in bf16 autocast with AdamW, a snapshot never, at each tenth step, at
every step, in turns. A real daemon on this node.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import nn

from snapshotd_client import Snapshotter
from tests.bench.harness import MIB, Scale, Table, gb_per_s, timed
from tests.integration.cluster import Cluster, Node

#: Of the copied state, so many times `Scale.bytes`.
LARGER = 16
#: Parameters of the copied state, each with two moments.
PIECES = 100
INTERVALS = (0, 10, 1)
#: Steps of one turn; turns of each interval.
STEPS, TURNS = 20, 3
WARM_UP = 5
#: Layers, width, tokens a batch, length of a sequence: 1.0 billion parameters.
SHAPE = (20, 2048, 8192, 1024)
VOCABULARY = 8192


def run(scale: Scale) -> Iterator[Table]:
    if not torch.cuda.is_available():
        yield Table("gpu: no CUDA device is here, nothing was measured")
        return
    device = torch.device("cuda")
    yield copy(LARGER * scale.bytes, scale.repeats, device)
    yield training(device, SHAPE)


def copy(nbytes: int, repeats: int, device: torch.device) -> Table:
    table = Table(
        f"copy from {_name(device)}",
        "GB/s, best; limit: into page-locked memory, the same bytes in one piece",
    )
    limit_s = _limit_s(nbytes, repeats, device)
    each = nbytes // 12 // PIECES
    parameters = [nn.Parameter(torch.ones(each, device=device)) for _ in range(PIECES)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    held = sum(3 * p.nbytes for p in parameters)
    with _daemon(held) as node, closing(_attached(node, parameters, optimizer)) as snap:
        blocked, whole = [], []
        for step in range(repeats + 1):
            _wait(device)
            began_s = time.perf_counter()
            snap.step(step)
            blocked.append(time.perf_counter() - began_s)
            optimizer.step()  # nothing has a gradient: it only waits for the copy
            _wait(device)
            whole.append(time.perf_counter() - began_s)
            snap.wait_protected(timeout_s=120)
        assert snap.status().torn == snap.status().skipped == 0
    table.add(
        state_MiB=held // MIB,
        limit=gb_per_s(nbytes, limit_s),
        copy=gb_per_s(held, min(whole[1:])),
        of_limit=(held / min(whole[1:])) / (nbytes / limit_s),
        blocked_ms=statistics.median(blocked[1:]) * 1e3,
        first_of_later=whole[0] / statistics.median(whole[1:]),
    )
    return table


def _limit_s(nbytes: int, repeats: int, device: torch.device) -> float:
    """The best time in which so many bytes went from the device into page-locked memory."""
    source = torch.ones(nbytes // 4, device=device)
    locked = torch.empty(nbytes // 4, pin_memory=device.type == "cuda")

    def move() -> None:
        locked.copy_(source, non_blocking=True)
        _wait(device)

    return timed({"limit": move}, repeats)["limit"].best_s


def training(device: torch.device, shape: tuple[int, int, int, int]) -> Table:
    table = Table(
        f"training beside snapshots on {_name(device)}",
        "ms a step, means of turns; slower: than without snapshots, in the same process",
    )
    trainer = _Trainer(device, shape)
    parameters = [*trainer.model.parameters()]
    with (
        _daemon(trainer.nbytes) as node,
        closing(_attached(node, parameters, trainer.optimizer)) as snap,
    ):
        times: dict[int, list[float]] = {interval: [] for interval in INTERVALS}
        number = 0
        for _ in range(WARM_UP):
            trainer.step()
        for turn in range(TURNS + 1):
            for interval in INTERVALS:
                _wait(device)
                began_s = time.perf_counter()
                for step in range(STEPS):
                    trainer.step()
                    if interval and step % interval == 0:
                        snap.step(number)
                        number += 1
                _wait(device)
                if turn:  # the first one touches and locks what it needs
                    times[interval].append((time.perf_counter() - began_s) / STEPS)
        status = snap.status()
    plain = statistics.mean(times[0])
    for interval in INTERVALS:
        mean_s = statistics.mean(times[interval])
        table.add(
            parameters_M=trainer.nbytes // 12_000_000,
            snapshot=f"each {interval} steps" if interval else "never",
            step_ms=mean_s * 1e3,
            slower_percent=100 * (mean_s / plain - 1),
            torn=status.torn,
            skipped=status.skipped,
        )
    return table


class _Trainer:
    def __init__(self, device: torch.device, shape: tuple[int, int, int, int]) -> None:
        layers, width, tokens, length = shape
        torch.manual_seed(1)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 128), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.model = nn.Sequential(
            nn.Embedding(VOCABULARY, width),
            nn.TransformerEncoder(block, layers, enable_nested_tensor=False),
            nn.Linear(width, VOCABULARY),
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self._batch = torch.randint(VOCABULARY, (tokens // length, length), device=device)
        self._device = device

    @property
    def nbytes(self) -> int:
        """Of parameters and both moments, fp32."""
        return sum(12 * p.numel() for p in self.model.parameters())

    def step(self) -> None:
        with torch.autocast(self._device.type, torch.bfloat16):
            logits = self.model(self._batch)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), self._batch.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _attached(
    node: Node, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Snapshotter:
    snap = Snapshotter(
        {"model": nn.ParameterList(parameters), "optimizer": optimizer},
        job=f"bench-{len(parameters)}", rank=0, world_size=1, local_rank=0, run_dir=node.run_dir,
        max_stall_s=30.0,
    )  # fmt: skip
    snap.restore()
    return snap


@contextmanager
def _daemon(state_bytes: int) -> Iterator[Node]:
    budget = f"{round(2.3 * state_bytes) // MIB + 64}MiB"
    with closing(Cluster(parity=0, group_size=2, memory_budget=budget)) as cluster:
        (node,) = cluster.start(1)
        yield node


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"the CPU ({os.cpu_count()} cores)"
