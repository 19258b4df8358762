"""Turns live training state into the plan of a shard image: manifest, payload, skeleton.

Collects references; consumes no random numbers, builds no graph and changes nothing of what it
captures. What has not changed since the last plan is not collected, described or pickled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import cuda, rng, tree
from snapshotd_client.about import About, held
from snapshotd_client.accord import Accord, Shared
from snapshotd_client.copying import Load, Piece, Target
from snapshotd_client.extents import Place, gather
from snapshotd_client.layout import Layout, lay_out, skeleton_room
from snapshotd_client.leaves import GROUPS, RNG, VALUES, Inventory, Leaf, local_piece
from snapshotd_client.overlap import Quiet, watched
from snapshotd_client.owners import (
    MODULE,
    OPTIMIZER,
    check_states,
    collect,
    cuda_devices,
    kind_of,
    optimizer_shapes,
)
from snapshotd_client.replicas import Replicas, ReplicasOption
from snapshotd_client.structure import GROUP_CONSTANTS, Structure


@dataclass(frozen=True, eq=False)
class Capture:
    """One shard's state at one step, held by reference until it is copied.

    Attributes:
        manifest: what opens the image.
        manifest_bytes: its length, serialized.
        layout: the same object for as long as nothing moved in the image.
        resting: what may be copied while training goes on; the same object as before likewise.
        moving: what must be copied before anything else runs.
        texts: (image offset, bytes): manifest and skeleton.
        watched: tensors whose versions tell whether `resting` was written to.
        versions: theirs, where they were read already.
        shared: pieces of which other ranks store the rest.
    """

    manifest: segment_pb2.Manifest
    manifest_bytes: int
    layout: Layout
    resting: Load
    moving: Sequence[Piece]
    texts: tuple[tuple[int, bytes], ...]
    watched: Sequence[torch.Tensor]
    versions: Sequence[int] | None
    shared: Sequence[Shared]
    #: Keeps tensors alive whose storages the pieces point into.
    _leaves: Sequence[Leaf]

    @property
    def devices(self) -> set[torch.device]:
        """The CUDA devices that some of it is on."""
        found = {source.device for _, source in self.resting.device}
        found |= {piece.extent.storage.device for piece in self.moving}
        return {device for device in found if device.type == "cuda"}

    @property
    def image_bytes(self) -> int:
        """Length of the whole image."""
        return self.layout.image_bytes

    def write(self, image: memoryview) -> None:
        """Copy all bytes into `image`; nothing may train between `plan` and the end of this.

        Args:
            image: writable, contiguous, at least `image_bytes` long; the rest is left alone.
        """
        target = Target(torch.frombuffer(image, dtype=torch.uint8))
        for text in self.texts:
            target.put_text(*text)
        target.put(Load(self.moving, ()))
        target.put(self.resting)


def plan(
    job: str,
    shard: int,
    world: int,
    step: int,
    states: Mapping[str, object],
    values: Mapping[str, object],
    replicas: ReplicasOption = None,
) -> Capture:
    """Collect the whole state by reference and lay out its image; see `Planner`."""
    return Planner(job, shard, world, states, replicas).plan(step, values)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What of a plan is good for the next one, too."""

    structure: Structure
    about: About
    shared: Sequence[Shared]
    leaves: Sequence[Leaf]
    extents: int  # how many of them these leaves have
    storages: frozenset[int]
    skeleton: bytes  # as far as it is the same
    changing: Sequence[bytes]  # entries of the other leaves, as they stand in the manifest
    manifest: segment_pb2.Manifest
    opening: bytes  # without the step
    layout: Layout
    resting: Load
    moving: Sequence[Piece]
    watched: Sequence[torch.Tensor]


