"""What stands in the trees of a new image for each tensor, and where its bytes are from.

Trees of other shards are read with stand-ins for their tensors; a tensor of the new image that
takes the place of one has a stand-in of its own. What is left in the trees as it was is carried
over as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch.distributed.tensor import DTensor

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.about import box_of
from snapshotd_client.boxes import Box, Strided, dense_strides
from snapshotd_client.capture import merge_groups
from snapshotd_client.catalog import Catalog, Form
from snapshotd_client.errors import StateMismatch
from snapshotd_client.leaves import (
    GROUPS,
    RNG,
    VALUES,
    describe_dtensor,
    is_wrapper,
    label,
    local_piece,
    walk,
)
from snapshotd_client.newimage import ImageMaker
from snapshotd_client.owners import STATEFUL, collect, kind_of
from snapshotd_client.tree import TensorMark

Manifests = Mapping[int, segment_pb2.Manifest]

#: Owners that every shard has.
OF_THE_RANK: Final = (VALUES, RNG)


class Unplaceable(Exception):  # an event within this package; what was wrong has been noted
    """A tensor cannot be laid out as this run needs it."""


class StandIns:
    """Keeps track of them.

    Args:
        manifests: of all shards that were saved.
        states: as given to Snapshotter.
        maker: of the new image.
        near: the shard whose per-rank state this rank takes over.

    Attributes:
        catalog: of the manifests.
        problems: what does not fit, in sentences.
    """

    def __init__(
        self, manifests: Manifests, states: Mapping[str, object], maker: ImageMaker, near: int
    ) -> None:
        self.catalog = Catalog(manifests, itemsizes(manifests.values()))
        self.problems: list[str] = []
        self._manifests = manifests
        self._states = states
        self._maker = maker
        self._near = near
        #: Meta tensors that stand in saved trees, by id: kept, with their shards and marks.
        self._saved: dict[int, tuple[torch.Tensor, int, str, TensorMark]] = {}
        #: What stands for a tensor in the trees of the new image, by id.
        self._marks: dict[int, tuple[torch.Tensor, TensorMark]] = {}

    def origin(self, tensor: torch.Tensor) -> tuple[segment_pb2.TensorEntry, TensorMark] | None:
        """What a tensor of a saved tree stands for; None where it is none, or hidden."""
        known = self._saved.get(id(tensor))
        if known is None or known[3].hidden:
            return None
        _, shard, _, mark = known
        return self._manifests[shard].tensors[mark.index], mark

    def read(self, entry: segment_pb2.TensorEntry) -> bool:
        """Have an entry's bytes read; notes what stands in the way, and says whether it works."""
        wanted = Form(entry.dtype, tuple(entry.global_shape))
        forms = self.catalog.forms.get(entry.fqn, set())
        text = label(*wanted)
        if entry.scattered or entry.fqn in self.catalog.scattered:
            where = "this run" if entry.scattered else "the snapshot"
            why = f"{where} spreads it so that a rank's piece is no box of the whole"
        elif not forms:
            why = f"only in this run ({text})"
        elif forms != {wanted}:
            why = f"snapshot {' and '.join(sorted(label(*f) for f in forms))}, this run {text}"
        else:
            box = Box(tuple(entry.offset), tuple(entry.shape))
            found = self.catalog.find(entry.fqn, box, self._near, tuple(entry.stride))
            if not found.lacking:
                self._note_ambiguous(entry.fqn, found.ambiguous)
                self._maker.from_boxes(entry, found)
                return True
            why = f"{found.lacking} of {box.elements} elements are in no shard"
        self.problems.append(f"{entry.fqn}: {why}")
        return False

    def _note_ambiguous(self, name: str, shards: Sequence[int]) -> None:
        world = self._maker.manifest.world
        if shards and (self._near not in shards or world != len(self._manifests)):
            self.problems.append(
                f"{name}: ranks {', '.join(map(str, shards))} saved one each, and nothing says "
                f"that they are the same (replicas=... does); rank {self._near}'s would be taken"
            )

    def place(
        self,
        owner: str,
        name: str,
        old: segment_pb2.TensorEntry,
        mark: TensorMark,
        like: torch.Tensor | None,
    ) -> torch.Tensor:
        """A tensor of the saved tree, spread like another one of this run; else the whole of it."""
        shape = tuple(old.global_shape)
        entry = segment_pb2.TensorEntry(
            name=name,
            dtype=old.dtype,
            device_type=old.device_type if like is None else like.device.type,
            requires_grad=old.requires_grad,
            owner=owner,
            fqn=old.fqn,
            global_shape=shape,
        )
        box, strides = Box((0,) * len(shape), shape), dense_strides(shape)
        if like is not None:
            piece = local_piece(like)
            placed = box_of(like)
            entry.scattered = placed is None
            box = Box(placed[1] if placed else (0,) * piece.dim(), tuple(piece.shape))
            dense = piece.is_contiguous() or not torch._debug_has_internal_overlap(piece)
            strides = piece.stride() if dense and _fills(piece) else dense_strides(box.shape)
            if isinstance(like, DTensor):
                entry.dtensor.CopyFrom(describe_dtensor(name, like))
        entry.shape.extend(box.shape)
        entry.stride.extend(strides)
        entry.offset.extend(box.offset)
        if box.elements:
            nbytes = Strided(box, strides).reach * getattr(torch, old.dtype).itemsize
            entry.extent = self._maker.add_extent(nbytes)
        index = len(self._maker.manifest.tensors)
        if not self.read(self._maker.add(entry)):
            del self._maker.manifest.tensors[index]
            raise Unplaceable
        return self.stand_in(torch.empty(0), index, mark)

    def load(self, shard: int, skeleton: bytes) -> dict[str, object]:
        manifest = self._manifests[shard]

        def stand_in(owner: str, mark: TensorMark) -> torch.Tensor:
            entry = manifest.tensors[mark.index]
            dtype = getattr(torch, entry.dtype)
            made = torch.empty(tuple(entry.shape), dtype=dtype, device="meta")
            self._saved[id(made)] = (made, shard, owner, mark)
            return made

        trees = tree.load(skeleton, stand_in)
        missing = [n for n in (*manifest.names, *OF_THE_RANK, GROUPS) if n not in trees]
        if missing:
            raise StateMismatch([f"{n}: no tree in the snapshot of rank {shard}" for n in missing])
        merge_groups(trees)
        return trees

    def stand_in(
        self, like: torch.Tensor, index: int, mark: TensorMark | None = None
    ) -> torch.Tensor:
        """What stands in the new trees for entry `index`."""
        made = torch.empty(0, device="meta")
        self._marks[id(made)] = (
            made,
            (
                TensorMark(
                    index, tree.tensor_class(like), like.is_conj(), like.is_neg(), hidden=False
                )
                if mark is None
                else TensorMark(index, mark.cls, mark.conj, mark.neg, mark.hidden)
            ),
        )
        return made

    def mark(self, tensor: torch.Tensor) -> TensorMark:
        """The mark of whatever stands in the trees: of the new image, saved, or live."""
        if id(tensor) not in self._marks:
            if id(tensor) in self._saved:
                stands = self._carry_over(*self._saved[id(tensor)])
            else:
                stands = self._keep_tensor("", f"<hidden {len(self._marks)}>", tensor, hidden=True)
            self._marks[id(tensor)] = tensor, self._marks[id(stands)][1]
        return self._marks[id(tensor)][1]

    def _carry_over(
        self, _: torch.Tensor, shard: int, owner: str, mark: TensorMark
    ) -> torch.Tensor:
        """A tensor that is the rank's own: its bytes as they were saved."""
        manifest = self._manifests[shard]
        old = manifest.tensors[mark.index]
        divided = all(old.shape) and manifest.extents[old.extent].HasField("part")
        if not mark.hidden and (divided or old.HasField("dtensor")):
            like = self._stateful_tensor(owner, old.name)
            whole = tuple(old.shape) == tuple(old.global_shape)
            if like is not None or whole:
                return self.place(owner, old.name, old, mark, like)
        if divided or old.HasField("dtensor"):
            self.problems.append(
                f"{old.name}: a DTensor, and nothing in this run tells how it is spread"
            )
        entry = segment_pb2.TensorEntry()
        entry.CopyFrom(old)
        entry.ClearField("dtensor")
        entry.ClearField("copies")
        if all(old.shape):
            extent = manifest.extents[old.extent]
            entry.extent = self._maker.copy_extent(shard, old.extent, extent)
        self._maker.add(entry)
        return self.stand_in(torch.empty(0), len(self._maker.manifest.tensors) - 1, mark)

    def _stateful_tensor(self, owner: str, name: str) -> torch.Tensor | None:
        state = self._states.get(owner)
        if state is None or kind_of(owner, state) != STATEFUL:
            return None
        return next((t for n, t, _ in walk(collect(state), owner) if n == name), None)

    def keep_live(self, name: str, state: object) -> object:
        """The tree of a state that the snapshot does not have, as it is now."""

        def keep(inner: str, tensor: torch.Tensor) -> object:
            return tensor if is_wrapper(tensor) else self._keep_tensor(name, inner, tensor)

        return mapped(name, collect(state), keep)

    def _keep_tensor(
        self, owner: str, name: str, tensor: torch.Tensor, *, hidden: bool = False
    ) -> torch.Tensor:
        piece = local_piece(tensor)
        entry = segment_pb2.TensorEntry(
            name=name,
            dtype=str(piece.dtype).removeprefix("torch."),
            shape=piece.shape,
            stride=piece.stride(),
            device_type=piece.device.type,
            requires_grad=tensor.requires_grad and tensor.is_leaf,
            owner=owner,
        )
        if isinstance(tensor, DTensor):
            entry.dtensor.CopyFrom(describe_dtensor(name, tensor))
        if piece.numel():
            reach = Strided(Box((0,) * piece.dim(), tuple(piece.shape)), piece.stride()).reach
            entry.extent = self._maker.add_extent(reach * piece.itemsize)
        self._maker.from_live(self._maker.add(entry), tensor)
        index = len(self._maker.manifest.tensors) - 1
        cls, conj, neg = tree.tensor_class(tensor), tensor.is_conj(), tensor.is_neg()
        return self.stand_in(tensor, index, TensorMark(index, cls, conj, neg, hidden))


