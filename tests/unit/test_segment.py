from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.errors import DamagedBytes
from snapshotd.memory.records import parity_record_bytes, seal_record_bytes
from snapshotd.memory.segment import IMAGE_OFFSET, Segment
from snapshotd.memory.segment_file import file_bytes
from snapshotd.memory.states import Kind, State, check_change
from snapshotd.metadata import ParityPlace, Version
from snapshotd.wire.protocol import HEADER_BYTES, SEGMENT_FORMAT
from snapshotd.wire.segment import MAGIC, SegmentFormatError, decode_header, encode_header
from snapshotd.wire.v1.segment_pb2 import SealRecord, SegmentHeader

CAPACITY = 16384
VERSION = Version(epoch=3, step=41)
PLACE = ParityPlace(shards=(0, 4, 7), parity=1, stripe=2, row=0)


@pytest.fixture
def data(shm_path: Path):
    segment = Segment.create(shm_path / "data-0.seg", Kind.DATA, CAPACITY, 4096)
    yield segment
    segment.close()


@pytest.fixture
def parity(shm_path: Path):
    segment = Segment.create(shm_path / "parity-0.seg", Kind.PARITY, CAPACITY, 4096)
    yield segment
    segment.close()


def fill(segment: Segment, payload: bytes) -> None:
    with segment.image(len(payload)) as image:
        image[:] = payload


def seal(segment: Segment, payload: bytes = b"state" * 2000) -> SealRecord:
    segment.begin_data("cluster", "job", 4, VERSION)
    fill(segment, payload)
    return segment.seal_data(world=8, image_bytes=len(payload), manifest_bytes=5)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def state_on_disk(segment: Segment) -> State:
    with closing(Segment.open(segment.path)) as again:
        return again.state


def reopened_and_verified(segment: Segment) -> None:
    with closing(Segment.open(segment.path)) as again:
        again.verify()


# -- the header page


def test_a_header_comes_back_and_fills_its_page() -> None:
    header = SegmentHeader(kind=1, state=2, image_capacity=5, job="j" * 300)
    page = encode_header(header)
    assert len(page) == HEADER_BYTES
    assert decode_header(page) == header


@settings(max_examples=300)
@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_every_flipped_bit_of_a_header_page_is_found(bit: int) -> None:
    page = bytearray(encode_header(SegmentHeader(kind=1, state=3, job="job", image_bytes=7)))
    page[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SegmentFormatError):
        decode_header(bytes(page))


def test_what_is_wrong_with_a_page_is_said() -> None:
    page = encode_header(SegmentHeader(kind=1))
    other = MAGIC + (SEGMENT_FORMAT + 1).to_bytes(4, "little") + page[12:]
    for bad, message in [
        (b"", "0 bytes, 4096 expected"),
        (bytes(HEADER_BYTES), "not a segment file"),
        (b"\x7fELF".ljust(HEADER_BYTES, b"x"), "not a segment file: starts with"),
        (other, f"segment format {SEGMENT_FORMAT + 1}, this program reads format"),
        (page[:12] + b"\xff" * 4 + page[16:], "length 4294967295 is beyond"),
        (page[:-1] + b"x", "not zero"),
    ]:
        with pytest.raises(SegmentFormatError, match=message):
            decode_header(bad)


def test_a_header_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="job name has 5000 characters"):
        encode_header(SegmentHeader(job="j" * 5000))


# -- a segment's life


def test_a_new_segment_is_free_whole_and_allocated(data: Segment) -> None:
    assert (data.state, data.kind, data.version) == (State.FREE, Kind.DATA, None)
    stat = data.path.stat()
    assert stat.st_size == data.size_bytes == file_bytes(CAPACITY, 4096)
    assert stat.st_blocks * 512 >= stat.st_size
    assert not list(data.path.parent.glob("*.new"))
    with pytest.raises(FileExistsError):
        Segment.create(data.path, Kind.DATA, CAPACITY, 4096)


def test_sealed_data_can_be_reopened_and_verified(data: Segment) -> None:
    payload = os.urandom(CAPACITY - 3)
    record = seal(data, payload)
    assert record.grain_digests == grain_digests(memoryview(payload))
    assert record.content_digest == content_digest(record.grain_digests)
    assert (record.job, record.world, record.shard, record.manifest_bytes) == ("job", 8, 4, 5)
    again = Segment.open(data.path)
    again.verify()
    assert again.state is State.SEALED
    assert again.version == VERSION
    assert again.record == record == data.record
    with again.image(len(payload)) as image:
        assert image == payload
    again.close()


@pytest.mark.parametrize("length", [0, 1, 4096, CAPACITY])
def test_images_of_any_length_are_sealed(data: Segment, length: int) -> None:
    data.begin_data("c", "j", 0, VERSION)
    data.seal_data(world=1, image_bytes=length, manifest_bytes=0)
    data.verify()


