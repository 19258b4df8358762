"""Segment files as the trainer sees them: mapped once, touched, page-locked, kept while the same.

A file that the daemon has made anew under an old name is another file; it is known by its inode.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Final

import torch

from snapshotd_client import cuda
from snapshotd_client.copying import Load, Target
from snapshotd_client.errors import SnapshotdClientError
from snapshotd_client.image import frozen_bytes
from snapshotd_client.pages import advise, have, see
from snapshotd_client.wires import DaemonGone

_Identity = tuple[int, int, int]

_SLICE_BYTES: Final = 256 << 20
#: Whoever says that it is enough waits for so many.
_SEEN_BYTES: Final = 8 << 20


class _Mapped:
    """One segment file, mapped for writing."""

    def __init__(self, path: str, identity: _Identity, offset: int) -> None:
        self.identity = identity
        self.offset = offset
        self._mapping = _map(path, mmap.PROT_READ | mmap.PROT_WRITE, os.O_RDWR)
        self.target = Target(torch.frombuffer(self._mapping, dtype=torch.uint8)[offset:])
        self._locked: list[int] = []

    def make_ready(self, load: Load, enough: Callable[[], bool]) -> None:
        """Have all pages in this process's tables, and page-locked where CUDA is in use.

        Where the kernel cannot, the first copy is slower.
        """
        address, length = self.target.image.data_ptr() - self.offset, len(self._mapping)
        for start in range(0, length, _SLICE_BYTES):
            if enough():
                return
            have(address + start, min(_SLICE_BYTES, length - start))
        if cuda.in_use() and not self._locked:
            self._locked = cuda.lock_pages(address, length)
        self.target.expect(load)

    def close(self) -> None:
        cuda.unlock_pages(self._locked)
        del self.target  # and its views, which keep the mapping open
        self._mapping.close()


class Buffers:
    """Mappings of the slot's segments, for writing."""

    def __init__(self) -> None:
        self._mapped: dict[str, _Mapped] = {}

    def target(self, path: str, offset: int, length: int) -> Target:
        """The image of a segment, from `offset` in its file, at least `length` bytes.

        Raises:
            OSError: the file is gone, or cut short: the daemon that granted it died.
        """
        mapped = self._get(path, offset)
        if mapped.target.image.numel() < length:
            raise OSError(f"{path} has no room for {length} bytes at {offset}")
        return mapped.target

    def make_ready(self, path: str, offset: int, load: Load, enough: Callable[[], bool]) -> None:
        """Do for a segment now what would make its first copy of `load` slow, or some of it.

        Raises:
            OSError: as `target`. ValueError: the load does not fit.
        """
        self._get(path, offset).make_ready(load, enough)

    def forget(self, load: Load) -> None:
        """Hold on to nothing of a load that does not come again."""
        for mapped in self._mapped.values():
            mapped.target.forget(load)

    def _get(self, path: str, offset: int) -> _Mapped:
        identity = _identity(path)
        known = self._mapped.get(path)
        if known is not None and known.identity == identity:
            return known
        if known is not None:
            known.close()
        self._mapped[path] = _Mapped(path, identity, offset)
        return self._mapped[path]

    def close(self) -> None:
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()


class Reading:
    """The bytes [offset, offset + length) of a segment file, until it is closed, or forgotten.

    Args:
        path: of the file.
        offset: in it.
        length: in bytes.
        private: whether the bytes may be written to, and what is written stays in this process.

    Attributes:
        image: these bytes, else read-only.

    Raises:
        DaemonGone: the file is: the daemon that named it died.
        SnapshotdClientError: the file is shorter.
    """

    def __init__(self, path: str, offset: int, length: int, *, private: bool = False) -> None:
        protection, flags = mmap.PROT_READ, mmap.MAP_SHARED
        if private:
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
        self._place = path, offset, length
        try:
            self._file = _identity(path)
            self._mapping = _map(path, protection, os.O_RDONLY, flags)
        except OSError as error:
            raise DaemonGone(f"its segment cannot be mapped: {error}") from error
        if offset + length > len(self._mapping):
            held = len(self._mapping)
            self._mapping.close()
            raise SnapshotdClientError(
                f"{path} has {held} bytes, {offset + length} were expected",
                "The daemon has made the file anew: restore again",
            )
        self._whole = memoryview(self._mapping)
        self.image = self._whole[offset : offset + length]
        self._address = frozen_bytes(self._whole).data_ptr()

    def see(self, enough: Callable[[], bool]) -> None:
        """Have its pages in this process's tables, until it is enough."""
        _, offset, length = self._place
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        for start in range(first, offset + length, _SEEN_BYTES):
            if enough():
                return
            see(self._address + start, min(_SEEN_BYTES, offset + length - start))

    def shows(self, path: str, offset: int, length: int) -> bool:
        """Whether it is these bytes of the file that is there now."""
        try:
            return (path, offset, length) == self._place and _identity(path) == self._file
        except OSError:
            return False

    def close(self) -> None:
        """Unmap it: no tensor may refer to it any more.

        Takes some ms for each 256 MiB, for which the interpreter lock is let go.
        """
        length = len(self._mapping)
        self.image.release()
        self._whole.release()
        for start in range(0, length, _SLICE_BYTES):
            advise(self._address + start, min(_SLICE_BYTES, length - start), mmap.MADV_DONTNEED)
        self._mapping.close()


def _identity(path: str) -> _Identity:
    status = os.stat(path)  # noqa: PTH116  # a plain path, once a step
    return status.st_dev, status.st_ino, status.st_size


def _map(path: str, protection: int, access: int, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    descriptor = os.open(path, access | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, 0, flags=flags, prot=protection)
    finally:
        os.close(descriptor)
