"""dcp.save in one layout, SIGKILL, dcp.load in another: real ranks and daemons, and faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.integration.damage import committed_file, flip
from tests.integration.layouts import DCP_RANK, run
from tests.unit.layout_training import WIDTH, Net, digests

#: Processes that import torch, several times: on a busy machine that alone takes minutes.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def state_bytes() -> int:
    """Of model and AdamW, once."""
    numbers = [p.numel() for p in Net(WIDTH).parameters()]
    return 3 * 4 * sum(numbers) + 4 * len(numbers)


def test_from_layout_to_layout_through_kills_a_lost_node_and_damage(cluster, tmp_path):
    nodes = cluster(parity=1, group_size=4).start(4)
    acts = ["train", "save", "train", "fail", "load"]
    first = run(nodes, 4, "fsdp", tmp_path, DCP_RANK, acts=acts)
    for rank, out in enumerate(first):
        # Rank 1 failed at step 2, and all were told; they went on from step 1.
        (text,) = out["errors"]
        assert "no memory of this" in text
        assert (out["newest"], out["note"], rank) == (1, {"step": 1, "of": "fsdp"}, rank)
        assert out["loaded"] == [out["left"]]
        assert out["taken"]["decoded"] == 0
        assert out["taken"]["local"] > state_bytes() / 5
        assert out["stored"] < state_bytes() + 60_000
    nodes[3].lose()
    moved = run(nodes[:2], 2, "tp", tmp_path, DCP_RANK, acts=["load", "train", "save"])
    for out in moved:
        assert (out["errors"], out["newest"]) == ([], 1)
        assert out["loaded"] == [first[0]["left"]]
    assert sum(out["taken"]["decoded"] for out in moved) > 0
    file = committed_file(nodes[0], "data")
    flip(file, 9000)
    acts = ["load", "train", "process"]
    back = run(nodes[:2], 2, "ddp", tmp_path, DCP_RANK, acts=acts)
    for out in back:
        assert out["loaded"] == [moved[0]["left"]]
        # What both have is stored once.
        assert out["stored"] < state_bytes() + 60_000
    command = [sys.executable, "-m", "snapshotd", "export", "--run-dir", nodes[1].run_dir,
               "--format", "dcp", tmp_path / "dcp"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    model = Net(WIDTH)
    opt = torch.optim.AdamW(model.parameters())
    state = dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True))
    state["note"] = {"step": 0, "of": ""}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert state["note"] == {"step": 3, "of": "ddp"}
    assert digests({"model": model, "opt": opt}) == back[0]["left"]
