"""One job's steps at an fsspec URL, as whoever reads them sees them.

It rests on what every store of today promises: what was written is there for the next reader and
the next listing, and a small object is there whole or not at all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from google.protobuf.message import DecodeError

from snapshotd.coding.digest import check_range
from snapshotd.errors import CallerError, DamagedBytes, RequestError, SnapshotdError
from snapshotd.metadata import Stored, StoredStep, Version
from snapshotd.tier import layout
from snapshotd.tier.streams import AT_ONCE, ahead, read_exactly
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1.segment_pb2 import SealRecord

#: Parts of one object: S3 takes 10,000 of at least 5 MiB, and a library keeps some in memory.
PART_BYTES: Final = 16 << 20

#: Of one range that is asked for; AT_ONCE of them are held.
PIECE_BYTES: Final = 4 << 20


class TierError(SnapshotdError):
    """The store refused, or did not answer; another attempt may succeed."""

    transient = True


class Absent(DamagedBytes):
    """There is no such step, or there is no longer."""


class Reader:
    """The steps of one job under a URL, to be looked at and read.

    Args:
        url: what fsspec understands: a directory, file://, s3://, gs://, memory:// and others.
        job: its name.

    Raises:
        CallerError: there is no such kind of store here.
    """

    def __init__(self, url: str, job: str) -> None:
        try:
            from fsspec.core import url_to_fs  # noqa: PLC0415  only where a tier is configured
        except ImportError as error:
            raise CallerError(
                f"the persistent tier {url} takes fsspec, which is not installed",
                "pip install 'snapshotd[persist]'",
            ) from error
        self.url = url
        self.job = job
        try:
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise CallerError(
                f"the persistent tier {url}: {error}",
                "Install the package that serves it: s3fs for s3://, gcsfs for gs://",
            ) from error
        except ValueError as error:
            raise CallerError(
                f"the persistent tier {url}: {error}", "Give it a directory, s3://, gs://, ..."
            ) from error
        self._base = str(root)
        self._root = layout.job_path(self._base, job)
        self._local = "file" in _protocols(self._fs)

    # -- looking

    def look(self) -> Stored:
        """Whole steps, damaged ones, and versions that are not whole. Raises TierError."""
        with self._asking("list"):
            names = self._listed(layout.steps_path(self._root))
            found = {v for n in names if n.endswith(".json") and (v := layout.version_of(n))}
            data = {
                v for n in self._listed(layout.data_path(self._root)) if (v := layout.version_of(n))
            }

        def step(version: Version) -> StoredStep | tuple[Version, str] | None:
            try:
                return self.index(version).step
            except Absent:  # retention has deleted it since it was listed
                return None
            except DamagedBytes as error:  # or of a later format: it is let alone, and counts
                return version, error.what

        with ThreadPoolExecutor(AT_ONCE) as pool:
            seen = list(pool.map(step, sorted(found)))
        return Stored(
            tuple(s for s in seen if isinstance(s, StoredStep)),
            tuple(sorted(data - found)),
            tuple(s for s in seen if isinstance(s, tuple)),
        )

    def index(self, version: Version) -> layout.Index:
        """What a whole step consists of. Raises DamagedBytes, TierError."""
        path = layout.index_path(self._root, version)
        with self._asking("read"):
            try:
                text = self._fs.cat_file(path)
            except FileNotFoundError as error:
                raise Absent(f"{self.url} has no whole {version} of {self.job!r}") from error
        index = layout.Index.from_bytes(text, path)
        if (index.job, index.step.version) != (self.job, version):
            raise DamagedBytes(f"{path} is of job {index.job!r} at {index.step.version}")
        return index

    def seal(self, version: Version, shard: int) -> SealRecord:
        """The record of a shard that was verified there. Raises DamagedBytes, TierError."""
        path = layout.seal_path(self._root, version, shard)
        with self._asking("read"):
            try:
                text = self._fs.cat_file(path)
            except FileNotFoundError as error:
                raise DamagedBytes(f"{path} is missing") from error
        try:
            record = SealRecord.FromString(text)
        except DecodeError as error:
            raise DamagedBytes(f"{path} is no seal record: {error}") from error
        told = (record.job, record.version.epoch, record.version.step, record.shard)
        if told != (self.job, version.epoch, version.step, shard):
            raise DamagedBytes(f"{path} is the record of another shard")
        return record

    def indexed_seals(self, version: Version, shards: Iterable[int]) -> Iterator[SealRecord]:
        """The records of the very shards that the step's index names, in the order asked for.

        Raises:
            DamagedBytes: one of them is not there. TierError: the store refused.
        """
        index = self.index(version)

        def seal(shard: int) -> SealRecord:
            if shard >= index.step.world:
                raise DamagedBytes(f"{self.url}: {version} has no shard {shard}")
            named, record = index.shards[shard], self.seal(version, shard)
            told = (record.image_bytes, record.manifest_bytes, record.content_digest.hex())
            if told != (named.image_bytes, named.manifest_bytes, named.content_digest):
                raise DamagedBytes(
                    f"{layout.seal_path(self._root, version, shard)} is not of the bytes that the "
                    "step's index names"
                )
            return record

        yield from ahead(seal, shards)

    def indexed_seal(self, version: Version, shard: int) -> SealRecord:
        """The one of them. Raises DamagedBytes, TierError."""
        return next(self.indexed_seals(version, (shard,)))

    # -- reading

    def read(self, version: Version, record: SealRecord) -> Iterator[memoryview]:
        """The chunks of an image, each verified. Raises DamagedBytes, TierError."""
        path = layout.image_path(self._root, version, record.shard)
        at = 0
        with self._asking("read"):
            try:
                file = self._fs.open(path, "rb", block_size=PART_BYTES)
            except FileNotFoundError as error:
                raise DamagedBytes(f"{path} is missing") from error
            with file:
                while at < record.image_bytes:
                    wanted = min(TRANSFER_BYTES, record.image_bytes - at)
                    chunk = read_exactly(file, wanted)
                    if len(chunk) < wanted:
                        raise DamagedBytes(
                            f"{path} has {at + len(chunk)} of {record.image_bytes} bytes"
                        )
                    try:
                        check_range(chunk, at, record.image_bytes, record.grain_digests)
                    except DamagedBytes as error:
                        raise DamagedBytes(f"{path}: {error.what}") from error
                    yield chunk
                    at += wanted

    def pieces(self, version: Version, spans: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        """Ranges of images, one after the other; no more of the files is asked for.

        Args:
            version: of a whole step.
            spans: shard, offset, length; each at most PIECE_BYTES, as some are held at a time.

        Raises:
            DamagedBytes: a file is missing, or too short. TierError: the store refused.
        """

        def piece(span: tuple[int, int, int]) -> bytes:
            shard, offset, length = span
            path = layout.image_path(self._root, version, shard)
            with self._asking("read"):
                try:
                    found: bytes = self._fs.cat_file(path, start=offset, end=offset + length)
                except FileNotFoundError as error:
                    raise DamagedBytes(f"{path} is missing") from error
                except Exception:  # what S3 says of a range behind the end, too
                    if self._fs.size(path) >= offset + length:
                        raise
                    found = b""
            if len(found) != length:
                raise DamagedBytes(f"{path} has no {length} bytes at {offset}: it was cut")
            return found

        yield from ahead(piece, spans)

    def read_range(self, version: Version, record: SealRecord, end: int) -> bytes:
        """The first `end` bytes of an image, verified. Raises DamagedBytes, TierError."""
        found = bytearray()
        for chunk in self.read(version, record):
            found += chunk
            if len(found) >= end:
                break
        return bytes(found[:end])

    # -- small parts

    def _listed(self, path: str) -> Sequence[str]:
        try:
            found: list[str] = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            self._check_base()
            return []
        return found

    def _check_base(self) -> None:
        """What is not there at all, a disk that is not mounted, must not pass for empty."""
        bucket = self._base if self._local else self._base.strip("/").partition("/")[0]
        if bucket and "memory" not in _protocols(self._fs) and not self._fs.exists(bucket):
            raise FileNotFoundError(errno.ENOENT, "it is not there, or must not be seen", bucket)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Any trouble of the store becomes one error that says what to do."""
        try:
            yield
        except (SnapshotdError, RequestError, GeneratorExit):
            raise
        except Exception as error:  # each store has errors of its own
            said = " ".join(str(error).split()) or type(error).__name__
            raise TierError(
                f"{what} at {self.url} failed: {said[:400]}", _remedy(error, what)
            ) from error


def _remedy(error: Exception, what: str) -> str:
    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError) or number in (errno.EACCES, errno.EPERM):
        return (
            f"Allow the daemon's user or role to {what} there; it must list, read, write and delete"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there, or keep fewer steps (persist.keep_last)"
    if isinstance(error, FileNotFoundError):
        return "Make the bucket or directory, or correct persist.url"
    return ""


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
