"""Which tensors may be copied while training goes on, and whether they have moved meanwhile.

Between two steps of an optimizer nothing but that optimizer writes to its parameters and its
state, and its pre-step hook waits for the copy. Everything else is copied before `step` returns.
What breaks the rule by an ordinary in-place operation is seen by torch's version counters; writes
through `.data`, by foreign kernels and by replayed CUDA graphs are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import torch

from snapshotd_client.extents import Place
from snapshotd_client.leaves import Leaf, local_piece
from snapshotd_client.owners import MODULE, OPTIMIZER, kind_of

_version = attrgetter("_version")


def hookable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every update of it passes its pre-step hooks, as far as can be known.

    A step that can be captured in a CUDA graph is replayed without them.
    """
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and not any(
        group.get("capturable") for group in optimizer.param_groups
    )


class Quiet:
    """What is at rest between two optimizer steps, of the objects given."""

    def __init__(self, states: Mapping[str, object]) -> None:
        optimizers = [
            s for s in states.values() if isinstance(s, torch.optim.Optimizer) and hookable(s)
        ]
        trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        self._kinds = {name: kind_of(name, state) for name, state in states.items()}
        self._state = {id(t) for o in optimizers for t in _state_tensors(o)}
        self._names = {
            f"{owner}.{name}"
            for owner, state in states.items()
            if isinstance(state, torch.nn.Module)
            for name, parameter in state.named_parameters(remove_duplicate=False)
            if id(parameter) in trained
        }

    def extents(self, leaves: Sequence[Leaf], places: Sequence[Place]) -> frozenset[int]:
        """Indices of the extents that hold nothing else."""
        resting: set[int] = set()
        moving: set[int] = set()
        for leaf, place in zip(leaves, places, strict=True):
            if local_piece(leaf.tensor).numel():
                (resting if self._rests(leaf) else moving).add(place.extent)
        return frozenset(resting - moving)

    def _rests(self, leaf: Leaf) -> bool:
        if leaf.tensor.is_inference():
            return False  # has no version
        match self._kinds.get(leaf.owner):
            case kind if kind == MODULE:
                return leaf.name in self._names
            case kind if kind == OPTIMIZER:
                return id(leaf.tensor) in self._state
        return False


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for entry in optimizer.state.values():
        if isinstance(entry, dict):
            yield from (value for value in entry.values() if isinstance(value, torch.Tensor))


class Watch:
    """Version counters of some tensors, from now on.

    Args:
        tensors: in any order.
        before: their counters, where they were read already.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], before: Sequence[int] | None = None
    ) -> None:
        self._tensors = tensors
        self._before = [*map(_version, tensors)] if before is None else before

    def moved(self) -> bool:
        """Whether any of them was written to since. Only the thread that trains can tell."""
        return [*map(_version, self._tensors)] != self._before


def watched(leaves: Sequence[Leaf]) -> list[torch.Tensor]:
    """The tensors whose versions tell of a write to these leaves."""
    tensors = [leaf.tensor for leaf in leaves]
    inner = [piece for t in tensors if (piece := local_piece(t)) is not t]
    return [*tensors, *inner]
