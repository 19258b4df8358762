"""Finds the tensors of a state tree and says what each one is, in a TensorEntry.

Reads metadata only; no tensor is copied or changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.errors import UnsupportedState
from snapshotd_client.extents import Extent, Place, byte_span, gather

#: Owners that no name given to Snapshotter can take.
VALUES: Final = "<values>"
RNG: Final = "<rng>"
#: What optimizers hold beside tensors and parameters: learning rates and the like, by name.
GROUPS: Final = "<groups>"

#: Owner of all that torch.distributed.checkpoint saved, and the kind that Manifest.names gives it.
CHECKPOINT: Final = "<checkpoint>"

#: Marks the name of a tensor that a walk over dict, list and tuple does not reach.
HIDDEN: Final = "<hidden"


@dataclass(frozen=True, eq=False)
class Leaf:
    """One tensor of a state tree.

    Attributes:
        owner: the name given to Snapshotter, VALUES or RNG.
        name: fully qualified.
        tensor: as found; kept so that its id stays its own.
        hidden: inside an opaque object or a wrapper subclass.
    """

    owner: str
    name: str
    tensor: torch.Tensor
    hidden: bool


@dataclass
class Inventory:
    """All leaves of some state trees, in the order they were found; each object once an owner."""

    leaves: list[Leaf] = field(default_factory=list)
    first: int = 0  # index of the first of these leaves in the manifest
    _index: dict[tuple[str, int], int] = field(default_factory=dict)

    def take_walk(self, owner: str, tree: object) -> None:
        """Add every tensor that a walk over dict, list and tuple of `tree` reaches."""
        for name, tensor, hidden in walk(tree, owner):
            self.take(owner, tensor, name, hidden=hidden)

    def take(self, owner: str, tensor: torch.Tensor, name: str = "", *, hidden: bool = True) -> int:
        """The index of `tensor`; it is added where `owner` does not have it yet.

        Raises:
            UnsupportedState: the bytes of such a tensor cannot be taken.
        """
        known = self._index.get((owner, id(tensor)))
        if known is not None:
            return known
        index = self.first + len(self.leaves)
        leaf = Leaf(owner, name or f"{owner}.{HIDDEN} {index}>", tensor, hidden)
        refuse_unsupported(leaf.name, tensor)
        self.leaves.append(leaf)
        self._index[owner, id(tensor)] = index
        return index

    def leaf(self, index: int) -> Leaf:
        return self.leaves[index - self.first]

    def gather(self) -> tuple[list[Extent], list[Place]]:
        return gather([local_piece(leaf.tensor) for leaf in self.leaves])


def walk(tree: object, prefix: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Tensors of `tree` as (fully qualified name, tensor, hidden), depth first.

    A wrapper subclass yields the tensors it is made of, hidden; a DTensor yields itself.
    """
    pending: list[tuple[str, object]] = [(prefix, tree)]
    seen: set[int] = set()
    while pending:
        name, node = pending.pop()
        if isinstance(node, torch.Tensor):
            yield from _walk_tensor(name, node)
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            items = node.items() if isinstance(node, dict) else enumerate(node)
            # Reversed, because the stack gives back the last one first.
            pending.extend(reversed([(f"{name}.{key}", child) for key, child in items]))


def _walk_tensor(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, bool]]:
    if not is_wrapper(tensor):
        yield name, tensor, False
        return
    for attribute in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]  # is_wrapper
        for inner_name, inner, _ in _walk_tensor(f"{name}.{attribute}", getattr(tensor, attribute)):
            yield inner_name, inner, True


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is made of other tensors, DTensor excepted."""
    if isinstance(tensor, DTensor) or tensor.is_nested:
        return False
    return bool(is_traceable_wrapper_subclass(tensor))


def local_piece(tensor: torch.Tensor) -> torch.Tensor:
    """The strided tensor that holds this process's bytes; shares memory with `tensor`."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def refuse_unsupported(name: str, tensor: torch.Tensor) -> None:
    """Raise UnsupportedState where the bytes of `tensor` cannot be taken as they are."""
    why = _why_unsupported(tensor)
    if why:
        raise UnsupportedState(
            f"the tensor {name} cannot be captured: {why}",
            "Leave it out of the captured state, or store it as a plain dense tensor.",
        )


