"""The alarm of a capture that stands still: successive snapshots whose trained tensors are equal.

A trainer whose capture is frozen (it copies from tensors that the model no longer uses) hands over
the same tensors at every step and reports success. Its images still differ, as manifest, counters
and random states go on; so only whole grains within tensors that training changes are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snapshotd.metadata import DataHolding, Version
from snapshotd.wire.protocol import DIGEST_BYTES, grain_bytes

#: Byte ranges [start, end) of an image that hold tensors which training changes, ascending.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a sealed shard's trained tensors are known by.

    Attributes:
        digests: of the whole grains within `ranges`, in order; empty where there is none.
    """

    job: str
    shard: int
    version: Version
    grain: int
    ranges: Ranges
    digests: bytes


def fingerprint(holding: DataHolding, ranges: Ranges, grain_digests: bytes) -> Fingerprint:
    """Of a sealed shard.

    Args:
        holding: the shard.
        ranges: where its image holds trained tensors.
        grain_digests: of all grains of its image.
    """
    grain = grain_bytes(holding.image_bytes)
    digests = b"".join(
        grain_digests[first * DIGEST_BYTES : last * DIGEST_BYTES]
        for first, last in _whole_grains(ranges, grain)
    )
    return Fingerprint(holding.job, holding.shard, holding.version, grain, ranges, digests)


def _whole_grains(ranges: Ranges, grain: int) -> Iterable[tuple[int, int]]:
    """Runs of grains [first, last) of which every byte is within a range."""
    for start, end in ranges:
        first, last = -(-start // grain), end // grain
        if first < last:
            yield first, last


def same_life(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether one trainer made both: of one shard, in one epoch, at different steps."""
    return (
        (old.job, old.shard, old.version.epoch) == (new.job, new.shard, new.version.epoch)
    ) and old.version != new.version


def repeated(old: Fingerprint, new: Fingerprint) -> bool | None:
    """Whether all compared grains are equal; None where nothing can be concluded.

    Only what stands at the same place can be compared: when the manifest or a tensor before
    them grew, all grains are cut elsewhere.
    """
    if not same_life(old, new) or not new.digests:
        return None
    if (old.grain, old.ranges) != (new.grain, new.ranges):
        return None
    return old.digests == new.digests


class Repeats:
    """Counts snapshots whose trained tensors are those of the snapshot before.

    Attributes:
        total: all of them since this was made.
        in_a_row: of the newest ones without a break; 0 while the state changes.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._newest: Fingerprint | None = None

    def sealed(self, new: Fingerprint) -> None:
        """The next snapshot of the slot's shard."""
        old, self._newest = self._newest, new
        if old is None or not same_life(old, new):
            self.in_a_row = 0
            return
        match repeated(old, new):
            case True:
                self.total += 1
                self.in_a_row += 1
            case False:
                self.in_a_row = 0
            case None:
                pass

    def forget(self) -> None:
        """The trainer is gone: what comes next is another's."""
        self._newest = None
        self.in_a_row = 0
