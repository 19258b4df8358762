"""From sealed to protected: time against plain sockets that move the same bytes, and the bytes.

Four real daemons on loopback, one rank each. The time is from the return of `step()` on all ranks
to the commit on all: it contains sealing (the digests), coding, storing and the commit.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event

import psutil
import torch

from snapshotd.config import Timeouts
from snapshotd.core.news import COUNTERS_S
from snapshotd_client import Snapshotter
from tests.bench.harness import MIB, Scale, Table, Timing
from tests.bench.mesh import mesh
from tests.integration.cluster import Cluster, Node

NODES = 4
PARITIES = (1, 2, 3)
#: Bound of one snapshot's protection; a slow machine is to end with a figure, too.
PATIENCE_S = 120.0


def run(scale: Scale) -> Iterator[Table]:
    table = Table(
        f"Seal to protected: {NODES} nodes, {scale.bytes // MIB} MiB each",
        "ms, medians, all nodes at once; sockets: the same bytes between as many processes, "
        "plain; bytes: of the dearest node, each a snapshot, over S(1 + (m-1)/k); payload: as the "
        "daemons count it, tcp: as the kernel counts it, control traffic and all; cpu: "
        "processor time of all of them, s for each GB of state",
    )
    for parity in PARITIES:
        table.add(**measured(parity, scale))
    yield table


def measured(parity: int, scale: Scale) -> dict[str, object]:
    """One row: NODES daemons with `parity` against plain sockets, in turns."""
    data = NODES - parity
    expected = scale.bytes * (1 + (parity - 1) / data)
    budget = round(2.2 * scale.bytes * (1 + parity / data)) + 64 * MIB
    with (
        closing(_cluster(parity, budget)) as cluster,
        mesh(NODES, round(expected)) as (move, members),
        closing(_Ranks(cluster.start(NODES), scale.bytes)) as ranks,
    ):
        nodes = list(cluster.nodes.values())
        kinds = {
            "sockets_cpu": members,
            "smp_cpu": [pid for node in nodes for pid in node.smp_pids()],
            "supervisor_cpu": [node.process.pid for node in nodes],
        }
        for _ in range(4):  # until every buffer is there and touched
            move()
            ranks.step()
            ranks.protected()
        before, spent = ranks.sent_bytes(), {k: _cpu_s(pids) for k, pids in kinds.items()}
        sockets, protection = Timing(), Timing()
        for _ in range(scale.repeats):
            sockets.note(move)
            ranks.step()
            protection.note(ranks.protected)
        spent = {k: _cpu_s(pids) - spent[k] for k, pids in kinds.items()}
        sent = ranks.sent_bytes()
    payload, tcp = (
        max(b - a for a, b in zip(before[kind], sent[kind], strict=True))
        / (scale.repeats * expected)
        for kind in ("payload", "tcp")
    )
    return {
        "m": parity,
        "protected": 1e3 * protection.median_s,
        "sockets": 1e3 * sockets.median_s,
        "ratio": protection.median_s / sockets.median_s,
        "payload": payload,
        "tcp": tcp,
        **{k: cpu_s / (scale.repeats * NODES * scale.bytes / 1e9) for k, cpu_s in spent.items()},
    }


def _cpu_s(pids: list[int]) -> float:
    """Processor time of some processes since their start."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def _cluster(parity: int, budget: int) -> Cluster:
    """With the timeouts that daemons have by default: heartbeats cost, too."""
    cluster = Cluster(parity=parity, memory_budget=budget)
    cluster.timeouts = {name: getattr(Timeouts(), name) for name in cluster.timeouts}
    return cluster


class _Ranks:
    """One rank a node, each with a tensor of the given size."""

    def __init__(self, nodes: list[Node], state_bytes: int) -> None:
        self._nodes = nodes
        self._pool = ThreadPoolExecutor(len(nodes))
        self._states = [torch.full((state_bytes // 4,), float(i)) for i, _ in enumerate(nodes)]
        self._snaps = [
            Snapshotter(
                {"state": state},
                job="bulk",
                rank=rank,
                world_size=len(nodes),
                local_rank=0,
                run_dir=node.run_dir,
                max_stall_s=PATIENCE_S,
                overlap="off",  # so that it is written when step() returns
            )
            for rank, (node, state) in enumerate(zip(nodes, self._states, strict=True))
        ]
        self._step = 0
        list(self._pool.map(lambda snap: snap.restore(), self._snaps))

    def step(self) -> None:
        """All take a snapshot; back when it is written."""
        self._step += 1
        for state in self._states:
            state[:: 1 << 16] += 1  # a state that stands still would raise an alarm
        list(self._pool.map(lambda snap: snap.step(self._step), self._snaps))

    def protected(self) -> None:
        """Back when the newest snapshot is committed."""
        waits = self._pool.map(
            lambda snap: snap.wait_protected(self._step, timeout_s=PATIENCE_S), self._snaps
        )
        assert min(waits) == self._step

    def sent_bytes(self) -> dict[str, list[int]]:
        """Of each node, since its start: as the daemon counts, as the kernel counts."""
        Event().wait(2 * COUNTERS_S)  # counters are told late where nothing else is news
        return {
            "payload": [n.status().slots[0].counters.bytes_sent for n in self._nodes],
            "tcp": [_tcp_bytes(n.smp_pids()) for n in self._nodes],
        }

    def close(self) -> None:
        for snap in self._snaps:
            snap.close()
        self._pool.shutdown()


def _tcp_bytes(pids: list[int]) -> int:
    """Bytes sent on the open TCP connections of processes; 0 where there is no `ss`."""
    if shutil.which("ss") is None:
        return 0
    shown = subprocess.run(["ss", "-Htinp"], capture_output=True, text=True, check=True).stdout
    mine = "|".join(f"pid={pid}," for pid in pids)
    sent = 0
    for line, more in itertools.pairwise(shown.splitlines()):
        if re.search(mine, line) and (found := re.search(r"bytes_sent:(\d+)", more)):
            sent += int(found[1])
    return sent
