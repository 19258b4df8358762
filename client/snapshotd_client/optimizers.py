"""Gives an optimizer back exactly the state it had.

torch's `Optimizer.load_state_dict` casts state to the dtype of its parameter, which rounds fp32
moments of bf16 parameters; so what it loaded is replaced by what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import cast

import torch

from snapshotd_client.leaves import local_piece, walk
from snapshotd_client.placing import Placing

#: Gives the tensor to live on for a name, a tensor of the saved tree and a wanted device.
MakeOwn = Callable[[torch.Tensor, torch.device | None], torch.Tensor]


def restore_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, object],
    own: MakeOwn,
    shared: frozenset[int],
    placing: Placing,
    *,
    compare: bool,
) -> None:
    """Load `saved` into `optimizer`, into tensors it already has where they fit.

    Args:
        name: the optimizer's name, which opens the names of its tensors.
        optimizer: has as many groups and parameters as the snapshot's (checked before).
        saved: its state dict, with tensors that view the image.
        own: gives a tensor of the saved tree in memory of its own.
        shared: ids of saved tensors that share memory with others, so must be made together.
        placing: what it was given is done before `optimizer` loads.
        compare: as in `Placing.run`.
    """
    resolver = _Resolver(name, optimizer, own, shared, placing)
    resolved = cast("dict[str, object]", resolver.resolve(name, saved, None))
    placing.run(compare=compare)
    optimizer.load_state_dict(resolved)
    if _is_customised(optimizer):
        # Its own hooks decide what the saved form means; the comparison afterwards judges them.
        return
    _set_state(optimizer, resolved)


def runs_code(optimizer: torch.optim.Optimizer) -> bool:
    """Whether loading its state runs other code than torch's own."""
    unpickled = getattr(type(optimizer).__setstate__, "__module__", "")
    return (
        _is_customised(optimizer)
        or bool(optimizer._optimizer_load_state_dict_post_hooks)
        or not unpickled.startswith("torch.optim.")
    )


def _is_customised(optimizer: torch.optim.Optimizer) -> bool:
    base, cls = torch.optim.Optimizer, type(optimizer)
    return (
        cls.load_state_dict is not base.load_state_dict
        or cls.state_dict is not base.state_dict
        or bool(optimizer._optimizer_load_state_dict_pre_hooks)
        or bool(optimizer._optimizer_state_dict_post_hooks)
    )


def _set_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, object]) -> None:
    groups = cast("list[dict[str, object]]", saved["param_groups"])
    parameters = dict(
        zip(
            chain.from_iterable(cast("Iterable[object]", g["params"]) for g in groups),
            chain.from_iterable(g["params"] for g in optimizer.param_groups),
            strict=True,
        )
    )
    optimizer.state.clear()
    for key, value in cast("dict[object, object]", saved["state"]).items():
        optimizer.state[parameters.get(key, key)] = value
    for live, group in zip(optimizer.param_groups, groups, strict=True):
        live.update({key: value for key, value in group.items() if key != "params"})


class _Resolver:
    """Replaces the image's tensors in a saved tree by tensors to live on."""

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        own: MakeOwn,
        shared: frozenset[int],
        placing: Placing,
    ) -> None:
        self._live = {n: t for n, t, hidden in walk(optimizer.state_dict(), name) if not hidden}
        self._devices = dict(_state_devices(name, optimizer))
        self._own = own
        self._shared = shared
        self._placing = placing
        #: By id of the saved node, which is kept so that its id stays its own.
        self._done: dict[int, tuple[object, object]] = {}

    def resolve(self, name: str, node: object, device: torch.device | None) -> object:
        if id(node) in self._done:
            return self._done[id(node)][1]
        device = self._devices.get(name, device)
        if isinstance(node, torch.Tensor):
            done: object = self._resolve_tensor(name, node, device)
        elif isinstance(node, dict):
            done = node
            self._done[id(node)] = (node, node)
            for key, child in node.items():
                node[key] = self.resolve(f"{name}.{key}", child, device)
        elif isinstance(node, list):
            done = node
            self._done[id(node)] = (node, node)
            node[:] = [self.resolve(f"{name}.{i}", c, device) for i, c in enumerate(node)]
        elif isinstance(node, tuple):
            items = [self.resolve(f"{name}.{i}", child, device) for i, child in enumerate(node)]
            unchanged = all(a is b for a, b in zip(items, node, strict=True))
            # A named tuple takes its fields one by one.
            make = getattr(type(node), "_make", type(node))
            done = node if unchanged else make(items)
        else:
            return node
        self._done[id(node)] = (node, done)
        return done

    def _resolve_tensor(
        self, name: str, saved: torch.Tensor, device: torch.device | None
    ) -> torch.Tensor:
        live = self._live.get(name)
        owned_type = type(live) is type(saved)
        if live is not None and owned_type and id(saved) not in self._shared and _fits(live, saved):
            self._placing.give(live, saved)
            return live
        return self._own(saved, device)


def _fits(live: torch.Tensor, saved: torch.Tensor) -> bool:
    a, b = local_piece(live), local_piece(saved)
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and not (
        a.is_conj() or a.is_neg() or b.is_conj() or b.is_neg() or live.requires_grad
    )


def _state_devices(
    name: str, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.device]]:
    packed = optimizer.state_dict()["param_groups"]
    for ids, group in zip(packed, optimizer.param_groups, strict=True):
        for key, parameter in zip(ids["params"], group["params"], strict=True):
            yield f"{name}.state.{key}", parameter.device
