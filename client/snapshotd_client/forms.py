"""What of tensors a plan rests on beside their bytes, looked at before each snapshot.

A tensor may come to read its memory in another way while it stays the same object at the same
address: `p.data = p.data.t()`. No version counter tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, eq
from typing import Final

import torch

try:
    # Made to ask just this, of many tensors, in one call: a fifth of the time of asking in Python.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is no public name
    TensorGuards = None  # type: ignore[assignment, misc]  # as declared by torch


#: So many tensors are asked everything one after the other, before the next ones are: what they
#: touch fits a core's cache, and is fetched from memory once, not for each question.
_TOGETHER: Final = 256

_version = attrgetter("_version")


class Forms:
    """Form and address of some tensors, as they are now.

    Args:
        tensors: strided, each with memory of its own or shared; one may come more than once.
        wrappers: tensors whose memory is not asked for, such as DTensors.

    Attributes:
        versions: of the tensors that `watch` returned, as read when `hold` was last true.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], wrappers: Iterable[torch.Tensor] = ()
    ) -> None:
        own = {id(t): t for t in tensors}
        other = {id(t): t for t in wrappers if id(t) not in own}
        self._parts = [_Part(some, some) for some in _cut([*own.values()])]
        self._parts += [_Part((), some) for some in _cut([*other.values()])]
        self._others: list[torch.Tensor] = []
        self.versions: list[int] = []

    def watch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Have `hold` read their version counters on the way; they come back in its order."""
        wanted = {id(t): t for t in tensors}
        ordered: list[torch.Tensor] = []
        for part in self._parts:
            part.watched = [wanted.pop(id(t)) for t in part.all if id(t) in wanted]
            ordered += part.watched
        # What a module's state_dict gives is another object, with the same counter.
        self._others = [*wanted.values()]
        return [*ordered, *self._others]

    def hold(self) -> bool:
        """Whether all tensors still read the same memory in the same way."""
        versions: list[int] = []
        for part in self._parts:
            if not part.holds():
                return False
            versions += map(_version, part.watched)
        self.versions = [*versions, *map(_version, self._others)]
        return True


class _Part:
    """Some of the tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor], every: Sequence[torch.Tensor]) -> None:
        self.all = every
        self.watched: list[torch.Tensor] = []
        self._tensors = tensors
        self._addresses = [*map(torch.Tensor.data_ptr, tensors)]
        self._guards = None
        self._forms: list[object] = []
        if TensorGuards is None:
            self._forms = [*map(_form, every)]
        else:
            self._guards = TensorGuards(*every, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def holds(self) -> bool:
        return self._forms_hold() and self._addresses_hold()

    def _addresses_hold(self) -> bool:
        return all(map(eq, map(torch.Tensor.data_ptr, self._tensors), self._addresses))

    def _forms_hold(self) -> bool:
        if self._guards is None:
            return [*map(_form, self.all)] == self._forms
        return bool(self._guards.check(*self.all))


def _cut(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    for start in range(0, len(tensors), _TOGETHER):
        yield tensors[start : start + _TOGETHER]


def _form(tensor: torch.Tensor) -> Sequence[object]:
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
