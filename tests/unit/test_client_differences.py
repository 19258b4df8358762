"""Each way in which a run may differ from the snapshot has its sentence, and nothing is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import apply, capture
from snapshotd_client.errors import StateMismatch


def states_of(*, bias=True, width=3, dtype=torch.float32, tied=False, **more):
    model = nn.Sequential(nn.Linear(3, width, bias=bias, dtype=dtype), nn.Linear(3, 3, bias=False))
    if tied:
        model[1].weight = model[0].weight
    parameters = list(model.parameters())
    opt = more.pop("opt", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))(parameters)
    return {"model": model, "opt": opt, "mask": torch.ones(2), **more}


def image_of(states):
    plan = capture.plan("job", 0, 2, 4, states, {})
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    return image, plan.manifest_bytes


def refusal(image, states, **changes):
    """The differences; proves that no byte, no object and no generator moved."""
    arguments = {"job": "job", "world": 2, "shard": 0} | changes
    before = image_of(states)
    with pytest.raises(StateMismatch) as caught:
        apply.apply(memoryview(image[0]), image[1], states=states, **arguments)
    assert image_of(states) == before
    assert "No live state was changed" in str(caught.value)
    return list(caught.value.differences)


def split_groups(p):
    return torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], lr=0.1, momentum=0.9)


CASES = {
    "shape": (
        {"width": 4},
        ["model.0.weight: snapshot float32 [3, 3], this run float32 [4, 3]"],
    ),
    "dtype": (
        {"dtype": torch.bfloat16},
        ["model.0.bias: snapshot float32 [3], this run bfloat16 [3]"],
    ),
    "missing": ({"bias": False}, ["model.0.bias: only in the snapshot (float32 [3])"]),
    "tied": ({"tied": True}, ["model.0.weight, model.1.weight: one memory in this run only"]),
    "extra state": ({"ema": torch.ones(1)}, ["ema: only in this run (tensor)"]),
    "kind": ({"mask": nn.Linear(1, 1)}, ["mask: snapshot tensor, this run module"]),
    "mask shape": ({"mask": torch.ones(3)}, ["mask: snapshot float32 [2], this run float32 [3]"]),
    "optimizer": (
        {"opt": torch.optim.AdamW},
        ["opt: snapshot SGD, this run AdamW"],
    ),
    "groups": ({"opt": split_groups}, ["opt: parameter groups: snapshot 1, this run 2"]),
    "parameters": (
        {"opt": lambda p: torch.optim.SGD(p[:2], lr=0.1)},
        ["opt: parameter group 0: parameters: snapshot 3, this run 2"],
    ),
    "order": (
        {"opt": lambda p: torch.optim.SGD([p[2], p[1], p[0]], lr=0.1)},
        [
            "opt: parameter group 0, parameter 0: snapshot model.0.weight: float32 [3, 3], "
            "this run model.1.weight: float32 [3, 3]"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_named(case):
    changes, expected = CASES[case]
    found = refusal(image_of(states_of()), states_of(**changes))
    assert set(expected) <= set(found), found


def test_a_name_that_is_gone():
    live = states_of()
    del live["mask"]
    assert refusal(image_of(states_of()), live) == ["mask: only in the snapshot (tensor)"]


def test_an_extra_parameter():
    found = refusal(image_of(states_of(bias=False)), states_of())
    assert "model.0.bias: only in this run (float32 [3])" in found


def test_identity():
    image = image_of(states_of())
    assert refusal(image, states_of(), job="other", world=4, shard=1) == [
        "job: snapshot 'job', this run 'other'",
        "world size: snapshot 2, this run 4",
        "shard: snapshot 0, this rank asks for 1",
    ]


def test_another_format_and_no_manifest_at_all():
    image, manifest_bytes = image_of(states_of())
    manifest = segment_pb2.Manifest.FromString(bytes(image[:manifest_bytes]))
    manifest.format = 77
    assert refusal((manifest.SerializeToString(), manifest.ByteSize()), states_of()) == [
        "manifest format: snapshot 77, this client reads 3"
    ]
    assert "cannot be read" in refusal((b"\xff" * 64, 64), states_of())[0]


def test_long_lists_are_cut():
    def deep(n):
        return {"model": nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(n))}

    image = image_of(deep(40))
    with pytest.raises(StateMismatch) as caught:
        apply.apply(memoryview(image[0]), image[1], job="job", world=2, shard=0, states=deep(5))
    assert len(caught.value.differences) == 35
    assert "35 difference(s)" in str(caught.value)
    assert "... and 15 more" in str(caught.value)
    assert str(caught.value).count("only in the snapshot") == 20
