"""Who is alive and who owns a directory, asked of the kernel and never of a pid.

A lock disappears with its process however it dies, and works across pid namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from snapshotd.errors import CallerError

LOCK_NAME: Final = "lock"

_MAX_INCARNATION_BYTES: Final = 256

#: struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")


def trainer_holding(lock_file: Path) -> str | None:
    """The incarnation of the trainer that holds a POSIX record lock on byte 0 of `lock_file`.

    The lock is asked about, never taken, so asking cannot disturb the holder. POSIX record locks
    and not flock, because a forked DataLoader worker inherits a flock and would keep a dead
    trainer alive. Must not be called within the trainer itself: closing any descriptor of the
    file gives up the locks of the process that closes it.

    Args:
        lock_file: a missing file counts as nobody alive.

    Returns:
        What the holder wrote into the file, "" before it did; None where nobody holds the lock.

    Raises:
        OSError: the file cannot be opened for another reason than its absence.
    """
    try:
        # Without waiting: a pipe that somebody put there must not keep the caller.
        descriptor = os.open(lock_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
        written = os.pread(descriptor, _MAX_INCARNATION_BYTES, 0)
    finally:
        os.close(descriptor)
    # The pid in the answer means nothing across pid namespaces; the type does.
    if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK:
        return None
    return written.decode("utf-8", "replace").strip()


def open_lock(path: Path) -> int:
    """A descriptor of a lock file that is made where it is not there; it is nobody else's file.

    Raises:
        OSError: it cannot be made; a link, a pipe or a second name of another file is in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o660)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "its lock file is no plain file of its own; remove it", str(path))


class DirectoryLock:
    """Sole ownership of a directory, as a flock on the file `lock` in it.

    The file stays when the lock is released: removing it would let two owners lock two files of
    the same name. It holds the owner's pid, for people only.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or fail at once.

        Raises:
            CallerError: somebody else holds it; names the directory and the holder's pid.
            OSError: the file cannot be made.
        """
        if self._descriptor is not None:
            raise ValueError(f"{self._directory} is locked by this object already")
        descriptor = open_lock(self._directory / LOCK_NAME)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise CallerError(
                f"{self._directory} is in use by another process (pid {holder or 'unknown'})",
                "stop that daemon first, or give this one a directory of its own",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        # One write of a short text, then a cut to its length: a reader never sees an empty file.
        os.pwrite(descriptor, text := f"{os.getpid()}\n".encode(), 0)
        os.ftruncate(descriptor, len(text))
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up; nothing happens where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
