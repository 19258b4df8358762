"""Ranges of what one slot holds, in one row; what they are gathered for, and what has come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from snapshotd.core.ranges import Targets
from snapshotd.errors import SnapshotdError
from snapshotd.flow.conduct import Conduct
from snapshotd.metadata import Home, Version
from snapshotd.rpc.ranges import RangesReader
from snapshotd.wire.protocol import TRANSFER_BYTES

#: What stands behind the end of a block that is shorter than the lost one.
_ZEROS: Final = memoryview(bytes(TRANSFER_BYTES))


@dataclass
class Tally:
    """Bytes of the ranges by where they came from; `received`: what other nodes sent for them."""

    local: int = 0
    copied: int = 0
    decoded: int = 0
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