def test_sealed_parity_can_be_reopened_and_verified(data: Segment, parity: Segment) -> None:
    group = [seal(data)] * 3
    parity.begin_parity("cluster", "job", VERSION, PLACE)
    fill(parity, b"p" * 5000)
    digests = grain_digests(memoryview(b"p" * 5000))
    record = parity.seal_parity(group, 5000, digests)
    assert list(record.group) == group
    assert tuple(record.place.shards) == PLACE.shards
    again = Segment.open(parity.path)
    again.verify()
    assert again.record == record
    again.close()


def test_freed_segments_are_filled_again(data: Segment) -> None:
    for step in range(3):
        data.begin_data("c", "j", 0, Version(1, step))
        data.seal_data(1, 10, 0)
        data.verify()
        data.free()
        assert data.version is None
        assert state_on_disk(data) is State.FREE


def test_only_the_table_changes_states() -> None:
    legal = {
        (State.FREE, State.WRITING),
        (State.WRITING, State.SEALED),
        (State.WRITING, State.FREE),
        (State.SEALED, State.FREE),
    }
    for now in State:
        for wanted in State:
            if (now, wanted) in legal:
                check_change("s", now, wanted)
            else:
                with pytest.raises(ValueError, match=f"is {now.name}.*not {wanted.name}"):
                    check_change("s", now, wanted)


def test_calls_out_of_order_are_refused(data: Segment, parity: Segment) -> None:
    for call in (
        lambda: data.seal_data(1, 0, 0),
        data.free,
        data.verify,
        lambda: data.record,
        data.unpin,
    ):
        with pytest.raises(ValueError, match=r"data-0\.seg"):
            call()
    with pytest.raises(ValueError, match="is for data, not parity"):
        data.begin_parity("c", "j", VERSION, PLACE)
    with pytest.raises(ValueError, match="is for parity, not data"):
        parity.begin_data("c", "j", 0, VERSION)
    seal(data)
    with pytest.raises(ValueError, match="is SEALED"):
        data.begin_data("c", "j", 0, VERSION)


def test_lengths_that_do_not_fit_are_refused_and_change_nothing(data: Segment) -> None:
    with pytest.raises(ValueError, match="5000 characters"):
        data.begin_data("c", "j" * 5000, 0, VERSION)
    assert data.state is State.FREE
    data.begin_data("c", "j", 0, VERSION)
    with pytest.raises(ValueError, match=f"capacity {CAPACITY}"):
        data.seal_data(1, CAPACITY + 1, 0)
    with pytest.raises(ValueError, match="manifest of 11 bytes in an image of 10"):
        data.seal_data(1, 10, 11)
    assert state_on_disk(data) is State.WRITING


def test_a_record_that_does_not_fit_is_refused(shm_path: Path) -> None:
    segment = Segment.create(shm_path / "s.seg", Kind.DATA, CAPACITY, 10)
    segment.begin_data("c", "j", 0, VERSION)
    with pytest.raises(ValueError, match=r"record of .* capacity 10"):
        segment.seal_data(1, CAPACITY, 0)
    assert segment.state is State.WRITING
    segment.close()


@pytest.mark.parametrize("image_bytes", [0, 1, 5000, 1 << 20, (300 << 20) + 1])
@pytest.mark.parametrize("job", ["", "j", "ü" * 40])
def test_record_bounds_hold(image_bytes: int, job: str) -> None:
    big = (1 << 63) - 1
    seal_bound = seal_record_bytes(job, image_bytes)
    digests = bytes(seal_bound - 256 - len(job.encode()))
    record = SealRecord(
        job=job, world=2**32 - 1, shard=2**32 - 1, image_bytes=big, manifest_bytes=big,
        grain_digests=digests, content_digest=bytes(16),
    )  # fmt: skip
    record.version.epoch = record.version.step = big
    assert record.ByteSize() <= seal_bound
    assert 32 * record.ByteSize() < parity_record_bytes(job, [image_bytes] * 32, image_bytes)


def test_pinned_segments_are_not_freed(data: Segment) -> None:
    seal(data)
    data.pin()
    data.pin()
    with pytest.raises(ValueError, match="pinned 2 times"):
        data.free()
    data.unpin()
    assert data.pinned
    data.unpin()
    data.free()


def test_a_view_in_use_keeps_the_segment_open(data: Segment) -> None:
    view = data.image(10)
    with pytest.raises(BufferError, match=r"data-0\.seg"):
        data.close()
    view[:] = b"0123456789"
    view.release()
    data.close()
    data.close()


