"""What was saved in one layout comes back in another, byte for byte."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from snapshotd_client.about import box_of
from snapshotd_client.exact import same_bits
from snapshotd_client.leaves import local_piece
from snapshotd_client.names import Names, unwrapped
from snapshotd_client.relayout import Relayout
from snapshotd_client.surveying import survey
from tests.unit.relaying import (
    executed,
    image_of,
    manifests_of,
    mesh_of,
    rank_of,
    relaid,
    spread,
    who,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool, torch.complex64]
MESHES = [(1,), (2,), (3,), (4,), (6,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]


@st.composite
def wholes(draw):
    """Some whole tensors by name, of all shapes."""
    made = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        count = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        made[f"t{i}"] = raw.view(dtype).reshape(shape)
    return made


@st.composite
def layouts(draw, names):
    """A mesh, and how each tensor is spread over it."""
    mesh = draw(st.sampled_from(MESHES))
    placed = {}
    for name, dims in names.items():
        kinds = [Replicate(), *(Shard(d) for d in range(dims))]
        placed[name] = [draw(st.sampled_from(kinds)) for _ in mesh]
    return mesh, placed


def states_of(full, layout):
    shape, placed = layout
    mesh = mesh_of(shape)
    return {name: spread(tensor, mesh, placed[name]) for name, tensor in full.items()}


@st.composite
def moves(draw):
    full = draw(wholes())
    dims = {name: tensor.dim() for name, tensor in full.items()}
    return full, draw(layouts(dims)), draw(layouts(dims))


def saved(full, layout):
    world = math.prod(layout[0])
    images = {}
    for rank in range(world):
        with rank_of(rank, world):
            images[rank] = image_of(states_of(full, layout), rank, world, {"seen": rank})
    return images


@settings(max_examples=60, deadline=None)
@given(moves())
def test_any_layout_into_any_other(move):
    full, old, new = move
    images = saved(full, old)
    world = math.prod(new[0])
    blank = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
    for rank in range(world):
        with rank_of(rank, world):
            states = states_of(blank, new)
            values, plan, _ = relaid(images, states, rank, world)
            assert values == {"seen": rank % len(images)}
            expected = states_of(full, new)
            for name, tensor in expected.items():
                assert same_bits(local_piece(states[name]), local_piece(tensor)), name
            wanted = sum(local_piece(t).nbytes for t in expected.values())
            rest = plan.ranges.nbytes - wanted
            # Beside these, the generators only.
            assert 0 <= rest < 16_000


class Net(nn.Module):
    """Uneven sizes, tied weights, buffers that batches change, extra state."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls, "seen": torch.tensor([self.calls])}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def wrap(kind, model, world):
    """The model as it is trained in that layout; what Snapshotter is given."""
    match kind:
        case "plain":
            return model
        case "ddp":
            return nn.parallel.DistributedDataParallel(model)
        case "compiled ddp":
            return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
        case "fsdp":
            for layer in model.body:
                fully_shard(layer, mesh=mesh_of((world,)))
            fully_shard(model, mesh=mesh_of((world,)))
        case "checkpointed fsdp":
            model.body = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.body)
            fully_shard(model, mesh=mesh_of((world,)))
        case "hsdp":
            fully_shard(model, mesh=mesh_of((2, world // 2)))
        case "tp":
            plan = {"body.1": ColwiseParallel(), "body.2": RowwiseParallel()}
            parallelize_module(model, mesh_of((world,)), plan)
        case "tp in fsdp":
            mesh = mesh_of((world // 2, 2), "dp", "tp")
            dp, tp = mesh.mesh_dim_names
            plan = {"body.1": ColwiseParallel(), "body.2": RowwiseParallel()}
            parallelize_module(model, mesh[tp], plan)
            fully_shard(model, mesh=mesh[dp])
    return model


def fill(tensor, name):
    """The piece of the one tensor of that name that this rank has."""
    whole = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name) * 97))
    whole = (whole * 1000 + hash_of(name)).to(tensor.dtype)
    offset = box_of(tensor)[1]
    piece = local_piece(tensor)
    slices = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
    with torch.no_grad():
        piece.copy_(whole[slices])


def hash_of(name):
    return sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 1009


def build(kind, world, *, filled):
    torch.manual_seed(world)
    model = wrap(kind, Net(), world)
    names = Names({"model": model}).parameters
    opt = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.5 if filled else 0.1,
    )
    if filled:
        for p in model.parameters():
            fill(p, names[id(p)])
            opt.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.empty_like(p.detach()),
                "exp_avg_sq": torch.empty_like(p.detach()),
            }
            for key in ("exp_avg", "exp_avg_sq"):
                fill(opt.state[p][key], names[id(p)] + key)
        for name, buffer in model.named_buffers():
            fill(buffer, "model." + unwrapped(name))
        net = next(m for m in model.modules() if isinstance(m, Net))
        net.calls = 41
    return {"model": model, "opt": opt}


