"""Whole steps in a bucket or directory: real daemons write them, and jobs come back from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from snapshotd_client import SnapshotLost
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.layouts import run
from tests.integration.ranks import Job, Rank, homes
from tests.integration.test_restore import outcomes
from tests.unit.layout_training import WIDTH, Net, digests

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Make = Callable[..., Cluster]
#: Every committed step is written, as soon as the one before is whole.
EVERY = {"interval_s": 0, "every_steps": 1, "keep_last": 3}


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier"
    path.mkdir()
    return path


def whole(tier: Path, job: str = "job") -> list[int]:
    """Steps that count, oldest first."""
    return [int(p.stem.partition("-")[2]) for p in sorted(tier.glob(f"{job}/steps/*.json"))]


def images(tier: Path, step: int) -> list[Path]:
    return sorted(tier.glob(f"job/data/*-{step:016d}/*.image"))


def train_whole(job: Job, tier: Path) -> None:
    """One step more, committed, and whole in the tier."""
    job.train_protected(1)
    step = job.next_step - 1
    eventually(f"step {step} is whole", lambda: whole(tier)[-1:] == [step], 60)


def lose_all(cluster: Cluster, nodes: list[Node]) -> list[Node]:
    """All nodes go with their memory; as many others come."""
    for node in nodes:
        node.lose()
    cluster.nodes.clear()
    fresh = [cluster.node(f"f{i}") for i in range(len(nodes))]
    for node in fresh:
        node.start()
    cluster.met()
    return fresh


def test_all_memory_is_lost_and_the_job_resumes_bit_for_bit(
    cluster: Make, tier: Path, tmp_path: Path
) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(3)
    job = Job(homes(nodes))
    job.restore()
    for _ in range(3):
        train_whole(job, tier)
    exports(tmp_path, nodes[0], tier, job)
    job.vanish()
    nodes = lose_all(made, nodes)
    job = Job(homes(nodes))
    restored = job.restore()
    assert all(r.step == 2 and r.tier == "persistent" for r in restored)
    job.check()
    train_whole(job, tier)
    job.check()
    job.close()
    index = json.loads(max(tier.glob("job/steps/*.json")).read_text())
    assert [s["shard"] for s in index["shards"]] == [0, 1, 2]
    assert len(list(tier.glob("job/data/*"))) == 3
    assert whole(tier) == [1, 2, 3], "keep_last = 3"


def test_nothing_there_is_a_fresh_start_and_records_do_not_hinder(
    cluster: Make, tier: Path
) -> None:
    """The job's record outlives its memory, as with state_dir on a disk."""
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(2)
    job = Job(homes(nodes))
    assert job.restore() == [None] * 2
    train_whole(job, tier)
    job.vanish()
    for node in nodes:
        node.kill()
        shutil.rmtree(node.shm_dir)
    for node in nodes:
        node.start()
    made.met()
    job = Job(homes(nodes))
    assert {(r.step, r.tier) for r in job.restore()} == {(0, "persistent")}
    job.check()
    job.close()


def test_damage_is_found_and_the_next_older_good_step_is_taken_by_all(
    cluster: Make, tier: Path
) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(2)
    job = Job(homes(nodes))
    job.restore()
    for _ in range(3):
        train_whole(job, tier)
    job.vanish()
    flip(images(tier, 2)[1])
    images(tier, 1)[0].unlink()
    # Half-written: everything but the index.
    data = max(tier.glob("job/data/*"))
    shutil.copytree(data, data.with_name(data.name[:-1] + "9"))
    nodes = lose_all(made, nodes)
    job = Job(homes(nodes))
    assert {(r.step, r.tier) for r in job.restore()} == {(0, "persistent")}
    job.check()
    said = "".join(node.log.read_text() for node in nodes)
    assert "shard-00001.image: bytes" in said
    assert "shard-00000.image is missing" in said
    # What is left over is removed when a newer step is whole.
    train_whole(job, tier)
    eventually("leftovers are gone", lambda: not list(tier.glob("job/data/*9")))
    job.close()


