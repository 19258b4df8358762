"""What a tensor is whatever the layout: its plain name, its place in the whole, who else has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    _get_shard_size_and_offsets,
)
from torch.distributed.tensor.placement_types import _StridedShard

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.accord import Shared
from snapshotd_client.extents import Extent, Place
from snapshotd_client.leaves import Leaf, describe, local_piece
from snapshotd_client.names import Names
from snapshotd_client.replicas import Held, Replicas
from snapshotd_client.shares import share


class Division(NamedTuple):
    """What is stored of some extents.

    Attributes:
        stored: of each extent the part that this rank stores.
        described: the same as the manifest says it.
        shared: those of which others store the rest; None for the others.
    """

    stored: list[Extent]
    described: list[segment_pb2.StorageExtent]
    shared: list[Shared | None]


def held(shared: Iterable[Shared | None]) -> list[Shared]:
    """Those that there are."""
    return [piece for piece in shared if piece is not None]


class About:
    """Describes the leaves of some states, and divides among ranks what they all hold.

    Args:
        states: as given to Snapshotter.
        replicas: who holds what; nothing is divided where it is not given.
        rank: this rank of the job.
    """

    def __init__(
        self, states: Mapping[str, object], replicas: Replicas | None = None, rank: int = 0
    ) -> None:
        self._names = Names(states)
        self._replicas = replicas
        self._rank = rank
        #: Ascending by first use, as Manifest.replica_sets has them.
        self.sets: dict[tuple[int, ...], int] = {}

    def entry(self, leaf: Leaf, place: Place) -> segment_pb2.TensorEntry:
        """The manifest's entry of a leaf that stands at `place`."""
        entry = describe(leaf, place)
        entry.fqn = self._names.of(leaf.owner, leaf.name)
        box = box_of(leaf.tensor)
        if box is None:
            entry.scattered = True
        else:
            entry.global_shape.extend(box[0])
            entry.offset.extend(box[1])
        held = self._held(leaf)
        if held is not None:
            entry.copies = 1 + self.sets.setdefault(held.ranks, len(self.sets))
        return entry

    def divide(self, leaves: list[Leaf], places: list[Place], extents: list[Extent]) -> Division:
        """What of each extent this rank stores.

        An extent is divided where all its tensors are the same on the same ranks.
        """
        holders: dict[int, tuple[str, set[Held | None]]] = {}
        for leaf, place in zip(leaves, places, strict=True):
            if local_piece(leaf.tensor).numel():
                known = holders.setdefault(
                    place.extent, (self._names.of(leaf.owner, leaf.name), set())
                )
                known[1].add(self._held(leaf))
        stored: list[Extent] = []
        described: list[segment_pb2.StorageExtent] = []
        shared: list[Shared | None] = []
        for index, extent in enumerate(extents):
            name, found = holders.get(index, ("", {None}))
            one = next(iter(found)) if len(found) == 1 else None
            if one is None or not one.same:
                stored.append(extent)
                described.append(segment_pb2.StorageExtent(bytes=extent.nbytes))
                shared.append(None)
                continue
            shared.append(Shared(one.ranks, name, extent))
            start, end = share(extent.nbytes, one.ranks.index(self._rank), len(one.ranks), name)
            stored.append(Extent(extent.storage, extent.start + start, end - start))
            described.append(
                segment_pb2.StorageExtent(
                    bytes=end - start, part=segment_pb2.Part(start=start, whole=extent.nbytes)
                )
            )
        return Division(stored, described, shared)

    @property
    def undivided(self) -> bool:
        """Whether all is stored whole, though others hold it, too."""
        return self._replicas is not None and self._replicas.undivided

    def replica_sets(self) -> list[segment_pb2.ReplicaSet]:
        return [segment_pb2.ReplicaSet(ranks=ranks) for ranks in self.sets]

    def _held(self, leaf: Leaf) -> Held | None:
        return self._replicas.of(leaf) if self._replicas is not None else None


def box_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Global shape of a tensor, and the offset of the local piece in it; None if it is no box."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    if any(isinstance(p, Partial) for p in tensor.placements):
        return None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    shape, offset = _compute_local_shape_and_global_offset(
        tensor.shape, mesh.shape, list(coordinate), tensor.placements
    )
    if tuple(shape) != tuple(local_piece(tensor).shape):
        return None
    if any(isinstance(p, _StridedShard) for p in tensor.placements) and not _in_one_piece(tensor):
        return None
    return tuple(tensor.shape), tuple(offset)


def _in_one_piece(tensor: DTensor) -> bool:
    """Whether the local indices of each dimension follow each other.

    torch tells the first of them only; this goes its way again.
    """
    sizes = list(tensor.shape)
    indices: dict[int, torch.Tensor] = {}
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_shard() and not isinstance(placement, _StridedShard):
            continue
        of: int = placement.dim  # type: ignore[attr-defined]  # both kinds have it
        sizes[of], found = _get_shard_size_and_offsets(
            sizes[of],
            tensor.device_mesh.size(dim),
            coordinate[dim],
            placement,  # type: ignore[arg-type]  # as asked above
            indices.get(of),
            tensor.shape[of],
            False,
        )
        assert found is not None, "asked for"
        indices[of] = found
    return all(
        sizes[of] == 0 or int(found[-1]) - int(found[0]) == sizes[of] - 1
        for of, found in indices.items()
    )
