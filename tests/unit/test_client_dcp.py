"""What a SavePlan is packed into, read back through LoadPlans of other layouts."""

from __future__ import annotations

import copy
import io
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.bounds import out_of_bounds
from snapshotd_client.dcp.described import Contents
from snapshotd_client.dcp.member import Place
from snapshotd_client.dcp.packing import pack, resolved, unpacked_paths
from snapshotd_client.dcp.reading import Reads, skeletons
from snapshotd_client.dcp.steps import is_step, step_of
from snapshotd_client.errors import (
    ReplicasDiverged,
    SnapshotLost,
    StateMismatch,
    UnsupportedState,
    WrongUse,
)
from snapshotd_client.filling import Taken, manifests
from snapshotd_client.identity import Identity
from tests.unit.client_layout_rank import Files

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64)


def who(rank: int, world: int) -> Identity:
    return Identity("job", "job", 0, rank, world, rank, Path())


class Pieces:
    """A planner of whole tensors, of which each rank has some boxes; and of objects."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.bytes = {}

    def resolve_data(self, item):
        value = self.tensors[item.index.fqn]
        if item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(value)
        return cut(value, item.tensor_data.chunk)

    def resolve_tensor(self, item):
        target = cut(self.tensors[item.dest_index.fqn], item.chunk)
        for dim, (start, n) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, start, n)
        return target

    def commit_tensor(self, item, tensor):
        pass

    def load_bytes(self, item, value):
        self.bytes[item.storage_index.fqn] = value.read()


def cut(tensor, chunk):
    for dim, (start, n) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, n)
    return tensor


def grid(rng, shape):
    """Boxes that make up a shape: each dimension cut at random."""
    boxes = [((), ())]
    for n in shape:
        cuts = sorted({0, n, *(rng.randrange(n + 1) for _ in range(rng.randrange(3)))})
        pairs = [*itertools.pairwise(cuts)] or [(0, 0)]
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in pairs]
    return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]


def write_item(name, tensor, chunk):
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.shape)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def saved(folder: Path, plans, planner) -> list[segment_pb2.Manifest]:
    found = []
    for rank, plan in enumerate(plans):
        data = resolved(plan, planner)
        captured = pack(who(rank, len(plans)), 7, data, plan.planner_data)
        image = bytearray(captured.image_bytes)
        captured.write(memoryview(image))
        (folder / f"{rank}.image").write_bytes(image)
        manifest = segment_pb2.Manifest.FromString(bytes(image[: captured.manifest_bytes]))
        assert not out_of_bounds(manifest, len(image), divided=True)
        assert manifest.step == 7
        found.append((manifest, captured.manifest_bytes))
    (folder / "0.json").write_text(json.dumps([length for _, length in found]))
    return [manifest for manifest, _ in found]


@pytest.mark.parametrize("seed", range(12))
def test_any_boxes_from_any_boxes(tmp_path, seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    world = rng.randint(1, 4)
    tensors = {}
    for i in range(6):
        shape = [rng.choice([0, 1, 2, 5, 7]) for _ in range(rng.randrange(4))]
        random_bytes = torch.randint(0, 2, (*shape, 16), generator=generator, dtype=torch.uint8)
        dtype = rng.choice(DTYPES)
        whole = random_bytes.view(torch.bool if dtype == torch.bool else dtype)[..., 0]
        tensors[f"t{i}"] = whole.t() if len(shape) == 2 and rng.random() < 0.5 else whole
    tensors |= {"text": b"some object", "none": b""}
    plans = [SavePlan([], planner_data={n: (n, 0) for n in tensors}) for _ in range(world)]
    for name, value in tensors.items():
        if isinstance(value, bytes):
            item = WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
            rng.choice(plans).items.append(item)
            continue
        for chunk in grid(rng, value.shape):
            rng.choice(plans).items.append(write_item(name, value, chunk))
    saved(tmp_path, plans, Pieces(tensors))
    ask = Files(tmp_path, tmp_path / "answer")
    near = rng.randrange(world)
    found, taken = manifests(ask), Taken()
    contents = Contents(found, near)
    metadata = contents.metadata(unpacked_paths(skeletons(found, ask, taken)))
    assert metadata.planner_data == {name: (name, 0) for name in tensors}
    blank = {n: t if isinstance(t, bytes) else torch.zeros_like(t) for n, t in tensors.items()}
    planner, items = Pieces(blank), []
    for name, value in tensors.items():
        about = metadata.state_dict_metadata[name]
        if isinstance(value, bytes):
            index = MetadataIndex(name)
            items += [object_item(index)]
            continue
        assert (about.size, about.properties.dtype) == (value.shape, value.dtype)
        for chunk in grid(rng, value.shape):
            for item in create_read_items_for_chunk_list(name, about, [chunk]):
                object.__setattr__(item, "chunk", chunk)
                items.append(item)
    image = memoryview((tmp_path / f"{near}.image").read_bytes())
    for own in (None, image):
        for value in blank.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        Reads(contents, ask, near, own, taken).answer(LoadPlan(items), planner)
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                assert raw(blank[name]) == raw(value), name
            else:
                assert planner.bytes[name] == value


def raw(tensor):
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return bytes(dense.untyped_storage())


def object_item(index):
    from torch.distributed.checkpoint.planner_helpers import _create_read_item_for_byteio

    return _create_read_item_for_byteio(index, 0, index, 0, 0)


def whole_chunk(tensor):
    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)


def test_ranks_that_saved_unlike_things_under_one_name_are_told(tmp_path):
    held = [torch.ones(2), torch.ones(3)]
    plans = [SavePlan([write_item("x", t, whole_chunk(t))], planner_data={}) for t in held]

    class Each:
        def resolve_data(self, item):
            return torch.ones(item.tensor_data.size)

    found = dict(enumerate(saved(tmp_path, plans, Each())))
    with pytest.raises(StateMismatch, match=r"x: float32 \[2\], float32 \[3\]: ranks saved unlike"):
        Contents(found, 0)


def test_a_planner_that_gives_another_shape_than_it_planned_is_found_out(tmp_path):
    item = write_item("x", torch.ones(4), whole_chunk(torch.ones(4)))
    with pytest.raises(UnsupportedState, match=r"gave \[3\] of x where its plan says \[4\]"):
        resolved(SavePlan([item]), type("P", (), {"resolve_data": lambda *_: torch.ones(3)})())


def test_another_format_and_another_author_are_refused():
    with pytest.raises(StateMismatch, match="manifest format: snapshot 99"):
        Contents({0: segment_pb2.Manifest(format=99)}, 0)


def test_steps():
    assert [step_of(x) for x in (0, "7", "a/step-100", Path("b1/epoch=2-step=30"), "s3://b/c_4/")] \
        == [0, 7, 100, 30, 4]  # fmt: skip
    assert not is_step("step-100/last")
    with pytest.raises(WrongUse, match="does not end with the number"):
        step_of("best")
    with pytest.raises(WrongUse, match="negative"):
        step_of(-1)


@pytest.mark.parametrize(
    "error",
    [
        WrongUse("what", "remedy"),
        StateMismatch(["one", "two"]),
        SnapshotLost("lost", "what", "remedy"),
        ReplicasDiverged(3, ["one"]),
    ],
)
def test_an_error_is_the_same_for_the_rank_that_is_told_of_it(error):
    told = copy.copy(error)  # by the same way as pickle
    assert (type(told), str(told), vars(told)) == (type(error), str(error), vars(error))


def test_ranks_of_a_process_group_are_those_of_the_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SNAPSHOTD_RANK", "SNAPSHOTD_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    who = Place(job="j").identity()
    assert (who.rank, who.world_size, who.local_rank) == (2, 4, 1)
    who = Place(job="j", rank=0, world_size=1, local_rank=0).identity()
    assert (who.rank, who.world_size, who.local_rank) == (0, 1, 0)
