"""Stripes are coded while trainers still write, and count once all is sealed: never before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import RawIOBase
from pathlib import Path

import pytest

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.rpc.serving import PATIENCE
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import trainer_pb2 as tp
from snapshotd_client.lock import TrainerLock
from tests.integration import wires
from tests.integration.cluster import TIMEOUTS, Cluster, Node, eventually

WORLD = 3
IMAGES = [os.urandom(7_000_000 + 100_000 * rank) for rank in range(WORLD)]


def digest_of(image: bytes) -> bytes:
    return content_digest(grain_digests(memoryview(image)))


class Writer:
    """A rank that writes its buffer as a test wants it."""

    def __init__(self, node: Node, line: wires.Trainer, image: bytes) -> None:
        self.node = node
        self.image = image
        self._line = line
        self._granted = tp.Granted()
        self._step = 0

    def claim(self, step: int) -> None:
        self._step = step
        claim = tp.Claim(step=step, image_bytes=len(self.image), patience_s=10)
        self._granted = self._line.ask(claim=claim).granted

    def copy(self, part: float) -> None:
        """Write that part of each block, and say that it stands."""
        block = self._granted.block_bytes
        count = round(part * block)
        with self._segment() as segment:
            for start in range(0, len(self.image), block):
                segment.seek(self._granted.image_offset + start)
                segment.write(self.image[start : min(start + count, start + block)])
        copied = tp.Copied(step=self._step, buffer=self._granted.buffer, block_bytes=count)
        self._line.say(copied=copied)

    def flip(self, at: int) -> None:
        with self._segment() as segment:
            segment.seek(self._granted.image_offset + at)
            segment.write(bytes([self.image[at] ^ 1]))

    def _segment(self) -> RawIOBase:
        return Path(self._granted.path).open("r+b", buffering=0)

    def say_written(self) -> None:
        size, buffer = len(self.image), self._granted.buffer
        written = tp.Written(step=self._step, buffer=buffer, image_bytes=size)
        assert self._line.ask(written=written).HasField("accepted")

    def give_up(self) -> None:
        answer = self._line.ask(**{"pass": tp.Pass(step=self._step, reason="it was torn")})
        assert answer.HasField("accepted")

    def slot(self) -> pb.SlotFacts:
        (slot,) = self.node.status().slots
        return slot


@contextmanager
def attached(nodes: list[Node]) -> Iterator[list[Writer]]:
    """A job of one rank a node, all of which start afresh."""
    with ExitStack() as stack:
        lines = []
        for rank, node in enumerate(nodes):
            lock = TrainerLock(node.run_dir, 0, f"rank {rank}")
            lock.acquire()
            stack.callback(lock.release)
            front = stack.enter_context(wires.trainer(wires.front(node)))
            found = Path(front.ask(find=tp.Find(slot=0)).found.endpoint.removeprefix("ipc://"))
            lines.append(stack.enter_context(wires.trainer(found, f"rank {rank}")))
            attach = tp.Attach(job="job", run_id="r", shard=rank, world=len(nodes))
            assert lines[-1].ask(attach=attach).HasField("attached")
        asked = [line.say(restore=tp.Restore()) for line in lines]
        for line, number in zip(lines, asked, strict=True):
            assert line.hear(number).restored.decision.HasField("fresh")
        yield [Writer(*each) for each in zip(nodes, lines, IMAGES, strict=True)]


@pytest.fixture
def nodes(cluster: Callable[..., Cluster]) -> list[Node]:
    return cluster().start(WORLD)


def sent(writers: list[Writer]) -> list[int]:
    return [writer.slot().counters.bytes_sent for writer in writers]


def committed(node: Node) -> int:
    (job,) = node.status().jobs
    return job.committed.step if job.HasField("committed") else 0


def is_committed(writers: list[Writer], step: int) -> None:
    eventually(f"step {step} is committed", lambda: {committed(w.node) for w in writers} == {step})
    digests = [digest_of(w.image) for w in writers]
    for writer in writers:
        parity = [p for p in writer.slot().parity if p.version.step == step]
        assert [list(p.content_digests) for p in parity] == [digests]


def test_all_is_coded_before_anything_is_sealed_and_counts_when_all_is(
    cluster: Callable[..., Cluster],
) -> None:
    patient = cluster()
    patient.timeouts |= {"rpc_s": 60.0, "restore_s": 120.0}  # nobody gives up, and reads twice
    with attached(patient.start(WORLD)) as writers:
        for writer in writers:
            writer.claim(1)
        for writer in writers:
            writer.copy(0.3)
        for writer in writers:
            writer.copy(1.0)
        sizes = [len(w.image) for w in writers]
        eventually("all blocks are with their coders", lambda: sent(writers) == sizes)
        for writer in writers[:-1]:
            writer.say_written()
        for writer in writers[:-1]:
            eventually("its shard is sealed", lambda w=writer: w.slot().data)
        assert not any(w.slot().parity for w in writers)
        assert not any(committed(w.node) for w in writers)
        writers[-1].say_written()
        is_committed(writers, 1)
        assert sent(writers) == sizes  # once


def test_an_image_that_is_given_up_takes_what_was_coded_of_it_along(nodes: list[Node]) -> None:
    with attached(nodes) as writers:
        for step in (1, 2, 3):
            before = sent(writers)
            for writer in writers:
                writer.claim(step)
            for writer in writers:
                writer.copy(0.6)
            eventually(
                "something is with all coders",
                lambda s=before: all(b > a for a, b in zip(s, sent(writers), strict=True)),
            )
            for writer in writers[:-1]:
                writer.copy(1.0)
                writer.say_written()
            writers[-1].give_up()
        for writer in writers:
            writer.claim(4)
            writer.copy(1.0)
            writer.say_written()
        is_committed(writers, 4)
        for writer in writers:
            slot = writer.slot()
            assert {p.version.step for p in slot.parity} == {4}
            assert not slot.accused


def test_a_trainer_that_stands_still_in_its_copy_is_held_against_nobody(nodes: list[Node]) -> None:
    with attached(nodes) as writers:
        for writer in writers:
            writer.claim(1)
        for writer in writers:
            writer.copy(0.6)

        def tried_again() -> bool:
            half = 0.6 * sum(len(w.image) for w in writers)
            return sum(sent(writers)) > 1.5 * half

        assert PATIENCE * TIMEOUTS["rpc_s"] < 2
        eventually("what stands was asked for again", tried_again)
        for writer in writers:
            writer.copy(1.0)
            writer.say_written()
        is_committed(writers, 1)
        assert not any(w.slot().accused for w in writers)


def test_bytes_that_change_after_they_stood_are_never_served(nodes: list[Node]) -> None:
    """A trainer may write where it should not; its step is lost, and nobody is blamed."""
    with attached(nodes) as writers:
        for writer in writers:
            writer.claim(1)
        for writer in writers:
            writer.copy(1.0)
        size = sum(len(w.image) for w in writers)
        eventually("all blocks are with their coders", lambda: sum(sent(writers)) == size)
        for writer in writers:
            writer.flip(1_000_000)
        eventually("they were asked for again", lambda: sum(sent(writers)) > size)
        for writer in writers:
            writer.say_written()
        eventually("each has found it", lambda: all(w.slot().counters.quarantined for w in writers))
        assert not any(committed(w.node) for w in writers)
        for writer in writers:
            writer.claim(2)
            writer.copy(1.0)
            writer.say_written()
        is_committed(writers, 2)
        assert not any(w.slot().accused for w in writers)


def test_a_node_that_is_lost_in_the_middle(nodes: list[Node]) -> None:
    with attached(nodes) as writers:
        for writer in writers:
            writer.claim(1)
        for writer in writers:
            writer.copy(0.6)
        eventually("something is with a coder", lambda: sum(sent(writers)))
        nodes[-1].lose()
        left = writers[:-1]
        for writer in left:
            writer.copy(1.0)
            writer.say_written()
        eventually("they are sealed", lambda: all(w.slot().data for w in left))
        assert not any(committed(w.node) for w in left)
        assert not any(w.slot().parity for w in left)
        assert not any(a.node != "" for w in left for a in w.slot().accused)