@pytest.mark.parametrize("what", ["shard-00001.image", f"{0:016d}.json"])
def test_nothing_good_left_names_what_was_tried(cluster: Make, tier: Path, what: str) -> None:
    made = cluster(persist={"url": str(tier), **EVERY})
    nodes = made.start(2)
    job = Job(homes(nodes))
    job.restore()
    train_whole(job, tier)
    job.vanish()
    (damaged,) = tier.rglob(f"*{what}")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    nodes = lose_all(made, nodes)
    job = Job(homes(nodes))
    before = [r.digest() for r in job.ranks]
    for error in outcomes(job):
        assert isinstance(error, SnapshotLost)
        assert "step 0" in str(error)
        assert damaged.name in str(error)
    assert [r.digest() for r in job.ranks] == before
    assert whole(tier) == [0]
    job.vanish()
    job = Job(homes(nodes))
    assert job.restore(on_lost="fresh") == [None] * 2
    job.close()


def test_a_tier_that_cannot_be_seen_is_no_fresh_start(cluster: Make, tier: Path) -> None:
    made = cluster(persist={"url": str(tier / "mount"), **EVERY})
    nodes = made.start(2)
    job = Job(homes(nodes))
    for error in outcomes(job):
        assert isinstance(error, SnapshotLost)
        assert "could not be looked into" in str(error)
        assert str(tier / "mount") in str(error)
    job.vanish()
    job = Job(homes(nodes))
    assert job.restore(on_lost="fresh") == [None] * 2
    job.train_protected(2)
    said = "it is not there, or must not be seen"
    eventually("status tells", lambda: any(said in e for e in errors(nodes)))
    assert not (tier / "mount").exists(), "what is not mounted is not written to"
    (tier / "mount").mkdir()
    eventually("it heals by itself", lambda: whole(tier / "mount") == [1], 60)
    eventually("status tells", lambda: errors(nodes) == [""] * 2)
    job.close()


def test_a_daemon_is_killed_in_the_middle_of_a_write(cluster: Make, tier: Path) -> None:
    """What was verified is not written again; what was not is; the step becomes whole."""
    made = cluster(persist={"url": str(tier), **EVERY, "bytes_per_s": 1 << 20}, generations=3)
    nodes = made.start(2)
    job = Job(homes(nodes), width=512)
    job.restore()
    job.train_protected(1)
    eventually("both write", lambda: all(progress(n) > 0 for n in nodes), 30)
    nodes[1].kill()
    first = images(tier, 0)[0].with_suffix(".seal")
    eventually("the other one is done", first.exists, 60)
    assert whole(tier) == []
    written = images(tier, 0)[0].stat().st_mtime_ns
    os.kill(nodes[0].smp_pids()[0], signal.SIGKILL)
    nodes[1].start()
    eventually("it is whole", lambda: whole(tier) == [0], 60)
    assert images(tier, 0)[0].stat().st_mtime_ns == written
    job.close()