class Planner:
    """Plans one snapshot after the other of the same objects.

    Args:
        job: name of the job.
        shard: logical rank.
        world: number of logical ranks.
        states: as given to Snapshotter.
        replicas: likewise.
        accord: with the ranks that hold the same; without one they are taken to agree.

    Raises:
        UnsupportedState: a state has no name, or is of no kind that can be captured.
    """

    def __init__(
        self,
        job: str,
        shard: int,
        world: int,
        states: Mapping[str, object],
        replicas: ReplicasOption = None,
        accord: Accord | None = None,
    ) -> None:
        check_states(states)
        self._replicas = replicas
        self._accord = accord
        self._opening = segment_pb2.Manifest(
            format=MANIFEST_FORMAT, job=job, shard=shard, world=world
        )
        self._states = states
        self._kept: _Kept | None = None

    def plan(self, step: int, values: Mapping[str, object]) -> Capture:
        """Collect the whole state by reference and lay out its image.

        Args:
            step: the step that has just been trained.
            values: keyword values that travel with the snapshot.

        Raises:
            UnsupportedState: something cannot be captured exactly; the message names it.
        """
        with torch.no_grad():
            if self._kept is not None and self._kept.structure.holds():
                again = self._plan_again(self._kept, step, values)
                if again is not None:
                    return again
            return self._plan_anew(step, values)

    def _plan_anew(self, step: int, values: Mapping[str, object]) -> Capture:
        structure = Structure(self._states)
        constant = Inventory()
        pickles: dict[str, bytes] = {}
        for name in self._states:
            if name in structure.owners:
                state_tree = _constant_part(self._states[name])
                constant.take_walk(name, state_tree)
                pickles[name] = tree.dump(name, state_tree, constant)
        changing, more = self._collect_changing(structure.owners, values, len(constant.leaves))
        leaves = [*constant.leaves, *changing.leaves]
        extents, places = gather([local_piece(leaf.tensor) for leaf in leaves])
        about = self._about()
        division = about.divide(leaves, places, extents)
        if self._accord is not None and not self._accord.divides(step, held(division.shared)):
            about = self._about(undivided=True)
            division = about.divide(leaves, places, extents)
        manifest = segment_pb2.Manifest(
            extents=division.described,
            tensors=[about.entry(*pair) for pair in zip(leaves, places, strict=True)],
            names={name: kind_of(name, state) for name, state in self._states.items()},
            optimizers=optimizer_shapes(self._states),
            replica_sets=about.replica_sets(),
        )
        manifest.MergeFrom(self._opening)
        skeleton = tree.join([*pickles, *more], pickles.values())
        rest = b"".join(more.values())
        manifest.skeleton.bytes = skeleton_room(len(skeleton) + len(rest))
        layout = lay_out(manifest)
        quiet = Quiet(self._states).extents(leaves, places)
        count = len(constant.leaves)
        own, others = _storages(constant.leaves), _storages(changing.leaves)
        kept_extents = 1 + max((p.extent for p in places[:count]), default=-1) if own else 0
        pieces = [Piece(*pair) for pair in zip(layout.offsets, division.stored, strict=True)]
        watching = watched(
            [
                leaf
                for leaf, place in zip(leaves, places, strict=True)
                if place.extent in quiet and local_piece(leaf.tensor).numel()
            ]
        )
        # Extents of what changes from step to step are found again each time; where they mix with
        # the others, or may be copied later, there is nothing to keep.
        entangled = own & others or any(i >= kept_extents for i in quiet)
        entangled = entangled or (self._accord is not None and self._accord.undecided)
        if not entangled:
            watching = structure.forms.watch(watching)
        kept = _Kept(
            structure=structure,
            about=about,
            shared=held(division.shared[:kept_extents]),
            leaves=constant.leaves,
            extents=kept_extents,
            storages=own,
            skeleton=skeleton,
            changing=_entries(manifest, count, kept_extents),
            manifest=manifest,
            opening=manifest.SerializeToString(deterministic=True),
            layout=layout,
            resting=Load([p for i, p in enumerate(pieces) if i in quiet], layout.gaps),
            moving=[p for i, p in enumerate(pieces[:kept_extents]) if i not in quiet],
            watched=watching,
        )
        # Reading the state may change it: FSDP2 shards its parameters for it.
        self._kept = kept if not entangled and structure.holds() else None
        moving = [p for i, p in enumerate(pieces) if i not in quiet]
        return _capture(kept, step, rest, moving, leaves, held(division.shared))

    def _plan_again(self, kept: _Kept, step: int, values: Mapping[str, object]) -> Capture | None:
        """The plan of the same objects with other bytes; None when more has changed than these."""
        changing, more = self._collect_changing(kept.structure.owners, values, len(kept.leaves))
        rest = b"".join(more.values())
        if len(kept.skeleton) + len(rest) > kept.layout.skeleton_bytes:
            return None
        if kept.storages & _storages(changing.leaves):
            return None
        extents, places = changing.gather()
        about = self._about_again(kept)
        division = about.divide(changing.leaves, places, extents)
        places = [
            Place(place.extent + kept.extents, place.offset) if leaf.tensor.numel() else place
            for leaf, place in zip(changing.leaves, places, strict=True)
        ]
        entries = _entry_bytes(
            [about.entry(*pair) for pair in zip(changing.leaves, places, strict=True)],
            division.described,
        )
        if entries != kept.changing:
            return None
        offsets = kept.layout.offsets[kept.extents :]
        fresh = [Piece(*pair) for pair in zip(offsets, division.stored, strict=True)]
        leaves = [*kept.leaves, *changing.leaves]
        # Where other code was asked for its state, it may have written to what is watched.
        alone = kept.structure.owners >= self._states.keys()
        versions = kept.structure.forms.versions if alone else None
        shared = [*kept.shared, *held(division.shared)]
        return _capture(kept, step, rest, [*kept.moving, *fresh], leaves, shared, versions)

    def _about(self, *, undivided: bool = False) -> About:
        rank, world = self._opening.shard, self._opening.world
        replicas = Replicas(self._states, self._replicas, rank, world, undivided=undivided)
        return About(self._states, replicas, rank)

    def _about_again(self, kept: _Kept) -> About:
        """The same where no tensor that it knows can be gone: those of owners that stayed."""
        kinds = {name: kind_of(name, s) for name, s in self._states.items()}
        if all(n in kept.structure.owners for n, k in kinds.items() if k in {MODULE, OPTIMIZER}):
            return kept.about
        about = self._about(undivided=kept.about.undivided)
        about.sets.update(kept.about.sets)
        return about

    def _collect_changing(
        self, constant: frozenset[str], values: Mapping[str, object], first: int
    ) -> tuple[Inventory, dict[str, bytes]]:
        """Leaves and pickles of everything whose tree must be read at each step."""
        trees = {n: collect(s) for n, s in self._states.items() if n not in constant}
        trees[GROUPS] = {
            name: [_hyperparameters(group) for group in state.param_groups]
            for name, state in self._states.items()
            if name in constant and isinstance(state, torch.optim.Optimizer)
        }
        trees[VALUES] = dict(values)
        trees[RNG] = rng.read(cuda_devices(self._states) if cuda.in_use() else ())
        inventory = Inventory(first=first)
        for owner, state_tree in trees.items():
            inventory.take_walk(owner, state_tree)
        return inventory, {n: tree.dump(n, t, inventory) for n, t in trees.items()}


