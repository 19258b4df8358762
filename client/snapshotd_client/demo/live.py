"""What the person who watches sees while it runs."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Live:
    """A bar for each run, and a line for each thing that happens."""

    def __init__(self, console: Console) -> None:
        self._began_s = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("step {task.completed:>3.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def run(self, name: str, steps: int) -> None:
        """A run begins."""
        self._tasks[name] = self._progress.add_task(name, total=steps, loss="")

    def step(self, name: str, step: int, loss: float) -> None:
        """A run has completed a step."""
        self._progress.update(self._tasks[name], completed=step + 1, loss=f"loss {loss:.3f}")

    def ended(self, name: str) -> None:
        """A run is over."""
        self._progress.stop_task(self._tasks[name])

    def note(self, text: str) -> None:
        """Something happened."""
        passed_s = time.monotonic() - self._began_s
        self._progress.console.print(
            f"[dim]{passed_s:6.1f} s[/dim]  {escape(text)}", soft_wrap=True
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
