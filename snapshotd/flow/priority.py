"""How an SMP stands back behind training: its niceness, and its processors.

Both are the kernel's per thread; new threads have those of the thread that starts them. The kernel
derives the priority of I/O from niceness, so there is none to set beside it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Final

from snapshotd.core.cpus import away_from
from snapshotd.wire.cpus import ALL, AUTO, parse_cpus

log = logging.getLogger(__name__)

_NODES: Final = Path("/sys/devices/system/node")
_THREADS: Final = Path("/proc/self/task")


class Priority:
    """Of this process. Made before it starts any thread.

    Args:
        nice: 0 to 19, added to what the process was started with.
        cpus: "auto", "all" or a list.
    """

    def __init__(self, nice: int, cpus: str) -> None:
        self._auto = cpus == AUTO
        self._allowed = os.sched_getaffinity(0)
        self._now: Set[int] = self._allowed
        os.nice(nice)
        if cpus not in {AUTO, ALL}:
            self._take(parse_cpus(cpus) & self._allowed)

    def beside(self, trainer: Set[int]) -> None:
        """Leave a trainer its processors, where it is pinned to some; empty: not known."""
        if self._auto and trainer:
            self._take(away_from(trainer, self._allowed, _numa_nodes()))

    def _take(self, cpus: Set[int]) -> None:
        if not cpus or cpus == self._now:
            return
        for thread in _THREADS.iterdir():
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread.name), cpus)
        self._now = cpus
        log.info("works on processors %s of %s", sorted(cpus), sorted(self._allowed))


def _numa_nodes() -> list[frozenset[int]]:
    """The processors of each NUMA node; none where the kernel does not tell."""
    found = []
    for path in sorted(_NODES.glob("node[0-9]*/cpulist")):
        text = path.read_text(encoding="ascii").strip()
        if text:  # a node of memory alone has none
            found.append(parse_cpus(text))
    return found
