"""Images of all shards of a step, as one state: which tensors and objects there are, by name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.capture import merge_groups
from snapshotd_client.errors import StateMismatch
from snapshotd_client.exact import same_bits
from snapshotd_client.export.boxes import Box, box_of
from snapshotd_client.image import Image

#: A path in the nested state, as torch.distributed.checkpoint keeps it.
Keys = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some box of a tensor, over the image of the shard that holds it."""

    shard: int
    box: Box
    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class Tensor:
    """A global tensor: pieces that together are all of it, each box once unless it is in parts."""

    name: str
    path: Keys
    pieces: Sequence[Piece]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pieces[0].box.whole

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].tensor.dtype

    def boxes(self) -> Iterator[tuple[int, Box, Callable[[], torch.Tensor]]]:
        """Each box once: a shard that has it, or some of it, where it lies, how to get it."""
        parts: dict[tuple[int, ...], list[Piece]] = {}
        for piece in self.pieces:
            parts.setdefault(piece.box.offsets, []).append(piece)
        for pieces in parts.values():
            first = pieces[0]
            box = replace(first.box, part=None)
            yield first.shard, box, partial(_put_together, self.name, pieces)


def _put_together(name: str, pieces: Sequence[Piece]) -> torch.Tensor:
    """The tensor of a box. Raises StateMismatch: some bytes of it are nowhere."""
    box, tensor = pieces[0].box, pieces[0].tensor
    if box.part is None:
        return tensor
    whole = torch.empty(box.shape, dtype=tensor.dtype)
    flat = whole.view(-1).view(torch.uint8)
    reached = 0
    for piece in sorted(pieces, key=lambda p: p.box.part or (0, 0)):
        assert piece.box.part is not None, "a box is whole or in parts"
        start, end = piece.box.part
        if start > reached:
            break
        flat[start:end] = piece.tensor.contiguous().view(-1).view(torch.uint8)[: end - start]
        reached = max(reached, end)
    if reached < flat.numel():
        raise StateMismatch([f"{name}: bytes {reached} to {flat.numel()} of it are in no shard"])
    return whole


@dataclass(frozen=True, eq=False)
class Thing:
    """What is no tensor: a number, a list, an object of the user's."""

    name: str
    path: Keys
    shard: int
    value: object


@dataclass(frozen=True, eq=False)
class State:
    """The whole state of a job at a step.

    Attributes:
        diverged: names of tensors that are the same box in several shards, with other bytes.
    """

    job: str
    step: int
    world: int
    tensors: Sequence[Tensor]
    things: Sequence[Thing]
    diverged: Sequence[str]


@dataclass(frozen=True, eq=False)
class _Leaf:
    path: Keys
    shard: int
    value: object
    entry: segment_pb2.TensorEntry | None


