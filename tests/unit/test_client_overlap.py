"""Snapshots are copied while training goes on; what it changes meanwhile is not in them."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client import apply, buffers, copying, cuda, flight, forms, tree
from snapshotd_client.accord import Accord
from snapshotd_client.handover import TORN_IN_A_ROW, Handover
from snapshotd_client.identity import identify
from snapshotd_client.wires import DaemonGone

CAPACITY = 2 << 20
OFFSET = 4096


class Desk:
    """A daemon's end that grants one file, when it is let."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"\xff" * (OFFSET + CAPACITY))
        self.path = path
        self.heard: list[pb.ToDaemon] = []
        self.open = threading.Event()
        self.open.set()
        self.gone = False
        self.block_bytes = 0
        self.stood: list[bytes] = []  # the image, at each Copied

    def post(self, message: pb.ToDaemon) -> int:
        self.heard.append(message)
        if message.WhichOneof("body") == "copied":
            self.stood.append(self.path.read_bytes()[OFFSET:])
        return len(self.heard)

    def answer(self, number: int, timeout_s: float) -> pb.ToTrainer:
        if self.heard[number - 1].WhichOneof("body") != "claim":
            return pb.ToTrainer(accepted=pb.Accepted())
        assert self.open.wait(20)
        if self.gone:
            raise DaemonGone("it closed the connection")
        return pb.ToTrainer(
            granted=pb.Granted(
                path=str(self.path), image_offset=OFFSET, buffer="b", block_bytes=self.block_bytes
            )
        )

    def ask(self, message: pb.ToDaemon, timeout_s: float) -> pb.ToTrainer:
        return self.answer(self.post(message), timeout_s)

    def said(self) -> list[str]:
        return [message.WhichOneof("body") for message in self.heard]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(8, 8)
        self.large = nn.Linear(256, 300)  # above what goes in batches
        self.register_buffer("seen", torch.zeros(3))


class Job:
    """A model, its optimizer, a copy of the model that is averaged by hand, and a handover."""

    def __init__(self, desk: Desk, overlap: str = "on", **more: object) -> None:
        torch.manual_seed(1)
        self.model, self.average = Model(), Model()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.states = {"model": self.model, "average": self.average, "opt": self.opt, **more}
        who = identify({}, job="j", rank=0, world_size=1, local_rank=0, run_dir="/none")
        self.desk = desk
        self.train()
        self.handover = Handover(self.states, desk, who, 20.0, overlap, None, Accord(who))
        self.step = 0

    def train(self) -> None:
        self.opt.zero_grad()
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.opt.step()

    def begin(self, **values: object) -> None:
        self.step += 1
        self.handover.begin(self.step, values)

    def bits(self) -> list[torch.Tensor]:
        trees = [self.model.state_dict(), self.average.state_dict()]
        state = [t for entry in self.opt.state.values() for t in entry.values()]
        return [t.clone() for t in (*trees[0].values(), *trees[1].values(), *state)]

    def written(self) -> list[torch.Tensor]:
        """What another process finds in the newest snapshot."""
        (*_, last) = [m.written for m in self.desk.heard if m.WhichOneof("body") == "written"]
        image = memoryview(self.desk.path.read_bytes())[OFFSET:][: last.image_bytes]
        other = Job(self.desk)
        try:
            apply.apply(
                image, last.manifest_bytes, job="j", world=1, shard=0, states=other.states,
                on_rng=False,
            )  # fmt: skip
            return other.bits()
        finally:
            other.handover.close()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "segment")


@pytest.fixture
def job(desk: Desk):
    made = Job(desk)
    yield made
    desk.open.set()
    made.handover.close()


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def told(desk: Desk | Side) -> list[int]:
    return [m.copied.block_bytes for m in desk.heard if m.WhichOneof("body") == "copied"]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 7])
