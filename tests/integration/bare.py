"""Ranks without torch: an image is bytes of a test's choosing, and each message is spelt out."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.channel import Channel
from snapshotd_client.lock import TrainerLock
from snapshotd_client.wires import DaemonGone
from tests.integration.cluster import Node, eventually

T = TypeVar("T")

ANSWER_S = 60.0
MANIFEST_BYTES = 700
#: A range: shard, offset, length, to.
Row = tuple[int, int, int, int]


def image_of(shard: int, step: int, image_bytes: int) -> bytes:
    """What rank `shard` has after `step`: no two alike."""
    return random.Random(f"{shard} {step}").randbytes(image_bytes)


class BareRank:
    """One rank, attached."""

    def __init__(self, node: Node, slot: int, rank: int, world: int, launch: str) -> None:
        self.node, self.rank = node, rank
        self._incarnation = secrets.token_hex(8)
        self.decision = node_pb2.DecisionId()
        self._attach = pb.Attach(job="job", run_id="run", shard=rank, world=world, launch=launch)
        self._lock = TrainerLock(node.run_dir, slot, self._incarnation)
        self._lock.acquire()
        self.committed = -1
        self._channel = Channel(
            node.run_dir, slot, self._incarnation, lambda: self._attach, self._progressed
        )
        self._channel.connect(ANSWER_S)

    def _progressed(self, progress: pb.Progress) -> None:
        if progress.HasField("committed") and progress.is_protected:
            self.committed = progress.committed.step

    def connect_again(self) -> None:
        """Once the daemon is gone, find the next one."""
        with contextlib.suppress(DaemonGone):
            while True:
                self._channel.listen(1.0)
        self._attach.decision.CopyFrom(self.decision)
        self._channel.connect(ANSWER_S)

    def post(self, **body: object) -> int:
        return self._channel.post(pb.ToDaemon(**body))

    def answer(self, number: int) -> pb.ToTrainer:
        return self._channel.answer(number, ANSWER_S)

    def ask(self, **body: object) -> pb.ToTrainer:
        return self._channel.ask(pb.ToDaemon(**body), ANSWER_S)

    def refusal(self, **asked: bool) -> str:
        """Why there is nothing to restore."""
        decision = self.ask(restore=pb.Restore(**asked)).restored.decision
        assert decision.refusal, decision
        return decision.refusal

    def save(self, step: int, image_bytes: int) -> None:
        claim = pb.Claim(step=step, image_bytes=image_bytes, patience_s=20)
        granted = self.ask(claim=claim).granted
        assert granted.path, "the claim was denied"
        with Path(granted.path).open("r+b") as file:
            file.seek(granted.image_offset)
            file.write(image_of(self.rank, step, image_bytes))
        self.ask(
            written=pb.Written(
                step=step, buffer=granted.buffer, image_bytes=image_bytes,
                manifest_bytes=min(MANIFEST_BYTES, image_bytes),
            )
        )  # fmt: skip

    def wait_committed(self, step: int) -> None:
        def committed() -> bool:
            self._channel.listen(0.05)
            return self.committed >= step

        eventually(f"step {step} is committed", committed, pause_s=0.0)

    def fill(self, image_bytes: int, rows: Sequence[Row]) -> tuple[bytes, pb.Filled]:
        return self.filled(self.post(fill=fill_of(image_bytes, rows)), image_bytes)

    def filled(self, number: int, image_bytes: int) -> tuple[bytes, pb.Filled]:
        filled = self.answer(number).filled
        with Path(filled.path).open("rb") as file:
            file.seek(filled.image_offset)
            return file.read(image_bytes), filled

    def manifests(self, *shards: int) -> dict[int, tuple[bytes, int]]:
        """shard -> its manifest, and the length of its whole image."""
        gathered = self.ask(manifests=pb.Manifests(shards=shards)).manifests_gathered
        file = Path(gathered.path).read_bytes()
        return {
            p.shard: (file[p.offset : p.offset + p.bytes], p.image_bytes) for p in gathered.pieces
        }

    def vanish(self) -> None:
        """What the daemon sees of a SIGKILL."""
        self._channel.close()
        self._lock.release()


def fill_of(image_bytes: int, rows: Sequence[Row]) -> pb.Fill:
    shards, offsets, lengths, to = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pb.Fill(image_bytes=image_bytes, shards=shards, offsets=offsets, lengths=lengths, to=to)


class BareJob:
    """All ranks of one start of a job, each in a thread where they wait for each other."""

    def __init__(self, homes: Sequence[tuple[Node, int]]) -> None:
        launch = secrets.token_hex(4)
        self._pool = ThreadPoolExecutor(len(homes))
        self.ranks = [
            BareRank(node, slot, rank, len(homes), launch)
            for rank, (node, slot) in enumerate(homes)
        ]

    def each(self, act: Callable[[BareRank], T]) -> list[T]:
        return list(self._pool.map(act, self.ranks))

    def restore(self, **asked: bool) -> list[pb.Restored]:
        def one(rank: BareRank) -> pb.Restored:
            restored = rank.ask(restore=pb.Restore(**asked)).restored
            rank.decision = restored.decision.id
            return restored

        return self.each(one)

    def save(self, step: int, image_bytes: Callable[[int], int]) -> None:
        self.each(lambda r: r.save(step, image_bytes(r.rank)))
        self.each(lambda r: r.wait_committed(step))

    def vanish(self) -> None:
        for rank in self.ranks:
            rank.vanish()
        self._pool.shutdown()
