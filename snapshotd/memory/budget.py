"""The byte budget of one node, kept by all its processes together.

What is in use is read from the file system each time, so nothing can drift: a file that a killed
process left counts until somebody removes it.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from snapshotd.errors import Busy, NoRoom
from snapshotd.memory.allocation import explain
from snapshotd.memory.cgroup import cgroup_left_bytes
from snapshotd.memory.locks import open_lock

#: Never taken from a machine: for its other processes to go on.
KEPT_AVAILABLE_BYTES: Final = 64 << 20

_LOCK_NAME: Final = ".budget.lock"

#: What one allocation of another process is waited for. One that takes longer has been stopped.
LOCK_S: Final = 30.0
#: Between two looks at the lock; flock itself knows no bound.
LOCK_PAUSE_S: Final = 0.01

#: What the holder calls itself: its pid, and when it took the lock.
_MAX_HOLDER_BYTES: Final = 64

#: Finished and unfinished segments of every slot.
_SEGMENT_FILES: Final = "slot-*/*.seg*"

#: Unit of st_blocks, whatever the file system's own block is.
_STAT_BLOCK_BYTES: Final = 512


class Budget:
    """At most `limit_bytes` of segments below `shm_dir`, over all slots."""

    def __init__(self, shm_dir: Path, limit_bytes: int) -> None:
        self._shm_dir = shm_dir
        self._limit_bytes = limit_bytes
        self._stuck = b""  # the holder that was waited for in vain

    @property
    def shm_dir(self) -> Path:
        return self._shm_dir

    @property
    def limit_bytes(self) -> int:
        return self._limit_bytes

    def used_bytes(self) -> int:
        """What all segment files of the node hold now."""
        return sum(_allocated_bytes(path) for path in self._shm_dir.glob(_SEGMENT_FILES))

    def left_bytes(self) -> int:
        return max(0, self._limit_bytes - self.used_bytes())

    @contextmanager
    def reserve(self, count_bytes: int) -> Iterator[None]:
        """Hold the right to allocate `count_bytes` for the length of the block.

        Nobody else on the node allocates meanwhile, so allocate within it and do nothing slower.
        Waits for other processes that are within theirs, for each of them LOCK_S at most.

        Raises:
            Busy: one of them does not come to its end; it is not waited for a second time.
            NoRoom: the budget, or the machine, does not have that much left.
            ConfigError: `shm_dir` is read-only or forbidden.
        """
        with self._lock():
            used, available = self.used_bytes(), _available_bytes()
            if used + count_bytes > self._limit_bytes:
                raise NoRoom(
                    f"{self._shm_dir}: needs {count_bytes} bytes, budget {self._limit_bytes}, "
                    f"in use {used}",
                    "raise memory_budget in the daemon's configuration, or free a job's memory "
                    "with `snapshotd drop JOB`",
                )
            if count_bytes > available:
                raise NoRoom(
                    f"{self._shm_dir}: needs {count_bytes} bytes, the machine or its control group "
                    f"has {available} available",
                    "free memory of the machine, raise the control group's limit, or lower "
                    "memory_budget",
                )
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = self._shm_dir / _LOCK_NAME
        try:
            descriptor = open_lock(path)
        except OSError as error:
            raise explain(error, path) from error
        try:
            self._take(descriptor, path)
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int, path: Path) -> None:
        holder, until_s = b"", time.monotonic() + LOCK_S
        while not _locked(descriptor):
            seen = os.pread(descriptor, _MAX_HOLDER_BYTES, 0)
            if seen != holder:
                holder, until_s = seen, time.monotonic() + LOCK_S
            if time.monotonic() >= until_s or (holder and holder == self._stuck):
                self._stuck = holder
                pid = holder.split()[0].decode(errors="replace") if holder.split() else "unknown"
                raise Busy(
                    f"{path}: the process {pid} has held the lock of the node's memory for "
                    f"{LOCK_S:g} s or longer; one allocation is all that it may be held for",
                    "let that process go on (kill -CONT) if it was stopped, or end it",
                )
            # No event tells that another process let go; rarely does anybody wait here at all.
            select.select([], [], [], LOCK_PAUSE_S)
        # A full tmpfs has no page for it: then the error of whoever waits knows no pid.
        with suppress(OSError):
            name = f"{os.getpid()} {time.monotonic_ns()}".encode()
            os.pwrite(descriptor, name.ljust(_MAX_HOLDER_BYTES), 0)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _available_bytes() -> int:
    """What can be had without the kernel having to kill somebody for it."""
    available = psutil.virtual_memory().available - KEPT_AVAILABLE_BYTES
    left = cgroup_left_bytes()
    return max(0, available if left is None else min(available, left))


def _allocated_bytes(path: Path) -> int:
    try:
        return path.lstat().st_blocks * _STAT_BLOCK_BYTES
    except FileNotFoundError:
        # Another process freed it between the listing and the look.
        return 0