LAYOUTS = [
    ("ddp", 4), ("fsdp", 4), ("plain", 1), ("ddp", 2), ("compiled ddp", 3), ("fsdp", 3),
    ("checkpointed fsdp", 2), ("hsdp", 4), ("tp", 2), ("tp in fsdp", 4), ("fsdp", 6), ("tp", 1),
]  # fmt: skip


#: Each as the old one with a few as the new one, so that all are both.
MOVES = [
    (old, LAYOUTS[(i + step) % len(LAYOUTS)]) for i, old in enumerate(LAYOUTS) for step in (1, 4, 7)
]


@pytest.mark.parametrize(("old", "new"), MOVES, ids=str)
def test_a_model_and_its_optimizer_into_another_layout(old, new):
    images = {}
    for rank in range(old[1]):
        with rank_of(rank, old[1]):
            told = {"replicas": range(old[1])} if old == ("tp", 2) else {}
            images[rank] = image_of(build(*old, filled=True), rank, old[1], {"at": rank}, **told)
    for rank in range(new[1]):
        with rank_of(rank, new[1]):
            expected, states = build(*new, filled=True), build(*new, filled=False)
            values, _, problems = relaid(images, states, rank, new[1])
            assert problems == []
            assert values == {"at": rank % old[1]}
            pairs = zip(expected["model"].parameters(), states["model"].parameters(), strict=True)
            for a, b in pairs:
                assert same_bits(a, b)
                ours, theirs = expected["opt"].state[a], states["opt"].state[b]
                assert ours.keys() == theirs.keys()
                for key, tensor in ours.items():
                    assert isinstance(tensor, DTensor) == isinstance(theirs[key], DTensor)
                    assert same_bits(tensor, theirs[key])
            for a, b in zip(expected["model"].buffers(), states["model"].buffers(), strict=True):
                assert same_bits(a, b)
            assert [g["lr"] for g in states["opt"].param_groups] == [0.5, 0.5]
            assert next(m for m in states["model"].modules() if isinstance(m, Net)).calls == 41


def plain(**sizes):
    """A model of linear layers by name, its optimizer stepped once, and a bare tensor."""
    model = nn.ModuleDict({name: nn.Linear(3, n) for name, n in sizes.items()})
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        opt.state[p] = {"momentum_buffer": torch.rand_like(p)}
    return {"model": model, "opt": opt, "mask": torch.rand(4)}


def images_of(world, make=plain, told=True, **sizes):
    images = {}
    for rank in range(world):
        torch.manual_seed(3 if told else rank)
        with rank_of(rank, world):
            options = {"replicas": range(world)} if told else {}
            images[rank] = image_of(make(**sizes), rank, world, {}, **options)
    return images


