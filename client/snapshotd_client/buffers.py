"""Segment files as the trainer sees them: mapped when first granted, kept while they are the same.

A file that the daemon has made anew under an old name is another file; it is known by its inode.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from snapshotd_client.errors import SnapshotdClientError

_Identity = tuple[int, int, int]


class Buffers:
    """Mappings of the slot's segments, for writing."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[_Identity, mmap.mmap]] = {}

    @contextmanager
    def writing(self, path: str, offset: int, length: int) -> Iterator[memoryview]:
        """The bytes [offset, offset + length) of a segment file, writable within the context.

        Raises:
            OSError: the file is gone: the daemon that granted it died.
        """
        mapping = self._mapping(path)
        with memoryview(mapping) as whole, whole[offset : offset + length] as image:
            yield image

    def _mapping(self, path: str) -> mmap.mmap:
        status = os.stat(path)  # noqa: PTH116  # a plain path, once a step
        identity = (status.st_dev, status.st_ino, status.st_size)
        known = self._mapped.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        if known is not None:
            known[1].close()
        mapping = _map(path, mmap.PROT_READ | mmap.PROT_WRITE, os.O_RDWR)
        self._mapped[path] = (identity, mapping)
        return mapping

    def close(self) -> None:
        for _, mapping in self._mapped.values():
            mapping.close()
        self._mapped.clear()


@contextmanager
def reading(path: str, offset: int, length: int) -> Iterator[memoryview]:
    """The bytes [offset, offset + length) of a segment file, for the time of the context."""
    with _map(path, mmap.PROT_READ, os.O_RDONLY) as mapping:
        if offset + length > len(mapping):
            raise SnapshotdClientError(
                f"{path} has {len(mapping)} bytes, {offset + length} were expected",
                "The daemon has made the file anew: restore again",
            )
        with memoryview(mapping) as whole, whole[offset : offset + length] as image:
            yield image


def _map(path: str, protection: int, flags: int) -> mmap.mmap:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(descriptor)
