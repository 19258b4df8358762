"""Images of all shards of a step, as one state: which tensors and objects there are, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.boxes import Box, Strided, dense_strides, runs
from snapshotd_client.catalog import Catalog, Found, Source
from snapshotd_client.errors import StateMismatch, UnsupportedState
from snapshotd_client.exact import same_bits
from snapshotd_client.export.leaf import Leaf
from snapshotd_client.export.opened import opened
from snapshotd_client.export.state import Piece, State, Tensor, Thing
from snapshotd_client.leaves import label, walk
from snapshotd_client.ranges import RangesMaker
from snapshotd_client.standins import itemsizes, mapped

#: What some leaves of one name are: a tensor, or a value that is none.
_Meaning = Tensor | Thing


class Shards:
    """The images of a step, mapped.

    Args:
        paths: files that hold the images alone, in shard order.
        manifest_bytes: lengths of the manifests that open them.
    """

    def __init__(self, paths: Sequence[Path], manifest_bytes: Sequence[int]) -> None:
        self._shards = [
            opened(shard, path, length)
            for shard, (path, length) in enumerate(zip(paths, manifest_bytes, strict=True))
        ]
        self._catalog = cache(self._catalog_of)

    def state(self) -> State:
        """Everything by name. Raises StateMismatch, UnsupportedState."""
        first = self._shards[0].manifest
        found: list[_Meaning] = []
        diverged: list[str] = []
        for name in dict.fromkeys(name for shard in self._shards for name in shard.leaves):
            groups = self._sorted([s.leaves[name] for s in self._shards if name in s.leaves])
            one, *others = [self._meaning(name, group, diverged) for group in groups]
            found.append(one)
            for group, other in zip(groups[1:], others, strict=True):
                if not _same(one, other):
                    shard = group[0].shard
                    path = ("ranks", str(shard), *group[0].path)
                    found.append(replace(other, name=f"ranks.{shard}.{name}", path=path))
        tensors = [each for each in found if isinstance(each, Tensor)]
        things = [each for each in found if isinstance(each, Thing)]
        return State(first.job, first.step, first.world, tensors, things, diverged)

    def _sorted(self, leaves: Sequence[Leaf]) -> list[list[Leaf]]:
        """Leaves of one name that are one thing together; DTensors first.

        A plain tensor that its holders divide is one; whoever stores all of his has one of his
        own, unless others rely on him for a part of theirs.
        """
        divided = {
            self._holders(leaf) for leaf in leaves if leaf.entry is not None and self._is_part(leaf)
        }
        groups: dict[object, list[Leaf]] = defaultdict(list)
        for leaf in leaves:
            if leaf.entry is None:
                groups[leaf.shard].append(leaf)
            elif leaf.entry.HasField("dtensor"):
                groups["spread"].append(leaf)
            else:
                holders = self._holders(leaf)
                groups[holders if holders in divided else leaf.shard].append(leaf)
        spread = groups.pop("spread", None)
        return [*([spread] if spread else []), *groups.values()]

    def _holders(self, leaf: Leaf) -> tuple[int, ...]:
        assert leaf.entry is not None, "asked before"
        sets = self._shards[leaf.shard].manifest.replica_sets
        return tuple(sets[leaf.entry.copies - 1].ranks) if leaf.entry.copies else (leaf.shard,)

    def _is_part(self, leaf: Leaf) -> bool:
        assert leaf.entry is not None, "asked before"
        extents = self._shards[leaf.shard].manifest.extents
        return all(leaf.entry.shape) and extents[leaf.entry.extent].HasField("part")

    def _meaning(self, name: str, leaves: Sequence[Leaf], diverged: list[str]) -> _Meaning:
        leaf = leaves[0]
        if leaf.entry is not None and (
            leaf.entry.HasField("dtensor") or any(map(self._is_part, leaves))
        ):
            return self._joined(name, leaves, diverged)
        if not isinstance(leaf.value, torch.Tensor):
            return Thing(name, leaf.path, leaf.shard, self._filled(leaf.shard, leaf.value))
        shape, value, mark = tuple(leaf.value.shape), leaf.value, leaf.mark
        if mark is None:  # made of other tensors, or one within an object
            load = partial(_itself, value)
        else:
            view = self._shards[leaf.shard].image.view
            load = partial(view, mark.index, conj=mark.conj, neg=mark.neg)
        piece = Piece(leaf.shard, Box((0,) * len(shape), shape), load)
        return Tensor(name, leaf.path, value.dtype, shape, [piece])

    def _filled(self, shard: int, value: object) -> object:
        """A value of a shard, with its tensors where they are stood for."""
        if next(walk(value, ""), None) is None:
            return value

        def fill(_name: str, tensor: torch.Tensor) -> torch.Tensor:
            known = self._shards[shard].marks.get(id(tensor))
            if known is None:
                return tensor
            mark = known[1]
            leaf = Leaf((), shard, tensor, mark, self._shards[shard].manifest.tensors[mark.index])
            if not self._is_part(leaf):
                return self._shards[shard].image.view(mark.index, conj=mark.conj, neg=mark.neg)
            assert leaf.entry is not None
            catalog = self._catalog(frozenset(self._holders(leaf)))
            box = Box(tuple(leaf.entry.offset), tuple(leaf.entry.shape))
            found = catalog.find(leaf.entry.fqn, box, shard)
            if found.lacking:
                raise StateMismatch([f"{leaf.entry.fqn}: some of it is in no shard"])
            return self._read(catalog, found, box, tensor.dtype, mark)

        return mapped("", value, fill)

    def _joined(self, name: str, leaves: Sequence[Leaf], diverged: list[str]) -> Tensor:
        """A tensor of which each of several shards has a box, or a part of one."""
        forms: dict[tuple[object, ...], Leaf] = {}
        for leaf in leaves:
            entry, mark = leaf.entry, leaf.mark
            assert entry is not None
            assert mark is not None
            if entry.scattered:
                _refuse_scattered(entry)
            text = label(entry.dtype, entry.global_shape)
            forms.setdefault((text, entry.fqn, mark.conj, mark.neg), leaf)
        if len(forms) > 1:
            said = (f"{form[0]} in shard {leaf.shard}" for form, leaf in forms.items())
            raise StateMismatch([f"{name}: {', '.join(said)}"])
        first = leaves[0]
        entry, mark = first.entry, first.mark
        assert entry is not None
        assert mark is not None
        shape, dtype = tuple(entry.global_shape), getattr(torch, entry.dtype)
        catalog = self._catalog(frozenset(leaf.shard for leaf in leaves))
        whole = Box((0,) * len(shape), shape)
        found = catalog.find(entry.fqn, whole, first.shard)
        if found.lacking:
            raise StateMismatch(
                [f"{name}: {found.lacking} of its {whole.elements} elements are in no shard"]
            )
        diverged += [
            f"{name} of shards {one.shard} and {other.shard}"
            for one, other in _twice(catalog.sources(entry.fqn))
            if self._differ(one, other, dtype.itemsize)
        ]
        pieces = [
            Piece(
                part[2][0].source.shard,
                part[0],
                partial(self._read, catalog, Found([part], (), 0), part[0], dtype, mark),
            )
            for part in found.parts
        ]
        if not pieces:  # a tensor without elements
            pieces = [Piece(first.shard, whole, partial(torch.empty, shape, dtype=dtype))]
        return Tensor(name, first.path, dtype, shape, pieces)

    def _read(
        self, catalog: Catalog, found: Found, box: Box, dtype: torch.dtype, mark: tree.TensorMark
    ) -> torch.Tensor:
        """One box, out of all shards that have some of it."""
        made = torch.empty(box.shape, dtype=dtype)
        target = made.view(-1).view(torch.uint8).numpy()
        maker = RangesMaker()
        catalog.read(maker, found, dtype.itemsize, Strided(box, dense_strides(box.shape)), 0)
        ranges = maker.ranges()
        assert ranges.nbytes == made.nbytes, "the catalog found all of it"
        for shard, offset, length, to in zip(
            ranges.shards.tolist(),
            ranges.offsets.tolist(),
            ranges.lengths.tolist(),
            ranges.to.tolist(),
            strict=True,
        ):
            source = self._shards[shard].bytes[offset : offset + length]
            target[to : to + length] = np.frombuffer(source, dtype=np.uint8)
        if mark.conj:
            made = made.conj().resolve_conj()
        return torch._neg_view(made).resolve_neg() if mark.neg else made

    def _differ(self, one: Source, other: Source, itemsize: int) -> bool:
        """Whether two shards have other bytes for the same elements."""
        low, high = max(one.low, other.low), min(one.high, other.high)
        box = one.piece.box
        starts, _, length = runs(box, one.piece, Strided(box, dense_strides(box.shape)), itemsize)
        for start in starts.tolist():
            begin, end = max(start, low), min(start + length, high)
            if begin < end and self._stored(one, begin, end) != self._stored(other, begin, end):
                return True
        return False

    def _stored(self, source: Source, low: int, high: int) -> memoryview:
        at = source.image_offset
        return self._shards[source.shard].bytes[at + low : at + high]

    def _catalog_of(self, shards: frozenset[int]) -> Catalog:
        manifests = {shard: self._shards[shard].manifest for shard in shards}
        return Catalog(manifests, itemsizes(manifests.values()))


def _twice(sources: Sequence[Source]) -> Iterator[tuple[Source, Source]]:
    """Each source that has bytes which one before it has, too; and that one."""
    by_piece: dict[Strided, list[Source]] = defaultdict(list)
    for source in sources:
        known = by_piece[source.piece]
        before = (s for s in known if max(s.low, source.low) < min(s.high, source.high))
        one = next(before, None)
        if one is not None:
            yield one, source
        known.append(source)


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value


def _refuse_scattered(entry: segment_pb2.TensorEntry) -> None:
    placements = ", ".join(entry.dtensor.placements)
    if "Partial" in placements:
        raise UnsupportedState(
            f"{entry.name} is a partial sum ({placements}), not a part of a tensor",
            "Reduce it before it is captured",
        )
    raise UnsupportedState(
        f"{entry.name} is spread so that a rank's piece is no box of the whole ({placements})",
        "Spread it in another way; this layout cannot be exported",
    )


def _same(a: _Meaning, b: _Meaning) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and same_bits(a.whole(), b.whole())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return bool(type(a.value) is type(b.value) and a.value == b.value)
    except (RuntimeError, ValueError, TypeError):  # what holds tensors or arrays has no one truth
        return False
