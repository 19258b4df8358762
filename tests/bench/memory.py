"""What is in memory: at the worst, and whether it stays so over a thousand snapshots.

Everything that a job's protection takes on one machine: the daemons' own memory and their tmpfs,
and what the trainers have more than without a Snapshotter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.harness import MIB, Scale, Table
from tests.bench.training import Training
from tests.integration.cluster import Cluster, Node

#: n and m.
NODES, PARITY = 4, 1
MANY = 1000
#: How often memory is looked at.
LOOK_S = 0.02
DAEMON_BYTES = 64 * MIB


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        f"Memory of {NODES} nodes, m = {PARITY}",
        "MiB beyond the trainers' own before; S: state of all; bound: 2 S (1 + m/(n - m)) and "
        "64 MiB a node; peak and its parts: the most seen at one moment; early, "
        "late: medians of the first and last tenth of the snapshots, without the first ten",
    )
    yield _many(table, scale)


@dataclass(slots=True)
class _Look:
    """Memory beyond the trainers' own, by part, bytes."""

    tmpfs: int
    daemons: int
    trainers: int

    @property
    def total(self) -> int:
        return self.tmpfs + self.daemons + self.trainers


@dataclass(slots=True)
class _Watch:
    """Looks again and again, in a thread, until it is closed."""

    nodes: list[Node]
    pids: list[int]
    before: int
    looks: list[_Look] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(LOOK_S):
            self.looks.append(self.look())

    def look(self) -> _Look:
        files = [path for node in self.nodes for path in node.shm_dir.rglob("*")]
        tmpfs = sum(_blocks(path) for path in files)
        return _Look(tmpfs, sum(map(_own_bytes, self.pids)), _own_bytes(os.getpid()) - self.before)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


def _many(table: Table, scale: Scale) -> Table:
    snapshots = max(MANY * scale.bytes // Scale().bytes, 20)
    for size, count in ((scale.bytes // 16, 20), (MIB // 2, snapshots)):
        with closing(Cluster(PARITY, NODES, memory_budget="2GiB")) as cluster:
            table.add(**_measured(cluster, size, count))
    return table


def _measured(cluster: Cluster, size: int, snapshots: int) -> dict[str, object]:
    nodes = cluster.start(NODES)
    trainings = [Training(size) for _ in nodes]
    state = sum(t.nbytes for t in trainings)
    before = _own_bytes(os.getpid())
    snaps = [t.attach(n, i, NODES) for i, (t, n) in enumerate(zip(trainings, nodes, strict=True))]
    with ThreadPoolExecutor(NODES) as pool:
        list(pool.map(lambda snap: snap.restore(), snaps))
    pids = [n.process.pid for n in nodes if n.process] + [p for n in nodes for p in n.smp_pids()]
    marks: list[int] = []
    with closing(_Watch(nodes, pids, before)) as watch:
        for step in range(snapshots):
            for training, snap in zip(trainings, snaps, strict=True):
                training.change()
                snap.step(step)
            for snap in snaps:
                snap.wait_protected(timeout_s=60.0)
            marks.append(len(watch.looks))
    for snap in snaps:
        snap.close()
    peak = max(watch.looks, key=lambda look: look.total)
    bound = 2 * state * (1 + PARITY / (NODES - PARITY)) + DAEMON_BYTES * NODES
    settled = watch.looks[marks[min(10, snapshots // 2)] :]
    tenth = max(len(settled) // 10, 1)
    early, late = (_median(part) for part in (settled[:tenth], settled[-tenth:]))
    return {
        "S": state / MIB,
        "snapshots": snapshots,
        "bound": bound / MIB,
        "peak": peak.total / MIB,
        "of_bound": peak.total / bound,
        "tmpfs": peak.tmpfs / MIB,
        "daemons": peak.daemons / MIB,
        "trainers": peak.trainers / MIB,
        "early": early / MIB,
        "late": late / MIB,
        "growth_percent": 100 * (late / early - 1),
    }


def _median(looks: list[_Look]) -> int:
    return sorted(look.total for look in looks)[len(looks) // 2]


def _own_bytes(pid: int) -> int:
    """Memory of a process that is in no file, and in no other process, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def _blocks(path: Path) -> int:
    """What a file takes; nothing where it is just gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
