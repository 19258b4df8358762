"""`SnapshotStorageReader`: dcp.load from the daemons' memory, into any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.buffers import Reading
from snapshotd_client.dcp.described import Contents
from snapshotd_client.dcp.member import TIMEOUT_S, Member, Place, member_of
from snapshotd_client.dcp.packing import unpacked_paths
from snapshotd_client.dcp.reading import Reads, skeletons
from snapshotd_client.dcp.steps import CheckpointId, is_step, step_of
from snapshotd_client.errors import StateMismatch, WrongUse
from snapshotd_client.filling import Ask, Taken, manifests
from snapshotd_client.waiting import Deadline

#: What no image is as long as: of another shard the daemon knows the length.
_ANY_LENGTH = 1 << 62


class SnapshotStorageReader(StorageReader):
    """Loads the job's newest protected step from the daemons, by torch's own planners.

    All ranks of the job load together. They need not be as many as saved it, nor lay it out alike.

    Args:
        checkpoint_id: as in SnapshotStorageWriter; where it is given, or `dcp.load` is given one,
            that very step must be there.
        job, rank, world_size, local_rank, run_dir: as in Snapshotter.
        timeout_s: longest wait for all ranks, and for the bytes.

    Attributes:
        taken: bytes of the last load, by where they came from.

    Raises (from torch's calls, as CheckpointException of all ranks):
        NoSuchStep: nothing was ever saved, or another step than was asked for.
        SnapshotLost: the job had a restore point and it cannot be restored.
        StateMismatch: it was not saved by SnapshotStorageWriter.
        WorldChanged, CannotProtect, NoDaemon, ProtectionTimeout: as Snapshotter.restore.
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
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self._place = Place(job, rank, world_size, local_rank, run_dir)
        self._timeout_s = timeout_s
        self._found: tuple[pb.Restored, Contents] | None = None
        self.taken = Taken()
        if checkpoint_id is not None:
            step_of(checkpoint_id)

    def newest_step(self) -> int | None:
        """The step that all ranks can load now; None where the job never saved one.

        All ranks ask together.

        Raises:
            SnapshotLost: the job had a restore point and it cannot be restored.
            WorldChanged, CannotProtect, NoDaemon, ProtectionTimeout: as Snapshotter.restore.
        """
        with self._member.guard:
            return self._member.step(Deadline(self._timeout_s))

    # -- torch's interface

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Another load begins."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._found = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it names a step."""
        return is_step(checkpoint_id)

    # torch asks those that take `kwargs` once more after an error.
    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """What all ranks saved."""
        wanted = None if self.checkpoint_id is None else step_of(self.checkpoint_id)
        member, deadline = self._member, Deadline(self._timeout_s)
        with member.guard:
            reply = member.check_there(wanted, deadline)
            ask = _asking(member, deadline)
            saved = manifests(ask)
            world = reply.decision.saved_world or member.who.world_size
            if sorted(saved) != list(range(world)):
                raise StateMismatch([f"manifests of ranks {sorted(saved)}, of {world} ranks"])
            own = saved[member.who.rank] if reply.path else None
            for manifest in saved.values():
                length = reply.image_bytes if manifest is own else _ANY_LENGTH
                if wrong := out_of_bounds(manifest, length, divided=True):
                    raise StateMismatch(wrong)
            contents = Contents(saved, member.who.rank)
            self.taken = Taken()
            paths = unpacked_paths(skeletons(saved, ask, self.taken))
            self._found = reply, contents
            return contents.metadata(paths)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is left to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Bring this rank what its plan wants."""
        if self._found is None:
            raise WrongUse("read_data() before read_metadata()", "Call dcp.load")
        reply, contents = self._found
        member = self._member
        with member.guard:
            member.check_current(reply)
            ask = _asking(member, Deadline(self._timeout_s))
            held = _mapped(reply)
            image = held.image if held is not None else None
            Reads(contents, ask, member.who.rank, image, self.taken).answer(plan, planner)
            if held is not None:  # after an error the traceback may hold tensors of it
                held.close()
            member.acquainted = True
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # -- beyond torch's

    def close(self) -> None:
        """As `SnapshotStorageWriter.close`."""
        with self._member.guard:
            self._member.leave()

    @property
    def _member(self) -> Member:
        return member_of(self._place)


def _mapped(reply: pb.Restored) -> Reading | None:
    """This rank's own image, where as many ranks saved it."""
    if not reply.path:
        return None
    return Reading(reply.path, reply.image_offset, reply.image_bytes)


def _asking(member: Member, deadline: Deadline) -> Ask:
    return lambda message: member.ask(message, deadline)
