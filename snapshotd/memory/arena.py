"""The segments of one slot: a directory with an owner, adopted at start, claimed from, trimmed."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple

from snapshotd.errors import ConfigError, DamagedBytes, NoRoom, SnapshotdError
from snapshotd.memory.allocation import PAGE_BYTES, UNFINISHED_SUFFIX, explain, pages
from snapshotd.memory.budget import Budget
from snapshotd.memory.locks import DirectoryLock
from snapshotd.memory.segment import Segment
from snapshotd.memory.segment_file import create_file, file_bytes
from snapshotd.memory.states import Kind, State
from snapshotd.wire.points import point

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".seg"
_DIRECTORY_MODE: Final = 0o770

#: A segment is made larger than asked by this part of it, so that a state that grows a little
#: (a counter's digit, a list of losses) finds room in the segments that are there.
_SLACK_DIVISOR: Final = 16


class Quarantined(NamedTuple):
    """A file that was taken out of the arena, and why."""

    name: str
    reason: str


def capacity_bytes(image_bytes: int) -> int:
    """Image capacity of a segment that is made for an image of this length: whole pages."""
    return max(PAGE_BYTES, pages(image_bytes + image_bytes // _SLACK_DIVISOR))


class Arena:
    """All segments of one slot, and the only maker and remover of them.

    Its directory belongs to the process that opened it. `claim` may be slow (it may allocate, and
    wait for other slots that do), so it may run in threads, several at once; the other methods
    are quick and never wait for it. `close` comes after the last claim has returned.

    Args:
        directory: `shm_dir/slot-<r>`.
        budget: the node's.
    """

    def __init__(self, directory: Path, budget: Budget) -> None:
        self._directory = directory
        self._budget = budget
        self._lock = DirectoryLock(directory)
        self._segments: list[Segment] = []
        # Held for a look or a change of the list, never for longer.
        self._books = Lock()
        # Held while a segment is made: two makers would take the same name.
        self._making = Lock()

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(self._segments)

    @property
    def allocated_bytes(self) -> int:
        """Length of all segment files of this slot."""
        return sum(segment.size_bytes for segment in self._segments)

    def open(self) -> tuple[Quarantined, ...]:
        """Make the directory where it is not there, own it, and adopt what it holds.

        What was half made is removed, what was half filled is FREE again, what cannot be a
        segment is removed. No image is read: `candidates` lists what the caller must verify.

        Returns:
            The files that were removed because they were foreign, cut short or damaged.

        Raises:
            CallerError: another process owns the directory.
            ConfigError: `shm_dir` cannot be made, read or written.
            NoRoom: memory or descriptors do not suffice.
        """
        self._make_directory()
        with ExitStack() as undo:
            try:
                self._lock.acquire()
                undo.callback(self.close)
                point("smp.arena.owned")
                self._remove_unfinished()
                point("smp.arena.cleaned")
                quarantined = self._adopt()
            except OSError as error:
                raise explain(error, self._directory) from error
            undo.pop_all()
        return quarantined

    def candidates(self) -> tuple[Segment, ...]:
        """The SEALED segments; of those just adopted, nothing is true before `verify` says so."""
        return tuple(s for s in self._segments if s.state is State.SEALED)

    def quarantine(self, segment: Segment, reason: str) -> Quarantined:
        """Take a damaged segment out for good: it is unmapped and its file removed.

        Raises:
            ValueError: it is pinned, or not of this arena.
            BufferError: a view of its image is not released.
        """
        if segment.pinned:
            raise ValueError(f"segment {segment.name} is pinned; not quarantined")
        with self._books:
            self._remove(segment)
        _log.error("segment %s is removed: %s", segment.path, reason)
        return Quarantined(segment.name, reason)

    def claim(self, kind: Kind, image_bytes: int, record_bytes: int) -> Segment:
        """A FREE segment with room for an image and its record: one that is there, or a new one.

        It stays FREE, and is the caller's until it is begun: nobody else is given it, `trim`
        spares it. `begin_data` or `begin_parity`, or else `Segment.unclaim`, must follow.

        Raises:
            NoRoom: the budget, the file system or descriptors do not suffice, even without the
                FREE segments that are too small; those are gone then.
            ConfigError: the directory is read-only or forbidden.
            Busy: another process that allocates has been stopped.
        """
        with self._books:
            fitting = self._smallest_fitting(kind, image_bytes, record_bytes)
            if fitting is not None:
                fitting.claim()
                return fitting
        capacity, records = capacity_bytes(image_bytes), max(PAGE_BYTES, pages(record_bytes))
        with self._making:
            return self._make(kind, capacity, records)

    def reserve(self, kind: Kind, image_bytes: int, record_bytes: int, count: int) -> bool:
        """Make one FREE segment, unless `count` would fit such an image, whatever they hold.

        Returns:
            Whether one was made.

        Raises:
            NoRoom, ConfigError, Busy: as `claim`; but no other segment is given up for it.
        """
        with self._books:
            there = [s for s in self._segments if _fits(s, kind, image_bytes, record_bytes)]
        if len(there) >= count:
            return False
        capacity, records = capacity_bytes(image_bytes), max(PAGE_BYTES, pages(record_bytes))
        with self._making:
            self._make(kind, capacity, records, give_way=False).unclaim()
        return True

    def trim(self, keep_free: int) -> int:
        """Remove FREE segments beyond the `keep_free` largest of each kind.

        Returns:
            Bytes given back.
        """
        with self._books:
            surplus = [segment for kind in Kind for segment in self._by_size(kind)[keep_free:]]
            for segment in surplus:
                self._remove(segment)
                point("smp.trim.removed")
        return sum(segment.size_bytes for segment in surplus)

    def close(self) -> None:
        """Unmap all and give the directory up; the files stay for the next owner.

        Raises:
            BufferError: a view of an image is not released; the arena stays open.
        """
        while self._segments:
            self._segments[-1].close()
            self._segments.pop()
        self._lock.release()

    def _make_directory(self) -> None:
        """`shm_dir` itself is made too, its parent is not: a typing error is not a directory."""
        for directory in (self._directory.parent, self._directory):
            try:
                directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
            except FileNotFoundError as error:
                raise ConfigError(
                    f"{directory} cannot be made: {directory.parent} does not exist",
                    "mount a tmpfs there, or point shm_dir at a directory on one",
                ) from error
            except OSError as error:
                raise explain(error, directory) from error

    def _remove_unfinished(self) -> None:
        for path in self._directory.glob(f"*{_SUFFIX}{UNFINISHED_SUFFIX}"):
            _remove_file(path)

    def _adopt(self) -> tuple[Quarantined, ...]:
        quarantined = []
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                segment = Segment.open(path)
            except DamagedBytes as error:
                quarantined.append(_remove_foreign(path, error.what))
                continue
            self._segments.append(segment)
            point("smp.adopt.opened")
            if segment.state is State.WRITING:
                segment.free()
        return tuple(quarantined)

    def _make(
        self, kind: Kind, image_capacity: int, record_capacity: int, *, give_way: bool = True
    ) -> Segment:
        path = self._unused_path(kind)
        size = file_bytes(image_capacity, record_capacity)
        while True:
            try:
                # Only the allocation is within the reservation: touching is the slow part, and
                # the other slots of the node need not wait for it.
                with self._budget.reserve(size):
                    create_file(path, kind, image_capacity, record_capacity)
                break
            except NoRoom:
                if not (give_way and self._give_way(kind)):
                    raise
        try:
            segment = Segment.open(path)
        except SnapshotdError:
            path.unlink()
            raise
        segment.claim()
        with self._books:
            self._segments.append(segment)
        segment.touch()
        point("smp.allocate.touched")
        return segment

    def _give_way(self, kind: Kind) -> bool:
        """Remove one FREE segment, of the wanted kind first; False where there is none."""
        other = Kind.PARITY if kind is Kind.DATA else Kind.DATA
        with self._books:
            victim = next(iter(self._by_size(kind) + self._by_size(other)), None)
            if victim is None:
                return False
            self._remove(victim)
            return True

    def _smallest_fitting(self, kind: Kind, image_bytes: int, record_bytes: int) -> Segment | None:
        fitting = (s for s in self._free(kind) if _fits(s, kind, image_bytes, record_bytes))
        return min(fitting, key=lambda segment: segment.size_bytes, default=None)

    def _free(self, kind: Kind) -> list[Segment]:
        return [
            segment for segment in self._segments if segment.kind is kind and segment.is_available
        ]

    def _by_size(self, kind: Kind) -> list[Segment]:
        """FREE and unpinned, the largest first."""
        return sorted(self._free(kind), key=lambda segment: -segment.size_bytes)

    def _unused_path(self, kind: Kind) -> Path:
        """The name of the lowest index that nothing has, not even a thing that is no segment."""
        names = (f"{kind.label}-{index}{_SUFFIX}" for index in count())
        paths = (self._directory / name for name in names)
        return next(path for path in paths if not os.path.lexists(path))

    def _remove(self, segment: Segment) -> None:
        if segment not in self._segments:
            raise ValueError(f"segment {segment.path} is not of {self._directory}")
        # Unmapped first: where a view is left, nothing has happened yet.
        segment.close()
        segment.unlink()
        self._segments.remove(segment)


def _fits(segment: Segment, kind: Kind, image_bytes: int, record_bytes: int) -> bool:
    return (
        segment.kind is kind
        and segment.image_capacity >= image_bytes
        and segment.record_capacity >= record_bytes
    )


def _remove_foreign(path: Path, reason: str) -> Quarantined:
    _log.error("file %s is removed: %s", path, reason)
    _remove_file(path)
    return Quarantined(path.name, reason)


def _remove_file(path: Path) -> None:
    """A directory that somebody put there stays: what is in it is not ours."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
