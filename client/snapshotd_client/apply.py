"""Puts a shard image back into live training state, in place and exactly.

Order: every check, then modules, tensors, optimizers and the rest in the mapping's order, then a
comparison with the image of all that was not compared behind its copy, then the random generators,
which nothing may disturb afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from google.protobuf.message import DecodeError

from snapshotd.wire.points import point
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import rng, tree
from snapshotd_client.adopted import adopt, is_imported
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.capture import merge_groups
from snapshotd_client.differences import differences, in_place
from snapshotd_client.errors import InexactRestore, StateMismatch
from snapshotd_client.exact import all_same_bits, copy_exact, is_expanded
from snapshotd_client.image import Anchor, Image, meshes_of
from snapshotd_client.leaves import HIDDEN, RNG, VALUES, dtensors
from snapshotd_client.optimizers import restore_optimizer, runs_code
from snapshotd_client.owners import (
    MODULE,
    OPTIMIZER,
    STATEFUL,
    TENSOR,
    check_states,
    cuda_devices,
    kind_of,
)
from snapshotd_client.placing import Placing
from snapshotd_client.room import Room
from snapshotd_client.structure import plain_schedule, plain_to_load
from snapshotd_client.surveying import Survey, find, survey


def apply(
    manifest_and_image: memoryview,
    manifest_bytes: int,
    *,
    job: str,
    world: int,
    shard: int,
    states: Mapping[str, object],
    on_rng: bool = True,
    live: Survey | None = None,
    fits: bool = False,
    room: Room | None = None,
) -> dict[str, object]:
    """Restore `states` and the random generators from an image.

    Args:
        manifest_and_image: the whole image, verified; may be read-only. No tensor refers to it
            after the call has returned; after an error the traceback may.
        manifest_bytes: length of the manifest that opens it.
        job: this run's job.
        world: this run's number of logical ranks.
        shard: this logical rank.
        states: as given to Snapshotter.
        on_rng: whether to set the random generators.
        live: what `survey` says of `states` as they are now, where it was asked already.
        fits: whether `differences` found none between the image's manifest and that of `live`.
        room: memory for tensors that are made.

    Returns:
        The keyword values that travelled with the snapshot.

    Raises:
        StateMismatch: the snapshot is of something else; nothing was changed.
        InexactRestore: live state differs from the image afterwards; names the tensor.
    """
    check_states(states)
    manifest = _read_manifest(manifest_and_image[:manifest_bytes])
    live = live or survey(states)
    live.manifest.job, live.manifest.world, live.manifest.shard = job, world, shard
    if is_imported(manifest):
        _refuse(adopt(manifest, live.manifest, manifest_and_image))
    if not fits:
        _refuse(differences(manifest, live.manifest))
    _refuse(out_of_bounds(manifest, len(manifest_and_image)))
    _refuse(_absent_devices(manifest))
    image = Image(
        manifest_and_image,
        manifest,
        meshes_of(dtensors(states)),
        _anchors(manifest, live),
        room,
    )
    place = manifest.skeleton.image_offset
    skeleton = bytes(manifest_and_image[place : place + manifest.skeleton.bytes])
    trees = _Trees(image, skeleton, states)
    _refuse(
        [f"{n}: no tree in the snapshot" for n in (*states, VALUES, RNG) if n not in trees.by_owner]
    )
    point("trainer.restore.checked")
    with torch.no_grad():
        for name, state in states.items():
            trees.restore(name, state)
            point("trainer.restore.piece")
        trees.placing.run(compare=True)
        _compare(trees, states)
    point("trainer.restore.compared")
    if on_rng:
        rng.restore(cast("rng.RngState", trees.by_owner[RNG]), cuda_devices(states))
    return cast("dict[str, object]", trees.by_owner[VALUES])


def _refuse(found: list[str]) -> None:
    if found:
        raise StateMismatch(found)


def _read_manifest(data: memoryview) -> segment_pb2.Manifest:
    try:
        return segment_pb2.Manifest.FromString(bytes(data))
    except DecodeError as error:
        raise StateMismatch(
            [f"the manifest of {len(data)} bytes cannot be read: {error}"]
        ) from error


def _absent_devices(manifest: segment_pb2.Manifest) -> list[str]:
    """Kinds of device that tensors must be made on and this process does not have."""
    in_place_names = in_place(manifest)
    kinds = {
        entry.device_type: entry.name
        for entry in reversed(manifest.tensors)
        if entry.device_type != "cpu"
        and (entry.owner, entry.name) not in in_place_names
        and entry.owner != RNG
    }
    return [
        f"{name}: was on a {kind} device, which this process does not have"
        for kind, name in sorted(kinds.items())
        if not torch.get_device_module(kind).is_available()
    ]


def _anchors(manifest: segment_pb2.Manifest, live: Survey) -> dict[int, Anchor]:
    """For extents of tensors that are restored in place: the live storage that holds them."""
    anchors: dict[int, Anchor] = {}
    live_entries = in_place(live.manifest)
    for key, entry in in_place(manifest).items():
        here = live_entries[key]
        if not all(entry.shape) or entry.stride != here.stride or entry.extent in anchors:
            continue
        extent = live.extents[here.extent]
        start = extent.start + here.extent_offset - entry.extent_offset
        fits = start + manifest.extents[entry.extent].bytes <= extent.storage.nbytes()
        if start >= 0 and fits and entry.device_type == extent.storage.device.type:
            anchors[entry.extent] = Anchor(extent.storage, start)
    return anchors


class _Trees:
    """The snapshot's state trees, and how each goes back into its live object."""

    def __init__(self, image: Image, skeleton: bytes, states: Mapping[str, object]) -> None:
        self.placing = Placing()
        self._image = image
        #: Those whose loading runs code of other people's, and that are still to come.
        self._foreign = {name for name, state in states.items() if _is_foreign(name, state)}
        self._kinds = dict(image.manifest.names)
        self._made: dict[tuple[int, bool], torch.Tensor] = {}
        self._views: dict[int, torch.Tensor] = {}  # those of them that are the image's own bytes
        self._marks: dict[int, tree.TensorMark] = {}
        self.by_owner = tree.load(skeleton, self._tensor)
        merge_groups(self.by_owner)

    def _tensor(self, owner: str, mark: tree.TensorMark) -> torch.Tensor:
        private = owner in {VALUES, RNG}
        borrowed = self._kinds.get(owner, STATEFUL) != STATEFUL and not mark.hidden
        key = (mark.index, private)
        if key not in self._made:
            with torch.no_grad():
                if borrowed:
                    made = self._image.view(mark.index, conj=mark.conj, neg=mark.neg)
                    self._views[mark.index] = made
                else:
                    made = self._image.own(mark, private=private)
            self._made[key] = made
            self._marks[id(made)] = mark
        return self._made[key]

    def restore(self, name: str, state: object) -> None:
        """Put the tree of `name` into `state`."""
        foreign = name in self._foreign
        if foreign:
            # It may look at what is restored already, and write to it.
            self.placing.run(compare=False)
        self._restore(name, state, self.by_owner[name], foreign=foreign)
        if foreign:
            self.placing.forget()
            self._foreign.remove(name)

    def _restore(self, name: str, state: object, saved: object, *, foreign: bool) -> None:
        match kind_of(name, state):
            case "tensor":
                self.placing.give(cast("torch.Tensor", state), cast("torch.Tensor", saved))
            case "module" if foreign:
                _load_module(cast("torch.nn.Module", state), cast("dict[str, object]", saved))
            case "module":
                self._place_module(cast("torch.nn.Module", state), cast("dict[str, object]", saved))
            case "optimizer":
                restore_optimizer(
                    name,
                    cast("torch.optim.Optimizer", state),
                    cast("dict[str, object]", saved),
                    self._own,
                    self._shared(name),
                    self.placing,
                    compare=not self._foreign,
                )
            case _:
                state.load_state_dict(saved)  # type: ignore[attr-defined]  # kind_of saw it

    def _place_module(self, module: torch.nn.Module, saved: dict[str, object]) -> None:
        """What its load_state_dict would do, which is not asked."""
        live = module.state_dict()
        if live.keys() != saved.keys():
            self.placing.forget()
            _load_module(module, saved)  # which says what it thinks of it
            return
        for key, tensor in live.items():
            self.placing.give(tensor, cast("torch.Tensor", saved[key]))

    def _own(self, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        mark = self._marks.get(id(tensor))
        # A tensor without a mark is a wrapper, made of tensors that are their own already.
        return tensor if mark is None else self._image.own(mark, device, put=self.placing.fill)

    def _shared(self, owner: str) -> frozenset[int]:
        entries = self._image.manifest.tensors
        users = Counter(entry.extent for entry in entries if all(entry.shape))
        return frozenset(
            key
            for key, mark in self._marks.items()
            if entries[mark.index].owner == owner and users[entries[mark.index].extent] > 1
        )

    def view(self, index: int) -> torch.Tensor:
        """Tensor `index` as the snapshot holds it, conjugate and negative bits applied."""
        if index in self._views:
            return self._views[index]
        made = self._made.get((index, False))
        mark = self._marks[id(made)] if made is not None else None
        flags = {"conj": mark.conj, "neg": mark.neg} if mark else {}
        return self._image.view(index, **flags)

    @property
    def manifest(self) -> segment_pb2.Manifest:
        return self._image.manifest


def _is_foreign(name: str, state: object) -> bool:
    """Whether restoring it runs other code than torch's and ours."""
    match kind_of(name, state):
        case "tensor":
            return False
        case "module":
            return not plain_to_load(cast("torch.nn.Module", state))
        case "optimizer":
            return runs_code(cast("torch.optim.Optimizer", state))
    return not plain_schedule(state)


def _load_module(module: torch.nn.Module, saved: dict[str, object]) -> None:
    live = module.state_dict()
    expanded = [
        key
        for key, tensor in live.items()
        if isinstance(tensor, torch.Tensor) and is_expanded(tensor)
    ]
    for key in expanded:
        # Module.load_state_dict cannot write these; and it must not miss them either.
        copy_exact(live[key], cast("torch.Tensor", saved.pop(key)))
    module.load_state_dict(saved, strict=not expanded)


def _compare(trees: _Trees, states: Mapping[str, object]) -> None:
    now = {(leaf.owner, leaf.name): leaf.tensor for leaf in find(states).leaves}
    kinds = {MODULE, OPTIMIZER, TENSOR}
    required = in_place(trees.manifest)
    names: list[str] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, entry in enumerate(trees.manifest.tensors):
        if trees.manifest.names.get(entry.owner) not in kinds or HIDDEN in entry.name:
            continue
        key = (entry.owner, entry.name)
        live = now.get(key)
        if live is None and key not in required and trees.manifest.names[entry.owner] == MODULE:
            continue
        if live is None:
            raise _inexact(entry.name)
        saved = trees.view(index)
        if not trees.placing.known_same(live, saved):
            names.append(entry.name)
            pairs.append((live, saved))
    for name, same in zip(names, all_same_bits(pairs), strict=True):
        if not same:
            raise _inexact(name)


def _inexact(name: str) -> InexactRestore:
    return InexactRestore(
        f"the tensor {name} differs from the snapshot after it was restored",
        "A hook or a load_state_dict of its owner changes what it is given; fix it, or "
        "give Snapshotter an object of your own in its place.",
    )
