"""A state goes out as a plain checkpoint and as plain safetensors, and a checkpoint comes in."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from snapshotd_client.apply import apply
from snapshotd_client.capture import plan
from snapshotd_client.errors import SnapshotdClientError, StateMismatch, UnsupportedState
from snapshotd_client.export import dcp as to_dcp
from snapshotd_client.export import flat
from snapshotd_client.export.incoming import read_checkpoint, write_image
from snapshotd_client.export.shards import Shards
from snapshotd_client.export.state import State
from tests.unit.relaying import image_of, mesh_of, rank_of, relaid, spread

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
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
    found = {}
    _load_state_dict(found, storage_reader=dcp.FileSystemReader(where),
                     planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    names = ("model", "optimizer")
    wanted = dict(zip(names, get_state_dict(model, optimizer)))
    dcp.load(wanted, checkpoint_id=where)
    set_state_dict(model, optimizer, model_state_dict=wanted["model"],
                   optim_state_dict=wanted["optimizer"])
    wanted = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
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
    assert sum(counted) == sum(t.whole().nbytes for t in state.tensors)
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
    assert torch.equal(found["optimizer.state.weight.exp_avg"], state[0]["exp_avg"])
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


def spread_images(tmp_path: Path, world: int, make) -> Shards:
    """What ranks that cannot talk to each other save; `make` gives the states of one."""
    paths, lengths = [], []
    for rank in range(world):
        with rank_of(rank, world):
            image, length = image_of(make(), rank, world, replicas=None)
        paths.append(tmp_path / f"{rank}.image")
        paths[-1].write_bytes(image)
        lengths.append(length)
    return Shards(paths, lengths)


def test_where_a_local_piece_lies(tmp_path: Path) -> None:
    """Boxes of two dimensions, uneven, and parts of them that replicas share."""
    whole = torch.arange(7 * 90, dtype=torch.float32).view(7, 90)

    def make() -> dict[str, object]:
        mesh = mesh_of((2, 2, 2))
        return {"t": spread(whole, mesh, [Shard(0), Replicate(), Shard(1)])}

    state = spread_images(tmp_path, 8, make).state()
    tensor = next(t for t in state.tensors if t.name == "t")
    boxes = sorted((piece.box.offset, piece.box.shape) for piece in tensor.pieces)
    rows, columns = ((0, 4), (4, 3)), ((0, 45), (45, 45))
    assert boxes == [((r, c), (n, m)) for r, n in rows for c, m in columns]
    assert state.diverged == []
    written_as(tmp_path, state, {"t": whole})


def written_as(tmp_path: Path, state: State, wanted: Mapping[str, torch.Tensor]) -> None:
    """Both formats give exactly these tensors."""
    to_dcp.write(state, tmp_path / "dcp", lambda _n: None)
    loaded = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "flat").mkdir()
    flat.write(state, tmp_path / "flat", lambda _n: None)
    plain = load_file(tmp_path / "flat" / flat.FILE)
    for name, tensor in wanted.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(plain[name], tensor), name


def test_a_partial_sum_is_refused(tmp_path: Path) -> None:
    def make() -> dict[str, object]:
        mesh = mesh_of((2,))
        return {"w": DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)}

    with pytest.raises(UnsupportedState, match="w is a partial sum"):
        spread_images(tmp_path, 2, make).state()


def test_shares_of_which_one_is_lacking_are_no_tensor(tmp_path: Path) -> None:
    whole = torch.rand(64, 64)

    def make() -> dict[str, object]:
        tensors = {"t": spread(whole, mesh_of((2,)), [Replicate()])}
        # The other one has thrown it away.
        return tensors if dist.get_rank() == 0 else {"u": torch.zeros(1)}

    with pytest.raises(StateMismatch, match="t: 4096 of its 4096 elements are in no shard"):
        spread_images(tmp_path, 2, make).state()


def test_groups_of_replicas_may_have_other_tensors_under_one_name(tmp_path: Path) -> None:
    """Ranks 0 and 1 hold one, 2 and 3 another, as experts do."""
    tensors = [torch.full((300,), float(i)) for i in range(2)]
    paths, lengths = [], []
    for rank in range(4):
        group = [0, 1] if rank < 2 else [2, 3]
        image, length = image_of({"w": tensors[rank // 2]}, rank, 4, replicas=group)
        paths.append(tmp_path / f"{rank}.image")
        paths[-1].write_bytes(image)
        lengths.append(length)
    state = Shards(paths, lengths).state()
    written_as(tmp_path, state, {"w": tensors[0], "ranks.2.w": tensors[1]})


def test_replicas_that_were_stored_whole_and_differ_are_told(tmp_path: Path) -> None:
    def make() -> dict[str, object]:
        local = torch.full((8,), float(dist.get_rank()))
        tensor = DTensor.from_local(local, mesh_of((2,)), [Replicate()], run_check=False)
        return {"t": tensor}

    paths, lengths = [], []
    for rank in range(2):
        with rank_of(rank, 2):
            states = make()
            # A value that refers to it has it stored whole.
            image, length = image_of(states, rank, 2, {"same": states["t"]})
        paths.append(tmp_path / f"{rank}.image")
        paths[-1].write_bytes(image)
        lengths.append(length)
    state = Shards(paths, lengths).state()
    assert "t of shards 0 and 1" in state.diverged


def test_tensors_within_tuples_go_out_with_them(tmp_path: Path) -> None:
    """torch's checkpoints do not look into tuples; one of these is in shares."""

    def make() -> dict[str, object]:
        weight = torch.nn.Parameter(torch.zeros(90))
        model = torch.nn.ParameterList([weight])
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        optimizer.state[weight] = {"history": (torch.arange(90.0), 3)}
        return {"model": ddp, "opt": optimizer}

    state = spread_images(tmp_path, 2, make).state()
    things = {thing.name: thing.value for thing in state.things}
    tensor, count = things["opt.state.0.history"]
    assert torch.equal(tensor, torch.arange(90.0))
    assert count == 3
    single = written(tmp_path, [{}], pair=(torch.ones(2), 1)).state()
    pair = {thing.name: thing.value for thing in single.things}["<values>.pair"]
    assert torch.equal(pair[0], torch.ones(2))


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
    with pytest.raises(UnsupportedState, match=r"no \.metadata"):
        read_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"rubbish")
    with pytest.raises(UnsupportedState, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path)
    dcp.save({"step": 3}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(UnsupportedState, match="step: a int"):
        read_checkpoint(tmp_path / "a")
    lost = {"optimizer": {"state": {"w": {"m": torch.ones(1)}}, "param_groups": []}}
    dcp.save(lost, checkpoint_id=tmp_path / "b", no_dist=True)
    with pytest.raises(UnsupportedState, match="state of w, which no group of parameters has"):
        read_checkpoint(tmp_path / "b")


def test_an_image_for_which_there_is_no_room_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SnapshotdClientError, match=r"No space left.* set TMPDIR"):
        write_image(tmp_path / "image", {"t": torch.ones(9)}, "job", 0, 1, 0)


