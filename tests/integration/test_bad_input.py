"""Whatever is said to a daemon, on any socket: the sender hears what is wrong, the job goes on.

One cluster and one training job bear all of it. After each test the very same processes still
serve, and the job trains and protects another step, byte for byte.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import pytest

import snapshotd_client.channel
import snapshotd_client.lock
import snapshotd_client.snapshotter
from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.wire.protocol import MAX_CONTROL_BYTES, PROTOCOL_VERSION
from snapshotd.wire.v1 import trainer_pb2 as tp
from snapshotd_client import (
    CannotProtect,
    Refused,
    StateChanged,
    StateMismatch,
    WorldChanged,
    WrongUse,
)
from snapshotd_client.lock import TrainerLock
from tests.integration import wires
from tests.integration.cluster import Node, eventually
from tests.integration.ranks import Job, Rank
from tests.integration.steady import Steady

GARBAGE = b"\xff\x00 this is no message \xc3\x28" * 8
OVERSIZED = bytes(MAX_CONTROL_BYTES + 1024)


# -- what trainers say


def bad_frames() -> list[tuple[str, tuple[bytes, ...], str, str]]:
    find = tp.Find(slot=0)
    other = tp.ToDaemon(protocol=PROTOCOL_VERSION + 1, request=1, find=find)
    return [
        ("garbage", (GARBAGE,), "malformed", "no message of snapshotd"),
        ("empty", (b"",), "protocol-mismatch", "protocol 0"),
        ("two frames", (b"", b""), "malformed", "2 frames, one expected"),
        ("other version", (other.SerializeToString(),), "protocol-mismatch", "speaks protocol 2"),
        (
            "no number",
            (tp.ToDaemon(protocol=1, find=find).SerializeToString(),),
            "malformed",
            "without a number or a body",
        ),
        (
            "no body",
            (tp.ToDaemon(protocol=1, request=1).SerializeToString(),),
            "malformed",
            "without a number or a body",
        ),
    ]


@pytest.mark.parametrize("path", [wires.front, wires.desk])
def test_frames_that_are_no_message(steady: Steady, path: Callable[[Node], Path]) -> None:
    for name, frames, code, what in bad_frames():
        with wires.trainer(path(steady.nodes[0])) as line:
            line.send(*frames)
            refused = line.hear(0).refused
            assert (refused.code, what in refused.what) == (code, True), f"{name}: {refused}"
            if code == "protocol-mismatch":
                assert "this daemon 1" in refused.what
                assert "Install the same version" in refused.remedy


@pytest.mark.parametrize("path", [wires.front, wires.desk])
def test_oversized_frames_and_junk_on_the_socket(
    steady: Steady, path: Callable[[Node], Path]
) -> None:
    with wires.trainer(path(steady.nodes[0])) as line:
        line.send(OVERSIZED)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(path(steady.nodes[0])))
        plain.sendall(GARBAGE)
    with wires.trainer(path(steady.nodes[0])) as line:
        line.send(GARBAGE)
        assert line.hear(0).refused.code == "malformed"


def test_messages_at_the_wrong_door(steady: Steady, node: Node) -> None:
    attach = tp.Attach(job="job", run_id="job", shard=0, world=2)
    with wires.trainer(wires.front(node)) as line:
        assert line.refused(attach=attach).code == "out-of-order"
        wild = line.refused(find=tp.Find(slot=4_000_000))
        assert wild.code == "malformed"
        assert "local rank 4000000 is beyond the 64 slots" in wild.what
        assert "LOCAL_RANK" in wild.remedy
    with wires.trainer(wires.desk(node)) as line:
        for body in (
            {"claim": tp.Claim(step=99, image_bytes=1, patience_s=1)},
            {"written": tp.Written(step=99, buffer="data-0.seg")},
            {"pass": tp.Pass(step=99)},
            {"restore": tp.Restore()},
            {"query": tp.Query()},
            {"detach": tp.Detach()},
            {"find": tp.Find()},
        ):
            refused = line.refused(**body)
            assert refused.code == "out-of-order", body
            assert "not attached" in refused.what
            assert refused.remedy


def slot_1(node: Node) -> Path:
    """The socket of a slot that no trainer uses; its SMP is started by asking."""
    with wires.trainer(wires.front(node)) as line:
        found = line.ask(find=tp.Find(slot=1)).found
    return Path(found.endpoint.removeprefix("ipc://"))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"shard": 2}, "rank 2 of a world of 2"),
        ({"world": 0}, "rank 0 of a world of 0"),
        ({"world": 4_000_000_000}, "rank 0 of a world of 4000000000"),
        ({"job": ""}, "takes 0 bytes"),
        ({"job": "x" * 5000}, "takes 5000 bytes"),
        ({"job": "\N{SNOWMAN}/" * 50}, "takes 600 bytes"),
        ({"run_id": "x" * 5000}, "a run id of 5000 characters"),
        ({}, "does not hold its lock"),
    ],
)
def test_attaching_with_facts_that_cannot_be(
    steady: Steady, node: Node, wrong: dict[str, object], what: str
) -> None:
    facts = {"job": "rogue", "run_id": "r", "shard": 0, "world": 2, **wrong}
    with wires.trainer(slot_1(node)) as line:
        refused = line.refused(attach=tp.Attach(**facts))
        assert what in refused.what
        assert refused.remedy


@pytest.fixture
def rogue(node: Node) -> Iterator[wires.Trainer]:
    """A trainer of its own job that holds its lock and is attached, on slot 1."""
    path = slot_1(node)
    lock = TrainerLock(node.run_dir, 1, "rogue")
    # The lock is this process's, as the steady job's are, so it is free here.
    lock.acquire()
    with wires.trainer(path, "rogue") as line:
        attach = tp.Attach(job="rogue/../\N{SNOWMAN}", run_id="r", shard=0, world=1)
        assert line.ask(attach=attach).HasField("attached")
        yield line
        line.ask(detach=tp.Detach())
    lock.release()


def test_requests_out_of_order(steady: Steady, rogue: wires.Trainer) -> None:
    before = rogue.refused(claim=tp.Claim(step=0, image_bytes=10, patience_s=1))
    assert (before.code, "before restore()" in before.what) == ("out-of-order", True)
    assert rogue.refused(**{"pass": tp.Pass(step=0)}).code == "out-of-order"
    assert rogue.refused(find=tp.Find()).code == "malformed"
    # Groups of two cannot be formed of one rank: the answer says what to do.
    decision = rogue.ask(restore=tp.Restore()).restored.decision
    assert "too few to keep 1 parity block" in decision.refusal
    assert "at least 2 nodes" in decision.refusal


@pytest.fixture
def lone(steady: Steady) -> Iterator[Node]:
    """A daemon without peers or parity, for a trainer that talks alone."""
    made = steady.cluster.node(f"lone{len(steady.cluster.nodes)}", seeds=[])
    made.config.write_text(made.config.read_text().replace("parity = 1", "parity = 0"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def attached(lone: Node) -> Iterator[wires.Trainer]:
    """A trainer that is attached to it, and whose restore() was answered."""
    path = slot_1(lone)
    lock = TrainerLock(lone.run_dir, 1, "one")
    lock.acquire()
    with wires.trainer(path, "one") as line:
        line.ask(attach=tp.Attach(job="mine", run_id="r", shard=0, world=1))
        assert line.ask(restore=tp.Restore()).restored.decision.HasField("fresh")
        yield line
    lock.release()


def test_a_trainer_that_breaks_every_rule_of_its_buffers(
    lone: Node, attached: wires.Trainer
) -> None:
    smps, line = lone.smp_pids(), attached
    again = line.refused(restore=tp.Restore())
    assert (again.code, "was answered" in again.what) == ("out-of-order", True)
    skip = line.ask(claim=tp.Claim(step=0, image_bytes=2**63, patience_s=1)).skip
    assert "budget 536870912" in skip.reason
    assert "raise memory_budget" in skip.reason
    granted = line.ask(claim=tp.Claim(step=1, image_bytes=9000, patience_s=1)).granted
    held = line.say(claim=tp.Claim(step=2, image_bytes=9000, patience_s=30))
    second = line.refused(claim=tp.Claim(step=3, image_bytes=9000, patience_s=1))
    assert "step 2 is still claimed" in second.what
    for wrong, code in (
        ({"buffer": "../../etc/passwd"}, "out-of-order"),
        ({"step": 7}, "out-of-order"),
        ({"image_bytes": 9001}, "malformed"),
        ({"image_bytes": 10, "manifest_bytes": 11}, "malformed"),
    ):
        good = {"step": 1, "buffer": granted.buffer, "image_bytes": 9000}
        assert line.refused(written=tp.Written(**{**good, **wrong})).code == code
    for wrong, code in (
        ({"buffer": "../../etc/passwd"}, "out-of-order"),
        ({"step": 7}, "out-of-order"),
        ({"block_bytes": 9001}, "malformed"),
    ):
        good = {"step": 1, "buffer": granted.buffer, "block_bytes": 9000}
        assert line.refused(copied=tp.Copied(**{**good, **wrong})).code == code
    # Of another step than that in the buffer, which stays.
    assert line.ask(**{"pass": tp.Pass(step=0)}).HasField("accepted")
    # Said twice in one breath: the second has nothing to speak of.
    written = tp.Written(step=1, buffer=granted.buffer, image_bytes=9000)
    first, twice = line.say(written=written), line.say(written=written)
    assert line.hear(first).HasField("accepted")
    assert line.hear(twice).refused.code == "out-of-order"
    granted = line.hear(held).granted
    backwards = line.refused(claim=tp.Claim(step=1, image_bytes=1, patience_s=1))
    assert backwards.code == "step-backwards"
    assert "step 1 comes after step 2" in backwards.what
    # An empty image, and away before it can be sealed.
    line.say(written=tp.Written(step=2, buffer=granted.buffer, image_bytes=0))
    line.say(detach=tp.Detach())
    late = line.refused(written=tp.Written(step=2, buffer=granted.buffer))
    assert late.code == "out-of-order"
    assert lone.smp_pids() == smps, lone.tail()


def test_what_was_said_to_stand_is_what_is_sealed(lone: Node, attached: wires.Trainer) -> None:
    image = os.urandom(3_000_001)
    claim = tp.Claim(step=1, image_bytes=len(image), patience_s=5)
    granted = attached.ask(claim=claim).granted
    said = {"step": 1, "buffer": granted.buffer}
    with Path(granted.path).open("r+b") as segment:
        segment.seek(granted.image_offset)
        for start in range(0, len(image), 1_000_000):
            end = min(start + 1_000_000, len(image))
            segment.write(image[start:end])
            segment.flush()
            attached.say(copied=tp.Copied(**said, block_bytes=end))
    attached.ask(written=tp.Written(**said, image_bytes=len(image)))

    def held() -> list[bytes]:
        return [d.content_digest for s in lone.status().slots for d in s.data]

    eventually("it is sealed", held)
    assert held() == [content_digest(grain_digests(memoryview(image)))]
    lone.kill()
    lone.start()
    eventually("it is verified, and held again", held)


# -- who may be a trainer


def test_two_processes_with_one_local_rank(
    steady: Steady, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotd_client.lock, "_LOCK_PATIENCE_S", 0.2)
    slot_1(node)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; file = open(sys.argv[1], 'a')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX, 1); print(flush=True); sys.stdin.read()",
            str(node.run_dir / "trainer-1.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(WrongUse, match="two processes have this local rank") as caught:
            Rank(0, 1).attach(node, 1, "another")
        assert "LOCAL_RANK" in caught.value.remedy
    finally:
        holder.communicate()


def test_one_rank_on_two_nodes(steady: Steady, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in steady.nodes:
        slot_1(node)  # an SMP that has yet to start may take longer than the refusal
    monkeypatch.setattr(snapshotd_client.snapshotter, "CONNECT_TIMEOUT_S", 2.0)
    first, second = Rank(0, 2), Rank(0, 2)
    first.attach(steady.nodes[0], 1, "twins")
    assert first.snap is not None
    errors: list[Refused] = []

    def is_refused() -> bool:
        """Once the second node has heard of the first trainer, and not a moment earlier."""
        try:
            second.attach(steady.nodes[1], 1, "twins")
        except Refused as error:
            errors.append(error)
        second.vanish()
        return bool(errors)

    with futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(first.snap.restore, timeout_s=8.0)
        eventually("the second is refused", is_refused)
        assert "not yet: shard 1" in str(waits.exception())
    assert errors[0].code == "duplicate-rank"
    assert "rank 0 of job 'twins' is already waiting on n0/1" in errors[0].what
    assert "its own RANK" in errors[0].remedy
    first.vanish()


def test_another_world_whose_ranks_are_other_models(steady: Steady) -> None:
    """Each rank's model has a size of its own here, so none of another world has a place for it."""
    saved = Job([(node, 1) for node in steady.nodes], "worlds")
    saved.restore()
    saved.train_protected(1)
    saved.close()
    more = Job([(node, slot) for slot in (1, 2) for node in steady.nodes], "worlds")
    before = [rank.digest() for rank in more.ranks]
    with pytest.raises(StateMismatch) as caught:
        more.restore()
    assert "model.0.weight: snapshot float32 [64, 64] and float32 [72, 64]" in str(caught.value)
    assert [rank.digest() for rank in more.ranks] == before
    more.vanish()


