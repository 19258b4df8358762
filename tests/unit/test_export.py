"""A state goes out as a plain checkpoint and as plain safetensors, and a checkpoint comes in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client.apply import apply
from snapshotd_client.capture import plan
from snapshotd_client.errors import StateMismatch, UnsupportedState
from snapshotd_client.export import dcp as to_dcp
from snapshotd_client.export import flat
from snapshotd_client.export.boxes import Box, box_of
from snapshotd_client.export.incoming import read_checkpoint, write_image
from snapshotd_client.export.shards import Piece, Shards, State, Tensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

#: Reads what was written where neither snapshotd nor its client can be imported.
PLAIN = """
import importlib.util, json, sys
assert importlib.util.find_spec("snapshotd") is None, "it must not be needed"
assert importlib.util.find_spec("snapshotd_client") is None, "it must not be needed"
import torch
kind, where, out = sys.argv[1:]
if kind == "dcp":
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
    found = {}
    _load_state_dict(found, storage_reader=dcp.FileSystemReader(where),
                     planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(wanted, checkpoint_id=where)
    found.update(wanted)
else:
    from safetensors import safe_open
    from safetensors.torch import load_file
    found = {k: t.clone() for k, t in load_file(where + "/state.safetensors").items()}
    with safe_open(where + "/state.safetensors", "pt") as file:
        found["objects"] = json.loads(file.metadata()["objects"])
torch.save(found, out)
"""


def read_plainly(kind: str, where: Path, out: Path) -> dict:
    """Without this package, and without what makes an editable install importable."""
    site = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({site!r})\n" + PLAIN
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", code, kind, str(where), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        cwd=out.parent,
    )
    assert ended.returncode == 0, ended.stderr
    return torch.load(out, weights_only=False)


def states(seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    more = torch.arange(5, dtype=torch.bfloat16), torch.tensor(7), torch.empty(0, 4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "half": more[0],
        "zero": more[1],
        "none": more[2],
    }


def written(tmp_path: Path, shards: list[Mapping[str, object]], **values: object) -> Shards:
    paths, lengths = [], []
    for rank, held in enumerate(shards):
        capture = plan("job", rank, len(shards), 4, held, values)
        image = bytearray(capture.image_bytes)
        capture.write(memoryview(image))
        paths.append(tmp_path / f"{rank}.image")
        paths[-1].write_bytes(image)
        lengths.append(capture.manifest_bytes)
    return Shards(paths, lengths)


def test_a_plain_checkpoint(tmp_path: Path) -> None:
    held = states()
    out = tmp_path / "out"
    counted: list[int] = []
    state = written(tmp_path, [held], seen=9).state()
    assert (state.job, state.step, state.diverged) == ("job", 4, [])
    to_dcp.write(state, out, counted.append)
    assert sum(counted) == sum(t.pieces[0].tensor.nbytes for t in state.tensors)
    found = read_plainly("dcp", out, tmp_path / "read.pt")
    for name, tensor in held["model"].state_dict().items():
        assert torch.equal(found["model"][name], tensor)
    want = held["optimizer"].state_dict()
    assert found["optimizer"]["param_groups"] == want["param_groups"]
    for key, entry in want["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(found["optimizer"]["state"][key][name], tensor)
    assert found["scheduler"] == held["scheduler"].state_dict()
    assert torch.equal(found["half"], held["half"])
    assert found["none"].shape == (0, 4)
    assert found["<values>"] == {"seen": 9}


def test_plain_safetensors(tmp_path: Path) -> None:
    held = states()
    out = tmp_path / "out"
    out.mkdir()
    flat.write(written(tmp_path, [held], seen=9).state(), out, lambda _n: None)
    found = read_plainly("safetensors", out, tmp_path / "read.pt")
    assert torch.equal(found["model.weight"], held["model"].weight)
    assert torch.equal(found["half"], held["half"])
    assert found["zero"] == 7
    assert found["none"].shape == (0, 4)
    state = held["optimizer"].state_dict()["state"]
    assert torch.equal(found["optimizer.state.0.exp_avg"], state[0]["exp_avg"])
    assert found["objects"]["<values>.seen"] == 9


def test_what_ranks_have_in_common_is_written_once_and_what_differs_by_rank(
    tmp_path: Path,
) -> None:
    one, other = states(), states()
    with torch.no_grad():
        other["half"][0] = 99
    state = written(tmp_path, [one, other]).state()
    names = {t.name for t in state.tensors}
    assert "model.weight" in names
    assert "ranks.1.model.weight" not in names
    assert {"half", "ranks.1.half"} <= names


def entry(shape: tuple[int, ...], whole: tuple[int, ...], placements: list[str], *mesh: int):
    return segment_pb2.TensorEntry(
        name="w",
        shape=shape,
        dtensor=segment_pb2.DTensorSpec(global_shape=whole, placements=placements, mesh_shape=mesh),
    )


def test_where_a_local_piece_lies() -> None:
    assert box_of(segment_pb2.TensorEntry(shape=(2, 3)), 1, 2) == Box((2, 3), (0, 0), (2, 3))
    uneven = box_of(entry((2, 4), (5, 4), ["Shard(0)"], 2), 1, 2)
    assert uneven == Box((5, 4), (3, 0), (2, 4))
    both = box_of(entry((2, 2), (4, 4), ["Shard(0)", "Shard(1)"], 2, 2), 3, 4)
    assert both == Box((4, 4), (2, 2), (2, 2))
    copy = box_of(entry((2, 4), (4, 4), ["Replicate()", "Shard(0)"], 2, 2), 2, 4)
    assert copy.offsets == (0, 0)
    with pytest.raises(UnsupportedState, match="partial sum"):
        box_of(entry((4, 4), (4, 4), ["Partial(sum)"], 2), 0, 2)
    with pytest.raises(UnsupportedState, match="2 of 4 ranks"):
        box_of(entry((2, 4), (4, 4), ["Shard(0)"], 2), 0, 4)
    with pytest.raises(UnsupportedState, match="its placement says"):
        box_of(entry((3, 4), (5, 4), ["Shard(0)"], 2), 1, 2)


def test_boxes_and_parts_of_boxes_make_the_whole(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(6, 4)
    lower = whole[3:].contiguous()
    parts = [
        Piece(1, Box((6, 4), (3, 0), (3, 4), (0, 20)), lower.view(-1)[:5]),
        Piece(2, Box((6, 4), (3, 0), (3, 4), (20, 48)), lower.view(-1)[5:]),
    ]
    pieces = [Piece(0, Box((6, 4), (0, 0), (3, 4)), whole[:3]), *parts]
    tensor = Tensor("model.w", ("model", "w"), pieces)
    state = State("job", 1, 3, [tensor], [], [])
    to_dcp.write(state, tmp_path / "dcp", lambda _n: None)
    found = {"model": {"w": torch.empty(6, 4)}}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(found["model"]["w"], whole)
    (tmp_path / "flat").mkdir()
    flat.write(state, tmp_path / "flat", lambda _n: None)
    data = (tmp_path / "flat" / flat.FILE).read_bytes()
    assert data[-whole.nbytes :] == whole.numpy().tobytes()
    lacking = Tensor("model.w", ("model", "w"), [pieces[0], parts[1]])
    with pytest.raises(StateMismatch, match="bytes 0 to 48 of it are in no shard"):
        flat.write(State("job", 1, 3, [lacking], [], []), tmp_path, lambda _n: None)


def test_a_dtype_that_safetensors_has_not(tmp_path: Path) -> None:
    state = written(tmp_path, [{"x": torch.zeros(2, dtype=torch.complex128)}]).state()
    with pytest.raises(UnsupportedState, match="complex128"):
        flat.write(state, tmp_path, lambda _n: None)


class Flat:
    """Its state looks like a module's."""

    def __init__(self) -> None:
        self.held: dict[str, object] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(3)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.held = {name: int(tensor) for name, tensor in state.items()}


def tied() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_a_checkpoint_comes_in_and_is_restored_exactly(tmp_path: Path) -> None:
    held = {**states(), "flat": Flat(), "tied": tied()}
    dcp.save(
        {n: s.state_dict() if hasattr(s, "state_dict") else s for n, s in held.items()},
        checkpoint_id=tmp_path / "dcp",
        no_dist=True,
    )
    trees = read_checkpoint(tmp_path / "dcp")
    path = tmp_path / "image"
    length = write_image(path, trees, "new", 0, 1, 3)
    fresh = {**states(seed=1), "flat": Flat(), "tied": tied()}
    fresh["half"].zero_()
    values = apply(memoryview(path.read_bytes()), length, job="new", world=1, shard=0, states=fresh)
    assert values == {}
    assert fresh["flat"].held == {"x": 3}
    assert torch.equal(fresh["tied"][1].weight, fresh["tied"][0].weight)
    assert torch.equal(fresh["tied"][1].weight, held["tied"][0].weight)
    assert torch.equal(fresh["model"].weight, held["model"].weight)
    assert torch.equal(fresh["half"], held["half"])
    want = held["optimizer"].state_dict()["state"]
    for key, entry_ in fresh["optimizer"].state_dict()["state"].items():
        assert all(torch.equal(entry_[name], want[key][name]) for name in entry_)


def test_checkpoints_that_cannot_be_a_start(tmp_path: Path) -> None:
    with pytest.raises(StateMismatch, match=r"no \.metadata"):
        read_checkpoint(tmp_path)
    dcp.save({"step": 3}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(StateMismatch, match="step: a int"):
        read_checkpoint(tmp_path / "a")
    by_name = {"optimizer": {"state": {"w": {"m": torch.ones(1)}}, "param_groups": []}}
    dcp.save(by_name, checkpoint_id=tmp_path / "b", no_dist=True)
    with pytest.raises(StateMismatch, match="by parameter names"):
        read_checkpoint(tmp_path / "b")


def test_the_program_says_what_is_wrong(tmp_path: Path) -> None:
    request = {"what": "import", "checkpoint": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "snapshotd_client.export", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "no .metadata" in json.loads(ended.stderr.splitlines()[-1])["error"]


def test_pieces_of_several_ranks_become_whole_tensors(tmp_path: Path) -> None:
    """FSDP2 on two ranks, with pieces of unequal length and empty ones."""
    command = [sys.executable, "-m", "tests.unit.export_fsdp_rank"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=150)
        assert rank.returncode == 0, said.decode()
    lengths = [int((tmp_path / f"{rank}.manifest").read_text()) for rank in range(2)]
    state = Shards([tmp_path / f"{rank}.image" for rank in range(2)], lengths).state()
    assert state.diverged == []
    (tmp_path / "flat").mkdir()
    flat.write(state, tmp_path / "flat", lambda _n: None)
    to_dcp.write(state, tmp_path / "dcp", lambda _n: None)
    whole = torch.load(tmp_path / "whole.pt")
    written_flat = read_plainly("safetensors", tmp_path / "flat", tmp_path / "read.pt")
    loaded = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert len(whole) > 20
    for name, tensor in whole.items():
        assert torch.equal(written_flat[name], tensor), name
        assert torch.equal(loaded[name], tensor), name
    assert not [n for n in written_flat if n.startswith("ranks.1.") and "<rng>" not in n]
