"""The thread that takes snapshots to the daemon: one at a time, ended with its owner."""

from __future__ import annotations

import os
import threading
import weakref
from queue import SimpleQueue
from typing import Protocol


class Errand(Protocol):
    """What the thread does: a flight, or what makes ready for it."""

    def fly(self) -> None:
        """All of it."""

    def abandon(self) -> None:
        """End it soon."""


class Courier:
    """Flies what it is given. Every method is the training thread's."""

    def __init__(self) -> None:
        self._post = _Post()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        # A thread that nobody ends would keep the channel open for the rest of the process.
        self._ending = weakref.finalize(self, self._post.end)
        self._ending.atexit = False

    @property
    def is_here(self) -> bool:
        """Whether this is the process it was made in: a fork has its objects, and no thread."""
        return self._process == os.getpid()

    def take(self, errand: Errand) -> None:
        """Fly it on the thread."""
        self.start()
        self._post.give(errand)

    def start(self) -> None:
        """Have the thread ready."""
        if self._thread is None:
            # Daemonic: a snapshot that is on its way does not keep a process from ending.
            self._thread = threading.Thread(
                target=self._post.serve, name="snapshotd-copy", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Abandon what is on its way, and end the thread."""
        self._ending()
        if self._thread is not None and self.is_here:
            self._thread.join()


class _Post:
    """What courier and thread share."""

    def __init__(self) -> None:
        self._errands: SimpleQueue[Errand | None] = SimpleQueue()
        self._given: weakref.WeakSet[Errand] = weakref.WeakSet()

    def give(self, errand: Errand) -> None:
        self._given.add(errand)
        self._errands.put(errand)

    def serve(self) -> None:
        while self._fly_next():
            pass

    def _fly_next(self) -> bool:
        # In a function of its own, so that a thread that waits holds on to no errand.
        errand = self._errands.get()
        if errand is None:
            return False
        errand.fly()
        return True

    def end(self) -> None:
        for errand in list(self._given):
            errand.abandon()
        self._errands.put(None)
