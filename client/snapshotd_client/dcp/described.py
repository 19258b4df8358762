"""What all shards of a step hold, as torch describes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.boxes import Box
from snapshotd_client.catalog import Catalog
from snapshotd_client.dcp.packing import Keys, is_object
from snapshotd_client.errors import StateMismatch
from snapshotd_client.leaves import CHECKPOINT, label
from snapshotd_client.standins import itemsizes

Manifests = Mapping[int, segment_pb2.Manifest]


class Contents:
    """The names of a step.

    Args:
        manifests: of all shards.
        near: the shard to prefer where several have the same.

    Attributes:
        catalog: of its tensors.

    Raises:
        StateMismatch: it was not saved by this, or not as one whole.
    """

    def __init__(self, manifests: Manifests, near: int) -> None:
        other = {m.format for m in manifests.values()} - {MANIFEST_FORMAT}
        if other:
            raise StateMismatch(
                [f"manifest format: snapshot {min(other)}, this client reads {MANIFEST_FORMAT}"]
            )
        if not all(CHECKPOINT in m.names for m in manifests.values()):
            raise StateMismatch(
                ["it was saved by Snapshotter, or imported, not by torch.distributed.checkpoint"],
                "Restore it with Snapshotter; or `snapshotd export` it, and load that.",
            )
        self._manifests = manifests
        self.catalog = Catalog(manifests, itemsizes(manifests.values()))
        #: By name, then by shard.
        self._objects: dict[str, dict[int, segment_pb2.TensorEntry]] = {}
        turn = sorted(manifests, key=lambda shard: (shard != near, shard))
        for shard in turn:
            for entry in manifests[shard].tensors:
                if is_object(entry):
                    self._objects.setdefault(entry.fqn, {})[shard] = entry
        wrong = [
            f"{name}: " + ", ".join(sorted(label(*form) for form in forms))
            for name, forms in self.catalog.forms.items()
            if len(forms) > 1
        ]
        wrong += [f"{n}: a tensor, and an object" for n in self._objects if n in self.catalog.forms]
        if wrong:
            raise StateMismatch(
                [f"{text}: ranks saved unlike things under one name" for text in wrong],
                "Save with collectives, or give each rank's own state a name of its own.",
            )

    def object(self, name: str) -> tuple[int, int, int]:
        """Where an object is: its shard, the offset in that shard's image, its length."""
        shard, entry = next(iter(self._objects[name].items()))
        length = entry.shape[0]
        at = self._manifests[shard].extents[entry.extent].image_offset if length else 0
        return shard, at + entry.extent_offset, length

    def metadata(self, paths: Mapping[str, Keys]) -> Metadata:
        """Of the whole checkpoint.

        Args:
            paths: of all names.
        """
        # In the order of the plans, which is that of a state made of it.
        shards = (self._manifests[shard] for shard in sorted(self._manifests))
        names = dict.fromkeys(entry.fqn for manifest in shards for entry in manifest.tensors)
        described: dict[str, STORAGE_TYPES] = {}
        for name in names:
            if name in self._objects:
                described[name] = BytesStorageMetadata()
                continue
            (form,) = self.catalog.forms[name]
            boxes = dict.fromkeys(source.piece.box for source in self.catalog.sources(name))
            if not boxes:
                boxes = {Box((0,) * len(form.shape), form.shape): None}
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, form.dtype)),
                torch.Size(form.shape),
                [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.shape)) for b in boxes],
            )
        return Metadata(
            described, planner_data={name: paths.get(name, (name,)) for name in described}
        )
