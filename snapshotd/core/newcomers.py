"""Whether a slot may take a trainer."""

from __future__ import annotations

from snapshotd.core.protection import Slots
from snapshotd.errors import RequestError
from snapshotd.metadata import Home, JobFacts, TrainerFacts
from snapshotd.wire.protocol import ErrorCode


def check_newcomer(trainer: TrainerFacts, job: JobFacts | None, home: Home, slots: Slots) -> None:
    """Refuse a trainer of another life of the job, or whose shard another one waits for.

    Args:
        trainer: who comes.
        job: as known now.
        home: the slot it comes to.
        slots: facts of all slots.

    Raises:
        RequestError: it is refused.
    """
    if trainer.decision and job and job.lineage > trainer.decision.epoch:
        raise RequestError(
            ErrorCode.OUT_OF_ORDER,
            f"this trainer was restored in epoch {trainer.decision.epoch} of job "
            f"{trainer.job!r}, which is at epoch {job.lineage} now",
            "It is left over from an earlier run: end it",
        )
    for place, facts in slots.items():
        other = facts.trainer
        if other is None or place == home or other.job != trainer.job:
            continue
        if other.waiting and other.shard == trainer.shard and other.start == trainer.start:
            raise RequestError(
                ErrorCode.DUPLICATE_RANK,
                f"rank {trainer.shard} of job {trainer.job!r} is already waiting on {place}",
                "Give each trainer its own RANK",
            )
