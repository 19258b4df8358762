"""Bytes of an image come into live memory, and what was not compared behind its copy is later."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn

from snapshotd_client import apply as apply_module
from snapshotd_client import capture, placing
from snapshotd_client.errors import InexactRestore, StateMismatch
from snapshotd_client.exact import all_same_bits, same_bits
from snapshotd_client.placing import Placing

MIB = 1 << 20


def image_of(states):
    plan = capture.plan("job", 0, 1, 1, states, {})
    image = bytearray(plan.image_bytes)
    plan.write(memoryview(image))
    return bytes(image), plan.manifest_bytes


def put_back(image, states):
    data, manifest_bytes = image
    apply_module.apply(
        memoryview(data), manifest_bytes, job="job", world=1, shard=0, states=states, on_rng=False
    )


def trained(seed: int, cls=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 700), nn.BatchNorm1d(700), nn.Linear(700, 3))
    opt = cls(model.parameters())
    model(torch.rand(4, 300)).sum().backward()
    opt.step()
    opt.zero_grad()
    return {"model": model, "opt": opt}


def tensors(states):
    moments = [t for entry in states["opt"].state.values() for t in entry.values()]
    return [*states["model"].state_dict().values(), *moments]


def bits(states):
    return [t.detach().clone() for t in tensors(states)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch):
    """The pairs that are compared after all is restored."""
    found = []

    def watch(pairs):
        pairs = [*pairs]
        found.extend(pairs)
        return all_same_bits(pairs)

    monkeypatch.setattr(apply_module, "all_same_bits", watch)
    return found


def test_plain_state_is_compared_behind_each_copy(compared):
    old, new = trained(1), trained(2)
    put_back(image_of(old), new)
    assert compared == []
    assert all(map(same_bits, bits(old), bits(new)))


def test_new_moments_are_compared_behind_each_copy(compared):
    old, new = trained(1), trained(2)
    new["opt"] = torch.optim.AdamW(new["model"].parameters())
    put_back(image_of(old), new)
    assert compared == []
    assert all(map(same_bits, bits(old), bits(new)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placing, "thread_count", lambda: threads)
    saved = [torch.rand(n) for n in (0, 1, 300_000, 7, 131_072, 131_073)]
    live = [torch.zeros_like(t) for t in saved]
    work = Placing()
    for pair in zip(live, saved, strict=True):
        work.fill(*pair)
    work.run(compare=True)
    assert all(map(same_bits, live, saved))
    assert all(map(work.known_same, live[1:], saved[1:]))
    assert not work.known_same(live[2], saved[2].clone())
    assert work.known_same(live[2][5:9], saved[2][5:9])
    assert not work.known_same(live[2][5:9], saved[2][4:8])


class Meddler:
    """Somebody's object that writes to a parameter when it is loaded."""

    def __init__(self, parameter, write):
        self.parameter, self.write = parameter, write

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.write(self.parameter)


@pytest.mark.parametrize(
    "write", [lambda p: p.add_(1), lambda p: p.data.add_(1), lambda p: p.numpy().fill(3)]
)
def test_what_others_write_afterwards_is_found(write):
    states = trained(1)
    states["late"] = Meddler(states["model"][0].weight, write)
    with pytest.raises(InexactRestore, match=r"model\.0\.weight"):
        put_back(image_of(states), states)


def test_what_others_write_before_is_written_over(compared):
    states = trained(1)
    before = bits(states)
    early = {"early": Meddler(states["model"][0].weight, lambda p: p.zero_()), **states}
    put_back(image_of(early), early)
    assert compared == []
    assert all(map(same_bits, bits(states), before))


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    ],
)
def test_a_schedule_of_torch_costs_no_second_pass(make, compared):
    def job(seed):
        states = trained(seed)
        return {**states, "schedule": make(states["opt"])}

    old, new = job(1), job(2)
    old["opt"].step()
    old["schedule"].step()
    put_back(image_of(old), new)
    assert compared == []
    assert all(map(same_bits, bits(old), bits(new)))
    assert new["schedule"].state_dict() == old["schedule"].state_dict()


