"""One rank of the FSDP2 test: train, capture, apply to fresh objects, train on, compare."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from snapshotd_client import apply, capture
from snapshotd_client.errors import StateMismatch
from snapshotd_client.exact import same_bits
from snapshotd_client.overlap import Watch
from snapshotd_client.predicting import predict_image_bytes
from tests.unit.ranks import leave


def build(mesh, seed, width=10):
    torch.manual_seed(seed)
    # 5 and 1 do not divide by two: one rank holds a shorter, the other an empty piece.
    model = nn.Sequential(
        nn.Linear(6, width), nn.Dropout(0.4), nn.Linear(width, 5), nn.Linear(5, 1)
    )
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.01)}


def train(states, steps):
    for _ in range(steps):
        states["opt"].zero_grad()
        states["model"](torch.rand(4, 6)).square().mean().backward()
        states["opt"].step()


def pieces(states):
    parameters = list(states["model"].parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    moments = [states["opt"].state[p][k] for p in parameters for k in ("exp_avg", "exp_avg_sq")]
    assert all(isinstance(m, DTensor) for m in moments)
    return parameters + moments + [states["opt"].state[p]["step"] for p in parameters]


def image_of(plan):
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    return image


def check_kept_plans(states, rank):
    """A plan is good for later steps, and gives the bytes of a new one."""
    planner = capture.Planner("job", rank, 2, states)
    first = planner.plan(4, {})
    train(states, 1)
    watch = Watch(first.watched)
    second = planner.plan(5, {})
    assert second.resting is first.resting
    assert second.resting.nbytes
    assert image_of(second) == image_of(capture.plan("job", rank, 2, 5, states, {}))
    assert not watch.moved()
    train(states, 1)
    assert watch.moved()
    model = states["model"]
    for change in (model.unshard, model.reshard, model.unshard, lambda: turn(states)):
        change()
        image = image_of(planner.plan(6, {}))
        assert image == image_of(capture.plan("job", rank, 2, 6, states, {}))
    turn(states)


def copies(mesh):
    """Other objects, trained a little."""
    states = build(mesh, seed=5)
    train(states, 2)
    return states


def turn(states):
    """The first moment of one weight in another memory, its local piece alone."""
    moment = states["opt"].state[states["model"][0].weight]["exp_avg"]
    moment._local_tensor = moment._local_tensor.clone()


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    first = build(mesh, seed=1)
    predicted = predict_image_bytes(first)
    torch.manual_seed(100 + rank)
    train(first, 3)
    plan = capture.plan("job", rank, 2, 3, first, {"averaged": first["model"][0].weight})
    assert plan.image_bytes <= predicted + 8192, (plan.image_bytes, predicted)
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    train(first, 3)
    with torch.random.fork_rng():
        check_kept_plans(copies(mesh), rank)

    def put_back(states):
        return apply.apply(
            memoryview(image), plan.manifest_bytes, job="job", world=2, shard=rank, states=states
        )

    second = build(mesh, seed=2)
    values = put_back(second)
    assert isinstance(values["averaged"], DTensor)
    assert same_bits(values["averaged"], second["model"][0].weight)
    train(second, 3)
    assert all(same_bits(a, b) for a, b in zip(pieces(first), pieces(second), strict=True))
    # Into objects with state, in place.
    kept = second["opt"].state[second["model"][0].weight]["exp_avg"]
    put_back(second)
    assert second["opt"].state[second["model"][0].weight]["exp_avg"] is kept
    train(second, 3)
    assert all(same_bits(a, b) for a, b in zip(pieces(first), pieces(second), strict=True))
    try:
        put_back(build(mesh, seed=3, width=12))
    except StateMismatch as error:
        assert "model.0.weight: snapshot DTensor float32 [10, 6] as Shard(0)" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("another width was accepted")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
