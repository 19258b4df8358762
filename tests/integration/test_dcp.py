"""dcp.save and dcp.load on a real daemon, one rank: what torch's own tests of storages check."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from snapshotd_client import NoDaemon, NoSuchStep, Snapshotter, StateMismatch, WrongUse
from snapshotd_client.dcp import SnapshotStorageReader, SnapshotStorageWriter
from tests.integration.cluster import Cluster, eventually

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

_jobs = itertools.count()


@pytest.fixture(scope="module")
def node():
    cluster = Cluster(parity=0, group_size=2)
    try:
        yield cluster.start(1)[0]
    finally:
        cluster.close()


@pytest.fixture
def place(node):
    """A job of its own, of one rank."""
    place = {
        "job": f"dcp-{next(_jobs)}", "rank": 0, "world_size": 1, "local_rank": 0,
        "run_dir": node.run_dir, "timeout_s": 20.0,
    }  # fmt: skip
    yield place
    SnapshotStorageReader(**place).close()


def save(place, state, step, **options):
    return dcp.save(state, storage_writer=SnapshotStorageWriter(step, **place), **options)


def load(place, state, checkpoint_id=None, **options):
    reader = SnapshotStorageReader(checkpoint_id, **place)
    dcp.load(state, storage_reader=reader, **options)
    return reader


def caused(error: pytest.ExceptionInfo, kind: type[Exception]) -> str:
    """The message of the error of one rank within torch's, which must be of a kind."""
    (failure,) = error.value.failures.values()
    assert isinstance(failure[0], kind), failure
    return str(failure[0])


@dataclasses.dataclass
class Note:
    text: str
    numbers: list[int]


def everything() -> dict:
    generator = torch.Generator().manual_seed(3)
    wide = torch.rand(7, 9, generator=generator)
    state = {
        "model": {"w": wide, "tied": wide, "t": wide.t(), "column": wide[:, 3], "e": wide[2:2]},
        "nested": {"list": [torch.arange(3), {"deep": torch.tensor(2.5)}], "tuple": (1, "two")},
        "scalars": {"lr": 0.1, "step": 7, "none": None, "flag": True, "text": "Ä"},
        "zero": torch.zeros(0, 4),
        "note": Note("kept", [1, 2, 3]),
        "ordered": OrderedDict(b=torch.ones(2), a=1),
        "conj": torch.complex(wide, wide).conj(),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int8):
        state[str(dtype)] = (wide * 9).to(dtype)
    return state


def emptied(node):
    """The same form with other bytes, as a program has it before it loads."""
    match node:
        case torch.Tensor():
            return torch.zeros(node.shape, dtype=node.dtype)
        case dict():
            return type(node)((key, emptied(value)) for key, value in node.items())
        case list():
            return [emptied(value) for value in node]
    return None


def raw(tensor):
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return bytes(dense.untyped_storage())


def check_same(a, b, where=""):
    match a:
        case torch.Tensor():
            assert (a.dtype, a.shape) == (b.dtype, b.shape), where
            assert raw(a) == raw(b), where
        case dict():
            assert list(a) == list(b), where
            for key in a:
                check_same(a[key], b[key], f"{where}.{key}")
        case list():
            for i, pair in enumerate(zip(a, b, strict=True)):
                check_same(*pair, f"{where}.{i}")
        case _:
            assert a == b, where


