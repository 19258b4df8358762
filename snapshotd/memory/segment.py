"""One segment file, mapped: its life from FREE through WRITING to SEALED and back.

The header page says what the file holds and is replaced whole by one pwrite. Everything it says
is true before it is said: sealing writes the record, then the header. So a process killed at any
instruction leaves a file that is WRITING, and worth nothing, or SEALED and complete.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import xxhash

from snapshotd.coding.digest import grain_digests
from snapshotd.errors import DamagedBytes
from snapshotd.memory.allocation import explain, touch
from snapshotd.memory.records import (
    check_image,
    parity_record,
    parse_record,
    place_message,
    seal_record,
    version_message,
)
from snapshotd.memory.segment_file import (
    blank,
    check_header,
    create_file,
    file_bytes,
    fill_holes,
    open_regular,
)
from snapshotd.memory.states import Kind, State, check_change
from snapshotd.metadata import ParityPlace, Version
from snapshotd.wire.points import point
from snapshotd.wire.protocol import HEADER_BYTES
from snapshotd.wire.segment import SegmentFormatError, decode_header, encode_header
from snapshotd.wire.v1.segment_pb2 import ParityRecord, SealRecord, SegmentHeader

#: Where the image starts in the file.
IMAGE_OFFSET: Final = HEADER_BYTES

#: A segment keeps its file open to replace the header, and its mapping keeps a duplicate.
DESCRIPTORS_PER_SEGMENT: Final = 2


class Segment:
    """One generation's bytes in shared memory: [header page | image | record].

    Every method may run in any thread, but only one at a time may change the state, and none
    while `seal_*`, `verify` or a copy out of the image runs elsewhere: pin the segment around
    those, so that it is not freed under them. Made by `create` or `open`.
    """

    def __init__(
        self, path: Path, descriptor: int, mapping: mmap.mmap, header: SegmentHeader
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._mapping = mapping
        self._header = header
        self._pins = 0
        self._claimed = False
        self._record: SealRecord | ParityRecord | None = None

    @classmethod
    def create(cls, path: Path, kind: Kind, image_capacity: int, record_capacity: int) -> Segment:
        """Make a FREE segment, all of its memory allocated and touched.

        Raises:
            NoRoom: memory, the file system or descriptors do not suffice.
            ConfigError: the directory is read-only or forbidden.
            FileExistsError: `path` exists.
        """
        create_file(path, kind, image_capacity, record_capacity)
        segment = cls.open(path)
        segment.touch()
        return segment

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Map a segment that is there; its bytes are not read (see `verify`).

        Raises:
            DamagedBytes: it is no segment: foreign, cut short, of another format, its header
                damaged.
            NoRoom: descriptors or memory do not suffice.
            ConfigError: it is forbidden.
            FileNotFoundError: it is not there.
        """
        with ExitStack() as undo:
            descriptor = open_regular(path)
            undo.callback(os.close, descriptor)
            size = os.fstat(descriptor).st_size
            try:
                header = decode_header(os.pread(descriptor, HEADER_BYTES, 0))
                check_header(header, size)
                fill_holes(descriptor, size)
                mapping = mmap.mmap(descriptor, size)
            except SegmentFormatError as error:
                raise DamagedBytes(f"{path}: {error}") from error
            except OSError as error:
                raise explain(error, path, size) from error
            undo.pop_all()
        return cls(path, descriptor, mapping, header)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def header(self) -> SegmentHeader:
        """A copy."""
        copy = SegmentHeader()
        copy.CopyFrom(self._header)
        return copy

    @property
    def state(self) -> State:
        return State(self._header.state)

    @property
    def kind(self) -> Kind:
        return Kind(self._header.kind)

    @property
    def version(self) -> Version | None:
        """What it holds or is being filled with; None while FREE."""
        if not self._header.HasField("version"):
            return None
        return Version(self._header.version.epoch, self._header.version.step)

    @property
    def image_capacity(self) -> int:
        return self._header.image_capacity

    @property
    def record_capacity(self) -> int:
        return self._header.record_capacity

    @property
    def size_bytes(self) -> int:
        return file_bytes(self.image_capacity, self.record_capacity)

    @property
    def pinned(self) -> bool:
        return self._pins > 0

    @property
    def is_available(self) -> bool:
        """Whether it may be claimed or removed: FREE, and nobody's."""
        return self.state is State.FREE and not self._claimed and not self.pinned

    def touch(self) -> None:
        """Map all pages of a FREE segment into this process, so that first use is not slow."""
        touch(self._mapping)

    def begin_data(self, cluster_id: str, job: str, shard: int, version: Version) -> None:
        """FREE to WRITING, to be filled with a shard.

        Raises:
            ValueError: not FREE, not a data segment, or names too long for the header.
        """
        self._check_kind(Kind.DATA)
        self._begin(cluster_id, job, version, SegmentHeader(shard=shard))

    def begin_parity(self, cluster_id: str, job: str, version: Version, place: ParityPlace) -> None:
        """FREE to WRITING, to be filled with a parity block.

        Raises:
            ValueError: not FREE, not a parity segment, or names too long for the header.
        """
        self._check_kind(Kind.PARITY)
        self._begin(cluster_id, job, version, SegmentHeader(place=place_message(place)))

    def image(self, image_bytes: int) -> memoryview:
        """A writable view of the first `image_bytes` of the image; contents stay for ever.

        The view, and each slice of it, is the caller's to release (`with segment.image(n) as
        view:`): `close` fails while one is left. Writing into a SEALED segment's image is
        damage; nothing prevents it, `verify` finds it.

        Raises:
            ValueError: longer than the capacity.
            DamagedBytes: the file is shorter than it was.
        """
        self._check_length()
        if not 0 <= image_bytes <= self.image_capacity:
            raise ValueError(
                f"segment {self.name}: image of {image_bytes} bytes, capacity {self.image_capacity}"
            )
        return memoryview(self._mapping)[IMAGE_OFFSET : IMAGE_OFFSET + image_bytes]

    def seal_data(
        self, world: int, image_bytes: int, manifest_bytes: int, digests: bytes | None = None
    ) -> SealRecord:
        """Checksum the image, write its record, then say SEALED.

        Args:
            world: number of shards of the job.
            image_bytes: length of the image.
            manifest_bytes: how much of it is the manifest.
            digests: of the image's grains, taken of this memory as the bytes came in; None reads
                the whole image for them.

        Raises:
            ValueError: not WRITING, not a data segment, or lengths that do not fit.
        """
        self._check_kind(Kind.DATA)
        check_change(self.name, self.state, State.SEALED)
        if not 0 <= manifest_bytes <= image_bytes:
            raise ValueError(
                f"segment {self.name}: manifest of {manifest_bytes} bytes in an image of "
                f"{image_bytes}"
            )
        with self.image(image_bytes) as image:
            found = grain_digests(image) if digests is None else digests
        record = seal_record(self._header, found, world, image_bytes, manifest_bytes)
        point("smp.seal.digested")
        self._seal(record)
        return record

    def seal_parity(
        self, group: Sequence[SealRecord], image_bytes: int, digests: bytes
    ) -> ParityRecord:
        """Write the block's record, then say SEALED.

        Args:
            group: the seal records of the group's shards, in group order.
            image_bytes: length of the parity block.
            digests: of the block's grains, taken of this memory as the bytes came in.

        Raises:
            ValueError: not WRITING, not a parity segment, or a record that does not fit.
        """
        self._check_kind(Kind.PARITY)
        check_change(self.name, self.state, State.SEALED)
        self.image(image_bytes).release()  # it fits, and nobody has cut the file
        record = parity_record(self._header, digests, group, image_bytes)
        point("smp.parity.digested")
        self._seal(record)
        return record

    @property
    def record(self) -> SealRecord | ParityRecord:
        """The record of a SEALED segment; for reading only.

        Raises:
            ValueError: not SEALED.
            DamagedBytes: the record is not what was sealed.
        """
        if self.state is not State.SEALED:
            raise ValueError(f"segment {self.name} is {self.state.name}; it has no record")
        if self._record is None:
            self._record = self._read_record()
        return self._record

    def verify(self, threads: int = 1) -> None:
        """Read all again, in some threads: header, record, each grain against its checksum.

        Raises:
            ValueError: not SEALED.
            DamagedBytes: names the segment and what differs.
        """
        if self.state is not State.SEALED:
            raise ValueError(f"segment {self.name} is {self.state.name}; nothing to verify")
        with self._named():
            if decode_header(os.pread(self._descriptor, HEADER_BYTES, 0)) != self._header:
                raise DamagedBytes("its header was changed by somebody else")
        record = self._read_record()
        with self.image(self._header.image_bytes) as image, self._named():
            check_image(record, image, threads)

    def free(self) -> None:
        """WRITING or SEALED to FREE: what it held is forgotten, its memory is kept.

        Raises:
            ValueError: pinned, or FREE already.
        """
        if self.pinned:
            raise ValueError(f"segment {self.name} is pinned {self._pins} times; not freed")
        self._replace_header(State.FREE, blank(self._header))

    def claim(self) -> None:
        """Promise the FREE segment to one caller, until it is begun."""
        if not self.is_available:
            raise ValueError(f"segment {self.name} is not available")
        self._claimed = True

    def unclaim(self) -> None:
        """Take the promise back."""
        self._claimed = False

    def pin(self) -> None:
        """Keep the segment from being freed until as many calls of `unpin`."""
        self._pins += 1

    def unpin(self) -> None:
        if self._pins == 0:
            raise ValueError(f"segment {self.name} is not pinned")
        self._pins -= 1

    def close(self) -> None:
        """Unmap; the file stays. A second call does nothing.

        Raises:
            BufferError: a view from `image` is not released; the segment stays usable.
        """
        if self._mapping.closed:
            return
        try:
            self._mapping.close()
        except BufferError as error:
            raise BufferError(f"segment {self.name}: a view of its image is in use") from error
        os.close(self._descriptor)

    def unlink(self) -> None:
        """Remove the file; its memory returns when the last process has unmapped it."""
        self._path.unlink(missing_ok=True)

    def _begin(
        self, cluster_id: str, job: str, version: Version, particulars: SegmentHeader
    ) -> None:
        try:
            header = blank(self._header)
            header.MergeFrom(particulars)
            header.cluster_id = cluster_id
            header.job = job
            header.version.CopyFrom(version_message(version))
            self._replace_header(State.WRITING, header)
            point("smp.begin.headed")
        finally:
            # Used up whatever comes of it; last, so that nobody can claim it in between.
            self._claimed = False

    def _seal(self, record: SealRecord | ParityRecord) -> None:
        encoded = record.SerializeToString()
        if len(encoded) > self.record_capacity:
            raise ValueError(
                f"segment {self.name}: record of {len(encoded)} bytes, capacity "
                f"{self.record_capacity}"
            )
        start = IMAGE_OFFSET + self.image_capacity
        self._mapping[start : start + len(encoded)] = encoded
        header = self.header
        header.image_bytes = record.image_bytes
        header.record_bytes = len(encoded)
        header.record_digest = xxhash.xxh3_128_digest(encoded)
        point("smp.seal.recorded")
        # Last, so that SEALED is said of nothing that is not there.
        self._replace_header(State.SEALED, header)
        point("smp.seal.headed")
        self._record = record

    def _replace_header(self, state: State, header: SegmentHeader) -> None:
        """The one place where a segment changes its state."""
        check_change(self.name, self.state, state)
        header.state = state.value
        written = os.pwrite(self._descriptor, encode_header(header), 0)
        if written != HEADER_BYTES:
            raise OSError(f"{self._path}: {written} of {HEADER_BYTES} header bytes were written")
        self._header = header
        self._record = None

    def _check_length(self) -> None:
        """Whoever reads a page behind the end of a mapped file is killed by SIGBUS."""
        size = os.fstat(self._descriptor).st_size
        if size < self.size_bytes:
            raise DamagedBytes(
                f"{self._path}: somebody cut it to {size} of its {self.size_bytes} bytes"
            )

    def _read_record(self) -> SealRecord | ParityRecord:
        self._check_length()
        start = IMAGE_OFFSET + self.image_capacity
        with self._named():
            return parse_record(
                self._header, self._mapping[start : start + self._header.record_bytes]
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Damage that is found within is told with the file's name."""
        try:
            yield
        except (SegmentFormatError, DamagedBytes) as error:
            raise DamagedBytes(f"{self._path}: {error}") from error

    def _check_kind(self, wanted: Kind) -> None:
        if self.kind is not wanted:
            raise ValueError(f"segment {self.name} is for {self.kind.label}, not {wanted.label}")
