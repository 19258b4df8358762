"""Plans this rank's image from what ranks in another layout saved.

Tensors that are a piece of something go by their plain names and boxes. What is per rank (keyword
values, hyperparameters, objects with a state_dict of their own) is that of the rank `near`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.adopted import adopt_kinds, is_imported
from snapshotd_client.differences import in_place, tie_differences
from snapshotd_client.errors import StateMismatch
from snapshotd_client.identity import Identity
from snapshotd_client.leaves import label
from snapshotd_client.names import unwrapped
from snapshotd_client.newimage import ImageMaker, NewImage
from snapshotd_client.owners import kind_of
from snapshotd_client.ranges import Ranges, skeleton_ranges
from snapshotd_client.standins import OF_THE_RANK, Manifests, StandIns, Unplaceable, mapped
from snapshotd_client.surveying import Survey

_Optimizer = torch.optim.Optimizer


class Relayout:
    """One rank's way into another layout.

    Args:
        manifests: of all shards that were saved.
        states: as given to Snapshotter.
        who: this trainer.
        live: what `survey` says of `states` as they are now.

    Attributes:
        near: the shard whose per-rank state this rank takes over.
        problems: what does not fit, in sentences.
    """

    def __init__(
        self, manifests: Manifests, states: Mapping[str, object], who: Identity, live: Survey
    ) -> None:
        other = {m.format for m in manifests.values()} - {MANIFEST_FORMAT}
        if other:
            raise StateMismatch(
                [f"manifest format: snapshot {min(other)}, this client reads {MANIFEST_FORMAT}"]
            )
        self._manifests = manifests
        self._states = states
        self.near = who.rank % len(manifests)
        self._live = live.manifest
        for manifest in manifests.values():
            if is_imported(manifest):
                adopt_kinds(manifest, live.manifest)
        self._live_tensors = {
            (leaf.owner, leaf.name): leaf.tensor for leaf in live.leaves.leaves if not leaf.hidden
        }
        self._maker = ImageMaker(
            segment_pb2.Manifest(
                format=MANIFEST_FORMAT,
                job=who.job,
                world=who.world_size,
                shard=who.rank,
                step=manifests[self.near].step,
                names=dict(self._live.names),
                optimizers=self._live.optimizers,
            )
        )
        self._shapes = {
            shard: {shape.name: shape for shape in m.optimizers} for shard, m in manifests.items()
        }
        self._homes = {name: self._home(name) for name in states}
        self._stand_ins = StandIns(manifests, states, self._maker, self.near)
        self.problems = self._stand_ins.problems
        self._left: set[str] = set()  # plain names of tensors that are left as they are

    # -- what must be read before it can be planned

    def skeletons(self) -> tuple[Ranges, dict[int, tuple[int, int]], int]:
        """What to read of shards beside tensors: as `skeleton_ranges`."""
        wanted = {self.near, *(home for home in self._homes.values() if home is not None)}
        for name, state in self._states.items():
            if isinstance(state, _Optimizer) and self._homes[name] is not None:
                wanted.update(home for home, _ in self._parameter_homes(name).values())
        return skeleton_ranges(self._manifests, wanted)

    def plan(self, skeletons: Mapping[int, bytes]) -> NewImage:
        """The image; `problems` are complete after this.

        Args:
            skeletons: as `skeletons` asked for.
        """
        saved = {shard: self._stand_ins.load(shard, text) for shard, text in skeletons.items()}
        self._compare_names()
        with torch.no_grad():
            index = self._take_in_place()
            trees: dict[str, object] = {}
            for name, state in self._states.items():
                home = self._homes[name]
                if isinstance(state, torch.Tensor):
                    trees[name] = self._stand_ins.stand_in(state, index[name, name])
                elif home is None:
                    trees[name] = self._stand_ins.keep_live(name, state)
                elif isinstance(state, torch.nn.Module):
                    trees[name] = self._module_tree(name, state, saved[home][name], index)
                elif isinstance(state, _Optimizer):
                    trees[name] = self._optimizer_tree(name, state, saved)
                else:
                    trees[name] = saved[home][name]
            for name in OF_THE_RANK:
                trees[name] = saved[self.near][name]
            skeleton = tree.dump_marked(trees, self._stand_ins.mark)
        return self._maker.make(self._stand_ins.catalog, skeleton)

    # -- names

    def _home(self, name: str) -> int | None:
        """The shard whose tree of a state is taken: the near one, if it has it."""
        kind = kind_of(name, self._states[name])
        having = [s for s, m in sorted(self._manifests.items()) if m.names.get(name) == kind]
        return self.near if self.near in having else next(iter(having), None)

    def _compare_names(self) -> None:
        saved = {n: k for m in reversed(self._manifests.values()) for n, k in m.names.items()}  # type: ignore[call-overload]  # a dict
        for name in sorted({*saved, *self._live.names}):
            if name not in self._live.names:
                self.problems.append(f"{name}: only in the snapshot ({saved[name]})")
            elif name not in saved:
                self.problems.append(f"{name}: only in this run ({self._live.names[name]})")
            elif saved[name] != self._live.names[name]:
                kinds = f"snapshot {saved[name]}, this run {self._live.names[name]}"
                self.problems.append(f"{name}: {kinds}")
        here = {entry.fqn for entry in in_place(self._live).values()}
        kept = {n for n, home in self._homes.items() if home is not None}
        for key, entry in in_place(self._manifests[self.near]).items():
            if (
                key[0] in kept
                and entry.fqn not in here
                and self._stand_ins.catalog.everywhere(entry.fqn)
            ):
                form = label(entry.dtype, entry.global_shape)
                self.problems.append(f"{entry.fqn}: only in the snapshot ({form})")
        self.problems += tie_differences(self._manifests[self.near], self._live)

    # -- modules and bare tensors

    def _take_in_place(self) -> dict[tuple[str, str], int]:
        """Entries of all tensors that are there already, as they are; their indices."""
        extents: dict[int, int] = {}
        index: dict[tuple[str, str], int] = {}
        for key, live in in_place(self._live).items():
            entry = segment_pb2.TensorEntry()
            entry.CopyFrom(live)
            if all(entry.shape):
                if entry.extent not in extents:
                    nbytes = self._live.extents[entry.extent].bytes
                    extents[entry.extent] = self._maker.add_extent(nbytes)
                entry.extent = extents[entry.extent]
            index[key] = len(self._maker.manifest.tensors)
            entry = self._maker.add(entry)
            if self._homes[entry.owner] is None or not self._stand_ins.read(entry):
                self._left.add(entry.fqn)
                self._maker.from_live(entry, self._live_tensors[key])
        return index

    def _module_tree(
        self,
        name: str,
        module: torch.nn.Module,
        saved: object,
        index: Mapping[tuple[str, str], int],
    ) -> object:
        """The live tree with tensors of the new image, and the rest of what was saved."""
        made = module.state_dict()
        old = {unwrapped(key): value for key, value in cast("dict[str, object]", saved).items()}
        for key, value in made.items():
            where = index.get((name, f"{name}.{key}"))
            if where is not None:
                made[key] = self._stand_ins.stand_in(value, where)
            elif unwrapped(key) in old:
                made[key] = old[unwrapped(key)]
            else:
                self.problems.append(f"{name}.{key}: only in this run")
        return made

    # -- optimizers

    def _parameter_homes(self, name: str) -> dict[str, tuple[int, int]]:
        """For each parameter that was saved: whose tree has its state, and its number there."""
        homes: dict[str, tuple[int, int]] = {}
        others = sorted(self._manifests)
        for shard in [self.near, *others]:
            shape = self._shapes[shard].get(name)
            for number, (_, parameter) in enumerate(_parameters(shape)):
                homes.setdefault(parameter, (shard, number))
        return homes

    def _optimizer_tree(
        self, name: str, optimizer: _Optimizer, saved: Mapping[int, Mapping[str, object]]
    ) -> object:
        home = cast("int", self._homes[name])
        live, old = self._shape_of(name), self._shapes[home][name]
        why = ""
        if type(optimizer).state_dict is not _Optimizer.state_dict:
            why = "its class has a state_dict of its own, which cannot be laid out anew"
        elif live.type != old.type:
            why = f"snapshot {old.type}, this run {live.type}"
        elif len(live.groups) != len(old.groups):
            why = f"parameter groups: snapshot {len(old.groups)}, this run {len(live.groups)}"
        if why:
            self.problems.append(f"{name}: {why}")
            return self._stand_ins.keep_live(name, optimizer)
        self._compare_groups(name)
        homes = self._parameter_homes(name)
        home_tree = cast("dict[str, Any]", saved[home][name])
        made = optimizer.state_dict()
        groups = [
            {**{k: v for k, v in was.items() if k not in ("params", "param_names")},
             **{k: v for k, v in now.items() if k in ("params", "param_names")}}
            for was, now in zip(home_tree["param_groups"], made["param_groups"], strict=True)
        ]  # fmt: skip
        state = {key: value for key, value in home_tree["state"].items() if type(key) is not int}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, ((_, fqn), parameter) in enumerate(
            zip(_parameters(live), parameters, strict=True)
        ):
            shard, there = homes.get(fqn, (home, -1))
            node = cast("dict[str, Any]", saved[shard][name])["state"].get(there)
            if node is not None and fqn in self._left:
                self.problems.append(f"{name}: state of {fqn}: its parameter does not fit")
            elif node is not None:
                try:
                    state[number] = self._moved(name, f"{name}.state.{number}", node, parameter)
                except Unplaceable:
                    continue
        return {"state": state, "param_groups": groups}

    def _shape_of(self, name: str) -> segment_pb2.OptimizerShape:
        return next(shape for shape in self._live.optimizers if shape.name == name)

    def _compare_groups(self, name: str) -> None:
        was = {
            parameter: group
            for shapes in self._shapes.values()
            for group, parameter in _parameters(shapes.get(name))
        }
        for group, parameter in _parameters(self._shape_of(name)):
            if parameter not in was:
                self.problems.append(f"{name}: {parameter}: only in this run")
            elif was[parameter] != group:
                self.problems.append(
                    f"{name}: {parameter}: snapshot parameter group {was[parameter]}, "
                    f"this run {group}"
                )

    def _moved(self, owner: str, name: str, node: object, parameter: torch.Tensor) -> object:
        """A tree of optimizer state with its tensors laid out like the parameter."""

        def move(inner: str, tensor: torch.Tensor) -> object:
            return self._like_parameter(owner, inner, tensor, parameter)

        return mapped(name, node, move)

    def _like_parameter(
        self, owner: str, name: str, saved: torch.Tensor, parameter: torch.Tensor
    ) -> torch.Tensor:
        origin = self._stand_ins.origin(saved)
        if origin is None:
            return saved
        old, mark = origin
        shape = tuple(old.global_shape)
        like = self._live_tensors.get((owner, name))
        if like is None or tuple(like.shape) != shape:
            like = parameter if tuple(parameter.shape) == shape and shape else None
        if like is None and isinstance(parameter, DTensor) and old.HasField("dtensor"):
            self.problems.append(
                f"{old.fqn}: DTensor {label(old.dtype, shape)}, and nothing tells how this run "
                "spreads it: its parameter has another shape"
            )
            raise Unplaceable
        return self._stand_ins.place(owner, name, old, mark, like)


def _parameters(shape: segment_pb2.OptimizerShape | None) -> Iterator[tuple[int, str]]:
    """Number of the group and plain name of each parameter, in the optimizer's order."""
    labels = [(g, text) for g, group in enumerate(shape.groups if shape else ())
              for text in group.parameters]  # fmt: skip
    for number, (group_number, text) in enumerate(labels):
        name = text.partition(": ")[0]
        yield group_number, str(number) if name == "a parameter" else name
