"""Which part of a global tensor a manifest's entry is. The one place that knows."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.errors import UnsupportedState
from snapshotd_client.leaves import placement_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A contiguous box of a global tensor.

    Attributes:
        whole: shape of the global tensor.
        offsets: of the box in it, elements.
        shape: of the box.
        part: which bytes of the box, in row-major order, are here; None: all.
    """

    whole: Shape
    offsets: Shape
    shape: Shape
    part: tuple[int, int] | None = None


def box_of(entry: segment_pb2.TensorEntry, shard: int, world: int) -> Box:
    """The box of a tensor that a shard holds; a tensor that is not distributed is all of itself.

    Raises:
        UnsupportedState: it is a partial sum, or where it lies cannot be known.
    """
    local = tuple(entry.shape)
    if not entry.HasField("dtensor"):
        return Box(local, (0,) * len(local), local)
    spec = entry.dtensor
    if any(text.startswith("Partial") for text in spec.placements):
        raise UnsupportedState(
            f"{entry.name} is a partial sum ({', '.join(spec.placements)}), not a part of a tensor",
            "Reduce it before it is captured",
        )
    mesh = tuple(spec.mesh_shape)
    if prod(mesh) != world:
        raise UnsupportedState(
            f"{entry.name} is on a mesh of {prod(mesh)} of {world} ranks: where shard {shard} lies "
            "in it is not said",
            "Export a job whose meshes have all its ranks",
        )
    shape, offsets = _compute_local_shape_and_global_offset(
        tuple(spec.global_shape),
        mesh,
        _coordinate(shard, mesh),
        [*map(placement_of, spec.placements)],
    )
    if tuple(shape) != local:
        raise UnsupportedState(
            f"{entry.name} of shard {shard} has shape {list(local)}, its placement says "
            f"{list(shape)}",
            "Its ranks are not in the order of its mesh; this layout cannot be exported",
        )
    return Box(tuple(spec.global_shape), tuple(offsets), local)


def _coordinate(rank: int, mesh: Shape) -> list[int]:
    found = []
    for length in reversed(mesh):
        rank, at = divmod(rank, length)
        found.append(at)
    return found[::-1]
