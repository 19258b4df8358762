"""Pickles state trees with their tensors taken out, and reads them back.

The only module that pickles. What it writes is opaque to the daemon; what it reads are bytes
that a trainer of the same job wrote and the daemon verified.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251  # the one place that may: user state is opaque, and only read here
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Final

import torch

from snapshotd_client.errors import StateMismatch, UnsupportedState
from snapshotd_client.leaves import Inventory, is_wrapper

#: Fixed, so that equal trees give equal bytes under every Python.
PICKLE_PROTOCOL: Final = 5


#: What pickle raises for bytes that it did not write, or that were cut short.
NO_TREES: Final = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
)


@dataclass(frozen=True)
class TensorMark:
    """What stands in the pickle where a tensor stood.

    Attributes:
        index: into Manifest.tensors.
        cls: torch.Tensor, torch.nn.Parameter or a subclass that is not a wrapper.
        conj: the tensor reads its bytes conjugated.
        neg: the tensor reads its bytes negated.
        hidden: as in Leaf.
    """

    index: int
    cls: type[torch.Tensor]
    conj: bool
    neg: bool
    hidden: bool


TensorSource = Callable[[str, TensorMark], torch.Tensor]


def dump(owner: str, tree: object, inventory: Inventory) -> bytes:
    """Pickle the tree of one owner; tensors not yet in `inventory` are added to it.

    Each owner has a pickle that refers to no other, so that one that is unchanged is kept.

    Raises:
        UnsupportedState: an object of the tree cannot be pickled.
    """
    stream = io.BytesIO()
    try:
        _TreePickler(stream, owner, inventory).dump(tree)
    # TypeError and AttributeError are what pickle raises for locks, lambdas and the like.
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnsupportedState(
            f"the state of {owner} holds an object that cannot be pickled: {error}",
            "Give Snapshotter plain data, tensors, or objects that pickle supports.",
        ) from error
    return stream.getvalue()


def join(owners: Sequence[str], pickles: Iterable[bytes]) -> bytes:
    """How the skeleton of an image begins; the pickles of the other owners follow, in order.

    Args:
        owners: all of them.
        pickles: of the first of them.
    """
    return b"".join([pickle.dumps([*owners], protocol=PICKLE_PROTOCOL), *pickles])


def load(skeleton: bytes, tensor: TensorSource) -> dict[str, object]:
    """Read back what `join` joined; what follows it is not looked at.

    Args:
        skeleton: the bytes.
        tensor: gives the tensor for an owner and a mark.

    Raises:
        StateMismatch: a class of the snapshot cannot be imported here, or these are no trees.
    """
    stream = io.BytesIO(skeleton)
    trees: dict[str, object] = {}
    try:
        for owner in _TreeUnpickler(stream, "", tensor).load():
            trees[owner] = _TreeUnpickler(stream, owner, tensor).load()
    except NO_TREES as error:
        raise StateMismatch([f"the {len(skeleton)} bytes of the skeleton: {error!r}"]) from error
    return trees


def dump_marked(trees: Mapping[str, object], mark: Callable[[torch.Tensor], TensorMark]) -> bytes:
    """A whole skeleton of trees that were read by `load`, and whose tensors stand for others.

    Args:
        trees: by owner.
        mark: what to write for a tensor of them.
    """
    stream = io.BytesIO()
    for state_tree in trees.values():
        _MarkedPickler(stream, mark).dump(state_tree)
    return join([*trees], [stream.getvalue()])


class _WrapperPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        attributes, context = obj.__tensor_flatten__()  # type: ignore[attr-defined]  # is_wrapper
        inner = {name: getattr(obj, name) for name in attributes}
        return _rewrap, (type(obj), inner, context, tuple(obj.shape), obj.stride())


class _MarkedPickler(_WrapperPickler):
    def __init__(self, stream: io.BytesIO, mark: Callable[[torch.Tensor], TensorMark]) -> None:
        super().__init__(stream, protocol=PICKLE_PROTOCOL)
        self._mark = mark

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, torch.Tensor) or is_wrapper(obj):
            return None
        return astuple(self._mark(obj))


class _TreePickler(_WrapperPickler):
    def __init__(self, stream: io.BytesIO, owner: str, inventory: Inventory) -> None:
        super().__init__(stream, protocol=PICKLE_PROTOCOL)
        self._owner = owner
        self._inventory = inventory

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, torch.Tensor) or is_wrapper(obj):
            return None
        index = self._inventory.take(self._owner, obj)
        hidden = self._inventory.leaf(index).hidden
        return index, tensor_class(obj), obj.is_conj(), obj.is_neg(), hidden


class _TreeUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, owner: str, tensor: TensorSource) -> None:
        super().__init__(stream)
        self._owner = owner
        self._tensor = tensor

    def persistent_load(self, pid: object) -> torch.Tensor:
        if not isinstance(pid, tuple) or len(pid) != len(fields(TensorMark)):
            raise pickle.UnpicklingError(f"{pid!r} is no tensor")
        return self._tensor(self._owner, TensorMark(*pid))

    def find_class(self, module: str, name: str, /) -> object:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError) as error:
            raise StateMismatch(
                [f"{self._owner}: {module}.{name} cannot be imported here: {error}"],
                "Make the class importable, as it was in the run that wrote the snapshot.",
            ) from error


def tensor_class(tensor: torch.Tensor) -> type[torch.Tensor]:
    """As in TensorMark."""
    if isinstance(tensor, torch.distributed.tensor.DTensor):
        return torch.nn.Parameter if isinstance(tensor, torch.nn.Parameter) else torch.Tensor
    return type(tensor)


def _rewrap(
    cls: type[torch.Tensor],
    inner: dict[str, torch.Tensor],
    context: object,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> object:
    return cls.__tensor_unflatten__(inner, context, shape, stride)  # type: ignore[attr-defined]  # is_wrapper