# -- damage


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (30, "damaged header"),
        (IMAGE_OFFSET, "bytes 0 to 4095"),
        (IMAGE_OFFSET + 9999, "bytes 8192 to 9999"),
        (IMAGE_OFFSET + CAPACITY + 4, "record differs"),
    ],
)
def test_a_flipped_bit_is_found_where_it_is(data: Segment, offset: int, message: str) -> None:
    seal(data, b"state" * 2000)
    flip(data.path, offset)
    with pytest.raises(DamagedBytes, match=rf"data-0\.seg.*{message}"):
        data.verify()
    with pytest.raises(DamagedBytes, match=rf"data-0\.seg.*{message}"):
        reopened_and_verified(data)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_that_matters_is_found(data: Segment, draw) -> None:
    if data.state is State.FREE:
        seal(data)
    header = data.header
    start, length = draw.draw(
        st.sampled_from(
            [
                (0, HEADER_BYTES),
                (IMAGE_OFFSET, header.image_bytes),
                (IMAGE_OFFSET + CAPACITY, header.record_bytes),
            ]
        )
    )
    offset, bit = start + draw.draw(st.integers(0, length - 1)), draw.draw(st.integers(0, 7))
    flip(data.path, offset, bit)
    with pytest.raises(DamagedBytes, match=r"data-0\.seg"):
        data.verify()
    flip(data.path, offset, bit)
    data.verify()


def test_files_that_are_no_segments_are_refused(data: Segment, shm_path: Path) -> None:
    whole = data.path.read_bytes()
    sealed = SegmentHeader(kind=1, state=3, image_capacity=0, record_capacity=0, image_bytes=1)
    for content, message in [
        (b"", "0 bytes, 4096 expected"),
        (whole[:100], "100 bytes, 4096 expected"),
        (whole[:-1], "its header says"),
        (whole + b"x", "its header says"),
        (b"foreign " * 1000, "not a segment file"),
        (encode_header(SegmentHeader(kind=9, state=1)), "unknown kind 9"),
        (encode_header(SegmentHeader(kind=1, state=9)), "unknown state 9"),
        (encode_header(SegmentHeader(kind=2, state=2)), "none in a parity's"),
        (encode_header(sealed), "image of 1 bytes in 0"),
    ]:
        path = shm_path / "x.seg"
        path.write_bytes(content)
        with pytest.raises(DamagedBytes, match=rf"x\.seg: .*{message}"):
            Segment.open(path)
    link = shm_path / "link.seg"
    link.symlink_to(data.path)
    with pytest.raises(DamagedBytes, match="no plain file"):
        Segment.open(link)
    with pytest.raises(FileNotFoundError):
        Segment.open(shm_path / "absent.seg")


def test_holes_of_a_copied_file_are_filled_when_opened(data: Segment, shm_path: Path) -> None:
    path = shm_path / "sparse.seg"
    with path.open("wb") as file:
        file.write(encode_header(data.header))
        file.truncate(data.size_bytes)
    segment = Segment.open(path)
    assert path.stat().st_blocks * 512 >= data.size_bytes
    segment.close()


# -- death

#: Forks a child for each line of the segment's code that a full cycle runs, and kills it there.
_KILL_AT_EVERY_LINE = """
    import os, signal, sys
    from pathlib import Path
    from snapshotd.memory.segment import Segment
    from snapshotd.memory.states import Kind
    from snapshotd.metadata import Version

    path = Path(sys.argv[1])
    watched = ("memory/segment.py", "memory/records.py", "memory/allocation.py", "coding/digest.py")

    def cycle():
        segment = Segment.create(path, Kind.DATA, 8192, 4096)
        segment.begin_data("c", "j", 0, Version(1, 7))
        with segment.image(5000) as image:
            image[:] = b"s" * 5000
        segment.seal_data(1, 5000, 10)
        segment.free()

    def killer(count):
        def trace(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.endswith(watched):
                return None
            if event == "line":
                count -= 1
                if count < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        return trace

    seen, line, killed = set(), 0, True
    while killed:
        pid = os.fork()
        if pid == 0:
            sys.settrace(killer(line))
            cycle()
            sys.settrace(None)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if path.exists():
            segment = Segment.open(path)
            seen.add(segment.state.name)
            if segment.state.name == "SEALED":
                segment.verify()
                assert segment.record.version.step == 7
            segment.close()
        else:
            seen.add("absent")
        for left in path.parent.iterdir():
            left.unlink()
        line += 1
    print(line, *sorted(seen))
"""


def test_killed_at_any_line_a_segment_is_worthless_or_complete(shm_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILL_AT_EVERY_LINE), shm_path / "data-0.seg"],
        check=True,
        capture_output=True,
        text=True,
    )
    lines, *seen = done.stdout.split()
    assert int(lines) > 50
    assert seen == ["FREE", "SEALED", "WRITING", "absent"]
