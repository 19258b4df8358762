"""`SnapshotStorageWriter`: dcp.save and dcp.async_save into the daemons' memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from snapshotd_client.dcp.member import TIMEOUT_S, Member, Place, member_of
from snapshotd_client.dcp.packing import pack, resolved
from snapshotd_client.dcp.steps import CheckpointId, is_step, step_of
from snapshotd_client.errors import WrongUse
from snapshotd_client.waiting import Deadline


class SnapshotStorageWriter(StorageWriter):
    """Saves steps to the daemons, which keep them as they keep Snapshotter's.

    `dcp.save` returns when the step is committed: the job survives the loss of nodes with it. Where
    that cannot be, every rank gets the error, as a CheckpointException; older steps are untouched.

    Args:
        checkpoint_id: what ends with the number of the step, as "out/step-100", or that number;
            `dcp.save(checkpoint_id=...)` wins. Steps grow from save to save.
        job, rank, world_size, local_rank, run_dir: as in Snapshotter. Where only some ranks save
            (`process_group=`), rank and world_size are those among them.
        timeout_s: longest wait for all ranks, for memory, and for the step to be committed, each.
        replace: this run may save over a step that it has not loaded.

    Raises (from torch's calls, as CheckpointException of all ranks):
        WrongUse: no step, or one that is not newer; ranks or job are not known.
        UnsupportedState: a tensor that cannot be stored.
        NoDaemon, Refused, ProtectionTimeout: as Snapshotter.restore and wait_protected.
    """

    def __init__(
        self,
        checkpoint_id: CheckpointId | None = None,
        *,
        job: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        local_rank: int | None = None,
        run_dir: str | Path | None = None,
        timeout_s: float = TIMEOUT_S,
        replace: bool = False,
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self._place = Place(job, rank, world_size, local_rank, run_dir)
        self._timeout_s = timeout_s
        self._replace = replace
        self._collective = True
        if checkpoint_id is not None:
            step_of(checkpoint_id)

    # -- torch's interface

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Another step is to be saved."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it names a step."""
        return is_step(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks begin the step."""
        self._collective = kwargs.get("use_collectives", True)
        with self._member.guard:
            self._member.begin(self._step, Deadline(self._timeout_s), replace=self._replace)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are, if they are of all ranks of the job."""
        world = self._member.who.world_size
        if self._collective and len(plans) != world:
            raise WrongUse(
                f"{len(plans)} rank(s) save together, and the job has {world}",
                "Give SnapshotStorageWriter the rank and world_size of this rank among those that "
                "save; with no_dist=True these are 0 and 1",
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's part goes to its daemon."""
        member, step = self._member, self._step
        with member.guard:
            try:
                data = resolved(plan, planner)
                paths = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
                member.save(pack(member.who, step, data, paths), step, Deadline(self._timeout_s))
            except BaseException as error:
                member.pass_by(step, f"{type(error).__name__}: {error}")
                raise
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(i.index, t.nbytes, member.who.rank) for i, t in data])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Wait until the step is committed; each rank's shard is told for what it wrote."""
        metadata.storage_data = {r.index: r.storage_data for rank in results for r in rank}
        with self._member.guard:
            self._member.wait_committed(self._step, Deadline(self._timeout_s))

    # -- beyond torch's

    def close(self) -> None:
        """Have this process leave the job, so that another, or a Snapshotter, may take its slot.

        What was saved stays. The next save or load joins again, together with all ranks.
        """
        with self._member.guard:
            self._member.leave()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, as that of async_save: it takes this one's place in the job."""
        with self._member.guard:
            self._member.leave()
            return {**self.__dict__, "_acquainted": self._member.acquainted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        acquainted = state.pop("_acquainted")
        self.__dict__.update(state)
        self._member.acquainted |= acquainted

    @property
    def _member(self) -> Member:
        return member_of(self._place)

    @property
    def _step(self) -> int:
        if self.checkpoint_id is None:
            raise WrongUse(
                "no step was named",
                'Give dcp.save a checkpoint_id that ends with it, like "step-100", or '
                "SnapshotStorageWriter(100)",
            )
        return step_of(self.checkpoint_id)
