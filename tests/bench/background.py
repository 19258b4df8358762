"""What protection takes from a training step: with the SMPs standing back, and without.

Two nodes; the training thread has one processor to itself, and everything that is not told
otherwise may use all. A step is arithmetic of one thread; a snapshot is taken at each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch

from snapshotd_client import Snapshotter
from tests.bench.harness import MIB, Scale, Table
from tests.bench.training import Training
from tests.integration.cluster import Cluster

STEP_S = 0.2
_WIDTH = 512
BACKGROUNDS: Mapping[str, Mapping[str, object]] = {
    "stands back (default)": {},
    "niceness alone": {"background.cpus": "all"},
    "processors alone": {"background.nice": 0},
    "neither": {"background.nice": 0, "background.cpus": "all"},
}


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        "Training beside protection",
        f"two nodes, {scale.bytes // MIB} MiB on that of the training, m = 1, a snapshot at every "
        "step; ms: the median step, with its snapshot; slower: than without snapshots in the same "
        "run; committed: ms from step() on, median",
    )
    for name, settings in BACKGROUNDS.items():
        table.add(background=name, **_measured(scale, settings))
    yield table


def _measured(scale: Scale, settings: Mapping[str, object]) -> dict[str, object]:
    budget = f"{4 * scale.bytes // MIB + 64}MiB"
    with closing(Cluster(group_size=2, memory_budget=budget, **settings)) as cluster, _pinned():
        trainings = [Training(scale.bytes), Training(MIB // 4)]
        nodes = cluster.start(2)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        snaps = [t.attach(n, r, 2) for r, (t, n) in enumerate(zip(trainings, nodes, strict=True))]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda snap: snap.restore(), snaps))
        rounds = _rounds_for(STEP_S)
        alone, beside, commits = [], [], []
        for step in range(2 * scale.repeats):
            alone.append(_compute(rounds))
            took_s, commit_s = _step(trainings, snaps, step, rounds)
            beside.append(took_s)
            commits.append(commit_s)
        for snap in snaps:
            snap.close()
    before, after = statistics.median(alone[2:]), statistics.median(beside[2:])
    return {
        "without_ms": 1000 * before,
        "with_ms": 1000 * after,
        "slower_percent": 100 * (after / before - 1),
        "committed_ms": 1000 * statistics.median(commits[2:]),
    }


def _step(
    trainings: list[Training], snaps: list[Snapshotter], step: int, rounds: int
) -> tuple[float, float]:
    """Seconds of a snapshot and the step of training beside it; and until it is committed."""
    for training in trainings:
        training.change()
    snaps[1].step(step)
    begun_s = time.perf_counter()
    snaps[0].step(step)
    _compute(rounds)
    took_s = time.perf_counter() - begun_s
    for snap in snaps:
        snap.wait_protected(timeout_s=60.0)
    return took_s, time.perf_counter() - begun_s


def _compute(rounds: int) -> float:
    begun_s = time.perf_counter()
    matrix = torch.full((_WIDTH, _WIDTH), 1.0 / _WIDTH)
    for _ in range(rounds):
        matrix = matrix @ matrix
    return time.perf_counter() - begun_s


def _rounds_for(seconds: float) -> int:
    _compute(4)
    return max(1, int(16 * seconds / _compute(16)))


@contextmanager
def _pinned() -> Iterator[None]:
    """One thread computes, and what is changed of this process's processors is undone."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)