def test_one_rank_is_started_by_the_name_of_a_job_that_trains(steady: Steady) -> None:
    """It is told that it cannot be right; nothing is taken from those that train."""
    lone = Rank(0, 1)
    lone.attach(steady.nodes[0], 1, steady.job.name)
    assert lone.snap is not None
    with pytest.raises(WorldChanged, match="trains on 2 ranks now, and 1 ask"):
        lone.snap.restore()
    for _ in range(2):
        steady.job.train(1)
        assert steady.job.protected() == steady.job.next_step - 1
    lone.vanish()


@pytest.mark.parametrize("on_lost", ["raise", "fresh"])
def test_too_few_nodes_for_the_parity(steady: Steady, on_lost: str) -> None:
    lone = Rank(0, 1)
    lone.attach(steady.nodes[0], 1, "alone")
    assert lone.snap is not None
    with pytest.raises(CannotProtect) as caught:
        lone.snap.restore(on_lost=on_lost)
    assert caught.value.code == "cannot-protect"
    assert "at least 2 nodes" in caught.value.what
    assert "on_lost" not in str(caught.value)
    lone.vanish()


def test_half_an_environment(steady: Steady, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapshotd_client import Snapshotter

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(WrongUse, match=r"world_size .* is not set, while rank=0 is") as caught:
        Snapshotter({}, job="half", run_dir=node.run_dir)
    assert "torchrun" in caught.value.remedy
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(WrongUse, match="WORLD_SIZE is 'two', a whole number was expected"):
        Snapshotter({}, job="half", run_dir=node.run_dir)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(WrongUse, match="the job has no name"):
        Snapshotter({}, run_dir=node.run_dir)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "many")
    with pytest.raises(WrongUse, match="TORCHELASTIC_RESTART_COUNT is 'many'"):
        Snapshotter({}, job="half", run_dir=node.run_dir)


def test_steps_out_of_order_and_tensors_of_another_shape(steady: Steady) -> None:
    job = Job([(node, 1) for node in steady.nodes], "shapes")
    snap = job.ranks[0].snap
    assert snap is not None
    with pytest.raises(WrongUse, match="before restore"):
        snap.step(0)
    job.restore()
    job.train_protected(3)
    with pytest.raises(WrongUse, match="step 1 comes after step 2") as caught:
        snap.step(1)
    assert "growing order" in caught.value.remedy
    buffer = job.ranks[0].model[0].weight
    kept = buffer.data
    buffer.data = kept[:1].clone()
    with pytest.raises(StateChanged, match=r"model\.0\.weight: float32\[64, 64\] became"):
        snap.step(3)
    buffer.data = kept
    for rank in job.ranks[1:]:
        assert rank.snap is not None
        rank.snap.step(3)
    job.next_step = 4
    job.train_until_protected()
    job.close()
