"""A checkpoint of torch.distributed.checkpoint as the image of a job's first step.

Its top-level keys are the names that are given to Snapshotter; under each stands what the
`state_dict()` of that object gives, or a tensor.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import rng, tree
from snapshotd_client.about import About
from snapshotd_client.copying import Load, Piece, Target
from snapshotd_client.errors import SnapshotdClientError, UnsupportedState
from snapshotd_client.export.counting import counted, is_optimizer, shape_of, unlisted
from snapshotd_client.layout import lay_out, skeleton_room
from snapshotd_client.leaves import GROUPS, RNG, VALUES, Inventory
from snapshotd_client.owners import TENSOR

Trees = Mapping[str, Any]

_WRITTEN: Final = "Give the directory that torch.distributed.checkpoint.save wrote, whole."
_KEYS: Final = (
    "Its top-level keys must be the names given to Snapshotter, and under each what that object's "
    "state_dict() returns (docs/persist.md)."
)


def read_checkpoint(directory: Path) -> Trees:
    """What a checkpoint holds, as it was nested. Raises UnsupportedState: it is no job's start."""
    if not (directory / ".metadata").is_file():
        raise UnsupportedState(
            f"{directory} is no checkpoint of torch.distributed.checkpoint: no .metadata in it",
            _WRITTEN,
        )
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own classes
        try:
            _load_state_dict(
                found,
                storage_reader=FileSystemReader(directory),
                planner=_EmptyStateDictLoadPlanner(),  # type: ignore[no-untyped-call]  # torch's
                no_dist=True,
            )
        except (Exception, CheckpointException) as error:  # whatever its bytes make of torch
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnsupportedState(
                f"{directory} cannot be read as a checkpoint of torch.distributed.checkpoint "
                f"({why[:400]})",
                _WRITTEN,
            ) from error
    found.pop("ranks", None)  # of our own export: what differed between ranks
    wrong = [why for name, value in found.items() if (why := _why_not(name, value))]
    if wrong or not found:
        raise UnsupportedState("; ".join(wrong) or f"{directory} is empty", _KEYS)
    return found


def _why_not(name: str, value: object) -> str:
    if isinstance(value, torch.Tensor) or name in (VALUES, RNG):
        return ""
    if not isinstance(value, dict):
        return f"{name}: a {type(value).__name__}, where the state_dict() of an object was expected"
    if is_optimizer(value) and (lost := unlisted(value)):
        return f"{name}: state of {', '.join(lost)}, which no group of parameters has"
    return ""


def write_image(path: Path, trees: Trees, job: str, shard: int, world: int, step: int) -> int:
    """Write the image of one shard, which has all of the state; returns its manifest's length."""
    states = {name: value for name, value in trees.items() if name not in (VALUES, RNG)}
    optimizers = {name: value for name, value in states.items() if is_optimizer(value)}
    whole = {
        **states,
        **{name: counted(value) for name, value in optimizers.items()},
        GROUPS: {},
        VALUES: trees.get(VALUES, {}),
        RNG: trees.get(RNG) or _generators(),
    }
    inventory = Inventory()
    pickles = {}
    for owner, value in whole.items():
        inventory.take_walk(owner, value)
        pickles[owner] = tree.dump(owner, value, inventory)
    extents, places = inventory.gather()
    skeleton = tree.join([*pickles], pickles.values())
    about = About({})
    manifest = segment_pb2.Manifest(
        format=MANIFEST_FORMAT,
        job=job,
        shard=shard,
        world=world,
        extents=[segment_pb2.StorageExtent(bytes=extent.nbytes) for extent in extents],
        tensors=[about.entry(*pair) for pair in zip(inventory.leaves, places, strict=True)],
        # Of what kind an object is, the run that restores it knows.
        names={n: TENSOR if isinstance(v, torch.Tensor) else "" for n, v in states.items()},
        optimizers=[shape_of(name, value, states) for name, value in optimizers.items()],
    )
    if world > 1:  # all ranks get the same
        manifest.replica_sets.add(ranks=range(world))
        for leaf, entry in zip(inventory.leaves, manifest.tensors, strict=True):
            entry.copies = int(not leaf.hidden and leaf.owner not in (VALUES, RNG))
    manifest.skeleton.bytes = skeleton_room(len(skeleton))
    layout = lay_out(manifest)
    manifest.step = step
    opening = manifest.SerializeToString()
    with path.open("xb") as file:  # all of it, or a full disk would end this by SIGBUS
        try:
            os.posix_fallocate(file.fileno(), 0, layout.image_bytes)
        except OSError as error:
            raise SnapshotdClientError(
                f"{path.parent} cannot take an image of {layout.image_bytes} bytes: "
                f"{error.strerror}",
                "Make room there, or set TMPDIR to a directory that has it.",
            ) from error
    target = Target(torch.from_file(str(path), True, layout.image_bytes, dtype=torch.uint8))
    target.put_text(0, opening)
    target.put(Load([Piece(*pair) for pair in zip(layout.offsets, extents, strict=True)], ()))
    target.put_text(layout.skeleton_offset, skeleton)
    return len(opening)


def _generators() -> rng.RngState:
    """All random generators as if they were seeded with 0: a checkpoint has none."""
    torch.manual_seed(0)
    random.seed(0)
    return {**rng.read(), "numpy": None}