class Shards:
    """The images of a step, mapped.

    Args:
        paths: files that hold the images alone, in shard order.
        manifest_bytes: lengths of the manifests that open them.
    """

    def __init__(self, paths: Sequence[Path], manifest_bytes: Sequence[int]) -> None:
        self._leaves: list[dict[str, _Leaf]] = []
        self._manifests: list[segment_pb2.Manifest] = []
        for shard, (path, length) in enumerate(zip(paths, manifest_bytes, strict=True)):
            self._open(shard, path, length)

    def state(self) -> State:
        """Everything by name. Raises StateMismatch, UnsupportedState."""
        first = self._manifests[0]
        names = dict.fromkeys(name for leaves in self._leaves for name in leaves)
        tensors: list[Tensor] = []
        things: list[Thing] = []
        diverged: list[str] = []
        for name in names:
            found = [leaves[name] for leaves in self._leaves if name in leaves]
            spread = [f for f in found if f.entry is not None and f.entry.HasField("dtensor")]
            if spread:
                tensors.append(self._joined(name, spread, diverged))
                found = [f for f in found if f not in spread]
            for leaf in _distinct(found):
                one = leaf is found[0] and not spread
                alias = name if one else f"ranks.{leaf.shard}.{name}"
                path = leaf.path if one else ("ranks", str(leaf.shard), *leaf.path)
                if isinstance(leaf.value, torch.Tensor):
                    piece = Piece(leaf.shard, self._box(leaf), leaf.value)
                    tensors.append(Tensor(alias, path, [piece]))
                else:
                    things.append(Thing(alias, path, leaf.shard, leaf.value))
        return State(first.job, first.step, first.world, tensors, things, diverged)

    def _joined(self, name: str, found: Sequence[_Leaf], diverged: list[str]) -> Tensor:
        pieces: dict[tuple[object, ...], Piece] = {}
        for leaf in found:
            assert isinstance(leaf.value, torch.Tensor)
            piece = Piece(leaf.shard, self._box(leaf), leaf.value)
            first = next(iter(pieces.values()), piece)
            if (first.box.whole, first.tensor.dtype) != (piece.box.whole, piece.tensor.dtype):
                raise StateMismatch(
                    [
                        f"{name}: {first.tensor.dtype} {list(first.box.whole)} in shard "
                        f"{first.shard}, {piece.tensor.dtype} {list(piece.box.whole)} in shard "
                        f"{piece.shard}"
                    ]
                )
            if 0 in piece.box.shape:
                continue
            known = pieces.setdefault((piece.box.offsets, piece.box.part), piece)
            if known is not piece and not same_bits(known.tensor, piece.tensor):
                diverged.append(f"{name} of shards {known.shard} and {piece.shard}")
        if not pieces:  # nothing of it anywhere: a tensor without elements
            leaf = found[0]
            assert isinstance(leaf.value, torch.Tensor)
            return Tensor(name, leaf.path, [Piece(leaf.shard, self._box(leaf), leaf.value)])
        return Tensor(name, found[0].path, [*pieces.values()])

    def _box(self, leaf: _Leaf) -> Box:
        if leaf.entry is None:
            assert isinstance(leaf.value, torch.Tensor)
            shape = tuple(leaf.value.shape)
            return Box(shape, (0,) * len(shape), shape)
        return box_of(leaf.entry, leaf.shard, self._manifests[leaf.shard].world)

    def _open(self, shard: int, path: Path, manifest_bytes: int) -> None:
        image = _mapped(path)
        try:
            manifest = segment_pb2.Manifest.FromString(bytes(image[:manifest_bytes]))
        except DecodeError as error:
            raise StateMismatch([f"the manifest of shard {shard}: {error}"]) from error
        wrong = out_of_bounds(manifest, len(image))
        if wrong:
            raise StateMismatch(wrong)
        entries: dict[int, segment_pb2.TensorEntry] = {}
        # Their local pieces only: there is no mesh here that a DTensor could be on.
        bare = segment_pb2.Manifest()
        bare.CopyFrom(manifest)
        for entry in bare.tensors:
            entry.ClearField("dtensor")
            entry.device_type = "cpu"
        source = Image(image, bare, {}, {})
        kept: list[torch.Tensor] = []

        def tensor(_owner: str, mark: tree.TensorMark) -> torch.Tensor:
            if mark.hidden:  # an object is written whole, with all of its tensors' storage
                return source.own(replace(mark, cls=torch.Tensor), private=True)
            made = source.view(mark.index, conj=mark.conj, neg=mark.neg)
            kept.append(made)
            entries[id(made)] = manifest.tensors[mark.index]
            return made

        place = manifest.skeleton.image_offset
        trees = tree.load(bytes(image[place : place + manifest.skeleton.bytes]), tensor)
        merge_groups(trees)
        flat, paths = flatten_state_dict(trees)
        self._manifests.append(manifest)
        self._leaves.append(
            {n: _Leaf(tuple(paths[n]), shard, v, entries.get(id(v))) for n, v in flat.items()}
        )


def _mapped(path: Path) -> memoryview:
    """A file's bytes, read-only, for as long as anything views them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


def _distinct(found: Sequence[_Leaf]) -> Iterator[_Leaf]:
    """The first, and each that is not the same as the first."""
    for leaf in found:
        if leaf is found[0] or not _same(leaf.value, found[0].value):
            yield leaf


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_bits(a, b)
    try:
        return bool(type(a) is type(b) and a == b)
    except (RuntimeError, ValueError, TypeError):  # what holds tensors or arrays has no one truth
        return False
