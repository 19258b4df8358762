"""Coming back: a trainer that crashed, from its node's memory; a lost node's shard, from the code.

The first against one thread's memcpy, the second against a loopback socket, both of the same run.
"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from snapshotd.memory.states import Kind, State
from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.segment import SegmentFormatError, decode_header
from snapshotd_client import Snapshotter
from tests.bench.harness import MIB, Scale, Table, gb_per_s
from tests.bench.limits import measured
from tests.bench.training import Training
from tests.integration.cluster import Cluster, Node, eventually

#: Times the state of the scale: what does not grow with the bytes shows in the difference.
SIZES = (1, 4)
#: Of the ranks whose state is not looked at.
SMALL_BYTES = MIB // 4
#: Each repeat is a restore of the whole job; as many as tell how much they differ.
MOST_REPEATS = 3
#: Of the group in which a node is lost: k = 3, m = 1.
GROUP = 4


def run(scale: Scale) -> Iterator[Table]:
    limits = measured(scale)
    memcpy = gb_per_s(scale.bytes, limits["memcpy"].best_s)
    loopback = gb_per_s(scale.bytes, limits["loopback"].best_s)
    yield _crash(scale, memcpy)
    yield _loss(scale, loopback)


@dataclass(slots=True)
class Watch:
    """A state of its own among those that are restored: it notes when its turn has come."""

    at_s: float = 0.0
    calls: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at_s = time.perf_counter()
        self.calls = state["calls"]


# -- a trainer crashed


def _crash(scale: Scale, memcpy: float) -> Table:
    table = Table(
        "A trainer crashed: its state from its own node",
        f"GB/s, medians; memcpy {memcpy:.1f}; attach: until the daemon has taken it; first: from "
        "there to the first restored tensor; restore: the whole call; load: of that, the bytes; "
        "kept: optimizer state that is there already; new: made by the restore",
    )
    for factor in SIZES:
        size = factor * scale.bytes
        if not _fits(6 * size):
            table.add(MiB=size // MIB, optimizer="left out: memory")
            continue
        # A group of two: the other rank is tiny, and keeps the parity of the one looked at.
        with closing(_cluster(2, size)) as cluster, closing(_Pair(cluster, size)) as pair:
            for kept in (True, False):
                table.add(**pair.row(kept, min(scale.repeats, MOST_REPEATS), memcpy))
    return table


class _Pair:
    """Two ranks on two nodes, the first with the state that is looked at."""

    def __init__(self, cluster: Cluster, size: int) -> None:
        self._nodes = cluster.start(2)
        self._states = [Training(size), Training(SMALL_BYTES)]
        self._watch = Watch()
        self._pool = ThreadPoolExecutor(2)
        self._snaps = [self._attach(rank) for rank in (0, 1)]
        self._step = 0
        self._restore()
        self._save()

    def _attach(self, rank: int) -> Snapshotter:
        more: dict[str, object] = {"first": self._states[rank].parameters[0].detach()[:16].clone()}
        if rank == 0:
            more["watch"] = self._watch
        return self._states[rank].attach(self._nodes[rank], rank, 2, more)

    def _restore(self) -> None:
        list(self._pool.map(lambda snap: snap.restore(), self._snaps))

    def _save(self) -> None:
        for snap in self._snaps:
            snap.step(self._step)
        for snap in self._snaps:
            snap.wait_protected(timeout_s=120.0)
        self._step += 1

    def row(self, kept: bool, repeats: int, memcpy: float) -> dict[str, object]:
        state = self._states[0]
        before = _digest(state)
        times = [self._crash(kept) for _ in range(repeats)]
        assert _digest(state) == before, "a restore that is not exact"
        attach, first, restore, load = (statistics.median(t) for t in zip(*times, strict=True))
        rate = gb_per_s(state.nbytes, restore)
        return {
            "MiB": state.nbytes // MIB,
            "optimizer": "kept" if kept else "new",
            "attach_ms": 1000 * attach,
            "first_ms": 1000 * first,
            "restore_ms": 1000 * restore,
            "restore": rate,
            "of_memcpy": rate / memcpy,
            "load": gb_per_s(state.nbytes, load),
            "load_of_memcpy": gb_per_s(state.nbytes, load) / memcpy,
        }

    def _crash(self, kept: bool) -> tuple[float, float, float, float]:
        """Seconds to attach, to the first tensor from there, of restore(), of its loading."""
        for snap in self._snaps:
            snap._let_go()  # what a daemon sees of a SIGKILL
        state = self._states[0]
        state.lose()
        if not kept:
            state.new_optimizer()
        self._snaps[1] = self._attach(1)
        other = self._pool.submit(self._snaps[1].restore)
        time.sleep(0.5)  # noqa: TID251  # as a trainer's start takes; its daemon knows of its end
        begun_s = time.perf_counter()
        self._snaps[0] = self._attach(0)
        attached_s = time.perf_counter()
        self._snaps[0].restore()
        ended_s = time.perf_counter()
        other.result()
        first_s = self._watch.at_s
        return attached_s - begun_s, first_s - attached_s, ended_s - attached_s, ended_s - first_s

    def close(self) -> None:
        for snap in self._snaps:
            snap.close()
        self._pool.shutdown()


# -- a node is lost


def _loss(scale: Scale, loopback: float) -> Table:
    table = Table(
        "A node is lost: its shard from the blocks of three others",
        f"GB/s of the lost shard and of what was received for it; loopback {loopback:.1f}; cpu: "
        "s of the rebuilding SMP for each GB received; memory: the most that it had of its own "
        "beyond its start, MiB",
    )
    size = scale.bytes
    if not _fits(3 * GROUP * size):
        table.add(MiB="left out: memory")
        return table
    for _ in range(min(scale.repeats, MOST_REPEATS)):
        with closing(_cluster(GROUP, size, replace_s=3600.0)) as cluster:
            table.add(**_rebuilt(cluster, size, loopback))
    return table


def _rebuilt(cluster: Cluster, size: int, loopback: float) -> dict[str, object]:
    nodes = cluster.start(GROUP)
    states = [Training(size) for _ in nodes]
    snaps = [
        state.attach(n, rank, GROUP)
        for rank, (state, n) in enumerate(zip(states, nodes, strict=True))
    ]
    with ThreadPoolExecutor(GROUP) as pool:
        list(pool.map(lambda snap: snap.restore(), snaps))
    for snap in snaps:
        snap.step(0)
    for snap in snaps:
        snap.wait_protected(timeout_s=120.0)
    for snap in snaps:
        snap._let_go()
    lost = nodes[-1]
    lost.lose()
    (lost.root / "run").mkdir(exist_ok=True)
    lost.launch()
    seen = _watch_rebuild(lost)
    shard = states[-1].nbytes
    received = gb_per_s((GROUP - 1) * shard, seen.filled_s)
    return {
        "MiB": shard // MIB,
        "allocate_ms": 1000 * seen.allocated_s,
        "rebuild_ms": 1000 * seen.filled_s,
        "shard": gb_per_s(shard, seen.filled_s),
        "received": received,
        "of_loopback": received / loopback,
        "cpu": seen.cpu_s / ((GROUP - 1) * shard / 1e9),
        "memory_MiB": seen.memory_bytes / MIB,
    }


@dataclass(slots=True)
class _Rebuild:
    """Seconds that the lost shard's segment was allocated and filled; what the SMP took then."""

    allocated_s: float
    filled_s: float
    cpu_s: float
    memory_bytes: int


