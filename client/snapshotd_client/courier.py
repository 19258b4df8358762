"""The thread that takes snapshots to the daemon: one at a time, ended with its owner."""

from __future__ import annotations

import os
import threading
import weakref
from queue import SimpleQueue

from snapshotd_client.flight import Flight


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

    def take(self, flight: Flight) -> None:
        """Fly it on the thread."""
        self.start()
        self._post.give(flight)

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
        self._flights: SimpleQueue[Flight | None] = SimpleQueue()
        self._newest: weakref.ref[Flight] | None = None

    def give(self, flight: Flight) -> None:
        self._newest = weakref.ref(flight)
        self._flights.put(flight)

    def serve(self) -> None:
        while self._fly_next():
            pass

    def _fly_next(self) -> bool:
        # In a function of its own, so that a thread that waits holds on to no flight.
        flight = self._flights.get()
        if flight is None:
            return False
        flight.fly()
        return True

    def end(self) -> None:
        flight = self._newest() if self._newest is not None else None
        if flight is not None:
            flight.abandon()
        self._flights.put(None)
