"""Says, in sentences, how a snapshot's manifest differs from what is live. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from snapshotd.wire.protocol import MANIFEST_FORMAT
from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.leaves import HIDDEN, label

_Key = tuple[str, str]


def differences(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> list[str]:
    """Everything that stands in the way of applying `saved` to the objects `live` describes.

    Args:
        saved: the snapshot's manifest.
        live: `Survey.manifest`, with job, world and shard set to this run's.
    """
    if saved.format != MANIFEST_FORMAT:
        return [f"manifest format: snapshot {saved.format}, this client reads {MANIFEST_FORMAT}"]
    return [
        *_identity(saved, live),
        *_names(saved, live),
        *_tensors(saved, live),
        *_ties(saved, live),
        *_optimizers(saved, live),
    ]


def _identity(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> Iterator[str]:
    if saved.job != live.job:
        yield f"job: snapshot {saved.job!r}, this run {live.job!r}"
    if saved.world != live.world:
        yield f"world size: snapshot {saved.world}, this run {live.world}"
    if saved.shard != live.shard:
        yield f"shard: snapshot {saved.shard}, this rank asks for {live.shard}"


def _names(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> Iterator[str]:
    for name in sorted({*saved.names, *live.names}):
        if name not in live.names:
            yield f"{name}: only in the snapshot ({saved.names[name]})"
        elif name not in saved.names:
            yield f"{name}: only in this run ({live.names[name]})"
        elif saved.names[name] != live.names[name]:
            yield f"{name}: snapshot {saved.names[name]}, this run {live.names[name]}"


def in_place(manifest: segment_pb2.Manifest) -> dict[_Key, segment_pb2.TensorEntry]:
    """Entries that must find a tensor of their name: those of modules and bare tensors.

    Optimizer state is created by the first step, extra state may change its shape: these are
    not among them.
    """
    return {
        (entry.owner, entry.name): entry
        for entry in manifest.tensors
        if manifest.names.get(entry.owner) in {"module", "tensor"}
        and HIDDEN not in entry.name
        # torch ends the key of a module's extra state so.
        and "_extra_state" not in entry.name.split(".")
    }


def _tensors(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> Iterator[str]:
    # A name that only one side has was reported as a whole already.
    common = {n for n in saved.names if saved.names[n] == live.names.get(n)}
    old = {k: e for k, e in in_place(saved).items() if k[0] in common}
    new = {k: e for k, e in in_place(live).items() if k[0] in common}
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            yield f"{key[1]}: only in the snapshot ({_text(old[key])})"
        elif key not in old:
            yield f"{key[1]}: only in this run ({_text(new[key])})"
        elif _text(old[key]) != _text(new[key]):
            yield f"{key[1]}: snapshot {_text(old[key])}, this run {_text(new[key])}"


def _text(entry: segment_pb2.TensorEntry) -> str:
    local = label(entry.dtype, entry.shape)
    if not entry.HasField("dtensor"):
        return local
    spec = entry.dtensor
    mesh = " x ".join(map(str, spec.mesh_shape)) + "".join(f" {n}" for n in spec.mesh_dim_names)
    whole = label(entry.dtype, spec.global_shape)
    return f"DTensor {whole} as {', '.join(spec.placements)} on mesh {mesh}, local {local}"


def _ties(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> Iterator[str]:
    old_names, new_names = in_place(saved), in_place(live)
    old, new = tied(saved), tied(live)
    for group in sorted(old ^ new):
        if all(key in old_names and key in new_names for key in group):
            where = "the snapshot" if group in old else "this run"
            yield f"{', '.join(name for _, name in group)}: one memory in {where} only"


def tie_differences(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> list[str]:
    """As in `differences`, for two layouts: by plain names."""
    old_names, new_names = (
        {e.fqn for e in in_place(m).values() if all(e.shape)} for m in (saved, live)
    )
    old, new = _tied_names(saved), _tied_names(live)
    return [
        f"{', '.join(sorted(group))}: one memory in "
        f"{'the snapshot' if group in old else 'this run'} only"
        for group in sorted(old ^ new, key=sorted)
        if group <= old_names and group <= new_names
    ]


def _tied_names(manifest: segment_pb2.Manifest) -> set[frozenset[str]]:
    groups: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for entry in in_place(manifest).values():
        if all(entry.shape):
            form = (entry.dtype, *entry.shape)
            groups[entry.extent, entry.extent_offset, form].add(entry.fqn)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def tied(manifest: segment_pb2.Manifest) -> set[tuple[_Key, ...]]:
    """Groups of names that stand for one memory."""
    groups: dict[tuple[object, ...], list[_Key]] = defaultdict(list)
    for key, entry in in_place(manifest).items():
        if all(entry.shape):
            groups[entry.extent, entry.extent_offset, _text(entry)].append(key)
    return {tuple(sorted(group)) for group in groups.values() if len(group) > 1}


def _optimizers(saved: segment_pb2.Manifest, live: segment_pb2.Manifest) -> Iterator[str]:
    present = {shape.name: shape for shape in live.optimizers}
    for old in saved.optimizers:
        new = present.get(old.name)
        if new is None:
            continue
        if old.type != new.type:
            yield f"{old.name}: snapshot {old.type}, this run {new.type}"
        if len(old.groups) != len(new.groups):
            groups = f"snapshot {len(old.groups)}, this run {len(new.groups)}"
            yield f"{old.name}: parameter groups: {groups}"
            continue
        for i, (a, b) in enumerate(zip(old.groups, new.groups, strict=True)):
            yield from _group(f"{old.name}: parameter group {i}", a, b)


def _group(
    where: str, old: segment_pb2.ParameterGroup, new: segment_pb2.ParameterGroup
) -> Iterator[str]:
    if len(old.parameters) != len(new.parameters):
        counts = f"snapshot {len(old.parameters)}, this run {len(new.parameters)}"
        yield f"{where}: parameters: {counts}"
        return
    for i, (a, b) in enumerate(zip(old.parameters, new.parameters, strict=True)):
        if a != b:
            yield f"{where}, parameter {i}: snapshot {a}, this run {b}"
