"""An image that was restored from is unmapped, quietly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.buffers import Buffers, Reading
from snapshotd_client.copying import Load
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.filling import Taken, filled
from snapshotd_client.ranges import RangesMaker
from snapshotd_client.readying import Readying
from snapshotd_client.wires import DaemonGone


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def segment(shm_path: Path) -> Path:
    path = shm_path / "segment"
    path.write_bytes(bytes(4096) + b"image" + bytes(4091))
    return path


def test_an_image_is_read_and_unmapped(segment: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = Reading(str(segment), 4096, 5)
        assert bytes(reading.image) == b"image"
        assert mapped(segment)
        readying = Readying(Buffers(), (), Load((), ()), [reading])
        readying.fly()
    assert readying.done.is_set()
    assert not mapped(segment)


def test_an_image_that_is_forgotten_is_unmapped_with_its_last_tensor(segment: Path) -> None:
    reading = Reading(str(segment), 4096, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = torch.frombuffer(reading.image, dtype=torch.uint8)
    del reading
    assert bytes(held.tolist()) == b"image"
    assert mapped(segment)
    del held
    assert not mapped(segment)


def test_a_file_that_is_too_short_is_told(segment: Path) -> None:
    with pytest.raises(SnapshotdClientError, match="8192 bytes, 9096 were expected"):
        Reading(str(segment), 4096, 5000)
    assert not mapped(segment)


def test_a_segment_that_went_with_its_daemon(tmp_path: Path) -> None:
    """The question is then asked again, of the daemon that comes next."""
    path = str(tmp_path / "data-0.seg")
    with pytest.raises(DaemonGone, match="cannot be mapped"):
        Reading(path, 4096, 5)
    answer = pb.ToTrainer(filled=pb.Filled(path=path, image_offset=4096))
    with (
        pytest.raises(DaemonGone, match="cannot be mapped"),
        filled(lambda _: answer, RangesMaker().ranges(), 5, Taken()),
    ):
        pass


def test_what_is_written_to_a_private_reading_stays_here(segment: Path) -> None:
    before = segment.read_bytes()
    reading = Reading(str(segment), 4096, 5, private=True)
    reading.image[:2] = b"xy"
    assert bytes(reading.image[:2]) == b"xy"
    reading.close()
    assert segment.read_bytes() == before
