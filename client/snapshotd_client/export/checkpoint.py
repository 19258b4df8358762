"""What torch.distributed.checkpoint saved in one shard, by name."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.dcp.packing import is_object
from snapshotd_client.errors import StateMismatch
from snapshotd_client.export.leaf import Leaf
from snapshotd_client.tree import NO_TREES, TensorMark


def checkpoint_leaves(
    shard: int, manifest: segment_pb2.Manifest, image: memoryview, paths: object
) -> Iterator[tuple[str, Leaf]]:
    """Names, and what they mean.

    Args:
        shard: which one.
        manifest: that opens it.
        image: its bytes.
        paths: of the names, as the skeleton has them.

    Raises:
        StateMismatch: an object cannot be read.
    """
    assert isinstance(paths, dict), "as it was packed"
    for index, entry in enumerate(manifest.tensors):
        path = paths.get(entry.fqn, (entry.fqn,))
        if is_object(entry):
            length = entry.shape[0]
            at = manifest.extents[entry.extent].image_offset if length else 0
            text = image[at + entry.extent_offset : at + entry.extent_offset + length]
            yield entry.fqn, Leaf(path, shard, _loaded(entry.fqn, text), None, None)
        else:
            stands = torch.empty(
                tuple(entry.shape), dtype=getattr(torch, entry.dtype), device="meta"
            )
            mark = TensorMark(index, torch.Tensor, conj=False, neg=False, hidden=False)
            yield entry.fqn, Leaf(path, shard, stands, mark, entry)


def _loaded(name: str, text: memoryview) -> object:
    # As dcp.load does, in a process that has nothing to lose.
    try:
        return torch.load(io.BytesIO(text), weights_only=False)
    except (*NO_TREES, RuntimeError, ImportError, AttributeError) as error:
        raise StateMismatch(
            [f"{name}: {len(text)} bytes that torch.load does not read here: {error}"],
            "Make its class importable, as it was in the run that saved it.",
        ) from error
