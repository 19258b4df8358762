"""Which bytes of an image training is expected to change at every step.

They are told to the daemon, which raises an alarm when they do not: a capture that is frozen would
otherwise go unseen, as the daemon reads no tensors and everything around them does change.
"""

from __future__ import annotations

import math
from typing import Final

from snapshotd.wire.protocol import grain_bytes
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.layout import aligned
from snapshotd_client.owners import MODULE, OPTIMIZER, TENSOR

_TRAINED_KINDS: Final = frozenset({MODULE, OPTIMIZER, TENSOR})
_REAL_PREFIXES: Final = ("float", "bfloat", "complex")


def trained_ranges(
    manifest: segment_pb2.Manifest, image_bytes: int
) -> list[segment_pb2.StorageExtent]:
    """Where floating-point tensors of modules, optimizers and bare tensors stand, ascending.

    Not scalars, which count steps; not integers, which may be counters or positions; nothing of
    other objects. Neighbours are one range, and those too short for the daemon to compare are
    left out.
    """
    several = [t for t in manifest.tensors if math.prod(t.shape) > 1]
    trained = {t.extent for t in several if _is_trained(manifest, t)}
    trained -= {t.extent for t in several if not _is_trained(manifest, t)}
    merged: list[segment_pb2.StorageExtent] = []
    for index in sorted(trained):
        extent = manifest.extents[index]
        if merged and aligned(_end(merged[-1])) == extent.image_offset:
            merged[-1].bytes = _end(extent) - merged[-1].image_offset
        else:
            merged.append(
                segment_pb2.StorageExtent(image_offset=extent.image_offset, bytes=extent.bytes)
            )
    grain = grain_bytes(image_bytes)
    return [extent for extent in merged if extent.bytes >= grain]


def _end(extent: segment_pb2.StorageExtent) -> int:
    return extent.image_offset + extent.bytes


def _is_trained(manifest: segment_pb2.Manifest, tensor: segment_pb2.TensorEntry) -> bool:
    kind = manifest.names.get(tensor.owner, "")
    return kind in _TRAINED_KINDS and tensor.dtype.startswith(_REAL_PREFIXES)
