"""Reads tensors out of a shard image: as views of it, or as tensors of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.errors import StateMismatch
from snapshotd_client.extents import storage_bytes, tensor_at
from snapshotd_client.leaves import mesh_key, placement_of
from snapshotd_client.room import Room
from snapshotd_client.tree import TensorMark

#: Has the second's bytes in the first: at once, or when it is told to.
Put = Callable[[torch.Tensor, torch.Tensor], object]

_MeshKey = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Anchor:
    """A live storage that holds an extent of the snapshot, from byte `start`."""

    storage: torch.UntypedStorage
    start: int


def meshes_of(tensors: Iterable[DTensor]) -> dict[_MeshKey, DeviceMesh]:
    """The device meshes that live DTensors are on, by shape and dimension names."""
    return {mesh_key(tensor): tensor.device_mesh for tensor in tensors}


class Image:
    """A shard image as tensors. Holds the buffer exported until it and its views are gone."""

    def __init__(
        self,
        buffer: memoryview,
        manifest: segment_pb2.Manifest,
        meshes: Mapping[_MeshKey, DeviceMesh],
        anchors: Mapping[int, Anchor],
        room: Room | None = None,
    ) -> None:
        self.manifest = manifest
        self._bytes = frozen_bytes(buffer)
        self._meshes = meshes
        self._anchors = anchors
        self._room = room or Room()
        self._storages: dict[tuple[int, bool], Anchor] = {}

    def view(self, index: int, *, conj: bool = False, neg: bool = False) -> torch.Tensor:
        """Tensor `index` over the image's own bytes; must only be read."""
        entry = self.manifest.tensors[index]
        base = Anchor(
            self._bytes.untyped_storage(),
            self.manifest.extents[entry.extent].image_offset if all(entry.shape) else 0,
        )
        return self._spread(entry, _plain(entry, base, conj=conj, neg=neg))

    def own(
        self,
        mark: TensorMark,
        device: torch.device | None = None,
        *,
        private: bool = False,
        put: Put = torch.Tensor.copy_,
    ) -> torch.Tensor:
        """Tensor `mark` in memory of its own, on the kind of device it came from.

        Those that shared memory share it again; where it was the memory of a module or of a bare
        tensor, they are views of the live one.

        Args:
            mark: which tensor.
            device: where to make it, if of the kind it came from; else that kind's current one.
            private: share with nothing but other private tensors.
            put: fills memory that is new.
        """
        entry = self.manifest.tensors[mark.index]
        if device is None or device.type != entry.device_type:
            device = torch.device(entry.device_type)
        base = self._storage(entry, device, put, private=private)
        tensor = self._spread(entry, _plain(entry, base, conj=mark.conj, neg=mark.neg))
        return _as_class(tensor, mark.cls, requires_grad=entry.requires_grad)

    def _storage(
        self, entry: segment_pb2.TensorEntry, device: torch.device, put: Put, *, private: bool
    ) -> Anchor:
        if not all(entry.shape):
            return Anchor(torch.empty(0, device=device).untyped_storage(), 0)
        if not private and entry.extent in self._anchors:
            return self._anchors[entry.extent]
        key = (entry.extent, private)
        if key not in self._storages:
            extent = self.manifest.extents[entry.extent]
            source = storage_bytes(self._bytes.untyped_storage(), extent.image_offset, extent.bytes)
            fresh = self._room.take(extent.bytes, device)
            put(fresh, source)
            self._storages[key] = Anchor(fresh.untyped_storage(), 0)
        return self._storages[key]

    def _spread(self, entry: segment_pb2.TensorEntry, local: torch.Tensor) -> torch.Tensor:
        if not entry.HasField("dtensor"):
            return local
        spec = entry.dtensor
        mesh = self._meshes.get((tuple(spec.mesh_shape), tuple(spec.mesh_dim_names)))
        if mesh is None:
            raise StateMismatch(
                [
                    f"{entry.name}: a DTensor on a mesh of shape {list(spec.mesh_shape)} with "
                    f"dimensions {list(spec.mesh_dim_names)}; no live parameter is on such a mesh"
                ]
            )
        return DTensor.from_local(
            local,
            mesh,
            [placement_of(text) for text in spec.placements],
            run_check=False,
            shape=torch.Size(spec.global_shape),
            stride=tuple(spec.global_stride),
        )


def frozen_bytes(buffer: memoryview) -> torch.Tensor:
    """The bytes of a buffer that may be read-only, as uint8; by one thread only at a time."""
    with warnings.catch_warnings():
        # The image is mapped read-only, and nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _plain(entry: segment_pb2.TensorEntry, base: Anchor, *, conj: bool, neg: bool) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    offset = base.start + entry.extent_offset
    tensor = tensor_at(base.storage, offset, dtype, entry.shape, entry.stride)
    if conj:
        tensor = tensor.conj()
    return torch._neg_view(tensor) if neg else tensor


def _as_class(
    tensor: torch.Tensor, cls: type[torch.Tensor], *, requires_grad: bool
) -> torch.Tensor:
    if cls is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    typed = tensor if cls is torch.Tensor else tensor.as_subclass(cls)
    return typed.requires_grad_() if requires_grad else typed