def _watch_rebuild(node: Node) -> _Rebuild:
    """See from outside what becomes of the data segments of a node that came back empty."""
    eventually("its SMP runs", node.smp_pids, 60.0)
    status = Path(f"/proc/{node.smp_pids()[0]}/status")
    process = psutil.Process(node.smp_pids()[0])
    made_s = begun_s = spent_s = 0.0
    at_first = most = _own_bytes(status)
    while True:
        now_s, states = time.perf_counter(), _data_states(node)
        made_s = made_s or (now_s if states else 0.0)
        if not begun_s and State.WRITING in states:
            begun_s, spent_s = now_s, _cpu_s(process)
        if State.SEALED in states:
            spent_s = _cpu_s(process) - spent_s
            return _Rebuild(begun_s - made_s, now_s - begun_s, spent_s, most - at_first)
        most = max(most, _own_bytes(status))
        time.sleep(0.002)  # noqa: TID251  # looking at another process from outside


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _data_states(node: Node) -> set[State]:
    """In which states data segments are, those included that are still being allocated."""
    found = set()
    for path in node.shm_dir.glob("slot-0/*.seg*"):
        with contextlib.suppress(OSError, SegmentFormatError), path.open("rb") as file:
            header = decode_header(file.read(HEADER_BYTES))
            if header.kind == Kind.DATA.value:
                found.add(State(header.state))
    return found


def _own_bytes(status: Path) -> int:
    """Memory of a process that is in no file: its own."""
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def _digest(training: Training) -> str:
    digest = hashlib.sha256()
    for tensor in training.live():
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def _cluster(count: int, size: int, **options: Any) -> Cluster:
    return Cluster(group_size=count, memory_budget=f"{5 * size // MIB + 64}MiB", **options)


def _fits(count_bytes: int) -> bool:
    return psutil.virtual_memory().available > count_bytes
