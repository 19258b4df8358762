"""From the daemon's answer to a restored state: maps the image, and puts it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from snapshotd.wire.points import point
from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.apply import apply
from snapshotd_client.buffers import reading
from snapshotd_client.identity import Identity
from snapshotd_client.results import Restored

_TIERS: Final = {
    node_pb2.TIER_LOCAL: "local",
    node_pb2.TIER_GROUP: "group",
    node_pb2.TIER_PERSISTENT: "persistent",
}


def bring_back(reply: pb.Restored, who: Identity, states: Mapping[str, object]) -> Restored:
    """Restore `states` from the segment that the daemon names.

    Raises:
        StateMismatch, InexactRestore: as `apply` says.
    """
    with reading(reply.path, reply.image_offset, reply.image_bytes) as image:
        point("trainer.restore.mapped")
        values = apply(
            image,
            reply.manifest_bytes,
            job=who.job,
            world=who.world_size,
            shard=who.rank,
            states=states,
        )
    return Restored(
        step=reply.decision.restore.step,
        tier=_TIERS[reply.decision.tier],
        values=values,
        bytes_copied=reply.bytes_copied,
        bytes_decoded=reply.bytes_decoded,
    )
