"""What a node's processes cost: memory, the processor while nothing happens, and each snapshot.

Real daemons with the timeouts they have by default, each with one rank of a job whose state is
tiny, so that what is seen is the cost of the protocol and not of the bytes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing

import psutil

from snapshotd.config import Timeouts
from tests.bench.harness import MIB, Scale, Table
from tests.integration.cluster import Cluster, Node
from tests.integration.ranks import Job, homes

NODES = (2, 4, 8)
#: Of idleness that is looked at, for each repeat: some heartbeats.
LOOK_S = 2.0
SNAPSHOTS = 10


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        "Cost of a daemon beside a job of one rank a node",
        "per process, the dearest of all nodes; idle: % of a core; snapshot: CPU ms for each one",
    )
    for count in NODES:
        with closing(Cluster(group_size=min(count, 4))) as cluster:
            cluster.timeouts = {name: getattr(Timeouts(), name) for name in cluster.timeouts}
            for row in _measured(cluster, count, scale):
                table.add(**row)
    yield table


def _measured(cluster: Cluster, count: int, scale: Scale) -> Iterator[dict[str, object]]:
    nodes = cluster.start(count)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    look_s = LOOK_S * scale.repeats
    before = _cpu_s(nodes)
    _look(nodes, look_s)
    idle = _spent(before, _cpu_s(nodes))
    before = _cpu_s(nodes)
    job.train_protected(SNAPSHOTS)
    busy = _spent(before, _cpu_s(nodes))
    for program, pids in _pids(nodes).items():
        memory = [psutil.Process(pid).memory_full_info() for pid in pids]
        yield {
            "nodes": count,
            "program": program,
            "idle_percent": 100 * idle[program] / look_s,
            "snapshot_cpu_ms": 1000 * busy[program] / SNAPSHOTS,
            "rss_mib": max(m.rss for m in memory) / MIB,
            "own_mib": max(m.uss for m in memory) / MIB,
        }
    job.close()


def _look(nodes: list[Node], look_s: float) -> None:
    """Let time pass in which nothing happens, and no daemon ends."""
    for node in nodes:
        assert node.process is not None
        try:
            ended = node.process.wait(look_s / len(nodes))
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"{node.name} ended with {ended}:\n{node.tail()}")


def _pids(nodes: list[Node]) -> dict[str, list[int]]:
    supervisors = [node.process.pid for node in nodes if node.process is not None]
    return {"supervisor": supervisors, "smp": [pid for node in nodes for pid in node.smp_pids()]}


def _cpu_s(nodes: list[Node]) -> dict[str, list[float]]:
    """CPU time of each process so far, seconds."""
    times = {
        program: [psutil.Process(pid).cpu_times() for pid in pids]
        for program, pids in _pids(nodes).items()
    }
    return {program: [t.user + t.system for t in found] for program, found in times.items()}


def _spent(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, float]:
    """The most that any process of a program has spent."""
    return {
        program: max(b - a for a, b in zip(before[program], after[program], strict=True))
        for program in before
    }
