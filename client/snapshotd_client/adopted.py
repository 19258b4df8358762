"""What an imported checkpoint could not know, and the run that restores it does."""

from __future__ import annotations

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.differences import in_place, tied

_Entry = segment_pb2.TensorEntry

#: Stands for a parameter of which an optimizer's state tells nothing but its number.
UNNAMED = "?"


def is_imported(saved: segment_pb2.Manifest) -> bool:
    """Whether it says of some object nothing but its name."""
    return "" in saved.names.values()


def adopt(saved: segment_pb2.Manifest, live: segment_pb2.Manifest, image: memoryview) -> list[str]:
    """Complete the manifest of an imported checkpoint; says what in it cannot be.

    Tensors that share memory stand in it once for each name: those that do in this run, and have
    the same bytes there, share it.
    """
    wrong = out_of_bounds(saved, len(image))
    if wrong:
        return wrong
    imported = {name for name, kind in saved.names.items() if not kind}
    adopt_kinds(saved, live)
    entries = in_place(saved)
    for group in tied(live):
        found = [entries[key] for key in group if key in entries and key[0] in imported]
        for entry in found[1:]:
            if _bytes_of(entry, saved, image) == _bytes_of(found[0], saved, image):
                entry.extent, entry.extent_offset = found[0].extent, found[0].extent_offset
    return []


def adopt_kinds(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> None:
    """Of which kind each object is, a checkpoint does not say, nor all of an optimizer."""
    for name in [name for name, kind in saved.names.items() if not kind]:
        if name in live.names:
            saved.names[name] = live.names[name]
    shapes = {shape.name: shape for shape in live.optimizers}
    for shape in saved.optimizers:
        here = shapes.get(shape.name)
        if here is None or shape.type:
            continue
        shape.type = here.type
        if all(label == UNNAMED for group in shape.groups for label in group.parameters) and [
            len(group.parameters) for group in shape.groups
        ] == [len(group.parameters) for group in here.groups]:
            shape.CopyFrom(here)


def _bytes_of(
    entry: _Entry, manifest: segment_pb2.Manifest, image: memoryview
) -> tuple[object, ...]:
    extent = manifest.extents[entry.extent]
    stored = image[extent.image_offset : extent.image_offset + extent.bytes]
    return (entry.dtype, tuple(entry.shape), tuple(entry.stride), entry.extent_offset, stored)
