"""An image for this rank that nobody has saved: what stands in it, and where each byte is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.boxes import Box, Strided
from snapshotd_client.catalog import Catalog, Found
from snapshotd_client.extents import byte_span, storage_bytes
from snapshotd_client.layout import lay_out, skeleton_room
from snapshotd_client.leaves import local_piece
from snapshotd_client.ranges import Ranges, RangesMaker


@dataclass(frozen=True, eq=False)
class NewImage:
    """The plan of such an image.

    Attributes:
        manifest: of the image, laid out.
        manifest_bytes: its length, serialized.
        ranges: what is read from shards.
        texts: (image offset, bytes) that are written over what was read: manifest, skeleton, and
            live tensors that the snapshot does not have.
        image_bytes: its length.
    """

    manifest: segment_pb2.Manifest
    manifest_bytes: int
    ranges: Ranges
    texts: Sequence[tuple[int, bytes]]
    image_bytes: int


class ImageMaker:
    """Collects tensors and where their bytes are from; entries keep their indices."""

    def __init__(self, manifest: segment_pb2.Manifest) -> None:
        self.manifest = manifest
        self._found: list[tuple[segment_pb2.TensorEntry, Found]] = []
        self._whole: list[tuple[int, int, int]] = []  # extent, shard, image offset there
        self._live: list[tuple[segment_pb2.TensorEntry, torch.Tensor]] = []
        self._copied: dict[tuple[int, int], int] = {}

    def add_extent(self, nbytes: int) -> int:
        """The index of a new extent."""
        self.manifest.extents.add(bytes=nbytes)
        return len(self.manifest.extents) - 1

    def add(self, entry: segment_pb2.TensorEntry) -> segment_pb2.TensorEntry:
        """Take an entry in, which has its extent; index `len(manifest.tensors) - 1`."""
        self.manifest.tensors.append(entry)
        return self.manifest.tensors[-1]

    def from_boxes(self, entry: segment_pb2.TensorEntry, found: Found) -> None:
        """The bytes of an entry are read from pieces of the same tensor."""
        self._found.append((entry, found))

    def from_live(self, entry: segment_pb2.TensorEntry, tensor: torch.Tensor) -> None:
        """The bytes of an entry are those of a live tensor of the same form."""
        self._live.append((entry, tensor))

    def copy_extent(self, shard: int, number: int, extent: segment_pb2.StorageExtent) -> int:
        """The index here of a whole extent of a shard, the same each time."""
        key = (shard, number)
        if key not in self._copied:
            self._copied[key] = self.add_extent(extent.bytes)
            self._whole.append((self._copied[key], shard, extent.image_offset))
        return self._copied[key]

    def make(self, catalog: Catalog, skeleton: bytes) -> NewImage:
        """Lay it out; `skeleton` is made of the marks of the entries."""
        self.manifest.skeleton.bytes = skeleton_room(len(skeleton))
        layout = lay_out(self.manifest)
        maker = RangesMaker()
        for entry, found in self._found:
            itemsize = getattr(torch, entry.dtype).itemsize
            target = Strided(Box(tuple(entry.offset), tuple(entry.shape)), tuple(entry.stride))
            to = layout.offsets[entry.extent] + entry.extent_offset if all(entry.shape) else 0
            catalog.read(maker, found, itemsize, target, to)
        for extent, shard, offset in self._whole:
            length = self.manifest.extents[extent].bytes
            if length:
                maker.add_one(shard, offset, length, layout.offsets[extent])
        opening = self.manifest.SerializeToString(deterministic=True)
        texts: list[tuple[int, bytes]] = [
            (layout.offsets[entry.extent] + entry.extent_offset, _bytes(tensor))
            for entry, tensor in self._live
            if all(entry.shape)
        ]
        texts += [(0, opening), (layout.skeleton_offset, skeleton)]
        return NewImage(self.manifest, len(opening), maker.ranges(), texts, layout.image_bytes)


def _bytes(tensor: torch.Tensor) -> bytes:
    """What the storage of a tensor holds from its first byte to its last."""
    piece = local_piece(tensor).detach()
    start, end = byte_span(piece)
    return bytes(storage_bytes(piece.untyped_storage(), start, end - start).cpu().numpy())
