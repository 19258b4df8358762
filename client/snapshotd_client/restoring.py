"""From the daemon's answer to a restored state.

The image of this rank is the one that was stored, or that one with the shares of other ranks, or
one made of what all ranks stored in another layout. From there it is the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Final

from google.protobuf.message import DecodeError

from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2, segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client import rng
from snapshotd_client.adopted import adopt, is_imported
from snapshotd_client.apply import apply
from snapshotd_client.assembling import assemble, is_divided
from snapshotd_client.buffers import Reading
from snapshotd_client.differences import differences
from snapshotd_client.errors import ProtectionTimeout, StateMismatch
from snapshotd_client.filling import Ask, Taken, filled, manifests
from snapshotd_client.foreseen import Foreseen
from snapshotd_client.identity import Identity
from snapshotd_client.leaves import CHECKPOINT
from snapshotd_client.meeting import Meeting, can_meet
from snapshotd_client.relayout import Relayout
from snapshotd_client.results import Restored
from snapshotd_client.surveying import Survey, survey
from snapshotd_client.waiting import Deadline

_TIERS: Final = {
    node_pb2.TIER_LOCAL: "local",
    node_pb2.TIER_GROUP: "group",
    node_pb2.TIER_PERSISTENT: "persistent",
}


class WayBack:
    """Restores `states` from what the daemon answered.

    Args:
        who: this trainer.
        states: as given to Snapshotter.
        ask: asks the daemon one question.
        strict: whether what does not fit is an error.
        deadline: for the other ranks.
        spent: closes a mapping when nobody waits for it.
        seen: what was done ahead.
    """

    def __init__(
        self,
        who: Identity,
        states: Mapping[str, object],
        ask: Ask,
        *,
        strict: bool,
        deadline: Deadline,
        spent: Callable[[Reading], None],
        seen: Foreseen | None = None,
    ) -> None:
        self._spent = spent
        self._seen = seen or Foreseen()
        self._who = who
        self._states = states
        self._ask = ask
        self._strict = strict
        self._deadline = deadline
        self._taken = Taken()
        self._skipped: tuple[str, ...] = ()

    def take(self, reply: pb.Restored) -> Restored:
        """Bring it all back.

        Raises:
            StateMismatch, InexactRestore: as `apply` says.
            ProtectionTimeout: not all ranks came to restore in time.
            SnapshotdClientError: ranks that hold the same could not exchange it.
            DaemonGone: the daemon went away meanwhile.
        """
        decision = reply.decision
        saved_world = decision.saved_world or self._who.world_size
        same_world = saved_world == self._who.world_size
        found = self._take_own(reply) if same_world and reply.path else None
        values = found if found is not None else self._take_other(saved_world)
        if not same_world:
            rng.seed(f"{self._who.job} {decision.restore.step} {self._who.rank}")
        return Restored(
            step=decision.restore.step,
            tier=_TIERS[decision.tier],
            values=values,
            bytes_copied=reply.bytes_copied + self._taken.copied,
            bytes_decoded=reply.bytes_decoded + self._taken.decoded,
            bytes_stored=self._taken.stored,
            bytes_received=self._taken.received,
            saved_world=saved_world,
            skipped=self._skipped,
            rng="restored" if same_world else "seeded",
        )

    def _take_own(self, reply: pb.Restored) -> dict[str, object] | None:
        """The keyword values; None where this rank's own image does not do."""
        reading = self._seen.take(reply.path, reply.image_offset, reply.image_bytes)
        # After an error the traceback may hold tensors of it: it is unmapped with the last of them.
        values = self._take_image(reply, reading.image)
        self._spent(reading)
        return values

    def _take_image(self, reply: pb.Restored, image: memoryview) -> dict[str, object] | None:
        manifest = _opening(image[: reply.manifest_bytes])
        fits = manifest is not None and not self._differences(manifest, image)
        divided = manifest is not None and is_divided(manifest)
        all_divided = self._meet(reply.decision.id, divided=divided and fits)
        if manifest is None or not fits:
            return None
        if not divided:
            return self._apply(image, reply.manifest_bytes, fits=True)
        if not all_divided:
            return None
        whole, length, received = assemble(image, manifest, self._deadline.left_s())
        self._taken.received += received
        with whole, memoryview(whole) as made:
            return self._apply(made, length)

    @cached_property
    def _live(self) -> Survey:
        """The state before any of it is changed."""
        return self._seen.live or survey(self._states)

    def _differences(self, manifest: segment_pb2.Manifest, image: memoryview) -> list[str]:
        live = self._live.manifest
        wrong = adopt(manifest, live, image) if is_imported(manifest) else []
        if wrong:
            return wrong
        who = self._who
        live.job, live.world, live.shard = who.job, who.world_size, who.rank
        return differences(manifest, live)

    def _meet(self, decision: node_pb2.DecisionId, *, divided: bool) -> bool:
        """Whether all ranks have shares that fit, and can exchange them.

        One that stored all of its own does not wait for anybody, so nobody may wait for it.
        """
        who = self._who
        if not can_meet(who.rank, who.world_size):
            return False
        topic = f"restore/{decision.epoch}/{decision.node}"
        meeting = Meeting(topic, range(who.world_size))
        alike = meeting.all_alike(b"shares" if divided else b"none", self._deadline.left_s())
        if alike is None:
            raise ProtectionTimeout(
                f"not all {who.world_size} ranks came to restore step by step with this one "
                f"within {self._deadline.timeout_s:.0f} s",
                "See the log of the others: one of them has failed or does not call restore()",
            )
        return alike and divided

    def _take_other(self, saved_world: int) -> dict[str, object]:
        """From whatever ranks stored, in whatever layout."""
        saved = manifests(self._ask)
        if sorted(saved) != list(range(saved_world)):
            raise StateMismatch([f"manifests of ranks {sorted(saved)}, of {saved_world} ranks"])
        if any(CHECKPOINT in manifest.names for manifest in saved.values()):
            raise StateMismatch(
                ["it was saved by torch.distributed.checkpoint, not by Snapshotter"],
                "Load it with dcp.load(storage_reader=SnapshotStorageReader(...)).",
            )
        relayout = Relayout(saved, self._states, self._who, self._live)
        ranges, places, length = relayout.skeletons()
        with filled(self._ask, ranges, length, self._taken) as texts:
            skeletons = {shard: bytes(texts[at : at + n]) for shard, (at, n) in places.items()}
        plan = relayout.plan(skeletons)
        if relayout.problems and self._strict:
            raise StateMismatch(
                relayout.problems,
                "Build the same objects as the run that wrote it, use another job name, or call "
                "restore(strict=False) to go on without what does not fit.",
            )
        self._skipped = tuple(relayout.problems)
        with filled(self._ask, plan.ranges, plan.image_bytes, self._taken) as image:
            for offset, text in plan.texts:
                image[offset : offset + len(text)] = text
            same_world = saved_world == self._who.world_size
            return self._apply(image, plan.manifest_bytes, on_rng=same_world)

    def _apply(
        self, image: memoryview, manifest_bytes: int, *, on_rng: bool = True, fits: bool = False
    ) -> dict[str, object]:
        point("trainer.restore.mapped")
        who = self._who
        return apply(
            image,
            manifest_bytes,
            job=who.job,
            world=who.world_size,
            shard=who.rank,
            states=self._states,
            on_rng=on_rng,
            live=self._live,
            fits=fits,
            room=self._seen.room,
        )


def _opening(text: memoryview) -> segment_pb2.Manifest | None:
    try:
        return segment_pb2.Manifest.FromString(bytes(text))
    except DecodeError:
        return None  # said when all manifests are read
