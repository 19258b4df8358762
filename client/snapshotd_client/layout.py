"""Where everything stands in an image. Pure arithmetic on a manifest's sizes.

    [ Manifest | pad | extent 0 | pad | extent 1 | ... | pad | skeleton | zeros ]

Manifest and skeleton get a little more room than they need, so that a step with more digits, or a
random generator whose state pickles longer, moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from snapshotd.wire.v1 import segment_pb2

#: Image offsets of extents are multiples of this, which suits every dtype and vector unit.
ALIGNMENT_BYTES: Final = 64
#: The field `step` of a manifest at its longest.
_STEP_BYTES: Final = 11
#: The skeleton's room is a multiple of this.
_SKELETON_BYTES: Final = 1024


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to ALIGNMENT_BYTES."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def skeleton_room(nbytes: int) -> int:
    """Bytes set apart for a skeleton of that length."""
    return -(-(nbytes + _SKELETON_BYTES // 4) // _SKELETON_BYTES) * _SKELETON_BYTES


@dataclass(frozen=True, eq=False)
class Layout:
    """Offsets from the start of an image, bytes.

    Attributes:
        offsets: of the extents.
        gaps: (offset, length) of what lies between them and is zero.
        opening_bytes: room of the manifest, up to the first extent.
        skeleton_offset: where the skeleton starts.
        skeleton_bytes: its room.
    """

    offsets: tuple[int, ...]
    gaps: tuple[tuple[int, int], ...]
    opening_bytes: int
    skeleton_offset: int
    skeleton_bytes: int

    @property
    def image_bytes(self) -> int:
        return self.skeleton_offset + self.skeleton_bytes


def lay_out(manifest: segment_pb2.Manifest) -> Layout:
    """Set every image offset of a manifest, whose step is not set yet."""
    start = 0
    while True:
        offset = start
        for extent in [*manifest.extents, manifest.skeleton]:
            extent.image_offset = offset
            offset = aligned(offset + extent.bytes)
        size = manifest.ByteSize() + _STEP_BYTES
        if size <= start:
            break
        # Longer offsets make a longer manifest, never a shorter one: this ends.
        start = aligned(size)
    extents = [*manifest.extents]
    following = [*(e.image_offset for e in extents[1:]), manifest.skeleton.image_offset]
    ends = [e.image_offset + e.bytes for e in extents]
    return Layout(
        offsets=tuple(e.image_offset for e in extents),
        gaps=tuple((end, to - end) for end, to in zip(ends, following, strict=False) if to > end),
        opening_bytes=start,
        skeleton_offset=manifest.skeleton.image_offset,
        skeleton_bytes=manifest.skeleton.bytes,
    )
