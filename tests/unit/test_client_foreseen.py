"""What is done while the daemons decide counts only where their answer says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snapshotd.wire.v1 import segment_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.capture import plan
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


def stepped() -> dict[str, object]:
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def looked_at(path: Path, image: bytes, manifest_bytes: int, states: dict[str, object]) -> Foreseen:
    path.write_bytes(bytes(4096) + image)
    newest = pb.Image(
        path=str(path), image_offset=4096, image_bytes=len(image), manifest_bytes=manifest_bytes
    )
    seen = Foreseen()
    seen.look(newest, states)
    seen.end(str(path), 4096, len(image))
    return seen


def test_there_is_room_for_the_moments_of_a_new_optimizer_and_for_nothing_else(
    shm_path: Path,
) -> None:
    states = stepped()
    captured = plan("job", 0, 1, 0, states, {})
    image = bytearray(captured.image_bytes)
    captured.write(memoryview(image))
    path = shm_path / "segment"
    moment = 300 * 300 * 4
    cpu = torch.device("cpu")
    seen = looked_at(path, image, captured.manifest_bytes, states)
    assert seen.room.held == []
    fresh = stepped()
    fresh["optimizer"].state.clear()
    seen = looked_at(path, image, captured.manifest_bytes, fresh)
    assert seen.room.held.count(moment) == 2
    pieces = [seen.room.take(moment, cpu) for _ in range(3)]
    assert [piece.nbytes for piece in pieces] == [moment] * 3
    assert len({piece.data_ptr() for piece in pieces}) == 3
    assert moment not in seen.room.held
    seen.end(str(path), 4096, 5)
    assert seen.room.held == []
    seen.let_go(lambda reading: reading.close())


@pytest.mark.parametrize("opening", [b"\xff" * 64, b""])
def test_an_opening_that_is_no_manifest_makes_no_room(shm_path: Path, opening: bytes) -> None:
    seen = looked_at(shm_path / "segment", opening.ljust(4096, b"\0"), len(opening), stepped())
    assert seen.room.held == []
    seen.let_go(lambda reading: reading.close())


def test_a_damaged_manifest_takes_no_more_memory_than_the_image(shm_path: Path) -> None:
    manifest = segment_pb2.Manifest(names={"optimizer": "optimizer"})
    manifest.extents.add(bytes=1 << 60)
    manifest.tensors.add(owner="optimizer", name="optimizer.state.0.other", device_type="cpu")
    opening = manifest.SerializeToString()
    seen = looked_at(shm_path / "segment", opening.ljust(4096, b"\0"), len(opening), stepped())
    assert seen.room.held == []
    seen.let_go(lambda reading: reading.close())
