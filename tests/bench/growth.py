"""How costs grow: with the number of tensors, with the bytes of state, with the number of nodes.

The exponent is fitted to each column: 0 where it does not grow, 1 where it grows as
what is varied does, 2 with its square. Where matplotlib is there, the plots are written too.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from snapshotd.config import Timeouts
from tests.bench.harness import MIB, Scale, Table
from tests.bench.training import Training
from tests.integration.cluster import PORT, Cluster, Node, eventually
from tests.integration.ranks import Job, homes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TENSORS = (10, 100, 1000, 10_000)
TENSOR_STATE_BYTES = 16 * MIB
SIZES_MIB = (64, 256, 1024, 2048, 3072, 4096, 8192)
NODES = (2, 4, 8, 16, 32, 64)
GROUP = 4
#: Of a supervisor and an SMP; with the ranks, which are all in this process.
NODE_BYTES = 130 * MIB
SNAPSHOTS = 8
#: Of idleness whose traffic is taken off that of the snapshots.
LOOK_S = 6.0
START_S = 300.0
#: From so many nodes on heartbeats are rarer, so that one machine has processors for all.
CROWD = 32
#: What a step may wait for a daemon that has no processor.
STALL_S = 60.0
PLOTS = Path("bench-growth.png")


def run(scale: Scale) -> Iterator[Table]:
    snapshots = min(SNAPSHOTS, scale.repeats)
    tables = [_tensors(snapshots)]
    yield tables[-1]
    tables.append(_sizes(snapshots))
    yield tables[-1]
    tables.append(_nodes(snapshots))
    yield tables[-1]
    _plot(tables)


# -- one node's state


def _tensors(snapshots: int) -> Table:
    table = Table(
        f"Growth with the number of tensors, {TENSOR_STATE_BYTES // MIB} MiB in all",
        "ms, medians; two nodes, the other rank is tiny; step: the call; commit: from there until "
        "it is the restore point",
    )
    for count in TENSORS:
        # Of each parameter AdamW keeps two moments and a step.
        table.add(tensors=count, **_snapshot_ms(TENSOR_STATE_BYTES, max(count // 4, 1), snapshots))
    return _fitted(table, "tensors", ("step_ms", "commit_ms"))


def _sizes(snapshots: int) -> Table:
    table = Table(
        "Growth with the bytes of state on one node",
        "ms, medians; two nodes, the other rank is tiny; sizes for which memory is short are "
        "left out",
    )
    for mib in SIZES_MIB:
        if psutil.virtual_memory().available < 7 * mib * MIB:
            continue
        table.add(MiB=mib, **_snapshot_ms(mib * MIB, 0, snapshots))
    return _fitted(table, "MiB", ("step_ms", "commit_ms"))


def _snapshot_ms(size: int, parameters: int, snapshots: int) -> dict[str, float]:
    """The medians of step() and of commitment after it, of the larger rank."""
    with closing(Cluster(group_size=2, memory_budget=f"{5 * size // MIB + 64}MiB")) as cluster:
        nodes = cluster.start(2)
        trainings = [Training(size, parameters), Training(MIB // 4)]
        snaps = [
            t.attach(n, rank, 2) for rank, (t, n) in enumerate(zip(trainings, nodes, strict=True))
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda snap: snap.restore(), snaps))
        steps, commits = [], []
        for step in range(snapshots + 2):  # the first two allocate
            for training in trainings:
                training.change()
            snaps[1].step(step)
            begun_s = time.perf_counter()
            snaps[0].step(step)
            stepped_s = time.perf_counter()
            for snap in snaps:
                snap.wait_protected(timeout_s=120.0)
            steps.append(stepped_s - begun_s)
            commits.append(time.perf_counter() - stepped_s)
        for snap in snaps:
            snap.close()
    return {
        "step_ms": 1000 * statistics.median(steps[2:]),
        "commit_ms": 1000 * statistics.median(commits[2:]),
    }


# -- nodes


def _nodes(snapshots: int) -> Table:
    table = Table(
        f"Growth with the number of nodes, groups of {GROUP}",
        f"one rank a node, tiny shards, default timeouts (from {CROWD} nodes on 4 and 16 times as "
        "long, so that one machine has processors for all); commit: median ms from the last step() "
        "until all know; control traffic between supervisors, each node's part, both ways, as the "
        "kernel counts it: TCP segments with data, KiB; idle: each second; snapshot: beyond that",
    )
    for count in NODES:
        if psutil.virtual_memory().available < count * NODE_BYTES:
            continue
        with closing(Cluster(group_size=min(count, GROUP))) as cluster:
            cluster.timeouts = _timeouts(count)
            table.add(**_with_nodes(cluster, count, snapshots))
    columns = ("commit_ms", "snapshot_segments", "snapshot_KiB", "idle_KiB_s")
    return _fitted(table, "nodes", columns)


def _timeouts(count: int) -> dict[str, float]:
    longer = 4 * (count / CROWD) ** 2 if count >= CROWD else 1.0
    return {name: longer * value for name, value in Timeouts().model_dump().items()}


def _with_nodes(cluster: Cluster, count: int, snapshots: int) -> dict[str, Any]:
    nodes = [cluster.node(f"n{i:03d}") for i in range(count)]
    for node in nodes:
        node.launch()
    for node in nodes:
        eventually(f"{node.name} serves", node.ready, START_S)
    cluster.met(START_S)
    job = Job(homes(nodes), max_stall_s=STALL_S)
    with closing(job):
        job.restore(timeout_s=START_S)
        for _ in range(2):
            job.train(1)
            job.protected(START_S)
        idle = _rates(nodes, max(LOOK_S, 3 * cluster.timeouts["heartbeat_s"]))
        before, begun_s, commits = _traffic(nodes), time.perf_counter(), []
        for _ in range(snapshots):
            job.train(1)
            trained_s = time.perf_counter()
            job.protected(START_S)
            commits.append(time.perf_counter() - trained_s)
        after, took_s = _traffic(nodes), time.perf_counter() - begun_s

    def each(total: float, idle_rate: float) -> float:
        return (total - idle_rate * took_s) / snapshots / count

    return {
        "nodes": count,
        "commit_ms": 1000 * statistics.median(commits),
        "snapshot_segments": each(after.segments - before.segments, idle.segments),
        "snapshot_KiB": each(after.count_bytes - before.count_bytes, idle.count_bytes) / 1024,
        "idle_segments_s": idle.segments / count,
        "idle_KiB_s": idle.count_bytes / count / 1024,
    }


@dataclass(frozen=True, slots=True)
class _Traffic:
    """Between supervisors, of all nodes."""

    segments: float
    count_bytes: float


def _rates(nodes: Sequence[Node], look_s: float) -> _Traffic:
    """Each second, while nothing happens."""
    before, begun_s = _traffic(nodes), time.perf_counter()
    time.sleep(look_s)  # noqa: TID251  # nothing is to happen
    after, took_s = _traffic(nodes), time.perf_counter() - begun_s
    return _Traffic(
        (after.segments - before.segments) / took_s,
        (after.count_bytes - before.count_bytes) / took_s,
    )


def _traffic(nodes: Sequence[Node]) -> _Traffic:
    """So far, from the kernel's counters of the serving end of every open connection."""
    ports = {node.address for node in nodes}
    command = ["ss", "-Htino", "state", "established", f"( sport = :{PORT} )"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    segments = count_bytes = 0
    for connection, counters in zip(lines[::2], lines[1::2], strict=True):
        # gRPC listens for both kinds of addresses, so that one of IPv4 is shown as one of IPv6.
        if connection.split()[2].replace("[::ffff:", "").replace("]", "") in ports:
            found = dict(re.findall(r"(\w+):(\d+)", counters))
            segments += sum(int(found.get(f"data_segs_{way}", 0)) for way in ("in", "out"))
            count_bytes += sum(int(found.get(f"bytes_{way}", 0)) for way in ("received", "sent"))
    assert count_bytes, f"ss has counted nothing on {', '.join(sorted(ports))}"
    return _Traffic(segments, count_bytes)


# -- what follows


def _fitted(table: Table, varied: str, columns: Sequence[str]) -> Table:
    """With the exponent of each column in its notes, by least squares of the logarithms."""
    fits = {
        column: _exponent([row[varied] for row in table.rows], [row[column] for row in table.rows])
        for column in columns
    }
    table.notes += "; exponents: " + ", ".join(f"{c} {f:.2f}" for c, f in fits.items())
    return table


def _exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
    if len(pairs) < 2:
        return float("nan")
    x, y = np.log(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def _plot(tables: Sequence[Table]) -> None:
    """Each table as curves over its first column, on logarithmic axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        _draw(axes, table.title, table.rows)
    figure.savefig(PLOTS, dpi=110)


def _draw(axes: Axes, title: str, rows: Sequence[Mapping[str, float]]) -> None:
    varied, *columns = rows[0]
    for column in columns:
        axes.loglog([r[varied] for r in rows], [r[column] for r in rows], marker=".", label=column)
    axes.set(title=title, xlabel=varied)
    axes.legend(fontsize="small")
