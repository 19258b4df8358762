"""Files of the segment directory: headers, records, and things that are no files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import xxhash
from hypothesis import strategies as st

from snapshotd.coding.digest import content_digest, grain_digests
from snapshotd.errors import SnapshotdError
from snapshotd.metadata import SlotCounters
from snapshotd.rpc import facts as convert
from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.segment import SegmentFormatError, decode_header, encode_header
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.fuzz.harness import Parts, Target
from tests.fuzz.messages import changed, messages, spoiled
from tests.fuzz.room import Memory, room, run, watched

SECRET = b"not yours " * 20


def _sealed(job: str, image: bytes, shard: int = 0) -> seg.SealRecord:
    digests = grain_digests(memoryview(image))
    return seg.SealRecord(
        job=job,
        world=2,
        shard=shard,
        version=seg.Version(epoch=5, step=1),
        image_bytes=len(image),
        grain_digests=digests,
        content_digest=content_digest(digests),
    )


def _data(image: bytes) -> tuple[seg.SegmentHeader, Any]:
    header = seg.SegmentHeader(
        kind=1, cluster_id="test", job="job", version=_sealed("", b"").version
    )
    return header, _sealed("job", image)


def _parity(image: bytes) -> tuple[seg.SegmentHeader, Any]:
    place = seg.ParityPlace(shards=[0, 1], parity=1, stripe=0, row=0)
    header = seg.SegmentHeader(
        kind=2, cluster_id="test", job="job", version=_sealed("", b"").version, place=place
    )
    record = seg.ParityRecord(
        place=place,
        group=[_sealed("job", image, s) for s in (0, 1)],
        image_bytes=len(image),
        grain_digests=grain_digests(memoryview(image)),
    )
    return header, record


@st.composite
def segment_files(draw: Any) -> bytes:
    """A segment file: record and header follow from each other most often, and may say anything."""
    image = draw(st.sampled_from([b"", b"x", bytes(4096), bytes(range(256)) * 40]))
    header, record = draw(st.sampled_from([_data, _parity]))(image)
    record = draw(st.just(record) | changed(st.just(record)))
    encoded = draw(spoiled(st.just(record.SerializeToString()), 1))
    # So that a changed record is one that the header agrees with, and gets as far as it can.
    for name in ("job", "version", "shard", "place", "image_bytes"):
        value = getattr(record, name, None)
        if isinstance(value, (str, int)):
            setattr(header, name, value)
        elif value is not None:
            getattr(header, name).CopyFrom(value)
    header.state = draw(st.sampled_from([3, 3, 3, 2, 1, 0, 9]))
    header.image_capacity = max(8192, len(image))
    header.record_capacity = max(4096, len(encoded))
    header.image_bytes = len(image)
    header.record_bytes = len(encoded)
    header.record_digest = xxhash.xxh3_128_digest(encoded)
    header = draw(st.just(header) | st.just(header) | changed(st.just(header)))
    try:
        page = encode_header(header)
    except ValueError:
        page = bytes(HEADER_BYTES)
    page = draw(spoiled(st.just(page), 1))
    body = image.ljust(max(8192, len(image)), b"\0") + encoded.ljust(max(4096, len(encoded)), b"\0")
    return page + draw(spoiled(st.just(body), 1))


def header(parts: Parts) -> None:
    """A header page is read, or refused by name; what is read can be written again."""
    for page in parts:
        try:
            found = decode_header(page)
        except SegmentFormatError:
            continue
        again = decode_header(encode_header(found))
        assert again == found


@st.composite
def _pages(draw: Any) -> list[bytes]:
    if draw(st.booleans()):
        return [draw(segment_files())[:HEADER_BYTES]]
    made = draw(messages(seg.SegmentHeader))
    try:
        page = encode_header(made)
    except ValueError:
        page = made.SerializeToString()
    return [draw(spoiled(st.just(page)))]


def _place(directory: Path, name: str, kind: str, data: bytes) -> None:
    path, secret = directory / name, directory.parent / "secret"
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "hard":
        os.link(secret, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "room":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data)


async def _adopt(shm: Path, shrink: bool) -> None:
    memory = Memory(shm)
    try:
        await memory.vault.adopt()
    except SnapshotdError:
        return
    try:
        facts = memory.machine.facts("127.0.0.1:9", memory.vault.counters())
        # What is adopted is told to all: they must take it.
        told = convert.slot_to(facts).SerializeToString()
        assert convert.slot_from(type(convert.slot_to(facts)).FromString(told)) == facts
        for job, version, what in memory.vault.held():
            segment = memory.vault.segment(job, version, what)
            if shrink:
                os.truncate(segment.path, HEADER_BYTES // 2)
            try:
                with memory.vault.reading(job, version, what) as sealed:
                    await asyncio.to_thread(sealed.verify)
                assert not shrink
            except SnapshotdError:
                assert shrink, "it was verified when it was adopted"
        assert memory.machine.facts("", SlotCounters()).data == () or not shrink
    finally:
        memory.arena.close()


_NAMES = ["data-0.seg", "parity-0.seg", "data-0.seg.new", "lock", "x\n.seg", ".seg", "-1.seg"]
_KINDS = ["file", "file", "file", "file", "link", "hard", "pipe", "room", "loop", "zero"]


def directory(parts: Parts) -> None:
    """A segment directory is adopted whatever lies in it; nothing outside of it is touched."""
    shrink = False
    with room() as path:
        shm, secret = path / "shm", path / "shm" / "secret"
        (shm / "slot-0").mkdir(parents=True)
        secret.write_bytes(SECRET)
        for part in parts:
            what, _, data = part.partition(b":")
            kind, _, name = what.decode("ascii", "replace").partition("=")
            shrink = shrink or kind == "shrink"
            if name in _NAMES and kind in _KINDS and not os.path.lexists(shm / "slot-0" / name):
                _place(shm / "slot-0", name, kind, data)
        with watched(shm):
            run(_adopt(shm, shrink))
        assert secret.read_bytes() == SECRET


@st.composite
def _directories(draw: Any) -> list[bytes]:
    names = draw(st.lists(st.sampled_from([*_NAMES[:2], *_NAMES]), max_size=3, unique=True))
    parts = []
    for name in names:
        kind = draw(st.sampled_from(_KINDS))
        data = draw(segment_files()) if kind == "file" else b""
        parts.append(f"{kind}={name}:".encode() + data)
    return [*parts, *([b"shrink=:"] if draw(st.booleans()) else [])]


TARGETS = [
    Target("header", _pages(), header, 300),
    Target("directory", _directories(), directory, 120),
]
