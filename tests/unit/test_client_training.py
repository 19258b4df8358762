"""A run that is captured and applied to fresh objects trains on exactly as it would have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from snapshotd_client import apply, capture
from snapshotd_client.exact import same_bits
from snapshotd_client.leaves import walk


def image_of(states, values=None):
    plan = capture.plan("job", 0, 1, 1, states, values or {})
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    return bytes(image), plan.manifest_bytes


def put_back(image, states):
    return apply.apply(memoryview(image[0]), image[1], job="job", world=1, shard=0, states=states)


class Net(nn.Module):
    """Tied embedding, dropout, batch statistics, extra state, an expanded buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1).expand(8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls, "seen": [torch.tensor(self.calls)]}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, tokens):
        self.calls += 1
        return self.head(self.body(self.embed(tokens)) * self.scale)


class Loader:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.given = 0

    def __next__(self):
        self.given += 1
        return torch.randint(0, 11, (16,), generator=self.generator)

    def state_dict(self):
        return {"given": self.given, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.given = state["given"]
        self.generator.set_state(state["generator"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, history_size=3, max_iter=3),
}


def build(optimizer, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return {
        "model": model,
        "opt": opt,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20),
        "loader": Loader(),
    }


def train(states, steps):
    model, opt = states["model"], states["opt"]
    losses = []
    for _ in range(steps):
        tokens = next(states["loader"])

        def closure(tokens=tokens):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens).float(), tokens)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
        states["scheduler"].step()
    return losses


def everything(states):
    return {
        name: tensor for name, tensor, _ in walk({k: v.state_dict() for k, v in states.items()}, "")
    }


def assert_same(a, b):
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []
    assert repr(a["opt"].state_dict()["param_groups"]) == repr(
        b["opt"].state_dict()["param_groups"]
    )
    assert a["scheduler"].get_last_lr() == b["scheduler"].get_last_lr()


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(optimizer, used):
    first = build(optimizer, seed=1)
    train(first, 5)
    image = image_of(first, {"tokens_seen": 80})
    expected = train(first, 5)

    second = build(optimizer, seed=2)
    if used:
        train(second, 2)
    weight = second["model"].embed.weight
    address = weight.data_ptr()
    assert put_back(image, second) == {"tokens_seen": 80}
    assert second["model"].embed.weight is weight
    assert weight.data_ptr() == address
    assert second["model"].head.weight is weight
    assert second["model"].calls == (5 if optimizer != "lbfgs" else second["model"].calls)
    assert train(second, 5) == expected
    assert_same(first, second)


def test_existing_optimizer_tensors_are_kept():
    states = build("adamw", seed=1)
    train(states, 2)
    image = image_of(states)
    train(states, 2)
    state = states["opt"].state[states["model"].embed.weight]
    before = dict(state)
    put_back(image, states)
    after = states["opt"].state[states["model"].embed.weight]
    assert all(after[key] is before[key] for key in ("exp_avg", "exp_avg_sq", "step"))
    assert after["step"].item() == 2


def test_fp32_moments_of_bf16_parameters_are_not_rounded():
    def make():
        model = nn.Linear(4, 4, dtype=torch.bfloat16)
        return {"model": model, "opt": torch.optim.AdamW(model.parameters())}

    first, second = make(), make()
    for p in first["model"].parameters():
        first["opt"].state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.rand(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
            "note": "a string",
        }
    put_back(image_of(first), second)
    for p, q in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        one, two = first["opt"].state[p], second["opt"].state[q]
        assert two["exp_avg"].dtype == torch.float32
        assert all(same_bits(one[k], two[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
        assert two["note"] == "a string"


def test_empty_optimizer_state_comes_back_empty():
    first, second = build("adamw", 1), build("adamw", 2)
    image = image_of(first)
    train(second, 1)
    put_back(image, second)
    assert second["opt"].state_dict()["state"] == {}


def test_groups_come_back_with_extra_keys():
    def make(lr):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        groups = [{"params": m.parameters(), "lr": lr, "tag": f"{lr}"} for m in model]
        return {"model": model, "opt": torch.optim.AdamW(groups, betas=(lr, 0.5))}

    first, second = make(0.1), make(0.2)
    put_back(image_of(first), second)
    for group in second["opt"].param_groups:
        assert (group["lr"], group["tag"], group["betas"]) == (0.1, "0.1", (0.1, 0.5))


def test_optimizer_state_that_shares_the_models_memory_shares_it_again():
    def make():
        model = nn.Linear(3, 3)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "opt": opt}

    first, second = make(), make()
    weight = first["model"].weight
    flat = torch.arange(6.0)
    first["opt"].state[weight] = {"alias": weight.detach()[1:], "a": flat[:4], "b": flat[2:]}
    put_back(image_of(first), second)
    state = second["opt"].state[second["model"].weight]
    assert same_bits(second["model"].weight, weight)
    assert state["alias"].data_ptr() == second["model"].weight[1:].data_ptr()
    assert state["a"][2:].data_ptr() == state["b"].data_ptr()
    assert state["b"].tolist() == [2, 3, 4, 5]


def test_a_grad_scaler_on_cpu():
    def make():
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    first, second = make(), make()
    weight = torch.ones(2, requires_grad=True)
    opt = torch.optim.SGD([weight], lr=0.1)
    for _ in range(3):
        first.scale((weight * 2).sum()).backward()
        first.step(opt)
        first.update()
    put_back(image_of({"scaler": first}), {"scaler": second})
    assert first.state_dict() == second.state_dict()
    assert first.get_scale() == second.get_scale() == 16.0


def test_compiled_and_checkpointed_modules_keep_working():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def make():
        inner = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Dropout(0.5), nn.Linear(4, 1))
        model = torch.compile(inner, backend="eager")
        return {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.1)}

    def steps(states):
        for _ in range(3):
            states["opt"].zero_grad()
            states["model"](torch.ones(2, 4)).sum().backward()
            states["opt"].step()

    first, second = make(), make()
    steps(first)
    image = image_of(first)
    steps(first)
    steps(second)
    put_back(image, second)
    steps(second)
    for a, b in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert same_bits(a, b)
    assert checkpoint(lambda x: x, torch.ones(1), use_reentrant=False).item() == 1


RANK = Path(__file__).with_name("client_fsdp_rank.py")


def test_fsdp2_on_two_ranks(tmp_path):
    """Each rank captures its own shard and applies it to a fresh model and optimizer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", RANK, str(rank), tmp_path / "store"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
