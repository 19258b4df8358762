"""The objects whose state is captured: of which kind each is, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.errors import UnsupportedState
from snapshotd_client.leaves import label
from snapshotd_client.names import Names

MODULE: Final = "module"
OPTIMIZER: Final = "optimizer"
TENSOR: Final = "tensor"
STATEFUL: Final = "stateful"


def kind_of(name: str, state: object) -> str:
    """Which kind of state `state` is.

    Raises:
        UnsupportedState: none that can be captured.
    """
    if isinstance(state, torch.Tensor):
        return TENSOR
    if isinstance(state, torch.nn.Module):
        return MODULE
    if isinstance(state, torch.optim.Optimizer):
        return OPTIMIZER
    if all(callable(getattr(state, method, None)) for method in ("state_dict", "load_state_dict")):
        return STATEFUL
    raise UnsupportedState(
        f"the state {name!r} is a {type(state).__module__}.{type(state).__qualname__}",
        "Give an nn.Module, an Optimizer, a tensor, or an object with state_dict and "
        "load_state_dict.",
    )


def check_states(states: Mapping[str, object]) -> None:
    """Raise UnsupportedState where a name or an object of `states` cannot be captured."""
    for name, state in states.items():
        if not isinstance(name, str) or not name or name.startswith("<"):
            raise UnsupportedState(
                f"{name!r} is no name of a state", "Use a string that does not start with '<'."
            )
        kind_of(name, state)


def collect(state: object) -> object:
    """The state tree of one object; its tensors are the live ones, by reference."""
    return state if isinstance(state, torch.Tensor) else state.state_dict()  # type: ignore[attr-defined]  # kind_of


def cuda_devices(states: Mapping[str, object]) -> set[int]:
    """Indices of the CUDA devices that modules and bare tensors of `states` live on."""
    found: set[int] = set()
    for state in states.values():
        tensors = state.parameters() if isinstance(state, torch.nn.Module) else [state]
        devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
        found |= {d.index for d in devices if d.type == "cuda"}
    return found


def optimizer_shapes(states: Mapping[str, object]) -> list[segment_pb2.OptimizerShape]:
    names = Names(states).parameters
    return [
        segment_pb2.OptimizerShape(
            name=owner,
            type=type(state).__name__,
            groups=[
                segment_pb2.ParameterGroup(
                    parameters=[_parameter_label(names, p) for p in group["params"]]
                )
                for group in state.param_groups
            ],
        )
        for owner, state in states.items()
        if isinstance(state, torch.optim.Optimizer)
    ]


def _parameter_label(names: Mapping[int, str], parameter: torch.Tensor) -> str:
    # A parameter of no captured module has no name; its shape must still fit.
    name = names.get(id(parameter), "a parameter")
    return f"{name}: {label(str(parameter.dtype).removeprefix('torch.'), parameter.shape)}"
