"""What is done while the daemons decide counts only where their answer says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.foreseen import Foreseen
from snapshotd_client.wires import DaemonGone

IMAGE = (4096, 5)


def put(path: Path, image: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(bytes(4096) + image + bytes(4096 - len(image)))


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.fixture
def segment(shm_path: Path) -> Path:
    path = shm_path / "segment"
    put(path, b"image")
    return path


@pytest.fixture
def seen(segment: Path) -> Foreseen:
    found = Foreseen()
    newest = pb.Image(path=str(segment), image_offset=IMAGE[0], image_bytes=IMAGE[1])
    found.look(newest, {"model": torch.nn.Linear(2, 2)})
    return found


def test_what_was_mapped_is_read_where_it_is_named(seen: Foreseen, segment: Path) -> None:
    reading = seen.take(str(segment), *IMAGE)
    assert bytes(reading.image) == b"image"
    assert mappings(segment) == 1
    seen.let_go(lambda _: pytest.fail("it was taken"))
    reading.close()
    assert mappings(segment) == 0


def test_what_was_written_since_is_seen(seen: Foreseen, segment: Path) -> None:
    """The daemon may have used the same file for another snapshot until it answered."""
    with segment.open("r+b") as file:
        file.seek(4096)
        file.write(b"other")
    reading = seen.take(str(segment), *IMAGE)
    assert bytes(reading.image) == b"other"
    reading.close()


def test_a_file_that_was_made_anew_is_another(seen: Foreseen, segment: Path) -> None:
    put(segment, b"newer")
    reading = seen.take(str(segment), *IMAGE)
    assert bytes(reading.image) == b"newer"
    reading.close()
    seen.let_go(lambda unused: unused.close())
    assert mappings(segment) == 0


def test_another_length_or_file_is_mapped_anew(seen: Foreseen, segment: Path) -> None:
    other = segment.with_name("other")
    put(other, b"older")
    for path, length, image in ((segment, 3, b"ima"), (other, 5, b"older")):
        reading = seen.take(str(path), 4096, length)
        assert bytes(reading.image) == image
        reading.close()
    seen.let_go(lambda unused: unused.close())
    assert mappings(segment) == mappings(other) == 0


def test_what_is_gone_is_no_trouble_until_it_is_named(segment: Path) -> None:
    seen = Foreseen()
    segment.unlink()
    seen.look(pb.Image(path=str(segment), image_offset=4096, image_bytes=5), {})
    with pytest.raises(DaemonGone, match="cannot be mapped"):
        seen.take(str(segment), *IMAGE)
    seen.let_go(lambda _: pytest.fail("there is none"))


def test_a_daemon_that_holds_nothing(segment: Path) -> None:
    seen = Foreseen()
    seen.look(pb.Image(), {"model": torch.nn.Linear(2, 2)})
    assert seen.live is not None
    reading = seen.take(str(segment), *IMAGE)
    reading.close()


def test_state_that_cannot_be_captured_is_told_of_where_it_matters() -> None:
    seen = Foreseen()
    seen.look(pb.Image(), {"model": torch.nn.LazyLinear(2)})
    assert seen.live is None