def test_everything_comes_back_also_without_a_live_state(place):
    saved = everything()
    metadata = save(place, saved, 3)
    loaded = emptied(saved)
    reader = load(place, loaded)
    check_same(saved, loaded)
    assert reader.newest_step() == 3
    assert reader.taken.copied == reader.taken.decoded == 0
    read = reader.read_metadata()
    assert read.state_dict_metadata.keys() == metadata.state_dict_metadata.keys()
    assert read.planner_data == metadata.planner_data
    made = {}
    _load_state_dict(
        made,
        storage_reader=SnapshotStorageReader(**place),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    check_same({**saved, "ordered": dict(saved["ordered"])}, made)
    # Tied and overlapping tensors are stored once.
    image = SnapshotStorageReader(**place)
    image.read_metadata()
    extents = image._found[1]._manifests[0].extents
    assert sum(e.bytes for e in extents) < 7 * 9 * (4 + 8 + 2 + 2 + 1 + 1 + 1) + 16_000


def test_by_planners_that_do_not_flatten_and_only_some_keys(place):
    save(place, {"a": torch.ones(3), "b": torch.ones(2) * 2, "n": 5}, 1,
         planner=DefaultSavePlanner(flatten_state_dict=False))  # fmt: skip
    some = {"b": torch.zeros(2)}
    load(place, some, planner=DefaultLoadPlanner(flatten_state_dict=False))
    assert some["b"].tolist() == [2, 2]
    more = {"n": 0, "new": torch.zeros(1), "a": torch.zeros(3)}
    with pytest.raises(CheckpointException) as error:
        load(place, more)
    assert "Missing key in checkpoint state_dict: new" in str(error.value)
    save(place, {"a": torch.ones(3), "n": 5}, 2, use_collectives=False)
    load(place, more, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert (more["n"], more["a"].tolist(), more["new"].tolist()) == (5, [1, 1, 1], [0])
    with pytest.raises(CheckpointException) as error:
        load(place, {"a": torch.zeros(4)})
    assert "Size mismatch" in str(error.value)


def test_model_and_optimizer_by_torchs_own_state_dicts(place):
    def made():
        torch.manual_seed(next(_jobs))
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=next(_jobs) / 1000)
        model(torch.rand(4, 5)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made()
    whole = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    save(place, whole, 10)
    other = made()
    again = dict(zip(("model", "optim"), get_state_dict(*other), strict=True))
    load(place, again)
    set_state_dict(*other, model_state_dict=again["model"], optim_state_dict=again["optim"])
    check_same(dict(model.state_dict()), dict(other[0].state_dict()))
    check_same(optimizer.state_dict(), other[1].state_dict())


def test_a_step_is_named_by_its_checkpoint_id(place, tmp_path):
    writer, reader = SnapshotStorageWriter(**place), SnapshotStorageReader(**place)
    state = {"x": torch.zeros(2)}
    with pytest.raises(CheckpointException) as error:
        dcp.save(state, storage_writer=writer)
    assert "no step was named" in caused(error, WrongUse)
    for step in (5, 10):
        state["x"] += 1
        dcp.save(state, checkpoint_id=tmp_path / f"step-{step}", storage_writer=writer)
    with pytest.raises(CheckpointException) as error:
        dcp.load({"x": torch.zeros(2)}, checkpoint_id="out/step-5", storage_reader=reader)
    assert "newest one that all ranks" in str(error.value)
    assert "is step 10" in str(error.value)
    dcp.load(found := {"x": torch.zeros(2)}, checkpoint_id="out/step-10/", storage_reader=reader)
    assert found["x"].tolist() == [2, 2]
    assert SnapshotStorageWriter.validate_checkpoint_id("step-10")
    assert not SnapshotStorageWriter.validate_checkpoint_id("last")
    assert not list(tmp_path.iterdir())


def test_steps_grow_and_one_that_failed_may_be_saved_again(place):
    class Broken(DefaultSavePlanner):
        def resolve_data(self, item):
            raise OSError("the disk of a dream")

    save(place, {"x": torch.ones(2)}, 4)
    for step in (4, 3):
        with pytest.raises(CheckpointException) as error:
            save(place, {"x": torch.ones(2)}, step)
        assert f"step {step} comes after step 4" in caused(error, WrongUse)
    with pytest.raises(CheckpointException) as error:
        save(place, {"x": torch.ones(2) * 5}, 5, planner=Broken())
    assert "dream" in caused(error, OSError)
    load(place, found := {"x": torch.zeros(2)})
    assert found["x"].tolist() == [1, 1]
    for _ in range(2):
        with pytest.raises(CheckpointException):
            save(place, {"x": torch.ones(2) * 5}, 5, planner=Broken())
    save(place, {"x": torch.ones(2) * 5}, 5)
    load(place, found, "step-5")
    assert found["x"].tolist() == [5, 5]


def test_nothing_saved_is_no_fresh_start_and_what_was_not_loaded_is_not_lost(place):
    reader = SnapshotStorageReader(**place)
    assert reader.newest_step() is None
    with pytest.raises(CheckpointException) as error:
        load(place, {"x": torch.ones(1)})
    assert "nothing was ever saved of job" in str(error.value)
    with pytest.raises(NoSuchStep):
        reader.read_metadata()
    save(place, {"x": torch.ones(1)}, 8)
    # As another process that does not load: it has no members yet.
    forget(reader)
    with pytest.raises(CheckpointException) as error:
        save(place, {"x": torch.zeros(1)}, 9)
    assert "has step 8 in memory, which this run has not loaded" in caused(error, WrongUse)
    load(place, found := {"x": torch.zeros(1)})
    assert found["x"].tolist() == [1]
    save(place, {"x": torch.zeros(1)}, 9)
    forget(reader)
    save({**place, "replace": True}, {"x": torch.ones(1) * 3}, 20)
    load(place, found)
    assert found["x"].tolist() == [3]


def forget(reader):
    """As a new process knows it."""
    reader.close()
    reader._member.acquainted = False


def test_async_save_in_a_thread_keeps_the_state_of_its_call(place):
    writer = SnapshotStorageWriter(**place)
    state = {"x": torch.zeros(1000)}
    for step in range(3):
        future = dcp.async_save(state, checkpoint_id=f"step-{step}", storage_writer=writer)
        state["x"] += 1
        future.result()
    load(place, found := {"x": torch.zeros(1000)})
    assert torch.equal(found["x"], torch.full((1000,), 2.0))
    with pytest.raises(CheckpointException):
        dcp.async_save(state, checkpoint_id="step-2", storage_writer=writer).result()


def test_tensors_that_cannot_be_stored_are_named(place):
    for bad in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(CheckpointException) as error:
            save(place, {"fine": torch.ones(1), "bad": bad}, 1)
        assert "bad" in str(error.value)


def test_a_rank_of_many_cannot_save_alone(place):
    writer = SnapshotStorageWriter(1, **{**place, "world_size": 2})
    with pytest.raises(WrongUse, match=r"1 rank\(s\) save together, and the job has 2"):
        writer.prepare_global_plan([None])


def test_beside_snapshotter(place, node):
    names = {k: v for k, v in place.items() if k != "timeout_s"}
    model = torch.nn.Linear(2, 2)
    with Snapshotter({"model": model}, **names) as snap:
        assert snap.restore(timeout_s=20) is None
        with pytest.raises(CheckpointException) as error:
            save(place, {"x": torch.ones(1)}, 1)
        assert "has a Snapshotter in the slot" in caused(error, WrongUse)
        snap.step(1)
        snap.wait_protected()
    with pytest.raises(StateMismatch, match="saved by Snapshotter"):
        SnapshotStorageReader(**place).read_metadata()
    SnapshotStorageReader(**place).close()
    other = {**place, "job": f"{place['job']}-other"}
    save(other, {"model": model.state_dict()}, 1)
    SnapshotStorageReader(**other).close()
    with (
        Snapshotter({"model": model}, **{**names, "job": other["job"]}) as snap,
        pytest.raises(StateMismatch, match=r"saved by torch\.distributed\.checkpoint"),
    ):
        snap.restore(timeout_s=20)


def test_the_page_says_what_works(place, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "dcp.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.setenv("SNAPSHOTD_JOB", place["job"])
    monkeypatch.setenv("SNAPSHOTD_RUN_DIR", str(place["run_dir"]))

    class TrainState:
        step = 0

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    trained = []
    for steps in (2, 5):
        state = TrainState()

        def train_step(state=state):
            trained.append(state.step)
            state.step += 1

        model = torch.nn.Linear(2, 2)
        given = {"model": model, "train_state": state}
        exec(program, {"state": given, "train_state": state, "steps": steps,
                       "train_step": train_step})  # fmt: skip
    assert trained == [0, 1, 2, 3, 4]


def test_a_daemon_that_dies_between_two_saves_is_found_again(place, node):
    save(place, {"x": torch.ones(2)}, 1)
    node.kill()
    with pytest.raises(CheckpointException) as error:
        save({**place, "timeout_s": 1.0}, {"x": torch.ones(2)}, 2)
    assert "no snapshotd answers" in caused(error, NoDaemon)
    node.start()
    steps = itertools.count(3)

    def saved():
        try:
            save(place, {"x": torch.ones(2) * 3}, next(steps))
        except CheckpointException as error:
            if "was not saved: this node does not know" not in str(error):
                raise
            return False  # it has yet to hear of the job
        return True

    eventually("a step is saved again", saved)
    load(place, found := {"x": torch.zeros(2)})
    assert found["x"].tolist() == [3, 3]


def test_without_a_daemon_there_is_an_error(place, tmp_path):
    with pytest.raises(CheckpointException) as error:
        save({**place, "run_dir": tmp_path}, {"x": torch.ones(1)}, 1)
    assert "no snapshotd answers" in caused(error, NoDaemon)


def test_what_memory_has_lost_comes_from_the_persistent_tier(tmp_path):
    tier = tmp_path / "tier"
    tier.mkdir()
    every = {"interval_s": 0, "every_steps": 1, "keep_last": 3}
    cluster = Cluster(parity=0, group_size=2, persist={"url": str(tier), **every})
    try:
        node = cluster.start(1)[0]
        place = {"job": "j", "rank": 0, "world_size": 1, "local_rank": 0, "timeout_s": 60.0}
        save({**place, "run_dir": node.run_dir}, saved := everything(), 4)
        eventually("step 4 is whole", lambda: list(tier.glob("j/steps/*-*4.json")), 60)
        SnapshotStorageReader(**place, run_dir=node.run_dir).close()
        node.lose()
        cluster.nodes.clear()
        fresh = {**place, "run_dir": cluster.start(1)[0].run_dir}
        reader = load(fresh, loaded := emptied(saved))
        check_same(saved, loaded)
        assert reader.newest_step() == 4
        save(fresh, saved, 5)
        reader.close()
    finally:
        cluster.close()
