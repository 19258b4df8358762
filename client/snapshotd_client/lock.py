"""The lock that says: the trainer of this slot lives, and who it is."""

from __future__ import annotations

import fcntl
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Final

import zmq

from snapshotd.wire.points import point
from snapshotd.wire.protocol import trainer_lock_name
from snapshotd_client.errors import WrongUse, no_daemon

#: How long a trainer that is dying may hold its lock before its successor gives up.
_LOCK_PATIENCE_S: Final = 10.0
_LOCK_PAUSE_S: Final = 0.05

#: Lock files that this process holds, by process: a fork inherits the table and not the locks.
_HELD: set[tuple[int, Path]] = set()
_HELD_GUARD: Final = threading.RLock()  # a finalizer may run within


class TrainerLock:
    """A POSIX record lock that says: the trainer of this slot lives, and who it is.

    Not a flock: data-loader workers that fork must not inherit it. The kernel lets go of it when
    the process dies, however it dies. Such locks are the process's: a second descriptor of the
    file would take the lock as well, and give it up when it is closed. So within the process a
    table says what is held.
    """

    def __init__(self, run_dir: Path, slot: int, incarnation: str) -> None:
        self._path = run_dir / trainer_lock_name(slot)
        self._incarnation = incarnation
        self._letting_go: weakref.finalize[[], TrainerLock] | None = None

    @property
    def held(self) -> bool:
        return self._letting_go is not None

    def acquire(self) -> None:
        """Take the lock; a predecessor that is just dying is waited for.

        Raises:
            WrongUse: another trainer lives in this slot. NoDaemon: there is no run directory.
        """
        hold = _Hold(self._path.absolute())
        try:
            self._lock(hold)
        except BaseException:
            hold.end()
            raise
        self._letting_go = weakref.finalize(self, hold.end)
        self._letting_go.atexit = False

    def _lock(self, hold: _Hold) -> None:
        try:
            hold.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except OSError as error:
            raise no_daemon(self._path.parent, str(error)) from error
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while not _locked(hold.descriptor):
            if time.monotonic() >= deadline_s:
                raise WrongUse(
                    f"another live trainer holds {self._path}: two processes have this local rank",
                    "End it, or give each trainer of the node its own LOCAL_RANK",
                )
            # No event tells that another process let go; this happens once a start.
            zmq.select([], [], [], _LOCK_PAUSE_S)
        # The daemon lets nobody else attach in this slot.
        os.pwrite(hold.descriptor, text := f"{self._incarnation}\n".encode(), 0)
        os.ftruncate(hold.descriptor, len(text))
        point("trainer.lock.taken")

    def release(self) -> None:
        if self._letting_go is not None:
            self._letting_go()
            self._letting_go = None


class _Hold:
    """A place in the table, and the descriptor that holds the lock once there is one."""

    def __init__(self, path: Path) -> None:
        self._key = (os.getpid(), path)
        self.descriptor: int | None = None
        if not self._enter():
            gc.collect()  # one that was dropped without close() may still be waiting for that
            if not self._enter():
                raise WrongUse(
                    f"this process has a Snapshotter in the slot of {path} already",
                    "close() it first, or give each its own local_rank",
                )

    def _enter(self) -> bool:
        with _HELD_GUARD:
            if self._key in _HELD:
                return False
            _HELD.add(self._key)
            return True

    def end(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        with _HELD_GUARD:
            _HELD.discard(self._key)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except OSError:
        return False
    return True
