"""Which ranks hold the same bytes: from DTensors, from DistributedDataParallel, or as told.

Nothing is taken for the same by guess: a plain tensor of a module that nobody wraps may be
another on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from snapshotd_client.errors import WrongUse
from snapshotd_client.leaves import Leaf
from snapshotd_client.owners import MODULE, OPTIMIZER, TENSOR, kind_of

#: A process group or the ranks of it; or one of these for each of some names of states.
ReplicaGroup: TypeAlias = dist.ProcessGroup | Sequence[int]
ReplicasOption: TypeAlias = ReplicaGroup | Mapping[str, ReplicaGroup] | None

_KINDS: Final = frozenset({MODULE, OPTIMIZER, TENSOR})


class Held(NamedTuple):
    """Who holds a tensor.

    Attributes:
        ranks: all of them, ascending, this one among them.
        same: they have the same bytes, so each need store a part only. Otherwise they are copies
            of one tensor that went apart, such as running statistics.
    """

    ranks: tuple[int, ...]
    same: bool


class Replicas:
    """Finds who else holds a tensor of `states`.

    Args:
        states: as given to Snapshotter.
        told: as in Snapshotter.
        rank: this rank of the job.
        world: ranks of the job.
        undivided: whether all is to be stored whole, though others hold it, too.

    Raises:
        WrongUse: `told` names a state that is not there, or ranks that cannot be.
    """

    def __init__(
        self,
        states: Mapping[str, object],
        told: ReplicasOption = None,
        rank: int = 0,
        world: int = 1,
        *,
        undivided: bool = False,
    ) -> None:
        self.undivided = undivided
        self._kinds = {name: kind_of(name, state) for name, state in states.items()}
        self._told = _told(states, told, rank, world)
        # The ranks of torch's groups are those of the job only if both count alike.
        self._groups_known = (
            dist.is_available()
            and dist.is_initialized()
            and (dist.get_rank(), dist.get_world_size()) == (rank, world)
        )
        self._by_storage: dict[int, Held] = {}
        self._by_layout: dict[object, tuple[DeviceMesh, Held | None]] = {}
        self._by_number: dict[str, list[Held | None]] = {}
        if self._groups_known:
            for state in states.values():
                if isinstance(state, torch.nn.Module):
                    self._look_for_ddp(state)
                    self._look_for_fsdp(state)
            for name, state in states.items():
                if isinstance(state, torch.optim.Optimizer) and _is_torchs(state):
                    parameters = [p for group in state.param_groups for p in group["params"]]
                    self._by_number[name] = [self._of_parameter(p) for p in parameters]

    def of(self, leaf: Leaf) -> Held | None:
        """Who holds the bytes of a leaf; None where that is this rank alone, or not known."""
        held = self._of(leaf)
        return held._replace(same=False) if held is not None and self.undivided else held

    def _of(self, leaf: Leaf) -> Held | None:
        if leaf.hidden or self._kinds.get(leaf.owner) not in _KINDS:
            return None
        if leaf.owner in self._told and not isinstance(leaf.tensor, DTensor):
            return Held(self._told[leaf.owner], same=True)
        if not self._groups_known:
            return None
        if isinstance(leaf.tensor, DTensor):
            held = self._of_dtensor(leaf.tensor)
            if held is not None:
                return held
        if self._kinds[leaf.owner] == OPTIMIZER:
            return self._of_optimizer_state(leaf)
        return self._by_storage.get(_storage(leaf.tensor))

    def holders_of_state(self, owner: str, parameter: torch.Tensor) -> int:
        """How many ranks will divide the state that optimizer `owner` makes of a parameter."""
        if owner in self._told and not isinstance(parameter, DTensor):
            return len(self._told[owner])
        if not self._groups_known or owner not in self._by_number:
            return 1
        held = self._of_dtensor(parameter) if isinstance(parameter, DTensor) else None
        held = held or self._by_storage.get(_storage(parameter))
        return len(held.ranks) if held is not None and held.same else 1

    def _of_dtensor(self, tensor: DTensor) -> Held | None:
        mesh, placements = tensor.device_mesh, tuple(tensor.placements)
        key = (id(mesh), placements)
        if key not in self._by_layout:
            # Asking a mesh takes long, and there are as many tensors as there are few layouts.
            self._by_layout[key] = mesh, _of_layout(mesh, placements)
        return self._by_layout[key][1]

    def _look_for_ddp(self, root: torch.nn.Module) -> None:
        for wrapper in root.modules():
            if not isinstance(wrapper, torch.nn.parallel.DistributedDataParallel):
                continue
            ranks = tuple(sorted(dist.get_process_group_ranks(wrapper.process_group)))
            if len(ranks) < 2:
                continue
            apart = set(wrapper.parameters_to_ignore)
            for name, parameter in wrapper.module.named_parameters():
                if name not in apart:
                    self._by_storage[_storage(parameter)] = Held(ranks, same=True)
            for name, buffer in wrapper.module.named_buffers():
                if name not in apart:
                    # Each rank's own batches have gone into it since it was made the same.
                    self._by_storage.setdefault(_storage(buffer), Held(ranks, same=False))

    def _look_for_fsdp(self, root: torch.nn.Module) -> None:
        """What FSDP leaves whole is there on each rank of its mesh, and nothing keeps it alike."""
        for wrapper in root.modules():
            if not isinstance(wrapper, FSDPModule):
                continue
            meshes = {p.device_mesh for p in wrapper.parameters() if isinstance(p, DTensor)}
            if not meshes:
                continue
            ranks = _all_of(max(meshes, key=lambda mesh: mesh.size()))
            for tensor in [*wrapper.parameters(), *wrapper.buffers()]:
                if not isinstance(tensor, DTensor) and len(ranks) > 1:
                    self._by_storage.setdefault(_storage(tensor), Held(ranks, same=False))

    def _of_parameter(self, parameter: torch.Tensor) -> Held | None:
        if isinstance(parameter, DTensor):
            # Plain state of it, such as a count of steps, every rank of the mesh has.
            mesh = parameter.device_mesh
            if id(mesh) not in self._by_layout:
                ranks = _all_of(mesh)
                held = Held(ranks, same=False) if len(ranks) > 1 else None
                self._by_layout[id(mesh)] = mesh, held
            return self._by_layout[id(mesh)][1]
        return self._by_storage.get(_storage(parameter))

    def _of_optimizer_state(self, leaf: Leaf) -> Held | None:
        head, _, _ = leaf.name.removeprefix(f"{leaf.owner}.state.").partition(".")
        known = self._by_number.get(leaf.owner, [])
        if not head.isdigit() or int(head) >= len(known):
            return None
        held = known[int(head)]
        if isinstance(leaf.tensor, DTensor) and held is not None and not held.same:
            return None  # its placements have told all
        return held


def _told(
    states: Mapping[str, object], told: ReplicasOption, rank: int, world: int
) -> dict[str, tuple[int, ...]]:
    if told is None:
        return {}
    by_name = told if isinstance(told, Mapping) else dict.fromkeys(states, told)
    unknown = sorted(set(by_name) - set(states))
    if unknown:
        raise WrongUse(
            f"replicas names {', '.join(unknown)}", f"The states are {', '.join(states)}"
        )
    found = {name: _ranks(group) for name, group in by_name.items() if group is not None}
    for name, ranks in found.items():
        if rank not in ranks or not 0 <= ranks[0] <= ranks[-1] < world:
            raise WrongUse(
                f"replicas of {name} are ranks {list(ranks)}, this is rank {rank} of {world}",
                "Give the process group, or all ranks, that hold the same as this one",
            )
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def _ranks(group: object) -> tuple[int, ...]:
    if isinstance(group, Sequence) and group and all(type(r) is int for r in group):
        return tuple(sorted(set(group)))
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return tuple(sorted(dist.get_process_group_ranks(group)))
    raise WrongUse(f"replicas is {group!r}", "Give a process group, or a list of ranks")


def _of_layout(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Held | None:
    """The ranks at the same place of the mesh but for the dimensions that are replicated over."""
    coordinate = mesh.get_coordinate()
    if coordinate is None or any(isinstance(p, Partial) for p in placements):
        return None
    index = tuple(
        slice(None) if isinstance(p, Replicate) else at
        for p, at in zip(placements, coordinate, strict=True)
    )
    ranks = tuple(sorted(mesh.mesh[index].flatten().tolist()))
    return Held(ranks, same=True) if len(ranks) > 1 else None


def _all_of(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Others may divide their state among the ranks, as ZeroRedundancyOptimizer does."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _storage(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage()._cdata)
