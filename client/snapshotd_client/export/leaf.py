"""Something that has a name in one shard."""

from __future__ import annotations

from dataclasses import dataclass

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.export.state import Keys
from snapshotd_client.tree import TensorMark


@dataclass(frozen=True, eq=False)
class Leaf:
    """It, in one shard.

    Attributes:
        path: its keys.
        shard: which one.
        value: it, or what stands for a tensor, which has no bytes.
        mark: set where it stands for one.
        entry: likewise.
    """

    path: Keys
    shard: int
    value: object
    mark: TensorMark | None
    entry: segment_pb2.TensorEntry | None
