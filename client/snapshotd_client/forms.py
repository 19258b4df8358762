"""What of tensors a plan rests on beside their bytes, looked at before each snapshot.

A tensor may come to read its memory in another way while it stays the same object at the same
address: `p.data = p.data.t()`. No version counter tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import eq

import torch

try:
    # Made to ask just this, of many tensors, in one call: a fifth of the time of asking in Python.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is no public name
    TensorGuards = None  # type: ignore[assignment, misc]  # as declared by torch


class Forms:
    """Form and address of some tensors, as they are now.

    Args:
        tensors: strided, each with memory of its own or shared; one may come more than once.
        wrappers: tensors whose memory is not asked for, such as DTensors.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], wrappers: Iterable[torch.Tensor] = ()
    ) -> None:
        self._tensors = [*{id(t): t for t in tensors}.values()]
        self._all = [*{id(t): t for t in (*self._tensors, *wrappers)}.values()]
        self._addresses = [*map(torch.Tensor.data_ptr, self._tensors)]
        self._guards = None
        self._forms: list[object] = []
        if TensorGuards is None:
            self._forms = [*map(_form, self._all)]
        elif self._all:
            self._guards = TensorGuards(
                *self._all, dynamic_dims_sizes=None, dynamic_dims_strides=None
            )

    def hold(self) -> bool:
        """Whether all tensors still read the same memory in the same way."""
        return self._addresses_hold() and self._forms_hold()

    def _addresses_hold(self) -> bool:
        return all(map(eq, map(torch.Tensor.data_ptr, self._tensors), self._addresses))

    def _forms_hold(self) -> bool:
        if self._guards is None:
            return [*map(_form, self._all)] == self._forms
        return bool(self._guards.check(*self._all))


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
