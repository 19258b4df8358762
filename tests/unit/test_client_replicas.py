"""What several ranks hold is divided among them, evenly, and only where that is known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import Replicate, Shard

from snapshotd_client import WrongUse, capture
from snapshotd_client.names import Names
from snapshotd_client.replicas import Replicas
from snapshotd_client.shares import UNIT_BYTES, share
from tests.unit.relaying import image_of, mesh_of, rank_of, spread

RANK = Path(__file__).with_name("client_replica_rank.py")


def test_replicas_on_four_ranks(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", RANK, str(rank), tmp_path / "store"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(outputs)


@given(st.integers(0, 5000), st.integers(1, 9), st.text(max_size=5))
def test_shares_cover_a_piece_and_are_even(nbytes, count, name):
    shares = sorted(share(nbytes, index, count, name) for index in range(count))
    assert [start for start, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert shares[-1][1] == nbytes
    lengths = [end - start for start, end in shares]
    assert max(lengths) - min(lengths) < 2 * UNIT_BYTES
    assert all(start % UNIT_BYTES == 0 or start == nbytes for start, _ in shares)


def test_many_small_pieces_are_even_to_one_percent():
    total = [sum(b - a for a, b in (share(2100, i, 4, f"layer.{n}") for n in range(2000)))
             for i in range(4)]  # fmt: skip
    assert max(total) / min(total) < 1.01


def test_plain_tensors_of_several_ranks_are_never_taken_for_the_same():
    with rank_of(1, 4):
        plan = capture.plan("job", 1, 4, 1, {"model": nn.Linear(100, 100)}, {})
        assert not any(e.HasField("part") for e in plan.manifest.extents)
        told = capture.plan("job", 1, 4, 1, {"model": nn.Linear(100, 100)}, {}, range(4))
        assert told.image_bytes < plan.image_bytes / 2


def test_a_dtensor_is_divided_among_those_it_is_replicated_over():
    whole = torch.rand(64, 64)
    with rank_of(5, 8):
        mesh = mesh_of((2, 2, 2))
        tensor = spread(whole, mesh, [Replicate(), Shard(0), Replicate()])
        plan = capture.plan("job", 5, 8, 1, {"t": tensor}, {})
        (described,) = [e for e in plan.manifest.extents if e.HasField("part")]
        assert described.part.whole == 64 * 64 * 4 // 2
        assert described.bytes == described.part.whole // 4
        # Rank 5 is at (1, 0, 1); its holders differ in the first and the last.
        assert [list(s.ranks) for s in plan.manifest.replica_sets] == [[0, 1, 4, 5]]


def test_what_a_value_refers_to_is_stored_whole():
    whole = torch.rand(64, 64)
    with rank_of(0, 2):
        tensor = spread(whole, mesh_of((2,)), [Replicate()])
        image, _ = image_of({"t": tensor}, 0, 2, {"same": tensor})
        assert len(image) > whole.nbytes


@pytest.mark.parametrize("wrong", [[0, 2], [0, 9], "abc", {"other": [0, 1]}], ids=str)
def test_replicas_that_cannot_be(wrong):
    with pytest.raises(WrongUse):
        Replicas({"model": nn.Linear(1, 1)}, wrong, 1, 4)


def test_other_optimizers_may_divide_their_state_themselves():
    class Own(torch.optim.SGD):
        pass

    with rank_of(0, 2):
        model = nn.parallel.DistributedDataParallel(nn.Linear(30, 30))
        opt = Own(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            opt.state[parameter] = {"momentum_buffer": torch.rand(parameter.shape)}
        plan = capture.plan("job", 0, 2, 1, {"model": model, "opt": opt}, {})
        parts = {t.owner for t in plan.manifest.tensors
                 if plan.manifest.extents[t.extent].HasField("part")}  # fmt: skip
        assert parts == {"model"}


def test_names_do_not_tell_how_a_module_is_wrapped():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)  # a name like any other

    def names(model):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for p in model.parameters():
            opt.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        plan = capture.plan("job", 0, 1, 1, {"net": model, "opt": opt}, {})
        return sorted(t.fqn for t in plan.manifest.tensors if t.owner in ("net", "opt"))

    def make():
        return nn.Sequential(nn.Linear(2, 2), Held())

    plain = names(make())
    assert plain == [
        "net.0.bias", "net.0.weight", "net.1.module.bias", "net.1.module.weight",
        "opt.state.net.0.bias.momentum_buffer", "opt.state.net.0.weight.momentum_buffer",
        "opt.state.net.1.module.bias.momentum_buffer",
        "opt.state.net.1.module.weight.momentum_buffer",
    ]  # fmt: skip
    assert names(torch.compile(make(), backend="eager")) == plain
    wrapped = make()
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    assert names(wrapped) == plain
    with rank_of(0, 1):
        assert names(nn.parallel.DistributedDataParallel(make())) == plain
        both = torch.compile(nn.parallel.DistributedDataParallel(wrapped), backend="eager")
        assert names(both) == plain


def test_names_are_those_of_torchs_own_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 1))
    model = torch.compile(model, backend="eager")
    opt = torch.optim.AdamW(model.parameters())
    theirs, _ = get_state_dict(model, opt)
    ours = Names({"model": model}).parameters.values()
    assert {f"model.{name}" for name in theirs} == set(ours)
