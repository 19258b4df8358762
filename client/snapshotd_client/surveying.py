"""Describes live training state as it is: to be held against an image, not to be stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.about import About
from snapshotd_client.extents import Extent
from snapshotd_client.leaves import Inventory
from snapshotd_client.owners import STATEFUL, collect, kind_of, optimizer_shapes


@dataclass(frozen=True, eq=False)
class Survey:
    """What is live now, of modules, optimizers and bare tensors; `tensors[i]` is leaf i."""

    manifest: segment_pb2.Manifest
    extents: Sequence[Extent]
    leaves: Inventory


def find(states: Mapping[str, object]) -> Inventory:
    """The tensors of modules, optimizers and bare tensors, as they are now."""
    inventory = Inventory()
    for name, state in states.items():
        if kind_of(name, state) != STATEFUL:
            inventory.take_walk(name, collect(state))
    return inventory


def survey(states: Mapping[str, object]) -> Survey:
    """Describe the live state as a manifest would, without the opaque objects and any bytes."""
    with torch.no_grad():
        inventory = find(states)
        extents, places = inventory.gather()
        about = About(states)
        manifest = segment_pb2.Manifest(
            extents=[segment_pb2.StorageExtent(bytes=extent.nbytes) for extent in extents],
            tensors=[about.entry(*pair) for pair in zip(inventory.leaves, places, strict=True)],
            names={name: kind_of(name, state) for name, state in states.items()},
            optimizers=optimizer_shapes(states),
        )
    return Survey(manifest, extents, inventory)
