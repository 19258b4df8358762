"""Whether the live objects still are those of the last plan: looked at before each snapshot.

Reads identities, forms and addresses, nothing else, in a few passes that do not run Python code for
each tensor. Where it cannot be sure it says no, and everything is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from snapshotd_client.forms import Forms
from snapshotd_client.leaves import is_wrapper, local_piece

#: What torch puts into a group that is the same for as long as the parameters are.
GROUP_CONSTANTS: Final = frozenset({"params", "param_names"})

_SHARDING_HOOK: Final = (
    "torch.distributed.fsdp._fully_shard._fsdp_param_group."
    "FSDPParamGroup._register_state_dict_hooks.<locals>.to_sharded_hook"
)

#: The last two see to states of other versions, which have other names.
_LOADERS: Final = (
    torch.nn.Module._load_from_state_dict,
    _NormBase._load_from_state_dict,
    _InstanceNorm._load_from_state_dict,
)
_SCHEDULES: Final = (LRScheduler.load_state_dict, LambdaLR.load_state_dict)
#: Of other classes a copy may be more than a copy.
_TENSORS: Final = (torch.Tensor, torch.nn.Parameter, DTensor)

_SCALARS: Final = (int, float, bool, str, type(None))


def plain_module(module: torch.nn.Module) -> bool:
    """Whether its state_dict gives its parameters and buffers and runs no code of anybody's."""
    base = torch.nn.Module
    return all(
        type(m).state_dict is base.state_dict
        and type(m)._save_to_state_dict is base._save_to_state_dict
        and type(m).get_extra_state is base.get_extra_state
        and "state_dict" not in vars(m)
        and not m._state_dict_hooks
        and all(map(_shards, m._state_dict_pre_hooks.values()))
        and all(_plain(t) for t in chain(m._parameters.values(), m._buffers.values()))
        for m in module.modules()
    )


def plain_to_load(module: torch.nn.Module) -> bool:
    """Whether its load_state_dict copies values of the same names and runs nobody's code."""
    base = torch.nn.Module
    return plain_module(module) and all(
        type(m).load_state_dict is base.load_state_dict
        and type(m)._load_from_state_dict in _LOADERS
        and type(m).set_extra_state is base.set_extra_state
        and "load_state_dict" not in vars(m)
        and not m._load_state_dict_pre_hooks
        and not m._load_state_dict_post_hooks
        and all(
            t is None or type(t) in _TENSORS
            for t in chain(m._parameters.values(), m._buffers.values())
        )
        for m in module.modules()
    )


def plain_schedule(state: object) -> bool:
    """Whether this is a schedule of torch's, whose load_state_dict sets its own attributes only."""
    return (
        isinstance(state, LRScheduler)
        and type(state).load_state_dict in _SCHEDULES
        and "load_state_dict" not in vars(state)
    )


def _shards(hook: object) -> bool:
    """Whether this is what FSDP2 has its modules do before their state is read.

    Where they are sharded already, it does nothing; and only then do they hold the same tensors.
    """
    name = f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}"
    return name == _SHARDING_HOOK


def plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state_dict gives its tensors as they are, by parameter."""
    cls, base = type(optimizer), torch.optim.Optimizer
    hooks = [
        *optimizer._optimizer_state_dict_pre_hooks,
        *optimizer._optimizer_state_dict_post_hooks,
    ]
    return (
        cls.state_dict is base.state_dict
        and not hooks
        and not any(isinstance(v, torch.Tensor) for v in _hyperparameters(optimizer))
        and all(
            isinstance(key, torch.Tensor)
            and type(entry) is dict
            and all(map(_simple, entry.values()))
            for key, entry in optimizer.state.items()
        )
    )


def _hyperparameters(optimizer: torch.optim.Optimizer) -> Iterator[object]:
    for group in optimizer.param_groups:
        yield from (value for key, value in group.items() if key not in GROUP_CONSTANTS)


def _simple(value: object) -> bool:
    return _plain(value) if isinstance(value, torch.Tensor) else isinstance(value, _SCALARS)


def _plain(tensor: torch.Tensor | None) -> bool:
    return tensor is None or not is_wrapper(tensor)


class Structure:
    """The modules and optimizers of `states` that are plain, as they are now.

    Attributes:
        owners: their names.
        forms: what their tensors make of their memory; looked at last.
    """

    def __init__(self, states: Mapping[str, object]) -> None:
        modules = {
            n: s for n, s in states.items() if isinstance(s, torch.nn.Module) and plain_module(s)
        }
        every = [s for s in states.values() if isinstance(s, torch.optim.Optimizer)]
        optimizers = {
            n: s
            for n, s in states.items()
            if isinstance(s, torch.optim.Optimizer) and plain_optimizer(s)
        }
        self.owners = frozenset({*modules, *optimizers})
        submodules = [m for module in modules.values() for m in module.modules()]
        self._tables: list[dict[str, Any]] = [
            table for m in submodules for table in (m._parameters, m._buffers, m._modules)
        ]
        self._hooks: list[dict[int, Any]] = [
            h for m in submodules for h in (m._state_dict_hooks, m._state_dict_pre_hooks)
        ]
        self._hooks_before = self._hooked()
        self._silent = [m._non_persistent_buffers_set for m in submodules]
        self._silent_before = [set(names) for names in self._silent]
        self._optimizers = [*optimizers.values()]
        self._every_optimizer = every
        self._groups = self._group_kinds()
        self._keys, self._values = self._members()
        live = [v for v in self._values if isinstance(v, torch.Tensor)]
        self._spread = [(t, t._local_tensor, t._spec) for t in live if isinstance(t, DTensor)]
        self.forms = Forms(map(local_piece, live), live)

    def holds(self) -> bool:
        """Whether all of it is as it was, but for the bytes."""
        if self._hooked() != self._hooks_before or self._silent != self._silent_before:
            return False
        keys, values = self._members()
        return (
            self._group_kinds() == self._groups
            and _same(keys, self._keys)
            and _same(values, self._values)
            and all(t._local_tensor is p and t._spec is spec for t, p, spec in self._spread)
            and not any(
                isinstance(v, torch.Tensor) for o in self._optimizers for v in _hyperparameters(o)
            )
            and self.forms.hold()
        )

    def _hooked(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, self._hooks))]

    def _group_kinds(self) -> list[tuple[int, bool]]:
        """Of each group: how many parameters, and whether its step may be in a CUDA graph."""
        groups = [group for o in self._every_optimizer for group in o.param_groups]
        return [(len(group["params"]), bool(group.get("capturable"))) for group in groups]

    def _members(self) -> tuple[list[object], list[object]]:
        """Names and objects: of modules, of optimizer state, and the parameters in their order."""
        states = [o.state for o in self._optimizers]
        entries = [*chain.from_iterable(state.values() for state in states)]
        keys: Iterable[object] = chain(
            chain.from_iterable(self._tables), *states, chain.from_iterable(entries)
        )
        groups = [group for o in self._every_optimizer for group in o.param_groups]
        values = chain(
            chain.from_iterable(map(dict.values, self._tables)),
            chain.from_iterable(map(dict.values, entries)),
            chain.from_iterable(group["params"] for group in groups),
            (group.get("param_names") for group in groups),
        )
        return [*keys], [*values]


def _same(now: Sequence[object], before: Sequence[object]) -> bool:
    """Whether both hold the same objects, or equal strings and small numbers."""
    if len(now) != len(before):
        return False
    return all(map(is_, now, before)) or all(map(_alike, now, before))


def _alike(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()  # 0.0 is not -0.0
    return isinstance(a, _SCALARS) and type(a) is type(b) and a == b
