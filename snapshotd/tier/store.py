"""One job's steps at an fsspec URL: written, verified, made whole, deleted.

A local directory gets by a rename what other stores promise: a small object is there whole or not
at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final

from snapshotd.coding.digest import check_range
from snapshotd.errors import DamagedBytes
from snapshotd.metadata import StoredStep, Version
from snapshotd.tier import layout
from snapshotd.tier.reading import PART_BYTES, Reader
from snapshotd.tier.streams import AT_ONCE, Throttle, chunks
from snapshotd.wire.points import point
from snapshotd.wire.v1.segment_pb2 import SealRecord

_MAX_PARTS: Final = 9000

#: Bytes that are done, of as many.
Progress = Callable[[int, int], None]


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


class Store(Reader):
    """The steps of one job under a URL, to be written and deleted, too."""

    # -- writing

    def write(
        self,
        image: memoryview,
        record: SealRecord,
        bytes_per_s: float = 0.0,
        progress: Progress = quiet,
    ) -> bool:
        """Have one shard there, verified.

        Args:
            image: what the record seals; each grain is held against it before it is sent.
            record: the shard's own.
            bytes_per_s: bound of writing, and of reading back; 0: none.
            progress: told of both together.

        Returns:
            False where an earlier attempt had finished it already.

        Raises:
            DamagedBytes: the image is not what was sealed, or did not come back as it was sent.
            TierError: the store refused.
        """
        version = Version(record.version.epoch, record.version.step)
        total = 2 * record.image_bytes
        with suppress(DamagedBytes):
            if self.seal(version, record.shard) == record:
                progress(total, total)
                return False
        path = layout.image_path(self._root, version, record.shard)
        throttle = Throttle(bytes_per_s)
        with self._asking("write"), self._created(path, record.image_bytes) as file:
            for at, chunk in chunks(image):
                check_range(chunk, at, record.image_bytes, record.grain_digests)
                file.write(chunk)
                point("tier.write.part")
                throttle.passed(len(chunk))
                progress(at + len(chunk), total)
        point("tier.write.closed")
        at = 0
        for chunk in self.read(version, record):
            throttle.passed(len(chunk))
            at += len(chunk)
            progress(record.image_bytes + at, total)
        point("tier.write.verified")
        self._put(layout.seal_path(self._root, version, record.shard), record.SerializeToString())
        point("tier.write.recorded")
        return True

    def publish(self, version: Version, world: int, number: int) -> layout.Index:
        """Make a step whole: all its shards are there, verified.

        Raises:
            DamagedBytes: some shard is not. TierError: the store refused.
        """
        paths = [layout.seal_path(self._root, version, shard) for shard in range(world)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            seals = list(pool.map(lambda shard: self.seal(version, shard), range(world)))
        for path, seal in zip(paths, seals, strict=True):
            if seal.world != world:
                raise DamagedBytes(f"{path} is of a job of {seal.world} ranks, not {world}")
        point("tier.publish.begun")
        step = StoredStep(version, world, number, time.time())
        index = layout.index_of(self.job, step, seals)
        self._put(layout.index_path(self._root, version), index.to_bytes())
        point("tier.publish.indexed")
        return index

    # -- deleting

    def remove(self, versions: Iterable[Version]) -> None:
        """Delete steps, or what is left of them; the index first, so that none is half there."""
        with self._asking("delete"):
            for version in versions:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(layout.index_path(self._root, version))
                    point("tier.remove.unlisted")
                with suppress(FileNotFoundError):
                    directory = f"{layout.data_path(self._root)}/{layout.version_name(version)}"
                    self._fs.rm(directory, recursive=True)
                point("tier.remove.done")

    # -- small parts

    @contextmanager
    def _created(self, path: str, size_bytes: int) -> Iterator[Any]:
        """A file for an image; one that is given up is not kept where the store can forget it."""
        self._make_parent(path)
        part = max(PART_BYTES, -(-size_bytes // _MAX_PARTS))
        file = self._fs.open(path, "wb", block_size=part)
        try:
            yield file
        except BaseException:
            # Closing would finish the object; what was sent of it is dropped instead.
            discard = getattr(file, "discard", None)
            if discard is not None:
                with suppress(Exception):
                    discard()
            raise
        if self._local:
            file.flush()
            os.fsync(file.fileno())
        file.close()

    def _put(self, path: str, text: bytes) -> None:
        """A small object, whole or not at all; read back."""
        with self._asking("write"):
            self._make_parent(path)
            if self._local:
                half = f"{path}.half"
                with self._fs.open(half, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                point("tier.put.half")
                os.replace(half, path)  # noqa: PTH105  paths of fsspec are text
            else:
                self._fs.pipe_file(path, text)
            if self._fs.cat_file(path) != text:
                raise DamagedBytes(f"{path} did not come back as it was written")

    def _make_parent(self, path: str) -> None:
        if self._local:  # elsewhere a directory is no more than a part of a name
            self._check_base()
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
