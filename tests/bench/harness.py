"""Timing by repeats, and tables of the outcome for people (rich) and programs (JSON).

A benchmark is a function `Scale -> Iterator[Table]`. What it compares, it times in turns, so that
whatever else the machine does meets all of it alike. Every time is noted twice: on the wall, and
as CPU time of the thread, which hardly changes when other jobs take the processor away. One
thread's arithmetic is reported in CPU time, everything else on the wall.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

MIB = 1 << 20

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a benchmark does: `bytes` of state at a time, `repeats` times."""

    bytes: int = 256 * MIB
    repeats: int = 15


#: Enough to see that a benchmark runs.
TINY = Scale(bytes=4 * MIB, repeats=2)


@dataclass(slots=True)
class Timing:
    """Seconds of each repeat, on the wall and of the thread's CPU time."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def best_s(self) -> float:
        """On the wall."""
        return min(self.wall_s)

    @property
    def median_s(self) -> float:
        """On the wall."""
        return statistics.median(self.wall_s)

    @property
    def best_cpu_s(self) -> float:
        return min(self.cpu_s)

    def note(self, work: Callable[[], object]) -> None:
        """Do the work once more."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        work()
        self.cpu_s.append(time.thread_time() - cpu_s)
        self.wall_s.append(time.perf_counter() - wall_s)


def timed(works: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, Timing]:
    """Time works in turns; the first turn, which warms caches and touches pages, is not counted."""
    for work in works.values():
        work()
    timings = {name: Timing() for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            timings[name].note(work)
    return timings


@dataclass(slots=True)
class Table:
    """Rows by column name; `notes` say what the columns mean."""

    title: str
    notes: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def rendered(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.notes, box=box.SIMPLE_HEAD)
        for column in self.rows[0] if self.rows else ():
            table.add_column(column.replace("_", " "), justify="right")
        for row in self.rows:
            table.add_row(*map(_text, row.values()))
        return table


def machine() -> dict[str, Any]:
    """What ran this, and how busy it was."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(models, platform.machine()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def report(tables: Iterable[Table], path: Path | None) -> None:
    """Print tables as they come; write all of them as JSON in the end."""
    console = Console()
    before, done = machine(), []
    console.print(", ".join(f"{key} {value}" for key, value in before.items()))
    for table in tables:
        console.print(table.rendered())
        done.append(asdict(table))
    if path is not None:
        content = {"machine": before, "load_after": os.getloadavg()[0], "tables": done}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def gb_per_s(count_bytes: int, seconds: float) -> float:
    """In units of 10^9 bytes a second; 0 where the clock saw no time pass."""
    return count_bytes / seconds / 1e9 if seconds else 0.0


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
