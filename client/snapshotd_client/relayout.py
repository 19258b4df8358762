"""Plans this rank's image from what ranks in another layout saved.

Tensors that are a piece of something go by their plain names and boxes. What is per rank (keyword
values, hyperparameters, objects with a state_dict of their own) is that of the rank `near`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch.distributed.tensor import DTensor

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import tree
from snapshotd_client.about import box_of
from snapshotd_client.boxes import Box, Strided, dense_strides
from snapshotd_client.capture import merge_groups, survey
from snapshotd_client.catalog import Catalog, Form
from snapshotd_client.differences import in_place, tie_differences
from snapshotd_client.errors import StateMismatch
from snapshotd_client.identity import Identity
from snapshotd_client.leaves import (
    GROUPS,
    RNG,
    VALUES,
    describe_dtensor,
    is_wrapper,
    label,
    local_piece,
    walk,
)
from snapshotd_client.names import Names, unwrapped
from snapshotd_client.newimage import ImageMaker, NewImage
from snapshotd_client.owners import STATEFUL, collect, kind_of
from snapshotd_client.ranges import Ranges, RangesMaker
from snapshotd_client.tree import TensorMark

Manifests = Mapping[int, segment_pb2.Manifest]
_Optimizer = torch.optim.Optimizer

#: Owners that every shard has.
_OF_THE_RANK: Final = (VALUES, RNG)


class _Unplaceable(Exception):  # an event within this module; what was wrong has been noted
    """A tensor of optimizer state cannot be laid out as this run needs it."""


class Relayout:
    """One rank's way into another layout.

    Args:
        manifests: of all shards that were saved.
        states: as given to Snapshotter.
        who: this trainer.

    Attributes:
        near: the shard whose per-rank state this rank takes over.
        problems: what does not fit, in sentences.
    """

    def __init__(self, manifests: Manifests, states: Mapping[str, object], who: Identity) -> None:
        other = {m.format for m in manifests.values()} - {MANIFEST_FORMAT}
        if other:
            raise StateMismatch(
                [f"manifest format: snapshot {min(other)}, this client reads {MANIFEST_FORMAT}"]
            )
        self.problems: list[str] = []
        self._manifests = manifests
        self._states = states
        self.near = who.rank % len(manifests)
        self._names = Names(states)
        live = survey(states)
        self._live = live.manifest
        self._live_tensors = {
            (leaf.owner, leaf.name): leaf.tensor for leaf in live.leaves.leaves if not leaf.hidden
        }
        self._catalog = Catalog(manifests, _itemsizes(manifests.values()))
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
        #: Meta tensors that stand in saved trees, by id: kept, with their shards and marks.
        self._saved: dict[int, tuple[torch.Tensor, int, str, TensorMark]] = {}
        #: What stands for a tensor in the trees of the new image, by id.
        self._marks: dict[int, tuple[torch.Tensor, TensorMark]] = {}

    # -- what must be read before it can be planned

    def skeletons(self) -> tuple[Ranges, dict[int, tuple[int, int]], int]:
        """What to read of shards beside tensors.

        Returns:
            the ranges; for each shard where its skeleton is in what they fill, and its length;
            and the length of it all.
        """
        wanted = {self.near, *(home for home in self._homes.values() if home is not None)}
        for name, state in self._states.items():
            if isinstance(state, _Optimizer) and self._homes[name] is not None:
                wanted.update(home for home, _ in self._parameter_homes(name).values())
        maker, places, at = RangesMaker(), {}, 0
        for shard in sorted(wanted):
            skeleton = self._manifests[shard].skeleton
            maker.add_one(shard, skeleton.image_offset, skeleton.bytes, at)
            places[shard] = (at, skeleton.bytes)
            at += skeleton.bytes
        return maker.ranges(), places, at

    def plan(self, skeletons: Mapping[int, bytes]) -> NewImage:
        """The image; `problems` are complete after this.

        Args:
            skeletons: as `skeletons` asked for.
        """
        saved = {shard: self._load(shard, text) for shard, text in skeletons.items()}
        self._compare_names()
        with torch.no_grad():
            index = self._take_in_place()
            trees: dict[str, object] = {}
            for name, state in self._states.items():
                home = self._homes[name]
                if isinstance(state, torch.Tensor):
                    trees[name] = self._stand_in(state, index[name, name])
                elif home is None:
                    trees[name] = self._keep_live(name, state)
                elif isinstance(state, torch.nn.Module):
                    trees[name] = self._module_tree(name, state, saved[home][name], index)
                elif isinstance(state, _Optimizer):
                    trees[name] = self._optimizer_tree(name, state, saved)
                else:
                    trees[name] = saved[home][name]
            for name in _OF_THE_RANK:
                trees[name] = saved[self.near][name]
            skeleton = tree.dump_marked(trees, self._mark)
        return self._maker.make(self._catalog, skeleton)

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
            if key[0] in kept and entry.fqn not in here and self._catalog.everywhere(entry.fqn):
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
            if self._homes[entry.owner] is None or not self._read(entry):
                self._maker.from_live(entry, self._live_tensors[key])
        return index

    def _read(self, entry: segment_pb2.TensorEntry) -> bool:
        """Have an entry's bytes read; notes what stands in the way, and says whether it works."""
        wanted = Form(entry.dtype, tuple(entry.global_shape))
        forms = self._catalog.forms.get(entry.fqn, set())
        text = label(*wanted)
        if entry.scattered or entry.fqn in self._catalog.scattered:
            where = "this run" if entry.scattered else "the snapshot"
            why = f"{where} spreads it so that a rank's piece is no box of the whole"
        elif not forms:
            why = f"only in this run ({text})"
        elif forms != {wanted}:
            why = f"snapshot {' and '.join(sorted(label(*f) for f in forms))}, this run {text}"
        else:
            box = Box(tuple(entry.offset), tuple(entry.shape))
            found = self._catalog.find(entry.fqn, box, self.near, tuple(entry.stride))
            if not found.lacking:
                self._note_ambiguous(entry.fqn, found.ambiguous)
                self._maker.from_boxes(entry, found)
                return True
            why = f"{found.lacking} of {box.elements} elements are in no shard"
        self.problems.append(f"{entry.fqn}: {why}")
        return False

    def _note_ambiguous(self, name: str, shards: Sequence[int]) -> None:
        world = self._maker.manifest.world
        if shards and (self.near not in shards or world != len(self._manifests)):
            self.problems.append(
                f"{name}: ranks {', '.join(map(str, shards))} saved one each, and nothing says "
                f"that they are the same (replicas=... does); rank {self.near}'s would be taken"
            )

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
                made[key] = self._stand_in(value, where)
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
            return self._keep_live(name, optimizer)
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
            if node is not None:
                try:
                    state[number] = self._moved(name, f"{name}.state.{number}", node, parameter)
                except _Unplaceable:
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
            known = self._saved.get(id(tensor))
            if known is None or known[3].hidden:
                return tensor
            return self._like_parameter(owner, inner, tensor, parameter)

        return _mapped(name, node, move)

    def _like_parameter(
        self, owner: str, name: str, saved: torch.Tensor, parameter: torch.Tensor
    ) -> torch.Tensor:
        _, shard, _, mark = self._saved[id(saved)]
        old = self._manifests[shard].tensors[mark.index]
        shape = tuple(old.global_shape)
        like = self._live_tensors.get((owner, name))
        if like is None or tuple(like.shape) != shape:
            like = parameter if tuple(parameter.shape) == shape and shape else None
        if like is None and isinstance(parameter, DTensor) and old.HasField("dtensor"):
            self.problems.append(
                f"{old.fqn}: DTensor {label(old.dtype, shape)}, and nothing tells how this run "
                "spreads it: its parameter has another shape"
            )
            raise _Unplaceable
        return self._place(owner, name, old, mark, like)

    def _place(
        self,
        owner: str,
        name: str,
        old: segment_pb2.TensorEntry,
        mark: TensorMark,
        like: torch.Tensor | None,
    ) -> torch.Tensor:
        """A tensor of the saved tree, spread like another one of this run; else the whole of it."""
        shape = tuple(old.global_shape)
        entry = segment_pb2.TensorEntry(
            name=name,
            dtype=old.dtype,
            device_type=old.device_type if like is None else like.device.type,
            requires_grad=old.requires_grad,
            owner=owner,
            fqn=old.fqn,
            global_shape=shape,
        )
        box, strides = Box((0,) * len(shape), shape), dense_strides(shape)
        if like is not None:
            piece = local_piece(like)
            placed = box_of(like)
            entry.scattered = placed is None
            box = Box(placed[1] if placed else (0,) * piece.dim(), tuple(piece.shape))
            dense = piece.is_contiguous() or not torch._debug_has_internal_overlap(piece)
            strides = piece.stride() if dense and _fills(piece) else dense_strides(box.shape)
            if isinstance(like, DTensor):
                entry.dtensor.CopyFrom(describe_dtensor(name, like))
        entry.shape.extend(box.shape)
        entry.stride.extend(strides)
        entry.offset.extend(box.offset)
        if box.elements:
            nbytes = Strided(box, strides).reach * getattr(torch, old.dtype).itemsize
            entry.extent = self._maker.add_extent(nbytes)
        index = len(self._maker.manifest.tensors)
        if not self._read(self._maker.add(entry)):
            del self._maker.manifest.tensors[index]
            raise _Unplaceable
        return self._stand_in(torch.empty(0), index, mark)

    # -- trees, and what stands in them

    def _load(self, shard: int, skeleton: bytes) -> dict[str, object]:
        manifest = self._manifests[shard]

        def stand_in(owner: str, mark: TensorMark) -> torch.Tensor:
            entry = manifest.tensors[mark.index]
            dtype = getattr(torch, entry.dtype)
            made = torch.empty(tuple(entry.shape), dtype=dtype, device="meta")
            self._saved[id(made)] = (made, shard, owner, mark)
            return made

        trees = tree.load(skeleton, stand_in)
        missing = [n for n in (*manifest.names, *_OF_THE_RANK, GROUPS) if n not in trees]
        if missing:
            raise StateMismatch([f"{n}: no tree in the snapshot of rank {shard}" for n in missing])
        merge_groups(trees)
        return trees

    def _stand_in(
        self, like: torch.Tensor, index: int, mark: TensorMark | None = None
    ) -> torch.Tensor:
        """What stands in the new trees for entry `index`."""
        made = torch.empty(0, device="meta")
        self._marks[id(made)] = (
            made,
            (
                TensorMark(
                    index, tree.tensor_class(like), like.is_conj(), like.is_neg(), hidden=False
                )
                if mark is None
                else TensorMark(index, mark.cls, mark.conj, mark.neg, mark.hidden)
            ),
        )
        return made

    def _mark(self, tensor: torch.Tensor) -> TensorMark:
        """The mark of whatever stands in the trees: of the new image, saved, or live."""
        if id(tensor) not in self._marks:
            if id(tensor) in self._saved:
                stands = self._carry_over(*self._saved[id(tensor)])
            else:
                stands = self._keep_tensor("", f"<hidden {len(self._marks)}>", tensor, hidden=True)
            self._marks[id(tensor)] = tensor, self._marks[id(stands)][1]
        return self._marks[id(tensor)][1]

    def _carry_over(
        self, _: torch.Tensor, shard: int, owner: str, mark: TensorMark
    ) -> torch.Tensor:
        """A tensor that is the rank's own: its bytes as they were saved."""
        manifest = self._manifests[shard]
        old = manifest.tensors[mark.index]
        divided = all(old.shape) and manifest.extents[old.extent].HasField("part")
        if not mark.hidden and (divided or old.HasField("dtensor")):
            like = self._stateful_tensor(owner, old.name)
            whole = tuple(old.shape) == tuple(old.global_shape)
            if like is not None or whole:
                return self._place(owner, old.name, old, mark, like)
        if divided or old.HasField("dtensor"):
            self.problems.append(
                f"{old.name}: a DTensor, and nothing in this run tells how it is spread"
            )
        entry = segment_pb2.TensorEntry()
        entry.CopyFrom(old)
        entry.ClearField("dtensor")
        entry.ClearField("copies")
        if all(old.shape):
            extent = manifest.extents[old.extent]
            entry.extent = self._maker.copy_extent(shard, old.extent, extent)
        self._maker.add(entry)
        return self._stand_in(torch.empty(0), len(self._maker.manifest.tensors) - 1, mark)

    def _stateful_tensor(self, owner: str, name: str) -> torch.Tensor | None:
        state = self._states.get(owner)
        if state is None or kind_of(owner, state) != STATEFUL:
            return None
        return next((t for n, t, _ in walk(collect(state), owner) if n == name), None)

    def _keep_live(self, name: str, state: object) -> object:
        """The tree of a state that the snapshot does not have, as it is now."""

        def keep(inner: str, tensor: torch.Tensor) -> object:
            return tensor if is_wrapper(tensor) else self._keep_tensor(name, inner, tensor)

        return _mapped(name, collect(state), keep)

    def _keep_tensor(
        self, owner: str, name: str, tensor: torch.Tensor, *, hidden: bool = False
    ) -> torch.Tensor:
        piece = local_piece(tensor)
        entry = segment_pb2.TensorEntry(
            name=name,
            dtype=str(piece.dtype).removeprefix("torch."),
            shape=piece.shape,
            stride=piece.stride(),
            device_type=piece.device.type,
            requires_grad=tensor.requires_grad and tensor.is_leaf,
            owner=owner,
        )
        if isinstance(tensor, DTensor):
            entry.dtensor.CopyFrom(describe_dtensor(name, tensor))
        if piece.numel():
            reach = Strided(Box((0,) * piece.dim(), tuple(piece.shape)), piece.stride()).reach
            entry.extent = self._maker.add_extent(reach * piece.itemsize)
        self._maker.from_live(self._maker.add(entry), tensor)
        index = len(self._maker.manifest.tensors) - 1
        cls, conj, neg = tree.tensor_class(tensor), tensor.is_conj(), tensor.is_neg()
        return self._stand_in(tensor, index, TensorMark(index, cls, conj, neg, hidden))


