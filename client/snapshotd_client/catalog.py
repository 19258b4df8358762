"""Where the bytes of each tensor of a snapshot are: from all its manifests. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.boxes import Box, Strided, runs
from snapshotd_client.leaves import HIDDEN
from snapshotd_client.ranges import RangesMaker


class Form(NamedTuple):
    """What a whole tensor is."""

    dtype: str
    shape: tuple[int, ...]


class Source(NamedTuple):
    """A piece of a tensor in one shard.

    Attributes:
        shard: which one.
        piece: its box, and how it lies in memory.
        low, high: the bytes of that memory which the shard stores.
        image_offset: of byte 0 of that memory, if it were stored.
        holders: shards whose piece of this box is the same tensor; this one only, if not known.
        own: a plain tensor, of these holders only: others may have another under that name.
    """

    shard: int
    piece: Strided
    low: int
    high: int
    image_offset: int
    holders: tuple[int, ...]
    own: bool


class _Part(NamedTuple):
    """Bytes [low, high) of a piece's memory are taken from `source`."""

    source: Source
    low: int
    high: int


@dataclass(frozen=True)
class Found:
    """What is to be read for a box.

    Attributes:
        parts: boxes, and which source has which bytes of the piece that they are of.
        ambiguous: shards with a tensor of that name each, which may or may not be the same.
        lacking: elements that no shard has.
    """

    parts: Sequence[tuple[Box, Strided, Sequence[_Part]]]
    ambiguous: Sequence[int]
    lacking: int


class Catalog:
    """All tensors of a snapshot that stand for themselves, by plain name.

    Args:
        manifests: of each shard.
        itemsize: bytes of an element, by name of the dtype.
    """

    def __init__(
        self, manifests: Mapping[int, segment_pb2.Manifest], itemsize: Mapping[str, int]
    ) -> None:
        self._itemsize = itemsize
        self.forms: dict[str, set[Form]] = defaultdict(set)
        self.scattered: set[str] = set()
        self._sources: dict[str, list[Source]] = defaultdict(list)
        self._shards: dict[str, set[int]] = defaultdict(set)
        for shard, manifest in sorted(manifests.items()):
            for entry in manifest.tensors:
                if HIDDEN not in entry.name:
                    self._take(shard, manifest, entry)
        self._all = frozenset(manifests)

    def _take(
        self, shard: int, manifest: segment_pb2.Manifest, entry: segment_pb2.TensorEntry
    ) -> None:
        self._shards[entry.fqn].add(shard)
        if entry.scattered:
            self.scattered.add(entry.fqn)
            return
        self.forms[entry.fqn].add(Form(entry.dtype, tuple(entry.global_shape)))
        if not all(entry.shape):
            return
        extent = manifest.extents[entry.extent]
        start = extent.part.start - entry.extent_offset
        holders = manifest.replica_sets[entry.copies - 1].ranks if entry.copies else [shard]
        self._sources[entry.fqn].append(
            Source(
                shard,
                Strided(Box(tuple(entry.offset), tuple(entry.shape)), tuple(entry.stride)),
                start,
                start + extent.bytes,
                extent.image_offset - start,
                tuple(holders),
                not entry.HasField("dtensor") and (not entry.copies or extent.HasField("part")),
            )
        )

    def names(self) -> Iterable[str]:
        return self._shards.keys()

    def sources(self, name: str) -> Sequence[Source]:
        """All pieces of a tensor, by shard; none that are empty."""
        return self._sources.get(name, ())

    def everywhere(self, name: str) -> bool:
        """Whether every rank that saved had a piece of it, if only an empty one."""
        return self._shards[name] == self._all

    def find(self, name: str, box: Box, near: int, like: tuple[int, ...] | None = None) -> Found:
        """What to read for `box` of a tensor.

        Args:
            name: plain.
            box: of the whole.
            near: the shard to prefer where several have the same.
            like: strides to prefer where pieces lie in memory in several ways.
        """
        by_piece: dict[Strided, list[Source]] = defaultdict(list)
        for source in self.sources(name):
            by_piece[source.piece].append(source)
        turn = crc32(name.encode()) + near
        parts: list[tuple[Box, Strided, Sequence[_Part]]] = []
        ambiguous: set[int] = set()
        left = [box] if box.elements else []
        pieces = sorted(by_piece, key=lambda p: (p.strides != like, p.box != box))
        for piece in pieces:
            wanted = [(rest, met) for rest in left if (met := rest.meet(piece.box)) is not None]
            if not wanted:
                continue
            several = {source.holders for source in by_piece[piece]}
            if len(several) > 1 and any(source.own for source in by_piece[piece]):
                ambiguous.update(source.shard for source in by_piece[piece])
            chosen = None
            for holders in sorted(several, key=lambda held: (near not in held, held)):
                same = [s for s in by_piece[piece] if s.holders == holders]
                chosen = chosen or self._parts(same, piece, name, near, turn)
            if not chosen:
                continue
            for rest, met in wanted:
                left.remove(rest)
                left += rest.without(met)
                parts.append((met, piece, chosen))
        return Found(parts, sorted(ambiguous), sum(rest.elements for rest in left))

    def _parts(
        self, sources: Sequence[Source], piece: Strided, name: str, near: int, turn: int
    ) -> Sequence[_Part] | None:
        """Sources for all bytes of a piece's memory; None where some are in no shard."""
        (form,) = self.forms[name]
        end = piece.reach * self._itemsize[form.dtype]
        parts, at = [], 0
        while at < end:
            able = [s for s in sources if s.low <= at < s.high]
            if not able:
                return None
            # The one that has most of the rest; among equals the near one, else each its turn.
            most = max(min(s.high, end) for s in able)
            able = [s for s in able if min(s.high, end) == most]
            best = next((s for s in able if s.shard == near), able[turn % len(able)])
            parts.append(_Part(best, at, most))
            at = most
        return parts

    def read(
        self, maker: RangesMaker, found: Found, itemsize: int, target: Strided, to: int
    ) -> None:
        """Have what was found read to memory that lies like `target`, from byte `to` on."""
        for box, piece, parts in found.parts:
            source_at, target_at, length = runs(box, piece, target, itemsize)
            for part in parts:
                low = np.maximum(source_at, part.low)
                high = np.minimum(source_at + length, part.high)
                kept = high > low
                maker.add(
                    part.source.shard,
                    (part.source.image_offset + low)[kept],
                    (high - low)[kept],
                    (to + target_at + low - source_at)[kept],
                )