def _why_unsupported(tensor: torch.Tensor) -> str:
    if torch.nn.parameter.is_lazy(tensor):
        return "it is not initialised yet (run one forward pass first)"
    if tensor.is_nested:
        return "it is a nested tensor"
    if tensor.is_quantized:
        return f"it is quantized ({tensor.qscheme()})"
    piece = local_piece(tensor)
    if isinstance(piece, torch._subclasses.FakeTensor):
        return "it is a fake tensor and has no data"
    if piece.is_meta:
        return "it is on the meta device and has no data"
    if piece.layout != torch.strided:
        return f"its layout is {piece.layout}, not strided"
    if not torch._C._has_storage(piece):
        return f"a {type(piece).__name__} has no storage"
    return _why_unbacked(piece)


def _why_unbacked(piece: torch.Tensor) -> str:
    if not piece.numel():
        return ""
    needed, held = byte_span(piece)[1], piece.untyped_storage().nbytes()
    return "" if needed <= held else f"its storage holds {held} bytes of the {needed} it reaches"


def describe(leaf: Leaf, place: Place) -> segment_pb2.TensorEntry:
    """The manifest's entry of a leaf that stands at `place`."""
    piece = local_piece(leaf.tensor)
    entry = segment_pb2.TensorEntry(
        name=leaf.name,
        dtype=str(piece.dtype).removeprefix("torch."),
        shape=piece.shape,
        stride=piece.stride(),
        extent=place.extent,
        extent_offset=place.offset,
        device_type=piece.device.type,
        # A tensor computed from others comes back as a leaf of the graph that asks for nothing.
        requires_grad=leaf.tensor.requires_grad and leaf.tensor.is_leaf,
        owner=leaf.owner,
    )
    if isinstance(leaf.tensor, DTensor):
        entry.dtensor.CopyFrom(describe_dtensor(leaf.name, leaf.tensor))
    return entry


def describe_dtensor(name: str, tensor: DTensor) -> segment_pb2.DTensorSpec:
    """How a DTensor is spread; `name` is for the error."""
    shape, dim_names = mesh_key(tensor)
    return segment_pb2.DTensorSpec(
        global_shape=tensor.shape,
        global_stride=tensor.stride(),
        placements=[_placement_text(name, p) for p in tensor.placements],
        mesh_shape=shape,
        mesh_dim_names=dim_names,
    )


def mesh_key(tensor: DTensor) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What a device mesh is recognised by in another process: its shape and dimension names."""
    mesh = tensor.device_mesh
    return tuple(mesh.shape), tuple(mesh.mesh_dim_names or ())


def _placement_text(name: str, placement: Placement) -> str:
    match placement:
        case _StridedShard():
            return f"StridedShard({placement.dim}, {placement.split_factor})"
        case Shard():
            return f"Shard({placement.dim})"
        case Replicate():
            return "Replicate()"
        case _ if type(placement) is Partial:
            return f"Partial({placement.reduce_op})"
    raise UnsupportedState(f"the tensor {name} has a placement that is not known: {placement!r}")


def placement_of(text: str) -> Placement:
    """The placement that `_placement_text` wrote."""
    kind, _, rest = text.partition("(")
    arguments = rest.removesuffix(")")
    match kind:
        case "StridedShard":
            dim, factor = arguments.split(", ")
            return _StridedShard(int(dim), split_factor=int(factor))
        case "Shard":
            return Shard(int(arguments))
        case "Replicate":
            return Replicate()
        case "Partial":
            return Partial(arguments)
    raise ValueError(f"not a placement: {text!r}")


def label(dtype: str, shape: Sequence[int]) -> str:
    """A tensor's dtype and shape for people: "float32 [3, 4]"."""
    return f"{dtype} [{', '.join(map(str, shape))}]"


def dtensors(states: Mapping[str, object]) -> Iterator[DTensor]:
    """Live DTensors among the parameters, buffers and bare tensors of `states`."""
    for state in states.values():
        if isinstance(state, torch.nn.Module):
            found: Sequence[object] = [*state.parameters(), *state.buffers()]
        elif isinstance(state, torch.optim.Optimizer):
            found = [p for group in state.param_groups for p in group["params"]]
        else:
            found = [state]
        yield from (tensor for tensor in found if isinstance(tensor, DTensor))
