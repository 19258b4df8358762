"""From the daemon's answer to a restored state: maps the image, and puts it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.apply import apply
from snapshotd_client.buffers import Reading
from snapshotd_client.identity import Identity
from snapshotd_client.results import Restored


def bring_back(
    reply: pb.Restored,
    who: Identity,
    states: Mapping[str, object],
    spent: Callable[[Reading], None],
) -> Restored:
    """Restore `states` from the segment that the daemon names.

    Args:
        reply: the daemon's answer.
        who: this trainer.
        states: as given to Snapshotter.
        spent: closes the mapping when nobody waits for it.

    Raises:
        StateMismatch, InexactRestore: as `apply` says.
    """
    reading = Reading(reply.path, reply.image_offset, reply.image_bytes)
    point("trainer.restore.mapped")
    # After an error the traceback may hold tensors of it: it is unmapped with the last of them.
    values = apply(
        reading.image,
        reply.manifest_bytes,
        job=who.job,
        world=who.world_size,
        shard=who.rank,
        states=states,
    )
    spent(reading)
    return Restored(
        step=reply.decision.restore.step,
        tier="local" if reply.decision.tier == node_pb2.TIER_LOCAL else "group",
        values=values,
        bytes_copied=reply.bytes_copied,
        bytes_decoded=reply.bytes_decoded,
    )