def test_what_the_daemon_is_told_stands_in_every_block(
    job: Job, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "_TELL_BYTES", 100 << 10)
    monkeypatch.setattr(copying, "ROUND_BYTES", 100 << 10)
    monkeypatch.setattr(copying, "TRANSFER_BYTES", 4 << 10)
    whole = plan(job).image_bytes
    block = job.desk.block_bytes = -(-whole // ((blocks or 1) * 8192)) * 8192 if blocks else 0
    for _ in range(2):  # the order is made by the first
        job.desk.heard.clear()
        job.desk.stood.clear()
        job.desk.path.write_bytes(b"\xff" * (OFFSET + CAPACITY))
        job.begin()
        assert not job.handover.collect().torn
        assert equal(job.written(), job.bits())
        (written,) = [m.written for m in job.desk.heard if m.WhichOneof("body") == "written"]
        image = job.desk.path.read_bytes()[OFFSET:][: written.image_bytes]
        assert image
        marks = told(job.desk)
        assert len(marks) >= 6
        assert marks == sorted(marks)
        assert marks[-1] <= min(block or whole, whole)
        for mark, stood in zip(marks, job.desk.stood, strict=True):
            for start in range(0, whole, block or whole):
                end = min(start + mark, whole)
                assert stood[start:end] == image[start:end]
        job.train()


def test_of_a_small_image_nothing_is_told(job: Job) -> None:
    job.desk.block_bytes = 512 << 10
    job.begin()
    assert not job.handover.collect().torn
    assert job.desk.said() == ["claim", "written"]
    assert equal(job.written(), job.bits())


def test_blocks_shorter_than_a_grain_are_not_filled(job: Job) -> None:
    job.desk.block_bytes = 1
    job.begin()
    error = job.handover.collect().error
    assert isinstance(error, DaemonGone)
    assert "blocks of 1 bytes; a grain has 8192" in str(error)


def test_the_next_update_waits_for_the_copy(job: Job) -> None:
    job.desk.open.clear()
    before = job.bits()
    job.begin()
    assert job.handover.busy
    threading.Timer(0.2, job.desk.open.set).start()
    job.train()
    assert not equal(job.bits(), before)
    flight = job.handover.collect()
    assert not flight.torn
    assert not flight.skipped
    assert job.handover.waited_s > 0.05
    assert equal(job.written(), before)


@pytest.mark.parametrize("which", ["small", "large"])
def test_what_moved_under_the_copy_is_never_published(job: Job, which: str) -> None:
    job.desk.open.clear()
    job.begin()
    with torch.no_grad():
        getattr(job.model, which).weight.add_(1)
    job.desk.open.set()
    flight = job.handover.collect()
    assert flight.torn
    assert job.handover.torn == 1
    assert job.desk.said() == ["claim", "pass"]
    job.begin()
    assert not job.handover.collect().torn
    assert equal(job.written(), job.bits())


def test_moments_that_moved_are_seen_as_well(job: Job) -> None:
    job.desk.open.clear()
    job.begin()
    next(iter(job.opt.state.values()))["exp_avg"].mul_(2)
    job.desk.open.set()
    assert job.handover.collect().torn


def test_what_no_optimizer_holds_is_copied_before_the_step_returns(job: Job) -> None:
    job.desk.open.clear()
    before = job.bits()
    job.begin()
    job.model.seen.add_(1)  # as forward does
    for parameter in job.average.parameters():
        parameter.data.add_(1)  # unseen by version counters
    job.desk.open.set()
    assert not job.handover.collect().torn
    assert equal(job.written(), before)


def test_many_torn_ones_end_the_overlap(job: Job) -> None:
    for _ in range(TORN_IN_A_ROW):
        assert job.handover.overlaps
        job.desk.open.clear()
        job.begin()
        with torch.no_grad():
            job.model.small.weight.add_(1)
        job.desk.open.set()
        job.handover.collect()
    assert not job.handover.overlaps
    job.begin()
    assert not job.handover.busy
    assert not job.handover.collect().torn
    assert equal(job.written(), job.bits())


def test_without_overlap_everything_is_copied_at_once(desk: Desk) -> None:
    job = Job(desk, overlap="off")
    before = job.bits()
    job.begin()
    for parameter in job.model.parameters():
        parameter.data.add_(1)
    job.handover.collect()
    assert equal(job.written(), before)
    job.handover.close()


def test_a_snapshot_is_published_without_another_update(job: Job) -> None:
    job.begin()
    flight = job.handover._flight
    for _ in range(10**6):
        if flight.done.is_set():
            break
        flight.done.wait(0.001)
    assert job.desk.said() == ["claim", "written"]


def test_a_thread_that_is_not_the_main_one_trains(desk: Desk) -> None:
    def work() -> None:
        job = Job(desk)
        job.begin()
        before = job.bits()
        job.train()
        assert not job.handover.collect().torn
        seen.append(equal(job.written(), before))
        job.handover.close()

    seen: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert seen == [True]


def test_close_while_it_is_copied_publishes_nothing(job: Job) -> None:
    job.desk.open.clear()
    job.begin()
    threading.Timer(0.1, job.desk.open.set).start()
    job.handover.close()
    assert job.desk.said() == ["claim"]
    job.train()  # the hooks are gone


def test_dropped_without_close_the_thread_ends(desk: Desk) -> None:
    job = Job(desk)
    job.begin()
    job.handover.collect()
    thread = job.handover._courier._thread
    del job
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_daemon_that_goes_is_told_of_and_holds_up_nothing(job: Job) -> None:
    job.desk.gone = True
    job.begin()
    job.train()
    assert isinstance(job.handover.collect().error, DaemonGone)


def test_a_fork_waits_for_nothing(job: Job) -> None:
    job.desk.open.clear()
    job.begin()
    job.handover._courier._process = os.getpid() + 1  # as a fork sees it
    job.train()
    job.handover._courier._process = os.getpid()


class Touching:
    """Stands in for the call that touches a segment: held up, and counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.held, self.count = threading.Event(), threading.Event(), 0
        patch.setattr(buffers, "have", self)
        patch.setattr(buffers, "_SLICE_BYTES", CAPACITY // 4)

    def __call__(self, *_: int) -> None:
        self.count += 1
        self.begun.set()
        assert self.held.wait(20)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_first_snapshot_follows_what_is_made_ready_for_it(
    job: Job, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    touching = Touching(monkeypatch)
    if at_once:
        touching.held.set()
    job.handover.make_ready([(str(job.desk.path), OFFSET), ("/none/gone", 0)], at_once=at_once)
    job.begin()
    assert touching.begun.wait(20)
    assert job.desk.said() == [] or at_once
    touching.held.set()
    job.handover.collect()
    assert touching.count >= 4
    assert equal(job.written(), job.bits())


def test_who_needs_the_segments_at_once_ends_what_makes_them_ready(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    touching = Touching(monkeypatch)
    job.handover.make_ready([(str(job.desk.path), OFFSET)], at_once=False)
    assert touching.begun.wait(20)
    job.handover._stop_overlapping("the test says so")
    threading.Timer(0.2, touching.held.set).start()
    job.begin()
    assert touching.count == 1
    job.handover.collect()
    assert equal(job.written(), job.bits())


def test_what_makes_ready_ends_with_its_owner(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    touching = Touching(monkeypatch)
    job = Job(desk)
    job.handover.make_ready([(str(desk.path), OFFSET)], at_once=False)
    assert touching.begun.wait(20)
    threading.Timer(0.2, touching.held.set).start()
    job.handover.close()
    assert touching.count == 1


def plan(job: Job, **values: object):
    return job.handover._planner.plan(job.step, values)


def test_a_plan_is_kept_while_only_bytes_change(job: Job) -> None:
    first = plan(job, loss=1.0)
    job.train()
    job.opt.param_groups[0]["lr"] = 0.05
    second = plan(job, loss=0.123456789)
    assert second.layout is first.layout
    assert second.resting is first.resting
    job.begin(loss=2.0)
    job.handover.collect()
    assert equal(job.written(), job.bits())


def replaced(job: Job) -> None:
    job.average.small.weight = nn.Parameter(torch.full((8, 8), 5.0))


def pointed_elsewhere(job: Job) -> None:
    job.model.small.weight.data = torch.full((8, 8), 6.0)


def other_moments(job: Job) -> None:
    entry = next(iter(job.opt.state.values()))
    entry["exp_avg"] = entry["exp_avg"] + 1


def another_buffer(job: Job) -> None:
    job.model.seen = torch.full((3,), 4.0)


def turned(job: Job) -> None:
    weight = job.model.small.weight
    weight.data = weight.data.t()


def turned_moments(job: Job) -> None:
    entry = job.opt.state[job.model.small.weight]
    entry["exp_avg"].copy_(torch.rand(8, 8)).t_()


def set_elsewhere(job: Job) -> None:
    with torch.no_grad():
        job.model.small.weight.set_(torch.rand(8, 8))


def other_storage_size(job: Job) -> None:
    with torch.no_grad():
        job.average.small.weight.set_(torch.rand(16, 8)[8:])


def tied_by_halves(job: Job) -> None:
    whole = torch.rand(16, 8)
    job.model.small.weight.data, job.average.small.weight.data = whole[:8], whole[8:]


CHANGES = [
    replaced, pointed_elsewhere, other_moments, another_buffer, turned, turned_moments,
    set_elsewhere, other_storage_size, tied_by_halves,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("asked_at_once", [True, False], ids=["guards", "one by one"])
def test_a_change_of_objects_is_planned_anew(
    desk: Desk, change, asked_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not asked_at_once:
        monkeypatch.setattr(forms, "TensorGuards", None)
    job = Job(desk)
    job.begin()
    job.handover.collect()
    change(job)
    job.begin()
    job.handover.collect()
    assert equal(job.written(), job.bits())
    job.handover.close()


def test_zero_is_not_minus_zero_in_optimizer_state(job: Job) -> None:
    entry = job.opt.state[job.model.small.weight]
    entry["scale"] = 0.0
    job.begin()
    job.handover.collect()
    entry["scale"] = -0.0
    assert math.copysign(1.0, plan_scale(job)) == -1.0


def plan_scale(job: Job) -> float:
    """What the newest plan says of the scalar that stands beside the moments."""
    captured = plan(job)
    image = bytearray(captured.image_bytes)
    captured.write(memoryview(image))
    skeleton = image[captured.layout.skeleton_offset :]
    trees = tree.load(bytes(skeleton), lambda *_: torch.zeros(()))
    state = trees["opt"]["state"]
    (scale,) = [entry["scale"] for entry in state.values() if "scale" in entry]
    return scale


def test_an_optimizer_that_becomes_capturable_is_copied_at_once(job: Job) -> None:
    assert plan(job).watched
    job.opt.param_groups[0]["capturable"] = True
    assert not plan(job).watched


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_a_compiled_step_waits_as_well(job: Job) -> None:
    step = torch.compile(job.opt.step, backend="eager")
    for parameter in job.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step()
    job.desk.open.clear()
    before = job.bits()
    job.begin()
    threading.Timer(0.2, job.desk.open.set).start()
    step()
    assert not equal(job.bits(), before)
    assert not job.handover.collect().torn
    assert equal(job.written(), before)


def test_hyperparameters_come_back(job: Job) -> None:
    job.begin()
    job.handover.collect()
    job.opt.param_groups[0]["lr"] = 0.0625
    job.begin()
    job.handover.collect()
    (*_, last) = [m.written for m in job.desk.heard if m.WhichOneof("body") == "written"]
    image = memoryview(job.desk.path.read_bytes())[OFFSET:][: last.image_bytes]
    other = Job(job.desk)
    apply.apply(image, last.manifest_bytes, job="j", world=1, shard=0, states=other.states)
    assert other.opt.param_groups[0]["lr"] == 0.0625
    assert list(other.opt.state_dict()["param_groups"][0]) == list(
        job.opt.state_dict()["param_groups"][0]
    )
    other.handover.close()


def in_flight(job: Job, write) -> bool:
    """Whether a snapshot is torn that `write` ran under, of objects that were planned before."""
    job.begin()
    assert not job.handover.collect().torn
    job.desk.open.clear()
    job.begin()
    assert job.handover._flight._cargo.captured.layout is job.handover._planned[0]
    write()
    job.desk.open.set()
    return job.handover.collect().torn


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_parameter_that_moves_under_a_later_copy_is_seen(job: Job, which: str) -> None:
    def write() -> None:
        with torch.no_grad():
            getattr(job.model, which).bias.add_(1)

    assert in_flight(job, write)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_moments_that_move_under_a_later_copy_are_seen(job: Job, key: str) -> None:
    assert in_flight(job, lambda: [*job.opt.state.values()][-1][key].add_(1))


def test_an_update_between_two_snapshots_is_no_tear(job: Job) -> None:
    for _ in range(3):
        job.begin()
        job.train()
        assert not job.handover.collect().torn


class Busybody:
    """Writes to a parameter whenever its state is asked for."""

    def __init__(self) -> None:
        self.parameter: torch.Tensor | None = None

    def state_dict(self) -> dict[str, int]:
        if self.parameter is not None:
            with torch.no_grad():
                self.parameter.add_(1)
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_who_writes_while_asked_for_its_state_tears_nothing(desk: Desk) -> None:
    other = Busybody()
    job = Job(desk, other=other)
    other.parameter = job.model.large.weight
    for _ in range(2):
        job.begin()
        assert not job.handover.collect().torn
    other.parameter = None
    job.handover.close()


def test_forms_of_many_tensors_are_asked_by_parts() -> None:
    tensors = [torch.zeros(2, 3) for _ in range(2 * forms._TOGETHER + 3)]
    alias = tensors[5].detach()
    known = forms.Forms(tensors)
    watched = known.watch([alias, tensors[-1], tensors[7]])
    assert [id(t) for t in watched] == [id(tensors[7]), id(tensors[-1]), id(alias)]
    tensors[5].add_(1)
    tensors[-1].add_(1)
    assert known.hold()
    assert known.versions == [0, 1, 1]
    for i in (0, forms._TOGETHER, -1):
        before = tensors[i].data
        tensors[i].data = torch.zeros(2, 3)
        assert not known.hold()
        tensors[i].data = before
        assert known.hold()
        tensors[i].data = before.view(3, 2)
        assert not known.hold()
        tensors[i].data = before


class Side:
    """Stands for the devices' streams; notes what is asked of it."""

    devices = (torch.device("cpu"),)
    standing_at = (64 << 10, 128 << 10)

    def __init__(self, heard: list[pb.ToDaemon]) -> None:
        self._heard = heard
        self.log: list[object] = []

    def start(self, *_: object) -> None:
        self.log.append("start")

    def standing(self) -> Iterator[int]:
        assert not told(self), "what devices copy stands when they have"
        yield from self.standing_at

    @property
    def heard(self) -> list[pb.ToDaemon]:
        return self._heard

    def hold_back(self) -> None:
        """There is nothing to hold back."""

    def join(self) -> None:
        self.log.append("join")


def test_what_devices_copy_is_told_when_they_have(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "_TELL_BYTES", 1)
    side = Side(job.desk.heard)
    monkeypatch.setattr(cuda, "Stream", lambda _: side)
    job.begin()
    assert not job.handover.collect().torn
    assert told(job.desk) == [*side.standing_at]
    assert side.log == ["start", "join"]


def test_a_buffer_is_nobody_elses_before_the_devices_are_done(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is given up goes back, and a device would still write to it."""
    side = Side(job.desk.heard)
    monkeypatch.setattr(cuda, "Stream", lambda _: side)

    def give_up(*_: object) -> None:
        raise flight.Abandoned

    monkeypatch.setattr(flight.Flight, "_check", give_up)
    job.begin()
    assert job.handover.collect().skipped == "it was abandoned"
    assert side.log == ["start", "join"]