def _constant_part(state: object) -> object:
    """The tree of a plain module or optimizer, without what may change from step to step."""
    found = collect(state)
    if isinstance(state, torch.optim.Optimizer):
        assert isinstance(found, dict), "torch.optim says so"
        groups = [
            {k: v for k, v in g.items() if k in GROUP_CONSTANTS} for g in found["param_groups"]
        ]
        return {**found, "param_groups": groups}
    return found


def _hyperparameters(group: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if key not in GROUP_CONSTANTS}


def merge_groups(trees: dict[str, object]) -> None:
    """Put the hyperparameters back into the optimizers' trees that they were taken from."""
    for name, groups in trees.pop(GROUPS, {}).items():  # type: ignore[attr-defined]  # as written
        saved = trees[name]["param_groups"]  # type: ignore[index]  # as torch.optim wrote it
        saved[:] = [{**more, **group} for more, group in zip(groups, saved, strict=True)]


def _capture(
    kept: _Kept,
    step: int,
    rest: bytes,
    moving: Sequence[Piece],
    leaves: Sequence[Leaf],
    shared: Sequence[Shared],
    versions: Sequence[int] | None = None,
) -> Capture:
    layout = kept.layout
    # Messages are merged where they are joined: what is the same need not be serialized again.
    last = segment_pb2.Manifest(step=step).SerializeToString()
    same, known = len(kept.opening), len(kept.skeleton)
    kept.manifest.step = step
    return Capture(
        manifest=kept.manifest,
        manifest_bytes=same + len(last),
        layout=layout,
        resting=kept.resting,
        moving=moving,
        texts=(
            (0, kept.opening),
            (same, last.ljust(layout.opening_bytes - same, b"\0")),
            (layout.skeleton_offset, kept.skeleton),
            (layout.skeleton_offset + known, rest.ljust(layout.skeleton_bytes - known, b"\0")),
        ),
        watched=kept.watched,
        versions=versions,
        shared=shared,
        _leaves=leaves,
    )


def _storages(leaves: Sequence[Leaf]) -> frozenset[int]:
    pieces = (local_piece(leaf.tensor) for leaf in leaves)
    return frozenset(p.untyped_storage()._cdata for p in pieces if p.numel())


def _entries(manifest: segment_pb2.Manifest, leaves: int, extents: int) -> list[bytes]:
    return _entry_bytes(manifest.tensors[leaves:], manifest.extents[extents:])


def _entry_bytes(
    entries: Sequence[segment_pb2.TensorEntry], extents: Sequence[segment_pb2.StorageExtent]
) -> list[bytes]:
    sizes = [(e.bytes, e.part.start, e.part.whole) for e in extents]
    return [*(e.SerializeToString(deterministic=True) for e in entries), repr(sizes).encode()]
