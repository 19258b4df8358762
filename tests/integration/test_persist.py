"""Whole steps in a bucket or directory: real daemons write them, and jobs come back from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotd_client import SnapshotLost
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, homes
from tests.integration.test_restore import outcomes

Make = Callable[..., Cluster]
#: Every committed step is written, as soon as the one before is whole.
EVERY = {"interval_s": 0, "every_steps": 1, "keep_last": 3}


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier"
    path.mkdir()
    return path


def whole(tier: Path, job: str = "job") -> list[int]:
    """Steps that count, oldest first."""
    return sorted(int(p.stem.partition("-")[2]) for p in tier.glob(f"{job}/steps/*.json"))


def images(tier: Path, step: int) -> list[Path]:
    return sorted(tier.glob(f"job/data/*-{step:016d}/*.image"))


def train_whole(job: Job, tier: Path) -> None:
    """One step more, committed, and whole in the tier."""
    job.train_protected(1)
    step = job.next_step - 1
    eventually(f"step {step} is whole", lambda: whole(tier)[-1:] == [step], 60)


def lose_all(cluster: Cluster, nodes: list[Node]) -> list[Node]:
    """All nodes go with their memory; as many others come."""
    for node in nodes:
        node.lose()
    cluster.nodes.clear()
    fresh = [cluster.node(f"f{i}") for i in range(len(nodes))]
    for node in fresh:
        node.start()
    cluster.met()
    return fresh


def test_all_memory_is_lost_and_the_job_resumes_bit_for_bit(cluster: Make, tier: Path) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(3)
    job = Job(homes(nodes))
    job.restore()
    for _ in range(3):
        train_whole(job, tier)
    job.vanish()
    nodes = lose_all(made, nodes)
    job = Job(homes(nodes))
    restored = job.restore()
    assert all(r.step == 2 and r.tier == "persistent" for r in restored)
    job.check()
    train_whole(job, tier)
    job.check()
    job.close()
    index = json.loads(max(tier.glob("job/steps/*.json")).read_text())
    assert [s["shard"] for s in index["shards"]] == [0, 1, 2]
    assert len(list(tier.glob("job/data/*"))) == 3
    assert whole(tier) == [1, 2, 3], "keep_last = 3"
