"""The file of a segment: made whole, opened only if it is a plain one, its header true of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from snapshotd.errors import DamagedBytes
from snapshotd.memory.allocation import allocate, explain
from snapshotd.memory.states import Kind, State
from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.segment import SegmentFormatError, encode_header
from snapshotd.wire.v1.segment_pb2 import SegmentHeader


def file_bytes(image_capacity: int, record_capacity: int) -> int:
    """Length of the file of a segment."""
    return HEADER_BYTES + image_capacity + record_capacity


def create_file(path: Path, kind: Kind, image_capacity: int, record_capacity: int) -> None:
    """Allocate the file of a FREE segment, and do not map it; errors as `Segment.create`."""
    header = SegmentHeader(
        kind=kind.value,
        state=State.FREE.value,
        image_capacity=image_capacity,
        record_capacity=record_capacity,
    )
    allocate(path, encode_header(header), file_bytes(image_capacity, record_capacity))


def blank(header: SegmentHeader) -> SegmentHeader:
    """The header of the same file that holds nothing."""
    return SegmentHeader(
        kind=header.kind,
        state=State.FREE.value,
        image_capacity=header.image_capacity,
        record_capacity=header.record_capacity,
    )


def open_regular(path: Path) -> int:
    """A descriptor of a plain file; a link or a pipe that was put there is not followed."""
    _check_plain(path, path.lstat())
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise explain(error, path) from error
    try:
        _check_plain(path, os.fstat(descriptor))  # of what was opened, whatever was there before
    except DamagedBytes:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DamagedBytes(f"{path}: not a segment file: it is no plain file")
    if status.st_nlink > 1:
        raise DamagedBytes(f"{path}: not a segment file: it has another name elsewhere")


def check_header(header: SegmentHeader, size: int) -> None:
    """Refuse a header that is intact and yet cannot be this file's.

    Raises:
        SegmentFormatError: says which numbers disagree.
    """
    if header.kind not in {kind.value for kind in Kind}:
        raise SegmentFormatError(f"unknown kind {header.kind}")
    if header.state not in {state.value for state in State}:
        raise SegmentFormatError(f"unknown state {header.state}")
    expected = file_bytes(header.image_capacity, header.record_capacity)
    if size != expected:
        raise SegmentFormatError(f"file is {size} bytes, its header says {expected}")
    if header.image_bytes > header.image_capacity or header.record_bytes > header.record_capacity:
        raise SegmentFormatError(
            f"image of {header.image_bytes} bytes in {header.image_capacity}, record of "
            f"{header.record_bytes} bytes in {header.record_capacity}"
        )
    if header.state == State.FREE.value:
        return
    if header.HasField("place") != (header.kind == Kind.PARITY.value):
        raise SegmentFormatError("a parity block's place in a data segment, or none in a parity's")


def fill_holes(descriptor: int, size: int) -> None:
    """A file that was copied may have pages missing, which would be a SIGBUS later."""
    if os.fstat(descriptor).st_blocks * 512 < size:
        os.posix_fallocate(descriptor, 0, size)