def test_a_schedule_of_ones_own_is_not_trusted():
    states = trained(1)

    class Mine(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            states["model"][0].weight.data.zero_()

    states["schedule"] = Mine(states["opt"], 3)
    with pytest.raises(InexactRestore, match=r"model\.0\.weight"):
        put_back(image_of(states), states)


def test_others_see_what_was_restored_before_them():
    states = trained(1)
    weight, seen = states["model"][0].weight, []
    states["late"] = Meddler(weight, lambda p: seen.append(p.clone()))
    image, saved = image_of(states), weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    put_back(image, states)
    assert torch.equal(seen[0], saved)


def test_a_load_hook_of_an_optimizer_is_not_trusted():
    states = trained(1)
    weight = states["model"][0].weight

    def meddle(opt):
        opt.state[weight]["exp_avg"].zero_()
        weight.data.zero_()

    states["opt"].register_load_state_dict_post_hook(meddle)
    with pytest.raises(InexactRestore):
        put_back(image_of(states), states)


def test_a_byte_that_a_copy_gets_wrong_is_found(monkeypatch: pytest.MonkeyPatch):
    old, new = trained(1), trained(2)
    wrong = new["model"][2].weight

    def copy(target, source, nbytes):
        memmove(target, source, nbytes)
        if target == wrong.data_ptr():
            ctypes.memset(target + nbytes - 1, 0x55, 1)

    image, memmove = image_of(old), ctypes.memmove
    monkeypatch.setattr(placing.ctypes, "memmove", copy)
    with pytest.raises(InexactRestore, match=r"model\.2\.weight"):
        put_back(image, new)


class Pair(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)


def test_memory_that_two_copies_want_differently_is_found():
    old = {"model": Pair(torch.rand(200), torch.rand(200))}
    whole = torch.rand(300)
    new = {"model": Pair(whole[:200], whole[100:])}
    with pytest.raises((InexactRestore, StateMismatch)):
        put_back(image_of(old), new)


def test_copies_that_overlap_are_known_where_they_agree():
    saved, live = torch.rand(300), torch.zeros(300)
    work = Placing()
    work.give(live[:200], saved[:200])
    work.give(live[100:], saved[100:])
    work.run(compare=True)
    assert work.known_same(live[:200], saved[:200])
    work.give(live[50:60], saved[:10])
    work.run(compare=True)
    assert not work.known_same(live[:200], saved[:200])
    assert not work.known_same(live[50:60], saved[:10])


def test_versions_move_as_with_a_copy_of_torch():
    old, new = trained(1), trained(2)
    weight = new["model"][0].weight
    loss = (weight * weight).sum()
    put_back(image_of(old), new)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_extra_state_that_is_not_expected_is_told(monkeypatch: pytest.MonkeyPatch):
    old, new = trained(1), trained(2)
    monkeypatch.setattr(nn.Linear, "get_extra_state", lambda _: 3)
    image = image_of(old)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="_extra_state"):
        put_back(image, new)


@pytest.mark.parametrize("form", ["strided", "conjugate", "channels last", "expanded"])
def test_what_is_not_plain_memory_is_copied_by_torch_and_compared(form, compared):
    def make(value):
        base = torch.full((2, 4, 4, 6), value, dtype=torch.complex64)
        return {
            "strided": base[..., ::2],
            "conjugate": base.conj(),
            "channels last": base.contiguous(memory_format=torch.channels_last),
            "expanded": base[:1].expand(3, 4, 4, 6),
        }[form]

    old, new = make(1 + 2j), make(5 + 1j)
    put_back(image_of({"t": old}), {"t": new})
    assert len(compared) == 1
    assert torch.equal(old, new)
