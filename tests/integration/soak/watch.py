"""What daemons use of descriptors and memory, from their first quiet moment to their last."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field

import psutil

from tests.integration.soak.ledger import Ledger
from tests.integration.soak.node import Node

#: A process counts from this age on: by then it has met all peers and held a few generations.
SETTLED_S = 30.0
#: Whoever is watched for less cannot be said to grow.
WATCHED_S = 60.0
MORE_DESCRIPTORS = 32
MORE_BYTES = 64 << 20
MORE_SEGMENTS = 2.0
SETTLED_LOOKS = 4


@dataclass
class Usage:
    """Of one process: the first settled sample, the newest, the greatest."""

    what: str
    first_s: float
    first: tuple[int, int]
    last_s: float = 0.0
    last: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (0, 0)


@dataclass
class Watch:
    """Samples of all daemons."""

    processes: dict[tuple[int, float], Usage] = field(default_factory=dict)
    memory: dict[str, list[int]] = field(default_factory=dict)  # tmpfs bytes, when all is quiet

    def look(self, nodes: list[Node]) -> None:
        """Sample every supervisor and SMP."""
        for node in nodes:
            if node.pid is None:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                self._sample(f"supervisor of {node.name}", psutil.Process(node.pid))
            for process in node.smps():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._sample(f"SMP of {node.name}", process)

    def _sample(self, what: str, process: psutil.Process) -> None:
        age_s = time.time() - process.create_time()
        if age_s < SETTLED_S:
            return
        memory = process.memory_info()
        now = (process.num_fds(), memory.rss - memory.shared)
        usage = self.processes.setdefault(
            (process.pid, process.create_time()), Usage(what, age_s, now)
        )
        usage.last_s, usage.last = age_s, now
        usage.most = max(usage.most[0], now[0]), max(usage.most[1], now[1])

    def look_at_memory(self, nodes: list[Node]) -> None:
        """Bytes of segments on each node, when nothing disturbs."""
        for node in nodes:
            stat = os.statvfs(node.memory)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            self.memory.setdefault(node.name, []).append(used)

    def judge(self, ledger: Ledger) -> None:
        """Nobody may have grown for good."""
        for usage in self.processes.values():
            if usage.last_s - usage.first_s < WATCHED_S:
                continue
            descriptors, more = usage.last[0] - usage.first[0], usage.last[1] - usage.first[1]
            if descriptors > MORE_DESCRIPTORS or more > MORE_BYTES:
                ledger.fail(
                    f"{usage.what} grew within {usage.last_s - usage.first_s:.0f} s by "
                    f"{descriptors} descriptors and {more} bytes"
                )
        for name, used in self.memory.items():
            early = max(used[:SETTLED_LOOKS])
            if len(used) > SETTLED_LOOKS and used[-1] > MORE_SEGMENTS * early:
                ledger.fail(f"the segments of {name} grew from {early} to {used[-1]} bytes")

    def summary(self) -> list[dict[str, object]]:
        """The processes that were watched for longest."""
        longest = sorted(self.processes.values(), key=lambda u: u.first_s - u.last_s)
        return [
            {
                "process": u.what,
                "watched_s": round(u.last_s - u.first_s),
                "descriptors": {"first": u.first[0], "most": u.most[0], "last": u.last[0]},
                "private_MiB": {
                    "first": u.first[1] >> 20,
                    "most": u.most[1] >> 20,
                    "last": u.last[1] >> 20,
                },
            }
            for u in longest[:8]
        ]