BAD = {
    "missing": ({"a": 2}, {"a": 2, "b": 2}, ["model.b.weight: only in this run (float32 [2, 3])"]),
    "surplus": ({"a": 2, "b": 2}, {"a": 2},
                ["model.b.bias: only in the snapshot (float32 [2])"]),
    "shape": ({"a": 2}, {"a": 4},
              ["model.a.weight: snapshot float32 [2, 3], this run float32 [4, 3]"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_passed_over_if_wanted(case):
    old, new, expected = BAD[case]
    images = images_of(2, **old)
    torch.manual_seed(3)
    was = plain(**old)
    states = plain(**new)
    kept = {n: p.clone() for n, p in states["model"].named_parameters()}
    with rank_of(0, 1):
        _, _, problems = relaid(images, states, 0, 1, strict=False)
    assert set(expected) <= set(problems), problems
    before = dict(was["model"].named_parameters())
    for name, now in states["model"].named_parameters():
        fits = name in before and before[name].shape == now.shape
        assert same_bits(now, before[name] if fits else kept[name])
    assert same_bits(states["mask"], was["mask"])


def test_a_tensor_that_groups_of_ranks_have_for_themselves_is_not_picked_from_one_of_them():
    """As experts: ranks 0 and 1 hold one under a name under which 2 and 3 hold another."""
    groups = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}
    images = {
        rank: image_of({"w": torch.full((300,), float(rank // 2))}, rank, 4, replicas=group)
        for rank, group in groups.items()
    }
    with rank_of(0, 2):
        _, _, problems = relaid(images, {"w": torch.zeros(300)}, 0, 2, strict=False)
    assert any(p.startswith("w: ranks 0, 1, 2, 3 saved one each") for p in problems)
    with rank_of(3, 4):
        states = {"w": torch.zeros(300)}
        assert relaid(images, states, 3, 4)[2] == []
        assert states["w"].tolist() == [1.0] * 300


def test_a_tensor_that_each_rank_has_for_itself_is_not_picked_from_one_of_them():
    images = images_of(2, told=False, a=2)
    with rank_of(0, 1):
        _, _, problems = relaid(images, plain(a=2), 0, 1, strict=False)
    assert any(p.startswith("mask: ranks 0, 1 saved one each") for p in problems)
    # In as many ranks each has its own.
    with rank_of(1, 2):
        states = plain(a=2)
        assert relaid(images, states, 1, 2)[2] == []
        torch.manual_seed(1)
        assert same_bits(states["mask"], plain(a=2)["mask"])


def test_a_piece_that_no_shard_has():
    whole = torch.rand(8, 4)
    images = {}
    for rank in range(2):
        with rank_of(rank, 2):
            images[rank] = image_of({"t": spread(whole, mesh_of((2,)), [Shard(0)])}, rank, 2)
    # As after an update on one rank only: the first rank's piece is of another tensor.
    image, length = images[0]
    manifest = manifests_of(images)[0]
    manifest.tensors[0].fqn = "other"
    images[0] = image, length
    with rank_of(0, 1):
        states = {"t": torch.zeros(8, 4)}
        manifests = {0: manifest, 1: manifests_of(images)[1]}
        relayout = Relayout(manifests, states, who(0, 1), survey(states))
        ranges, places, total = relayout.skeletons()
        read = executed(ranges, {r: i for r, (i, _) in images.items()}, total)
        relayout.plan({s: bytes(read[at : at + n]) for s, (at, n) in places.items()})
    assert relayout.problems == ["t: 16 of 32 elements are in no shard"]


def test_a_layout_that_cannot_hold_the_state():
    whole = torch.rand(8, 4)
    with rank_of(0, 1):
        images = {0: image_of({"t": whole}, 0, 1)}
    with rank_of(0, 4):
        mesh = mesh_of((2, 2))
        local = torch.zeros(2, 4)
        # Rows 0 and 2 of the first half: no box.
        spread_thin = [Shard(0), _StridedShard(0, split_factor=2)]
        states = {"t": DTensor.from_local(local, mesh, spread_thin, run_check=False)}
        _, _, problems = relaid(images, states, 0, 4, strict=False)
    assert problems == ["t: this run spreads it so that a rank's piece is no box of the whole"]


def test_other_objects_and_averages_come_along():
    class Average:
        def __init__(self, model):
            self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}
            self.updates = 0

        def state_dict(self):
            return {"shadow": self.shadow, "updates": self.updates}

        def load_state_dict(self, state):
            self.shadow, self.updates = state["shadow"], state["updates"]

    def make(kind, world, *, filled):
        states = build(kind, world, filled=filled)
        states["average"] = Average(states["model"])
        states["schedule"] = torch.optim.lr_scheduler.StepLR(states["opt"], 2)
        states["scaler"] = torch.amp.GradScaler("cpu", init_scale=8.0)
        states["swa"] = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
        if filled:
            states["average"].updates = 5
            states["schedule"].last_epoch = 3
            states["scaler"]._init_growth_tracker = 4
            with torch.no_grad():
                states["swa"].module.weight.fill_(2.5)
        return states

    images = {}
    for rank in range(3):
        with rank_of(rank, 3):
            states = make("fsdp", 3, filled=True)
            told = {"replicas": {"swa": range(3)}}
            images[rank] = image_of(states, rank, 3, {}, **told)
    for rank in range(2):
        with rank_of(rank, 2):
            expected = make("fsdp", 2, filled=True)
            states = make("fsdp", 2, filled=False)
            assert relaid(images, states, rank, 2)[2] == []
            for name, tensor in expected["average"].shadow.items():
                assert same_bits(states["average"].shadow[name], tensor)
            assert states["average"].updates == 5
            assert states["schedule"].last_epoch == 3
            assert states["scaler"].state_dict() == expected["scaler"].state_dict()
            assert states["swa"].module.weight.tolist() == [[2.5] * 2] * 2


def test_state_of_a_parameter_that_does_not_fit_is_left_out_with_it():
    def made(width, dtype=torch.float32):
        last = nn.Linear(width, 4, dtype=dtype)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, width), last)
        return {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.01)}

    def step(states):
        for parameter in states["model"].parameters():
            parameter.grad = torch.ones_like(parameter)
        states["opt"].step()

    saved = made(4)
    step(saved)
    images = {0: image_of(saved, 0, 1)}
    for now in (made(5), made(1), made(4, torch.float64)):
        _, _, problems = relaid(images, now, 0, 1, strict=False)
        assert "opt: state of model.2.weight: its parameter does not fit" in problems
        first, *_, last = now["model"].parameters()
        assert torch.equal(first, next(saved["model"].parameters()))
        assert now["opt"].state[first]["step"] == 1
        assert (last in now["opt"].state) == (last.dtype == torch.float32)
        step(now)
