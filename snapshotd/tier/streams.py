"""Bytes on their way to a store and back: how fast, how much at a time, how many at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from snapshotd.wire.protocol import TRANSFER_BYTES, grain_bytes

#: Objects, or ranges of them, that are asked for at once.
AT_ONCE: Final = 16

T = TypeVar("T")
Found = TypeVar("Found")


class Throttle:
    """Lets so many bytes a second pass, on average; 0: all."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = time.monotonic()

    def passed(self, count: int) -> None:
        """Wait as long as `count` bytes take."""
        if self._bytes_per_s > 0:
            now_s = time.monotonic()
            self._due_s = max(self._due_s, now_s - 1.0) + count / self._bytes_per_s
            threading.Event().wait(max(0.0, self._due_s - now_s))


def ahead(fetch: Callable[[T], Found], tasks: Iterable[T]) -> Iterator[Found]:
    """`fetch` of each, in order, some of them at once; no more than that many are held."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        under_way: deque[Future[Found]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(fetch, task))
                if len(under_way) == AT_ONCE:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def chunks(image: memoryview) -> Iterator[tuple[int, memoryview]]:
    """An image in chunks of whole grains: where each begins, and its bytes."""
    assert TRANSFER_BYTES % grain_bytes(len(image)) == 0, "chunks are whole grains"
    for at in range(0, len(image), TRANSFER_BYTES):
        with image[at : at + TRANSFER_BYTES] as chunk:
            yield at, chunk


def read_exactly(file: Any, count: int) -> memoryview:
    """As many bytes as there are, up to `count`: a read may give less."""
    found = file.read(count)
    while len(found) < count:
        more = file.read(count - len(found))
        if not more:
            break
        found += more
    return memoryview(found)
