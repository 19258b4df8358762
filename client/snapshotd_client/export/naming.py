"""State trees with the names that torch.distributed.checkpoint.state_dict gives.

Modules: names without wrappers. Optimizers: the names of their parameters where torch's own
state_dict has numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.owners import MODULE, OPTIMIZER

#: The entry that a leaf of a tree stands for; None where it is none.
Entry = Callable[[object], segment_pb2.TensorEntry | None]


def plainly_named(
    trees: Mapping[str, object], manifest: segment_pb2.Manifest, entry: Entry
) -> dict[str, object]:
    """The trees of a shard with plain names; what is neither module nor optimizer as it is."""
    made = dict(trees)
    for owner, kind in manifest.names.items():
        tree = made.get(owner)
        if kind == MODULE and isinstance(tree, dict):
            made[owner] = _module(owner, tree, entry)
    for shape in manifest.optimizers:
        tree = made.get(shape.name)
        if manifest.names.get(shape.name) == OPTIMIZER and isinstance(tree, dict):
            made[shape.name] = _optimizer(tree, _parameters(shape, manifest))
    return made


def _module(owner: str, tree: Mapping[str, object], entry: Entry) -> Mapping[str, object]:
    names: dict[str, str] = {}
    #: Extra state has no entry; what it is part of is called as the tensors beside it tell.
    parents: dict[str, str] = {}
    for key, value in tree.items():
        known = entry(value)
        if known is not None and known.name == f"{owner}.{key}":
            names[key] = known.fqn.removeprefix(f"{owner}.")
            parents[key.rpartition(".")[0]] = names[key].rpartition(".")[0]
    for key in tree:
        parent, _, last = key.rpartition(".")
        plain = parents.get(parent, parent)
        names.setdefault(key, f"{plain}.{last}" if plain else last)
    return {names[key]: value for key, value in tree.items()} if _unique(names) else tree


def _unique(names: Mapping[str, str]) -> bool:
    return len({*names.values()}) == len(names)


def _parameters(shape: segment_pb2.OptimizerShape, manifest: segment_pb2.Manifest) -> list[str]:
    """Names of an optimizer's parameters, in its order; without the module's if it is one."""
    names = [label.rpartition(": ")[0] for group in shape.groups for label in group.parameters]
    for owner, kind in manifest.names.items():
        if kind == MODULE and all(name.startswith(f"{owner}.") for name in names):
            names = [name.removeprefix(f"{owner}.") for name in names]
            break
    return [str(i) if name == "a parameter" else name for i, name in enumerate(names)]


def _optimizer(tree: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    groups, state = tree.get("param_groups"), tree.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        return tree
    numbers = [number for group in groups for number in group.get("params", ())]
    if numbers != [*range(len(names))] or len({*names}) != len(names):
        return tree  # a state_dict of its own
    return {
        **tree,
        "state": {names[k] if type(k) is int else k: value for k, value in state.items()},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in groups],
    }