def _fills(piece: torch.Tensor) -> bool:
    """Whether a tensor's elements lie without gaps, in whatever order."""
    box = Box((0,) * piece.dim(), tuple(piece.shape))
    return Strided(box, piece.stride()).reach == piece.numel()


def mapped(name: str, node: object, change: Callable[[str, torch.Tensor], object]) -> object:
    """A copy of a tree of dicts, lists and tuples, its tensors changed; `name` as in `walk`."""
    if isinstance(node, torch.Tensor):
        return change(name, node)
    if isinstance(node, dict):
        made = {key: mapped(f"{name}.{key}", child, change) for key, child in node.items()}
        return made if type(node) is dict else type(node)(made)
    if isinstance(node, list):
        return [mapped(f"{name}.{i}", child, change) for i, child in enumerate(node)]
    if isinstance(node, tuple):
        items = [mapped(f"{name}.{i}", child, change) for i, child in enumerate(node)]
        return getattr(type(node), "_make", type(node))(items)
    return node


def itemsizes(manifests: Iterable[segment_pb2.Manifest]) -> dict[str, int]:
    """Bytes of an element, by name of the dtype, of all that manifests name."""
    found = {entry.dtype for manifest in manifests for entry in manifest.tensors}
    dtypes = {name: getattr(torch, name, None) for name in found}
    return {n: d.itemsize if isinstance(d, torch.dtype) else 1 for n, d in dtypes.items()}
