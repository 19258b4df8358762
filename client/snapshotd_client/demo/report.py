"""What the demo leaves for the reader: one table, one picture, one file of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table

from snapshotd_client.demo.record import Outcome, Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, int, float]]

_CAPTION: Final = (
    "recomputed: steps that were complete and were computed again (the interrupted one is not "
    "counted); rebuilt: decoded from the other nodes' blocks; moved: copied whole, as torchrun "
    "gave the rank to another node"
)


_TIMES_CAPTION: Final = (
    "detection: until new trainers run; rendezvous: until all ask to restore; plan: until the "
    "daemons answer, but for rebuild: the shards on their nodes, verified; load: back in the "
    "models; steps: those computed again, and the first new one"
)


@dataclass(frozen=True)
class RunReport:
    """One run: its loss as (wall clock s, step, loss), its faults, its seconds."""

    name: str
    curve: Curve
    outcomes: Sequence[Outcome]
    took_s: float


def fault_table(outcomes: Sequence[Outcome]) -> Table:
    """The table of faults."""
    table = Table(title="What was broken, and how the job came back", caption=_CAPTION)
    for column in ("run", "fault", "what was lost", "tier"):
        table.add_column(column)
    for column in ("steps recomputed", "fault to first new step", "bytes rebuilt", "bytes moved"):
        table.add_column(column, justify="right")
    for row in outcomes:
        lost = f"{row.lost}\n[dim]{row.remark}[/dim]" if row.remark else row.lost
        numbers = (
            str(row.recomputed_steps),
            f"{row.first_new_step_s:.1f} s",
            f"{row.decoded_bytes:,}",
            f"{row.copied_bytes:,}",
        )
        table.add_row(row.run, row.fault, lost, row.tier, *numbers)
    return table


def times_table(outcomes: Sequence[Outcome]) -> Table:
    """Where the time went, for each fault that stopped the job."""
    table = Table(title="From the fault to the first new step, seconds", caption=_TIMES_CAPTION)
    parts = [field.name for field in fields(Times)]
    table.add_column("run")
    table.add_column("fault")
    for part in (*parts, "in all"):
        table.add_column(part, justify="right")
    for row in outcomes:
        if row.times is not None:
            seconds = (*(getattr(row.times, part) for part in parts), row.first_new_step_s)
            table.add_row(row.run, row.fault, *(f"{value:.2f}" for value in seconds))
    return table


def write_numbers(path: Path, runs: Sequence[RunReport], compared_bytes: Mapping[str, int]) -> None:
    """Everything of the table and the picture, as JSON."""
    content = {
        "runs": [asdict(run) for run in runs],
        "bytes_equal_to_reference": dict(compared_bytes),
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def draw_curves(path: Path, reference: RunReport, faulty: Sequence[RunReport]) -> None:
    """Loss against step and against time, of the reference and of each run with faults.

    Args:
        path: of the PNG file.
        reference: the uninterrupted run.
        faulty: the others; their faults are marked.
    """
    # matplotlib takes a second to import; only this needs it. It never opens a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 3.4 * len(faulty)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(faulty), 2, squeeze=False)
    for (by_step, by_time), run in zip(grid, faulty, strict=True):
        _draw_by_step(by_step, reference, run)
        _draw_by_time(by_time, reference, run)
    figure.savefig(path, dpi=110)


def _draw_by_step(axes: Axes, reference: RunReport, run: RunReport) -> None:
    axes.plot(*_points(reference.curve, 1), color="0.7", linewidth=5, label="reference")
    axes.plot(*_points(run.curve, 1), color="C0", linewidth=1.2, label=run.name)
    for number, outcome in enumerate(run.outcomes):
        axes.axvline(outcome.step, color=f"C{number + 1}", linestyle="--", label=outcome.fault)
    axes.set(title=f"{run.name}: loss by step", xlabel="step", ylabel="loss")
    axes.legend(fontsize="small")


def _draw_by_time(axes: Axes, reference: RunReport, run: RunReport) -> None:
    for curve, color, width in ((reference.curve, "0.7", 3.0), (run.curve, "C0", 1.2)):
        times, losses = _points(curve, 0)
        axes.plot([t - times[0] for t in times], losses, color=color, linewidth=width, marker=".")
    for number, outcome in enumerate(run.outcomes):
        moment_s = outcome.time_s - run.curve[0][0]
        axes.axvline(moment_s, color=f"C{number + 1}", linestyle="--")
    axes.set(title=f"{run.name}: loss by time", xlabel="seconds since step 0 ended")


def _points(curve: Curve, axis: int) -> tuple[list[float], list[float]]:
    return [point[axis] for point in curve], [point[2] for point in curve]
