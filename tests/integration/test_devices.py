"""State on a device: captured beside training, restored bit for bit; torn snapshots are seen.

Runs on the CPU everywhere, and on a CUDA device where there is one (marked `gpu`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from snapshotd_client import Snapshotter
from snapshotd_client.exact import same_bits
from tests.integration.cluster import Cluster, Node

MIB = 1 << 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    return torch.device(request.param)


@pytest.fixture
def node(cluster: Callable[..., Cluster]) -> Node:
    (made,) = cluster(parity=0, group_size=2, memory_budget="1GiB").start(1)
    return made


class Job:
    """Dropout draws from the device's generator, forward writes batch statistics."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(7)
        self.device = device
        self.model = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Dropout(0.2), nn.Linear(256, 64)
        ).to(device)
        self.model.register_buffer("bulk", torch.zeros(16 * MIB // 4, device=device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(self) -> None:
        batch = torch.rand(32, 64, device=self.device)
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def attach(self, node: Node, **options: object) -> Snapshotter:
        states = {"model": self.model, "optimizer": self.optimizer}
        return Snapshotter(
            states, job="job", rank=0, world_size=1, local_rank=0, run_dir=node.run_dir,
            max_stall_s=20.0, **options,
        )  # fmt: skip

    def state(self) -> list[torch.Tensor]:
        moments = [v for e in self.optimizer.state.values() for v in e.values()]
        tensors = [*self.model.state_dict().values(), *moments]
        return [t.detach().clone() for t in tensors]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_what_comes_back_trains_on_as_if_nothing_had_been(
    node: Node, device: torch.device, overlap: str
) -> None:
    job = Job(device)
    snap = job.attach(node, overlap=overlap)
    snap.restore()
    for step in range(4):
        job.train()
        snap.step(step)
    assert snap.wait_protected() == 3
    assert (snap.status().torn, snap.status().skipped) == (0, 0)
    for _ in range(3):
        job.train()
    snap._let_go()  # as after a SIGKILL

    back = Job(device)
    snap = back.attach(node)
    restored = snap.restore()
    assert restored is not None
    assert restored.step == 3
    for _ in range(3):
        back.train()
    assert equal(back.state(), job.state())
    snap.close()


def test_a_write_under_the_copy_is_seen_or_came_too_late(node: Node, device: torch.device) -> None:
    """Nobody's hook tells of it: the snapshot is of before the write, or there is none."""
    job = Job(device)
    snap = job.attach(node)
    snap.restore()
    job.train()
    snap.step(0)
    snap.wait_protected()
    kept = {0: job.state()}
    for step in range(1, 6):
        job.train()
        kept[step] = job.state()
        snap.step(step)
        with torch.no_grad():
            for parameter in job.model.parameters():
                parameter.add_(1.0)
    job.train()
    kept[6] = job.state()
    snap.step(6)
    job.optimizer.zero_grad()
    snap.wait_protected(6)
    status = snap.status()
    snap._let_go()

    back = Job(device)
    snap = back.attach(node)
    restored = snap.restore()
    assert restored is not None
    assert equal(back.state(), kept[restored.step]), f"torn before: {status.torn}"
    snap.close()
