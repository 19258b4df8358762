"""Turns live training state into the bytes of a shard image: manifest, payload, skeleton.

Collects references first and copies bytes later; consumes no random numbers, builds no graph and
changes nothing of what it captures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from snapshotd.wire.points import point
from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import rng, tree
from snapshotd_client.errors import UnsupportedState
from snapshotd_client.extents import Extent
from snapshotd_client.leaves import RNG, VALUES, Inventory, describe, label, local_piece

#: Image offsets of extents are multiples of this, which suits every dtype and vector unit.
ALIGNMENT_BYTES: Final = 64

MODULE: Final = "module"
OPTIMIZER: Final = "optimizer"
TENSOR: Final = "tensor"
STATEFUL: Final = "stateful"


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to ALIGNMENT_BYTES."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False)
class Capture:
    """One shard's state, held by reference until `write`.

    Attributes:
        image_bytes: length of the whole image.
        manifest_bytes: length of the serialized Manifest, which opens the image.
    """

    image_bytes: int
    manifest_bytes: int
    manifest: segment_pb2.Manifest
    _extents: Sequence[Extent]
    _skeleton: bytes
    #: Keeps tensors alive whose storages the extents point into.
    _inventory: Inventory

    def write(self, image: memoryview) -> None:
        """Copy all bytes into `image`; nothing may train between `plan` and the end of this.

        Args:
            image: writable, contiguous, at least `image_bytes` long; the rest is left alone.
        """
        target = torch.frombuffer(image, dtype=torch.uint8, count=self.image_bytes)
        opening = self.manifest.SerializeToString(deterministic=True)
        end = _put(target, 0, 0, _as_bytes(opening))
        with torch.no_grad():
            for place, extent in zip(self.manifest.extents, self._extents, strict=True):
                end = _put(target, end, place.image_offset, extent.bytes_view())
        _put(target, end, self.manifest.skeleton.image_offset, _as_bytes(self._skeleton))


def _as_bytes(data: bytes) -> torch.Tensor:
    # bytearray, because torch warns of buffers that cannot be written to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _put(target: torch.Tensor, end: int, offset: int, piece: torch.Tensor) -> int:
    """Zero target[end:offset], copy `piece` behind it, and return where it ends."""
    target[end:offset].zero_()
    target[offset : offset + piece.numel()].copy_(piece)
    point("trainer.piece.copied")
    return offset + piece.numel()


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


def plan(
    job: str,
    shard: int,
    world: int,
    step: int,
    states: Mapping[str, object],
    values: Mapping[str, object],
) -> Capture:
    """Collect the whole state by reference and lay out its image.

    Args:
        job: name of the job.
        shard: logical rank.
        world: number of logical ranks.
        step: the step that has just been trained.
        states: as given to Snapshotter.
        values: keyword values that travel with the snapshot.

    Raises:
        UnsupportedState: something cannot be captured exactly; the message names it.
    """
    check_states(states)
    with torch.no_grad():
        trees = {name: collect(state) for name, state in states.items()}
        trees[VALUES] = dict(values)
        trees[RNG] = rng.read(cuda_devices(states))
        inventory = Inventory()
        for owner, state_tree in trees.items():
            inventory.take_walk(owner, state_tree)
        skeleton = tree.dump(trees, inventory)
        manifest, extents = _manifest(states, inventory)
    manifest.format = MANIFEST_FORMAT
    manifest.job, manifest.shard, manifest.world, manifest.step = job, shard, world, step
    manifest.skeleton.bytes = len(skeleton)
    manifest_bytes = _lay_out(manifest)
    image_bytes = manifest.skeleton.image_offset + len(skeleton)
    return Capture(image_bytes, manifest_bytes, manifest, extents, skeleton, inventory)


@dataclass(frozen=True, eq=False)
class Survey:
    """What is live now, of modules, optimizers and bare tensors; `tensors[i]` is leaf i."""

    manifest: segment_pb2.Manifest
    extents: Sequence[Extent]
    leaves: Inventory


def survey(states: Mapping[str, object]) -> Survey:
    """Describe the live state as a manifest would, without the opaque objects and any bytes."""
    inventory = Inventory()
    with torch.no_grad():
        for name, state in states.items():
            if kind_of(name, state) != STATEFUL:
                inventory.take_walk(name, collect(state))
        manifest, extents = _manifest(states, inventory)
    return Survey(manifest, extents, inventory)


def _manifest(
    states: Mapping[str, object], inventory: Inventory
) -> tuple[segment_pb2.Manifest, list[Extent]]:
    extents, places = inventory.gather()
    manifest = segment_pb2.Manifest(
        extents=[segment_pb2.StorageExtent(bytes=extent.nbytes) for extent in extents],
        tensors=[describe(*pair) for pair in zip(inventory.leaves, places, strict=True)],
        names={name: kind_of(name, state) for name, state in states.items()},
        optimizers=_optimizer_shapes(states),
    )
    return manifest, extents


def _lay_out(manifest: segment_pb2.Manifest) -> int:
    """Set every image offset, and return the manifest's own length, on which they depend."""
    start = 0
    while True:
        offset = start
        for extent in [*manifest.extents, manifest.skeleton]:
            extent.image_offset = offset
            offset = aligned(offset + extent.bytes)
        size = manifest.ByteSize()
        if size <= start:
            return size
        # Longer offsets make a longer manifest, never a shorter one: this ends.
        start = aligned(size)


def _optimizer_shapes(states: Mapping[str, object]) -> list[segment_pb2.OptimizerShape]:
    names = {
        id(parameter): f"{owner}.{name}"
        for owner, state in states.items()
        if isinstance(state, torch.nn.Module)
        for name, parameter in state.named_parameters()
    }
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


def predict_image_bytes(states: Mapping[str, object]) -> int:
    """What a snapshot of `states` will need, in bytes, as far as it is known now.

    Optimizers that have not stepped yet hold no state; theirs is estimated from the local
    parameters: two tensors of the parameter's size for each of the Adam family and for
    optimizers not known here, one for SGD with momentum, none for SGD without. Keyword values
    are not known and not counted.
    """
    known = plan("", 0, 1, 0, states, {}).image_bytes
    optimizers = [s for s in states.values() if isinstance(s, torch.optim.Optimizer)]
    return known + sum(_missing_state_bytes(optimizer) for optimizer in optimizers)


#: Manifest entry, pickle mark, alignment and scalar step counters of one parameter's state.
_OVERHEAD_BYTES: Final = 1024


def _missing_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for group in optimizer.param_groups:
        copies = _state_copies(optimizer, group)
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter) and copies:
                piece = local_piece(parameter)
                total += copies * aligned(piece.numel() * piece.itemsize) + _OVERHEAD_BYTES
    return total


def _state_copies(optimizer: torch.optim.Optimizer, group: Mapping[str, object]) -> int:
    match type(optimizer).__name__:
        case "SGD":
            return 1 if group.get("momentum") else 0
        case "RMSprop":
            return 1 + bool(group.get("momentum")) + bool(group.get("centered"))
        case _:
            return 3 if group.get("amsgrad") else 2
