"""The whole image of a rank that stored its share of what others hold, too.

Its own bytes come from its own image, the rest from the other holders, who are restoring at the
same time: one exchange for each set of them, in buckets.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Final, NamedTuple

import torch
import torch.distributed as dist

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.layout import lay_out
from snapshotd_client.shares import share

#: Of memory for one bucket of all holders.
_BUCKETS_BYTES: Final = 128 << 20
_LEAST_BUCKET_BYTES: Final = 64 << 10


class _Piece(NamedTuple):
    """A divided extent: where it begins in the whole image, and its name."""

    offset: int
    nbytes: int
    name: str


def is_divided(manifest: segment_pb2.Manifest) -> bool:
    """Whether a shard stores only its share of something."""
    return any(extent.HasField("part") for extent in manifest.extents)


def assemble(
    image: memoryview, manifest: segment_pb2.Manifest, timeout_s: float
) -> tuple[mmap.mmap, int, int]:
    """The image that this rank would have stored alone.

    All ranks that hold the same must call it at the same time.

    Args:
        image: of the shard, as it was stored.
        manifest: that opens it.
        timeout_s: longest wait for the others.

    Returns:
        the image, in memory of its own; the length of its manifest; bytes that came from others.

    Raises:
        SnapshotdClientError: the exchange failed.
    """
    whole = segment_pb2.Manifest()
    whole.CopyFrom(manifest)
    for extent in whole.extents:
        if extent.HasField("part"):
            extent.bytes = extent.part.whole
            extent.ClearField("part")
    layout = lay_out(whole)
    made = mmap.mmap(-1, layout.image_bytes)
    target, source = torch.frombuffer(made, dtype=torch.uint8), memoryview(image)
    for was, now in zip(
        [*manifest.extents, manifest.skeleton], [*whole.extents, whole.skeleton], strict=True
    ):
        if not was.HasField("part"):
            made[now.image_offset : now.image_offset + was.bytes] = source[
                was.image_offset : was.image_offset + was.bytes
            ]
    opening = whole.SerializeToString(deterministic=True)
    made[: len(opening)] = opening
    received = 0
    for ranks, numbers in sorted(_sets(manifest).items()):
        pieces = [
            _Piece(whole.extents[i].image_offset, whole.extents[i].bytes, name)
            for i, name in numbers
        ]
        own = torch.cat(
            [
                _bytes(source[e.image_offset : e.image_offset + e.bytes])
                for e in (manifest.extents[i] for i, _ in numbers)
            ]
        )
        received += _exchange(target, own, pieces, ranks, timeout_s)
    return made, len(opening), received


def _sets(manifest: segment_pb2.Manifest) -> dict[tuple[int, ...], list[tuple[int, str]]]:
    """For each set of holders the extents that they divide, with their names, in order."""
    names: dict[int, tuple[str, int]] = {}
    for entry in manifest.tensors:
        if all(entry.shape):
            names.setdefault(entry.extent, (entry.fqn, entry.copies))
    found: dict[tuple[int, ...], list[tuple[int, str]]] = defaultdict(list)
    for index, extent in enumerate(manifest.extents):
        if extent.HasField("part"):
            name, copies = names[index]
            found[tuple(manifest.replica_sets[copies - 1].ranks)].append((index, name))
    return dict(found)


def _bytes(view: memoryview) -> torch.Tensor:
    # A copy: the image is read-only, which torch warns of.
    return (
        torch.frombuffer(bytearray(view), dtype=torch.uint8)
        if len(view)
        else torch.empty(0, dtype=torch.uint8)
    )


def _exchange(
    target: torch.Tensor,
    own: torch.Tensor,
    pieces: Sequence[_Piece],
    ranks: Sequence[int],
    timeout_s: float,
) -> int:
    """Put all shares of `pieces` into `target`. Returns the bytes that others gave."""
    count = len(ranks)
    lengths = [sum(n for _, n in _shares(pieces, i, count)) for i in range(count)]
    bucket = max(_LEAST_BUCKET_BYTES, _BUCKETS_BYTES // count)
    try:
        group = dist.new_group(
            list(ranks),
            backend="gloo",
            timeout=timedelta(seconds=timeout_s),
            use_local_synchronization=True,
        )
        try:
            walks = [_Walk(target, _shares(pieces, i, count)) for i in range(count)]
            for at in range(0, max(lengths), bucket):
                size = min(bucket, max(lengths) - at)
                mine = torch.zeros(size, dtype=torch.uint8)
                part = own[at : at + size]
                mine[: len(part)] = part
                given = [torch.empty_like(mine) for _ in ranks]
                dist.all_gather(given, mine, group=group)
                for walk, length, got in zip(walks, lengths, given, strict=True):
                    walk.put(got[: max(0, min(size, length - at))])
        finally:
            dist.destroy_process_group(group)
    except (RuntimeError, ValueError) as error:
        raise SnapshotdClientError(
            f"ranks {', '.join(map(str, ranks))} hold the same state and could not give each "
            f"other their shares of it: {error}",
            "Start the job again: what was saved is untouched",
        ) from error
    return sum(lengths) - len(own)


def _shares(pieces: Sequence[_Piece], index: int, count: int) -> Iterator[tuple[int, int]]:
    """Where in the whole image the shares of a holder are: offsets and lengths, in order."""
    for piece in pieces:
        start, end = share(piece.nbytes, index, count, piece.name)
        if end > start:
            yield piece.offset + start, end - start


class _Walk:
    """Puts a row of bytes to where they belong, a bucket at a time."""

    def __init__(self, target: torch.Tensor, places: Iterator[tuple[int, int]]) -> None:
        self._target = target
        self._places = places
        self._at, self._left = 0, 0

    def put(self, row: torch.Tensor) -> None:
        done = 0
        while done < len(row):
            if not self._left:
                self._at, self._left = next(self._places)
            n = min(self._left, len(row) - done)
            self._target[self._at : self._at + n] = row[done : done + n]
            self._at, self._left, done = self._at + n, self._left - n, done + n
