"""Ranks that write their buffers as a test wants it: how much, when, and what they say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import RawIOBase
from pathlib import Path

from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import trainer_pb2 as tp
from snapshotd_client.lock import TrainerLock
from tests.integration import wires
from tests.integration.cluster import Node


class Writer:
    """One rank, attached, that has started afresh."""

    def __init__(self, node: Node, line: wires.Trainer, image: bytes) -> None:
        self.node = node
        self.image = image
        self._line = line
        self._granted = tp.Granted()
        self._step = 0
        self._stands = 0  # of each block
        self._writes = False

    def claim(self, step: int) -> None:
        self._step, self._stands, self._writes = step, 0, True
        claim = tp.Claim(step=step, image_bytes=len(self.image), patience_s=60)
        self._granted = self._line.ask(claim=claim, timeout_s=60.0).granted

    def write(self, part: float) -> None:
        """Write that part of each block."""
        block, end = self._granted.block_bytes, round(part * self._granted.block_bytes)
        whole = memoryview(self.image)
        with self.segment() as segment:
            for start in range(0, len(whole), block):
                segment.seek(self._granted.image_offset + start + self._stands)
                segment.write(whole[start + self._stands : min(start + end, start + block)])
        self._stands = end

    def tell(self) -> None:
        """Say what stands."""
        granted, stands = self._granted, self._stands
        copied = tp.Copied(step=self._step, buffer=granted.buffer, block_bytes=stands)
        self._line.say(copied=copied)

    def sent_bytes(self) -> int:
        """What its SMP has sent of blocks; what is said again has it tell what it counted."""
        if self._writes:
            self.tell()
        return self.slot().counters.bytes_sent

    def copy(self, part: float) -> None:
        self.write(part)
        self.tell()

    def flip(self, at: int) -> None:
        with self.segment() as segment:
            segment.seek(self._granted.image_offset + at)
            segment.write(bytes([self.image[at] ^ 1]))

    def segment(self) -> RawIOBase:
        return Path(self._granted.path).open("r+b", buffering=0)

    def say_written(self) -> None:
        size, buffer = len(self.image), self._granted.buffer
        written = tp.Written(step=self._step, buffer=buffer, image_bytes=size)
        assert self._line.ask(written=written).HasField("accepted")
        self._writes = False

    def give_up(self) -> None:
        answer = self._line.ask(**{"pass": tp.Pass(step=self._step, reason="it was torn")})
        assert answer.HasField("accepted")
        self._writes = False

    def until_committed(self, timeout_s: float = 60.0) -> None:
        """Back when the step is."""
        self._line.until(lambda progress: progress.committed.step == self._step, timeout_s)

    def slot(self) -> pb.SlotFacts:
        (slot,) = self.node.status().slots
        return slot


@contextmanager
def writers(nodes: Sequence[Node], images: Sequence[bytes]) -> Iterator[list[Writer]]:
    """A job of one rank a node, all of which start afresh."""
    with ExitStack() as stack:
        lines = []
        for rank, node in enumerate(nodes):
            lock = TrainerLock(node.run_dir, 0, f"rank {rank}")
            lock.acquire()
            stack.callback(lock.release)
            with wires.trainer(wires.front(node)) as front:
                found = Path(front.ask(find=tp.Find(slot=0)).found.endpoint.removeprefix("ipc://"))
            lines.append(stack.enter_context(wires.trainer(found, f"rank {rank}")))
            attach = tp.Attach(job="job", run_id="r", shard=rank, world=len(nodes))
            assert lines[-1].ask(attach=attach).HasField("attached")
        asked = [line.say(restore=tp.Restore()) for line in lines]
        for line, number in zip(lines, asked, strict=True):
            assert line.hear(number).restored.decision.HasField("fresh")
        yield [Writer(*each) for each in zip(nodes, lines, images, strict=True)]
