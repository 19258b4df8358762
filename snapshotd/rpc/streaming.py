"""Bulk work in threads that wait for sockets, and the bound of what all of them may send.

Such a thread may wait for long, so it is none of the event loop's own pool; and it can be stopped,
since what it waits for can be broken off.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Final, TypeVar

from snapshotd.core.bandwidth import Bucket, most_streams
from snapshotd.errors import PeerError
from snapshotd.wire.protocol import TRANSFER_BYTES

T = TypeVar("T")

#: Streams of blocks that a process has under way at once; a further one waits for its turn.
MAX_STREAMS: Final = 512

_THREADS: Final = ThreadPoolExecutor(MAX_STREAMS, "blocks")


async def streamed(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run `work` in a thread, and leave only when it has ended.

    Args:
        work: what waits for connections.
        stop: breaks them off, so that `work` ends soon; called when the caller is cancelled.
    """
    running = asyncio.get_running_loop().run_in_executor(_THREADS, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            stop()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody is left who would want to know
        raise


def result_of(work: concurrent.futures.Future[T]) -> T:
    """What a call on the event loop gave. Raises PeerError: it was broken off."""
    try:
        return work.result()
    except concurrent.futures.CancelledError as error:
        raise PeerError("a stream of a block was broken off") from error


class Bandwidth:
    """What one process may send of blocks; 0 bytes a second: as much as goes. For all threads.

    `stall_s`: how long a peer waits for the next chunk of a stream.
    """

    def __init__(
        self,
        bytes_per_s: int = 0,
        stall_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = Bucket(bytes_per_s)
        self._bytes_per_s = bytes_per_s
        self._most = None
        if stall_s < math.inf:
            self._most = most_streams(bytes_per_s, stall_s, TRANSFER_BYTES)
        self._streams = 0
        self._clock = clock
        self._lock = Lock()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Serve one stream more, within the context.

        Raises:
            PeerError: so many are served that their turns come too late for those who wait.
        """
        with self._lock:
            if self._most is not None and self._streams >= self._most:
                raise PeerError(
                    f"{self._streams} streams of blocks share {self._bytes_per_s} bytes a second "
                    "here, as many as do without being taken for stalled",
                    "It is tried again; more go at once with a greater background.bytes_per_s",
                )
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def pause_s(self, count: int) -> float:
        """Take `count` bytes; returns the seconds to wait before sending them."""
        with self._lock:
            return self._bucket.take(count, self._clock())

    async def wait(self, count: int) -> None:
        """Return when `count` more bytes may be sent."""
        pause_s = self.pause_s(count)
        if pause_s:
            await asyncio.sleep(pause_s)
