"""Ranges of what one slot holds, in one row; what they are gathered for, and what has come."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from snapshotd.core.ranges import Range, Spans, Targets, wanted
from snapshotd.errors import PeerError, SnapshotdError
from snapshotd.flow.conduct import Conduct
from snapshotd.metadata import Home, Version
from snapshotd.rpc.ranges import MAX_RANGES, RangesReader, Sound
from snapshotd.wire.protocol import TRANSFER_BYTES

log = logging.getLogger(__name__)

#: Attempts, and the longest pause between two of them: a daemon that was killed is back by then, or
#: known to be dead.
ATTEMPTS: Final = 12
PAUSE_S: Final = 1.5
#: What stands behind the end of a block that is shorter than the lost one.
_ZEROS: Final = memoryview(bytes(TRANSFER_BYTES))
#: What is copied within a thread before anybody may cancel it.
STRIDE_BYTES: Final = 64 * TRANSFER_BYTES


@dataclass
class Tally:
    """Bytes of the ranges by where they came from.

    `received`: what other nodes, or the persistent tier, sent for them.
    """

    local: int = 0
    copied: int = 0
    decoded: int = 0
    stored: int = 0
    received: int = 0


@dataclass
class Gathering:
    """One piece of work: where the bytes go, and which have come."""

    job: str
    version: Version
    image: memoryview
    targets: dict[int, Targets]
    tally: Tally = field(default_factory=Tally)
    came: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def put(self, shard: int, offset: int, data: memoryview) -> int:
        """Bytes [offset, ...) of a shard are here; returns how many bytes the ranges take of it."""
        taken = 0
        for start, to, count in self.targets[shard].of(offset, len(data)):
            self.image[to : to + count] = data[start : start + count]
            taken += count
        self.came[shard].append((offset, len(data)))
        return taken


async def until_done(attempt: Callable[[set[Home]], Awaitable[str]], attempts: int) -> None:
    """Try until nothing is lacking, with pauses that grow; what is wrong now may heal.

    Args:
        attempt: says what is lacking; given, and adding to it, the slots to do without.
        attempts: so often.

    Raises:
        PeerError: it did not heal.
    """
    avoid: set[Home] = set()
    why = ""
    for count in range(attempts):
        # At once the first time: others may have what one did not give.
        await asyncio.sleep(min(PAUSE_S, 0.25 * max(0, count - 1)))
        why = await attempt(avoid)
        if not why:
            return
        log.warning("ranges are not here yet: %s", why)
    raise PeerError(f"after {attempts} attempts {why}")


class Row:
    """Ranges of what another slot holds, in one row; behind them zeros."""

    def __init__(
        self,
        reader: RangesReader | None,
        home: Home | None,
        length: int,
        conduct: Conduct,
        avoid: set[Home],
    ) -> None:
        self._reader = reader
        self._home = home
        self._left = length
        self.received = 0
        self._conduct = conduct
        self._avoid = avoid

    async def take(self, count: int) -> memoryview:
        """The next `count` bytes. Raises PeerError, and notes the slot."""
        if self._reader is None or self._home is None or self._left <= 0:
            return _ZEROS[:count]
        with noting(self._home, self._avoid), self._conduct.blaming(self._home.node):
            chunk = await self._reader.chunk()
        self._left -= len(chunk)
        self.received += len(chunk)
        if len(chunk) >= count:
            return chunk[:count]
        return memoryview(b"".join((chunk, _ZEROS[: count - len(chunk)])))

    def cancel(self) -> None:
        if self._reader is not None:
            self._reader.cancel()


@contextmanager
def noting(home: Home | None, avoid: set[Home]) -> Iterator[None]:
    """Note a slot whose bytes could not be had within the context."""
    try:
        yield
    except SnapshotdError:
        if home is not None:
            avoid.add(home)
        raise


def strides(spans: Spans) -> Iterator[Spans]:
    """Ranges in portions of at most STRIDE_BYTES."""
    portion: list[tuple[int, int]] = []
    room = STRIDE_BYTES
    for offset, length in spans:
        for at in range(offset, offset + length, STRIDE_BYTES):
            count = min(STRIDE_BYTES, offset + length - at)
            if count > room:
                yield tuple(portion)
                portion, room = [], STRIDE_BYTES
            portion.append((at, count))
            room -= count
    if portion:
        yield tuple(portion)


def calls(spans: Spans) -> Iterator[Spans]:
    """Ranges by as many as one call takes."""
    for first in range(0, len(spans), MAX_RANGES):
        yield spans[first : first + MAX_RANGES]


def copy_in(work: Gathering, shard: int, image: memoryview, sound: Sound, spans: Spans) -> int:
    """Own bytes, checked; returns how many the ranges take of them. Raises DamagedBytes."""
    count = 0
    for offset, length in spans:
        sound.check(offset, length)
        with image[offset : offset + length] as data:
            count += work.put(shard, offset, data)
    return count


def by_shard(ranges: Sequence[Range]) -> tuple[dict[int, Spans], dict[int, Targets]]:
    """What is wanted of each shard, and where it goes."""
    found = defaultdict(list)
    for r in ranges:
        found[r.shard].append(r)
    return wanted(ranges), {shard: Targets(some) for shard, some in found.items()}