def _fills(piece: torch.Tensor) -> bool:
    """Whether a tensor's elements lie without gaps, in whatever order."""
    box = Box((0,) * piece.dim(), tuple(piece.shape))
    return Strided(box, piece.stride()).reach == piece.numel()


def _mapped(name: str, node: object, change: Callable[[str, torch.Tensor], object]) -> object:
    """A copy of a tree of dicts, lists and tuples, its tensors changed; `name` as in `walk`."""
    if isinstance(node, torch.Tensor):
        return change(name, node)
    if isinstance(node, dict):
        made = {key: _mapped(f"{name}.{key}", child, change) for key, child in node.items()}
        return made if type(node) is dict else type(node)(made)
    if isinstance(node, list):
        return [_mapped(f"{name}.{i}", child, change) for i, child in enumerate(node)]
    if isinstance(node, tuple):
        items = [_mapped(f"{name}.{i}", child, change) for i, child in enumerate(node)]
        return getattr(type(node), "_make", type(node))(items)
    return node


def _parameters(shape: segment_pb2.OptimizerShape | None) -> Iterator[tuple[int, str]]:
    """Number of the group and plain name of each parameter, in the optimizer's order."""
    labels = [(g, text) for g, group in enumerate(shape.groups if shape else ())
              for text in group.parameters]  # fmt: skip
    for number, (group_number, text) in enumerate(labels):
        name = text.partition(": ")[0]
        yield group_number, str(number) if name == "a parameter" else name


def _itemsizes(manifests: Any) -> dict[str, int]:
    found = {entry.dtype for manifest in manifests for entry in manifest.tensors}
    dtypes = {name: getattr(torch, name, None) for name in found}
    return {n: d.itemsize if isinstance(d, torch.dtype) else 1 for n, d in dtypes.items()}
