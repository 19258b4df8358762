"""The ranks of a small job, in this process or each in its own; a reference to compare with.

State is tiny but of the real kind: a model with dropout, AdamW, a scheduler. Each rank's training
depends on its rank, its step and its RNG only, so the reference is a rank that was never disturbed.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from snapshotd_client import ProtectionTimeout, Restored, Snapshotter, WrongUse
from tests.integration.cluster import Node

WIDTH = 64


class Rank:
    """One rank's training state, its own random stream, and its Snapshotter when attached."""

    def __init__(self, rank: int, world: int, width: int = WIDTH) -> None:
        self.rank = rank
        self.world = world
        # Unequal shards: every rank's model has another size.
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width + 8 * rank), torch.nn.Linear(width + 8 * rank, width)
        )
        self.generator = torch.Generator().manual_seed(1000 + rank)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=self.generator) - 0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.9)
        self.snap: Snapshotter | None = None

    # The generator is user state of its own: ranks in one process share torch's.
    def state_dict(self) -> dict[str, object]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def states(self) -> dict[str, object]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rank": self,
        }

    def train(self) -> None:
        batch = torch.rand(8, self.model[0].in_features, generator=self.generator)
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def attach(self, node: Node, slot: int = 0, job: str = "job", **options: object) -> None:
        self.snap = Snapshotter(
            self.states(),
            job=job,
            rank=self.rank,
            world_size=self.world,
            local_rank=slot,
            run_dir=node.run_dir,
            **options,
        )

    def vanish(self) -> None:
        """What the daemon sees of a SIGKILL: the lock and the connection are gone, unannounced."""
        if self.snap is not None:
            self.snap._let_go()
            self.snap = None

    def digest(self) -> str:
        digest = hashlib.sha256(self.generator.get_state().numpy().tobytes())
        for tensor in self.model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        for entry in self.optimizer.state_dict()["state"].values():
            for name in sorted(entry):
                digest.update(entry[name].numpy().tobytes())
        digest.update(repr(self.scheduler.state_dict()).encode())
        return digest.hexdigest()


def reference(rank: int, world: int, steps: int, width: int = WIDTH) -> str:
    """The digest of an undisturbed rank after `steps` steps."""
    undisturbed = Rank(rank, world, width)
    for _ in range(steps):
        undisturbed.train()
    return undisturbed.digest()


class Job:
    """All ranks of a job in this process, one thread each where they wait for each other."""

    def __init__(
        self,
        homes: list[tuple[Node, int]],
        job: str = "job",
        width: int = WIDTH,
        **options: object,
    ) -> None:
        self.name = job
        self.world = len(homes)
        self.width = width
        self.ranks = [Rank(r, self.world, width) for r in range(self.world)]
        self._pool = ThreadPoolExecutor(self.world)
        try:
            for rank, (node, slot) in zip(self.ranks, homes, strict=True):
                rank.attach(node, slot, job, **options)
        except BaseException:
            self.vanish()
            raise
        self.next_step = 0

    def restore(self, **options: object) -> list[Restored | None]:
        def one(rank: Rank) -> Restored | None:
            assert rank.snap is not None
            return rank.snap.restore(**options)

        found = list(self._pool.map(one, self.ranks))
        assert len({f.step if f else None for f in found}) == 1
        assert len({f.tier if f else None for f in found}) == 1
        self.next_step = found[0].step + 1 if found[0] else 0
        return found

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for rank in self.ranks:
                rank.train()
                if rank.snap is not None:
                    rank.snap.step(self.next_step, seen=self.next_step * 10)
            self.next_step += 1

    def protected(self, timeout_s: float = 30.0) -> int:
        def one(rank: Rank) -> int:
            assert rank.snap is not None
            return rank.snap.wait_protected(timeout_s=timeout_s)

        return min(self._pool.map(one, self.ranks))

    def train_protected(self, steps: int) -> None:
        """Train step by step, each committed before the next."""
        for _ in range(steps):
            self.train(1)
            self.protected()

    def train_until_protected(self, most_steps: int = 100) -> None:
        """Train until a step of this call is committed: after a fault some steps are skipped."""
        first = self.next_step
        for _ in range(most_steps):
            self.train(1)
            try:
                if self.protected() >= first:
                    return
            except (ProtectionTimeout, WrongUse):
                continue
        raise AssertionError(f"nothing was protected in {most_steps} steps")

    def vanish(self) -> None:
        for rank in self.ranks:
            rank.vanish()
        self._pool.shutdown()

    def close(self) -> None:
        for rank in self.ranks:
            if rank.snap is not None:
                rank.snap.close()
        self._pool.shutdown()

    def check(self) -> None:
        """Every rank's state is byte for byte that of a rank that was never disturbed."""
        for rank in self.ranks:
            assert rank.digest() == reference(rank.rank, self.world, self.next_step, self.width), (
                f"rank {rank.rank} differs from the reference after {self.next_step} steps"
            )


def homes(nodes: list[Node]) -> list[tuple[Node, int]]:
    """One rank a node, in slot 0."""
    return [(node, 0) for node in nodes]


def segment_files(node: Node) -> list[Path]:
    return sorted(node.shm_dir.glob("slot-*/*.seg"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
