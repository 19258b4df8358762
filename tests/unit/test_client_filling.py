"""What a daemon lends is read only as long as that daemon lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.errors import StateMismatch
from snapshotd_client.filling import Taken, filled, manifests
from snapshotd_client.ranges import RangesMaker
from snapshotd_client.wires import DaemonGone


class Daemon:
    """Lends one file, for both kinds of question."""

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.alive = True

    def ask(self, message: pb.ToDaemon) -> pb.ToTrainer:
        if not self.alive:
            raise DaemonGone("it closed the connection")
        match message.WhichOneof("body"):
            case "manifests":
                gathered = pb.ManifestsGathered(path=str(self.path))
                gathered.pieces.add(shard=0, bytes=self.length)
                return pb.ToTrainer(manifests_gathered=gathered)
            case "fill":
                return pb.ToTrainer(filled=pb.Filled(path=str(self.path)))
            case _:
                return pb.ToTrainer(progress=pb.Progress())


def test_an_image_counts_if_its_lender_lives_until_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lent"
    path.write_bytes(b"abcdef")
    daemon = Daemon(path, 6)

    def read(*, dies: bool, then: Exception | None = None) -> bytes:
        daemon.alive = True
        with filled(daemon.ask, RangesMaker().ranges(), 6, Taken()) as image:
            daemon.alive = not dies
            if then is not None:
                raise then
            return bytes(image)

    assert read(dies=False) == b"abcdef"
    with pytest.raises(DaemonGone):
        read(dies=True)
    with pytest.raises(DaemonGone):
        read(dies=True, then=StateMismatch(["of bytes that another wrote there"]))
    with pytest.raises(StateMismatch):
        read(dies=False, then=StateMismatch(["it is so"]))


def test_so_do_manifests_and_a_file_that_is_gone_with_its_lender(tmp_path: Path) -> None:
    path = tmp_path / "lent"
    text = segment_pb2.Manifest(job="j", step=3).SerializeToString()
    path.write_bytes(text)
    daemon = Daemon(path, len(text))
    assert manifests(daemon.ask)[0].step == 3
    path.unlink()

    def dying(message: pb.ToDaemon) -> pb.ToTrainer:
        reply = daemon.ask(message)
        daemon.alive = False
        return reply

    with pytest.raises(DaemonGone):
        manifests(dying)
