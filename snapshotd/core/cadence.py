"""How often to snapshot: widen the interval for all ranks when skips recur, narrow it later.

A rank that finds no free buffer skips its snapshot and training goes on; the others' work for
that step was in vain. So when half of the due snapshots of a window are skipped, the interval
doubles for every rank, from a step all of them have yet to reach; after a long window without a
skip it halves again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snapshotd.metadata import Cadence, TrainerFacts

WIDEN_WINDOW = 16  # due snapshots looked back on before widening
NARROW_WINDOW = 64  # ... and before narrowing
MARGIN_STEPS = 8  # ranks of one job are never this far apart


@dataclass(frozen=True, slots=True)
class Window:
    """Where the present window began: the step, and the skips counted up to it."""

    step: int = 0
    skipped: int = 0


def judge(
    window: Window | None, trainers: Iterable[TrainerFacts], present: Cadence, max_interval: int
) -> tuple[Window | None, Cadence]:
    """The window to go on with and the cadence to follow, unchanged where nothing is to be done.

    Args:
        window: None at a job's first call.
        trainers: all trainers of the job that train now.
        present: the cadence in force.
        max_interval: widening stops there.
    """
    ranks = list(trainers)
    if not ranks:
        return window, present
    step = max(t.passed_step for t in ranks)
    skipped = max(t.skipped for t in ranks)
    if window is None or step < window.step or skipped < window.skipped:
        return Window(step, skipped), present
    due = (step - max(window.step, present.from_step)) // present.interval
    lost = skipped - window.skipped
    if due >= WIDEN_WINDOW and 2 * lost >= due and present.interval < max_interval:
        return Window(step, skipped), _from(step, min(max_interval, present.interval * 2))
    if due >= NARROW_WINDOW:
        if lost == 0 and present.interval > 1:
            return Window(step, skipped), _from(step, present.interval // 2)
        return Window(step, skipped), present
    return window, present


def _from(step: int, interval: int) -> Cadence:
    return Cadence(interval, step + MARGIN_STEPS)
