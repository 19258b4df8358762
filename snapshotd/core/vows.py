"""What a slot remembers of the restores that were decided: which it has staged, and since when.

A decision is released once every slot has staged it, and whoever sees that acts on it at once. So
that none is taken for abandoned which somebody else has seen released, a slot goes on saying that
it staged it when its trainer is gone; and one whose process began later says that it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterable

from snapshotd.metadata import DecisionId, JobFacts, Vow


class Vows:
    """Of one slot, for as long as its process lives."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._staged: dict[str, DecisionId] = {}

    def follow(self, jobs: Iterable[JobFacts]) -> None:
        """What is known of all jobs now."""
        epochs = {job.job: job.epoch for job in jobs}
        self._since = {job: self._since.get(job, epoch) for job, epoch in epochs.items()}
        self._staged = {job: d for job, d in self._staged.items() if job in epochs}

    def staged(self, job: str, decision: DecisionId) -> None:
        """Its part of a decision is here."""
        self._staged[job] = decision

    def of(self, jobs: Iterable[JobFacts]) -> tuple[Vow, ...]:
        """What others must know of the restores that are not over."""
        return tuple(self._vow(job) for job in jobs if job.restoring is not None)

    def _vow(self, job: JobFacts) -> Vow:
        staged = self._staged.get(job.job)
        over = staged is None or staged.epoch <= job.lineage
        return Vow(job.job, self._since[job.job], None if over else staged)
