"""The trainer's side: how long a snapshot keeps training waiting, and how fast it is copied.

A real daemon on this node; the training thread has one core to itself, everything else the other.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from snapshotd_client import NoDaemon, Refused, Snapshotter
from tests.bench.harness import MIB, Scale, Table, gb_per_s
from tests.bench.limits import measured
from tests.integration.cluster import Cluster, Node

TENSORS = (12, 100, 1000, 10_000)
#: The second state is so many times as large, where the machine has memory for it.
LARGER = 16
GENERATIONS = 2


def run(scale: Scale) -> Iterator[Table]:
    memcpy = measured(scale)["memcpy"].best_s / scale.bytes
    table = Table(
        "capture",
        "ms; blocked: in step(), busy: of CPU time; waited: by an update at once; rested: "
        "by one later; of memcpy: the whole copy's best, of one thread's into tmpfs",
    )
    cases = [(scale.bytes, n) for n in TENSORS]
    if psutil.virtual_memory().available > (GENERATIONS + 2) * LARGER * scale.bytes:
        cases.append((LARGER * scale.bytes, 100))
    for state_bytes, tensors in cases:
        repeats = scale.repeats if state_bytes == scale.bytes else max(3, scale.repeats // 4)
        table.add(**_measure(state_bytes, tensors, repeats, memcpy))
    yield table


class Job:
    """fp32 parameters and both moments of AdamW: `tensors` of them, of equal size."""

    def __init__(self, state_bytes: int, tensors: int) -> None:
        count = tensors // 4  # with each parameter's step, a scalar
        each = state_bytes // count // 3 // 4
        self.model = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.full((each,), 0.5)) for _ in range(count)]
        )
        self.opt = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            self.opt.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.ones_like(parameter),
                "exp_avg_sq": torch.ones_like(parameter),
            }

    def update(self) -> float:
        """What an update waits for; there are no gradients, so nothing else is done. Seconds."""
        began_s = time.perf_counter()
        self.opt.step()
        return time.perf_counter() - began_s


def _measure(state_bytes: int, tensors: int, repeats: int, memcpy: float) -> dict[str, object]:
    job = Job(state_bytes, tensors)
    blocked, busy, waited, rested = [], [], [], []
    with _daemon(state_bytes) as node, _apart(node):
        snap = _attached(job, node)
        snap.restore()
        _spread()
        for step in range(2 * repeats + 1):
            began_s, began_busy_s = time.perf_counter(), time.thread_time()
            snap.step(step)
            busy.append(time.thread_time() - began_busy_s)
            blocked.append(time.perf_counter() - began_s)
            if step % 2:
                time.sleep(3 * memcpy * state_bytes)  # noqa: TID251  # forward and backward
            (rested if step % 2 else waited).append(job.update())
            snap.wait_protected(timeout_s=60)
        assert snap.status().torn == snap.status().skipped == 0
        snap.close()
    whole = [b + w for b, w in zip(blocked[::2], waited, strict=True)]
    return {
        "state_MiB": state_bytes // MIB,
        "tensors": tensors,
        "best": min(blocked[1:]) * 1e3,
        "busy": min(busy[1:]) * 1e3,
        "blocked": statistics.median(blocked[1:]) * 1e3,
        "waited": statistics.median(waited[1:]) * 1e3,
        "rested": statistics.median(rested) * 1e3,
        "GB/s": gb_per_s(state_bytes, min(whole[1:])),
        "of_memcpy": memcpy * state_bytes / min(whole[1:]),
        "first_blocked": blocked[0] * 1e3,
        "first_of_later": whole[0] / statistics.median(whole[1:]),
    }


def _attached(job: Job, node: Node) -> Snapshotter:
    """On a busy machine an SMP may take long to start."""
    for patience in reversed(range(5)):
        try:
            return Snapshotter(
                {"model": job.model, "opt": job.opt},
                job="bench",
                run_dir=node.run_dir,
                max_stall_s=20.0,
            )
        except (NoDaemon, Refused):
            if not patience:
                raise
    raise AssertionError


@contextmanager
def _daemon(state_bytes: int) -> Iterator[Node]:
    cluster = Cluster(
        parity=0,
        group_size=2,
        generations=GENERATIONS,
        memory_budget=f"{4 * state_bytes // MIB + 64}MiB",
    )
    try:
        (node,) = cluster.start(1)
        yield node
    finally:
        cluster.close()


@contextmanager
def _apart(node: Node) -> Iterator[None]:
    """This thread on the first core, the daemon on the others."""
    cores = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, cores[:1])
        assert node.process is not None
        for pid in (node.process.pid, *node.smp_pids()):
            _pin(pid, cores[1:] or cores)
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _spread() -> None:
    """This process's other threads on the cores that the training has not."""
    rest = sorted(set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0))
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) != os.getpid() and rest:
            os.sched_setaffinity(int(thread.name), rest)


def _pin(pid: int, cores: list[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)