def exports(tmp_path: Path, node: Node, tier: Path, job: Job) -> None:
    """The step that is in memory and in the tier goes out from both, the same."""
    flat, plain = tmp_path / "flat", tmp_path / "plain"
    snapshotd("export", "--run-dir", node.run_dir, "--format", "safetensors", flat)
    snapshotd("export", "--from", tier, "--job", "job", "--step", "2", "--format", "dcp", plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "plain", "tier"]
    found = load_file(flat / "state.safetensors")
    assert [p.name for p in flat.iterdir()] == ["state.safetensors"]
    for rank in job.ranks:
        prefix = f"ranks.{rank.rank}.model." if rank.rank else "model."
        for name, tensor in rank.model.state_dict().items():
            assert torch.equal(found[prefix + name], tensor)
    loaded = {"model": {n: torch.empty_like(t) for n, t in job.ranks[0].model.state_dict().items()}}
    dcp.load(loaded, checkpoint_id=plain, no_dist=True)
    for name, tensor in job.ranks[0].model.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)
    code, said = snapshotd("export", "--run-dir", node.run_dir, flat, check=False)
    assert (code, "is there already" in said) == (2, True), said
    code, said = snapshotd(
        "export", "--run-dir", node.run_dir, "--step", "77", tmp_path / "x", check=False
    )
    assert (code, "step 77 is not in memory; there:" in said) == (1, True), said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_export_of_replicas_that_store_a_share_each(cluster: Make, tmp_path: Path) -> None:
    """DDP: each shard has half of every tensor; what torch reads back is the model."""
    nodes = cluster(parity=1).start(2)
    first, other = run(nodes, 2, "ddp", tmp_path, steps=2)
    assert first["left"] == other["left"]
    snapshotd("export", "--run-dir", nodes[0].run_dir, "--format", "dcp", tmp_path / "dcp")
    snapshotd("export", "--run-dir", nodes[1].run_dir, "--format", "safetensors", tmp_path / "flat")
    held = sum(f.stat().st_size for f in (tmp_path / "dcp").iterdir())
    model = Net(WIDTH)
    opt = torch.optim.AdamW(model.parameters())
    loaded = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    assert digests({"model": model, "opt": opt}) == first["left"]
    assert opt.param_groups[0]["lr"] == 0.01
    found = load_file(tmp_path / "flat" / "state.safetensors")
    wanted, _ = flatten_state_dict(loaded)
    tensors = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 4 * len(loaded["model"])
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert held < 1.2 * sum(t.nbytes for t in tensors.values()), "each byte once"


def snapshotd(*arguments: object, check: bool = True) -> tuple[int, str]:
    command = [sys.executable, "-m", "snapshotd", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert not check or ended.returncode == 0, ended.stderr
    return ended.returncode, ended.stdout + ended.stderr


def test_a_checkpoint_is_a_jobs_start(cluster: Make, tier: Path, tmp_path: Path) -> None:
    trained = Rank(0, 1)
    for _ in range(3):
        trained.train()
    state = {name: each.state_dict() for name, each in trained.states().items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    take = ("import", "--job", "job", "--to", tier, "--step", 2, tmp_path / "dcp")
    _, said = snapshotd(*take)
    assert "job job starts from step 2" in said
    nodes = cluster(parity=0, persist={"url": str(tier), **EVERY}).start(1)
    job = Job(homes(nodes))
    assert [(r.step, r.tier) for r in job.restore()] == [(2, "persistent")]
    job.check()
    train_whole(job, tier)
    job.check()
    job.close()
    assert snapshotd(*take, check=False)[0] == 2, "it has steps already"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def told(node: Node) -> list:
    return [p for slot in node.status().slots for p in slot.persist]


def progress(node: Node) -> int:
    return sum(p.bytes_done for p in told(node))


def errors(nodes: list[Node]) -> list[str]:
    return [p.error for node in nodes for p in told(node)]


def test_a_write_gives_way_to_training_where_there_is_no_memory_for_both(
    cluster: Make, tier: Path
) -> None:
    """Two buffers a shard fit and no third one: each step is granted one all the same."""
    made = cluster(
        parity=0,
        persist={"url": str(tier), **EVERY, "bytes_per_s": 1 << 20},
        memory_budget="17MiB",
    )
    nodes = made.start(2)
    job = Job(homes(nodes), width=550)
    job.restore()
    job.train_protected(1)
    eventually("both write", lambda: all(progress(n) > 0 for n in nodes), 30)
    job.train_protected(3)
    assert all(r.snap.status().skipped == 0 for r in job.ranks)
    assert all(not slot.short for node in nodes for slot in node.status().slots)
    eventually("status tells", lambda: any("gave way to training" in e for e in errors(nodes)))
    job.vanish()
    # Now that nothing wants its memory, it comes to its end.
    eventually("it is whole", lambda: whole(tier)[-1:] == [3], 90)
