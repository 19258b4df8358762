"""One shard's image, mapped: what it has, by name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from google.protobuf.message import DecodeError
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.capture import merge_groups
from snapshotd_client.errors import StateMismatch
from snapshotd_client.export.checkpoint import checkpoint_leaves
from snapshotd_client.export.leaf import Leaf
from snapshotd_client.export.naming import plainly_named
from snapshotd_client.image import Image
from snapshotd_client.leaves import CHECKPOINT


@dataclass(frozen=True, eq=False)
class Opened:
    """A shard.

    Attributes:
        manifest: that opens it.
        bytes: all of the image; read-only, for as long as anything views them.
        image: local pieces as tensors, of what is stored whole.
        marks: for what stands for a tensor, by its id: it, and the tensor's mark.
        leaves: by name.
    """

    manifest: segment_pb2.Manifest
    bytes: memoryview
    image: Image
    marks: Mapping[int, tuple[torch.Tensor, tree.TensorMark]]
    leaves: Mapping[str, Leaf]


def opened(shard: int, path: Path, manifest_bytes: int) -> Opened:
    """Map a file that holds an image alone. Raises StateMismatch: it is none that fits here."""
    image = _mapped(path)
    try:
        manifest = segment_pb2.Manifest.FromString(bytes(image[:manifest_bytes]))
    except DecodeError as error:
        raise StateMismatch([f"the manifest of shard {shard}: {error}"]) from error
    if manifest.format != MANIFEST_FORMAT:
        raise StateMismatch(
            [
                f"manifest format: shard {shard} has {manifest.format}, this client reads "
                f"{MANIFEST_FORMAT}"
            ]
        )
    wrong = out_of_bounds(manifest, len(image), divided=True)
    if wrong:
        raise StateMismatch(wrong)
    # Local pieces only: there is no mesh here that a DTensor could be on.
    bare = segment_pb2.Manifest()
    bare.CopyFrom(manifest)
    for entry in bare.tensors:
        entry.ClearField("dtensor")
        entry.device_type = "cpu"
    source = Image(image, bare, {}, {})
    marks: dict[int, tuple[torch.Tensor, tree.TensorMark]] = {}

    def tensor(_owner: str, mark: tree.TensorMark) -> torch.Tensor:
        if mark.hidden:  # an object is written whole, with all of its tensors' storage
            return source.own(replace(mark, cls=torch.Tensor), private=True)
        entry = manifest.tensors[mark.index]
        dtype = getattr(torch, entry.dtype)
        made = torch.empty(tuple(entry.shape), dtype=dtype, device="meta")
        marks[id(made)] = made, mark
        return made

    def entry_of(value: object) -> segment_pb2.TensorEntry | None:
        known = marks.get(id(value))
        return None if known is None else manifest.tensors[known[1].index]

    place = manifest.skeleton.image_offset
    trees = tree.load(bytes(image[place : place + manifest.skeleton.bytes]), tensor)
    if CHECKPOINT in manifest.names:
        leaves = dict(checkpoint_leaves(shard, manifest, image, trees[CHECKPOINT]))
        return Opened(manifest, image, source, {}, leaves)
    merge_groups(trees)
    flat, paths = flatten_state_dict(plainly_named(trees, manifest, entry_of))
    leaves = {
        n: Leaf(tuple(paths[n]), shard, v, marks.get(id(v), (v, None))[1], entry_of(v))
        for n, v in flat.items()
    }
    return Opened(manifest, image, source, marks, leaves)


def _mapped(path: Path) -> memoryview:
    """A file's bytes, read-only, for as long as anything views them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
