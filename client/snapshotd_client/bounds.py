"""Whether a manifest can be of the image it opens: every byte it speaks of is there.

The daemon has verified the bytes; this is for images that another version, or nobody of ours,
wrote. Nothing is read before it has said yes. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from snapshotd.wire.v1 import segment_pb2


def out_of_bounds(
    manifest: segment_pb2.Manifest, image_bytes: int, *, divided: bool = False
) -> list[str]:
    """What in a manifest cannot be, in sentences; empty when all of it can.

    Args:
        manifest: of an image.
        image_bytes: its length.
        divided: whether the image may have a part of a piece, and others the rest.
    """
    found = [
        *_extents(manifest, image_bytes),
        *(text for entry in manifest.tensors for text in _tensor(entry, manifest, divided=divided)),
    ]
    if divided:
        found += [text for entry in manifest.tensors for text in _place(entry, manifest)]
    return found


def _extents(manifest: segment_pb2.Manifest, image_bytes: int) -> Iterator[str]:
    named = [(f"extent {i}", extent) for i, extent in enumerate(manifest.extents)]
    for name, extent in [*named, ("the skeleton", manifest.skeleton)]:
        if extent.image_offset + extent.bytes > image_bytes:
            yield (
                f"{name}: bytes {extent.image_offset} to {extent.image_offset + extent.bytes} of "
                f"an image of {image_bytes}"
            )
        if extent.HasField("part") and extent.part.start + extent.bytes > extent.part.whole:
            yield (
                f"{name}: {extent.bytes} bytes from {extent.part.start} on of a piece of "
                f"{extent.part.whole}"
            )


def _is_device(kind: str) -> bool:
    try:
        return kind == "cpu" or bool(torch.get_device_module(kind))
    except (RuntimeError, TypeError):
        return False


def _place(entry: segment_pb2.TensorEntry, manifest: segment_pb2.Manifest) -> Iterator[str]:
    if entry.copies > len(manifest.replica_sets):
        yield f"{entry.name}: replica set {entry.copies} of {len(manifest.replica_sets)}"
    if entry.scattered:
        return
    whole, offset, shape = list(entry.global_shape), list(entry.offset), list(entry.shape)
    if not len(whole) == len(offset) == len(shape) or any(
        start < 0 or start + n > length
        for start, n, length in zip(offset, shape, whole, strict=True)
    ):
        yield f"{entry.name}: no piece {shape} at {offset} of a tensor {whole}"


def _tensor(
    entry: segment_pb2.TensorEntry, manifest: segment_pb2.Manifest, *, divided: bool
) -> Iterator[str]:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        yield f"{entry.name}: {entry.dtype!r} is no dtype of this torch"
        return
    if not _is_device(entry.device_type):
        yield f"{entry.name}: {entry.device_type!r} is no kind of device of this torch"
    shape, stride = list(entry.shape), list(entry.stride)
    if len(shape) != len(stride) or min([*shape, *stride], default=0) < 0:
        yield f"{entry.name}: no tensor has shape {shape} and strides {stride}"
        return
    if not all(shape):
        return
    if entry.extent >= len(manifest.extents):
        yield f"{entry.name}: extent {entry.extent} of {len(manifest.extents)}"
        return
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    extent = manifest.extents[entry.extent]
    size = extent.part.whole if divided and extent.HasField("part") else extent.bytes
    end = entry.extent_offset + reach * dtype.itemsize
    if end > size or entry.extent_offset % dtype.itemsize:
        yield f"{entry.name}: bytes {entry.extent_offset} to {end} of an extent of {size}"
