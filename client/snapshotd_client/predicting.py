"""How large the first snapshot will be, before optimizers have made their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from snapshotd_client.capture import plan
from snapshotd_client.layout import aligned
from snapshotd_client.leaves import local_piece
from snapshotd_client.replicas import Replicas, ReplicasOption


def predict_image_bytes(
    states: Mapping[str, object], replicas: ReplicasOption = None, rank: int = 0, world: int = 1
) -> int:
    """What a snapshot of `states` will need, in bytes, as far as it is known now.

    Optimizers that have not stepped yet hold no state; theirs is estimated from the local
    parameters: two tensors of the parameter's size for each of the Adam family and for
    optimizers not known here, one for SGD with momentum, none for SGD without. Keyword values
    are not known and not counted.
    """
    known = plan("", rank, world, 0, states, {}, replicas).image_bytes
    optimizers = {n: s for n, s in states.items() if isinstance(s, torch.optim.Optimizer)}
    found = Replicas(states, replicas, rank, world)
    return known + sum(_missing_state_bytes(found, *item) for item in optimizers.items())


#: Manifest entry, pickle mark, alignment and scalar step counters of a tensor of state.
_OVERHEAD_BYTES: Final = 1024
#: What a parameter's state takes in the skeleton, also without tensors.
_PICKLED_BYTES: Final = 64


def _missing_state_bytes(replicas: Replicas, name: str, optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for group in optimizer.param_groups:
        copies = _state_copies(optimizer, group)
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                piece = local_piece(parameter)
                holders = replicas.holders_of_state(name, parameter)
                stored = -(-piece.numel() * piece.itemsize // holders)
                total += copies * (aligned(stored) + _OVERHEAD_BYTES) + _PICKLED_BYTES
    return total


def _state_copies(optimizer: torch.optim.Optimizer, group: Mapping[str, object]) -> int:
    match type(optimizer).__name__:
        case "SGD":
            return 1 if group.get("momentum") else 0
        case "RMSprop":
            return 1 + bool(group.get("momentum")) + bool(group.get("centered"))
        case _:
            return 3 if group.get("amsgrad") else 2