def test_what_goes_out_comes_in_again_for_any_number_of_ranks(tmp_path: Path) -> None:
    """By the names of parameters, which the run finds in its own order."""
    held = {name: state for name, state in states().items() if name != "none"}
    to_dcp.write(written(tmp_path, [held]).state(), tmp_path / "dcp", lambda _n: None)
    trees = read_checkpoint(tmp_path / "dcp")
    assert [*trees["optimizer"]["state"]] == ["weight", "bias"]

    def check(fresh: Mapping[str, object]) -> None:
        model = fresh["model"]
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        assert torch.equal(model.weight, held["model"].weight)
        assert torch.equal(fresh["half"], held["half"])
        for name, parameter in held["model"].named_parameters():
            state = fresh["optimizer"].state[dict(model.named_parameters())[name]]
            for key, tensor in held["optimizer"].state[parameter].items():
                assert torch.equal(state[key], tensor), (name, key)
        assert fresh["optimizer"].param_groups[0]["lr"] == 0.5
        assert fresh["scheduler"].state_dict() == held["scheduler"].state_dict()

    images = {}
    for shard in range(2):
        path = tmp_path / f"in-{shard}"
        length = write_image(path, trees, "job", shard, 2, 3)
        images[shard] = path.read_bytes(), length
    for rank, world in ((1, 2), (2, 3), (0, 1)):
        fresh = {name: state for name, state in states(seed=1).items() if name != "none"}
        fresh["half"] = torch.zeros_like(held["half"])
        if rank < 2 == world:
            image, length = images[rank]
            apply(memoryview(image), length, job="job", world=2, shard=rank, states=fresh)
            check(fresh)
            fresh["half"].zero_()
        with rank_of(rank, world):
            fresh["model"] = torch.nn.parallel.DistributedDataParallel(fresh["model"])
            relaid(images, fresh, rank, world)
        check(fresh)


def test_an_imported_optimizer_must_be_of_the_same_parameters(tmp_path: Path) -> None:
    held = states()
    less = torch.optim.AdamW([held["model"].weight])
    trees = {"model": held["model"].state_dict(), "optimizer": less.state_dict()}
    dcp.save(trees, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "image"
    length = write_image(path, read_checkpoint(tmp_path / "dcp"), "job", 0, 1, 3)
    fresh = {name: held[name] for name in trees}
    with pytest.raises(StateMismatch, match="parameters: snapshot 1, this run 2"):
        apply(memoryview(path.read_bytes()), length, job="job", world=1, shard=0, states=fresh)


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


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("ddp", 2), ("hsdp", 4)])
def test_pieces_and_shares_of_several_ranks_become_whole_tensors(
    tmp_path: Path, kind: str, world: int
) -> None:
    """FSDP2 with pieces of unequal length and empty ones; replicas that store a share each."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.export_rank", kind]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=150)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    lengths = [int((tmp_path / f"{rank}.manifest").read_text()) for rank in range(world)]
    paths = [tmp_path / f"{rank}.image" for rank in range(world)]
    state = Shards(paths, lengths).state()
    assert state.diverged == []
    whole, _ = flatten_state_dict(torch.load(tmp_path / "whole.pt", weights_only=False))
    tensors = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 15
    # Statistics of batches, each rank has of its own.
    own = {n for n in tensors if "running_" in n} if kind != "fsdp" else set()
    written_as(tmp_path, state, tensors)
    names = {t.name for t in state.tensors}
    apart = {n.removeprefix("ranks.1.") for n in names if n.startswith("ranks.1.")}
    assert {n for n in apart if "<rng>" not in n} == own | ({"own"} if kind != "fsdp" else set())
    things = {thing.name: thing.value for thing in state.things}
    for name, value in whole.items():
        if name not in tensors:
            assert things[name] == value, name
