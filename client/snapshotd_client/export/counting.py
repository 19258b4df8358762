"""Optimizer state of a checkpoint, by the numbers that `Optimizer.state_dict()` gives parameters.

A checkpoint has it by numbers, as text, or by the names of the parameters, as
torch.distributed.checkpoint.state_dict gives them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.adopted import UNNAMED
from snapshotd_client.leaves import label

_Tree = Mapping[str, Any]


def is_optimizer(value: object) -> bool:
    """Whether that is what the state_dict() of an optimizer gives."""
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def unlisted(tree: _Tree) -> list[str]:
    """Parameters with state, which are in no group."""
    known = {*_numbers(tree)}
    return [str(key) for key in tree.get("state", {}) if str(key) not in known]


def counted(tree: _Tree) -> _Tree:
    """The same by numbers: parameters count in the order of the groups."""
    numbers = _numbers(tree)
    state = {numbers[str(key)]: value for key, value in tree.get("state", {}).items()}
    groups = [
        {**group, "params": [numbers[str(key)] for key in group["params"]]}
        for group in tree["param_groups"]
    ]
    return {**tree, "state": state, "param_groups": groups}


def _numbers(tree: _Tree) -> dict[str, int]:
    keys = [key for group in tree["param_groups"] for key in group["params"]]
    return {str(key): number for number, key in enumerate(keys)}


def shape_of(name: str, tree: _Tree, trees: _Tree) -> segment_pb2.OptimizerShape:
    """What is known of the parameters of an optimizer, whose class is not."""
    return segment_pb2.OptimizerShape(
        name=name,
        groups=[
            segment_pb2.ParameterGroup(parameters=[_label(key, trees) for key in group["params"]])
            for group in tree["param_groups"]
        ],
    )


def _label(key: object, trees: _Tree) -> str:
    """As `owners.optimizer_shapes` has it, if exactly one module has a parameter of that name."""
    if str(key).isdigit():
        return UNNAMED
    found = [
        f"{owner}.{key}: {label(str(value[key].dtype).removeprefix('torch.'), value[key].shape)}"
        for owner, value in trees.items()
        if isinstance(value, Mapping) and isinstance(value.get(key), torch.Tensor)
    ]
    return found[0] if len(found) == 1 else str(key)
