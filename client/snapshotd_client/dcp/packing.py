"""What a rank's SavePlan writes, as the image of a shard.

An entry for each WriteItem: a tensor's is the box that the item names, an object's is a row of
bytes. The skeleton holds the paths that the planner made the names of.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.boxes import dense_strides
from snapshotd_client.capture import Capture
from snapshotd_client.copying import Load, Piece
from snapshotd_client.errors import UnsupportedState
from snapshotd_client.extents import Place, gather
from snapshotd_client.identity import Identity
from snapshotd_client.layout import lay_out, skeleton_room
from snapshotd_client.leaves import (
    CHECKPOINT,
    HIDDEN,
    Inventory,
    Leaf,
    describe,
    is_wrapper,
    refuse_unsupported,
)

#: A path in the nested state.
Keys = tuple[object, ...]
#: Ends the name of an object's bytes: what looks for tensors passes over it.
_OBJECT: Final = f".{HIDDEN} object>"


def is_object(entry: segment_pb2.TensorEntry) -> bool:
    """Whether an entry is the bytes of an object."""
    return entry.name.endswith(_OBJECT)


def resolved(plan: SavePlan, planner: SavePlanner) -> list[tuple[WriteItem, torch.Tensor]]:
    """The bytes of each item. Raises UnsupportedState: they cannot be had."""
    return [(item, _data(item, planner.resolve_data(item))) for item in plan.items]


def _data(item: WriteItem, data: torch.Tensor | io.BytesIO) -> torch.Tensor:
    name = item.index.fqn
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO), "so the interface says"
        text = bytearray(data.getbuffer())
        return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0).byte()
    assert isinstance(data, torch.Tensor), "so the interface says"
    assert item.tensor_data is not None, "so the interface says"
    refuse_unsupported(name, data)
    if is_wrapper(data):
        raise UnsupportedState(
            f"the tensor {name} is a {type(data).__name__}, which is made of others",
            "Save the tensors that it is made of",
        )
    if data.shape != item.tensor_data.chunk.sizes:
        raise UnsupportedState(
            f"the planner gave {list(data.shape)} of {name} where its plan says "
            f"{list(item.tensor_data.chunk.sizes)}"
        )
    return data.detach().resolve_conj().resolve_neg()


def pack(
    who: Identity,
    step: int,
    data: Sequence[tuple[WriteItem, torch.Tensor]],
    paths: Mapping[str, Keys],
) -> Capture:
    """The plan of the image.

    Args:
        who: this rank.
        step: of the checkpoint.
        data: as `resolved`.
        paths: of the names of the items.
    """
    extents, places = gather([tensor for _, tensor in data])
    manifest = segment_pb2.Manifest(
        format=MANIFEST_FORMAT,
        job=who.job,
        world=who.world_size,
        shard=who.rank,
        extents=[segment_pb2.StorageExtent(bytes=extent.nbytes) for extent in extents],
        tensors=[_entry(*pair, place) for pair, place in zip(data, places, strict=True)],
        names={CHECKPOINT: CHECKPOINT},
    )
    names = {item.index.fqn for item, _ in data}
    kept = {name: tuple(paths.get(name, (name,))) for name in sorted(names)}
    skeleton = tree.join([CHECKPOINT], [tree.dump(CHECKPOINT, kept, Inventory())])
    manifest.skeleton.bytes = skeleton_room(len(skeleton))
    layout = lay_out(manifest)
    manifest.step = step
    opening = manifest.SerializeToString(deterministic=True)
    pieces = [Piece(*pair) for pair in zip(layout.offsets, extents, strict=True)]
    return Capture(
        manifest=manifest,
        manifest_bytes=len(opening),
        layout=layout,
        resting=Load(pieces, layout.gaps),
        moving=(),
        texts=(
            (0, opening.ljust(layout.opening_bytes, b"\0")),
            (layout.skeleton_offset, skeleton.ljust(layout.skeleton_bytes, b"\0")),
        ),
        watched=(),
        versions=None,
        shared=(),
        _leaves=(),
    )


def _entry(item: WriteItem, tensor: torch.Tensor, place: Place) -> segment_pb2.TensorEntry:
    name, about = item.index.fqn, item.tensor_data
    kept = name if about is not None else f"{name}{_OBJECT}"
    entry = describe(Leaf(CHECKPOINT, kept, tensor, about is None), place)
    entry.fqn = name
    whole = tensor.shape if about is None else about.size
    entry.global_shape.extend(whole)
    entry.offset.extend([0] * len(whole) if about is None else about.chunk.offsets)
    if about is not None:
        # Whoever has it: a box stands for that part of the whole.
        entry.requires_grad = about.properties.requires_grad
        entry.dtensor.global_shape.extend(whole)
        entry.dtensor.global_stride.extend(dense_strides(whole))
    return entry


def unpacked_paths(skeletons: Iterable[bytes]) -> dict[str, Keys]:
    """The paths of all names, from the skeletons of all shards. Raises StateMismatch."""
    paths: dict[str, Keys] = {}
    for skeleton in skeletons:
        found = tree.load(skeleton, _no_tensor)[CHECKPOINT]
        assert isinstance(found, dict), "as it was packed"
        paths |= found
    return paths


def _no_tensor(owner: str, mark: tree.TensorMark) -> torch.Tensor:
    raise AssertionError(f"{owner}: there is no tensor {mark.index} among paths")
