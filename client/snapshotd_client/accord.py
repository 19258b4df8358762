"""Ranks that hold the same agree on it: on what they divide, and that its bytes are the same.

A share is worth something only if the others store theirs of the very same pieces. Ranks that do
not find the same pieces each store all of theirs, which is complete whatever the others do.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import xxhash

from snapshotd_client.errors import ReplicasDiverged
from snapshotd_client.extents import Extent
from snapshotd_client.identity import Identity
from snapshotd_client.meeting import MEET_S, Meeting, can_meet

log = logging.getLogger(__name__)

#: Ranks that do not come in time may have been late; so often it is tried.
_TRIES: Final = 3
_DIGEST_BYTES: Final = 16

#: Tells the topics of one Snapshotter of this process from those of the next.
_counts = itertools.count()


class Shared(NamedTuple):
    """A piece of memory that several ranks hold.

    Attributes:
        ranks: all of them, ascending.
        name: of its first tensor.
        extent: all of it, here.
    """

    ranks: tuple[int, ...]
    name: str
    extent: Extent


class Accord:
    """What this rank has agreed on with those that hold the same.

    Args:
        who: this trainer.
        check_every: bytes are compared at the first snapshot, and at every that many due ones
            from then on; 0: at the first only.
    """

    def __init__(self, who: Identity, check_every: int = 0) -> None:
        self._who = who
        self._topic = str(next(_counts))
        self._known: dict[tuple[int, ...], bytes] = {}
        self._asked: Counter[int] = Counter()  # how often, of each step
        self._agreed = True
        self._tries = _TRIES
        self._every = check_every
        #: Sets of ranks whose first comparison is due, and how often it is tried; None before all.
        self._due: dict[tuple[int, ...], int] | None = None

    @property
    def undecided(self) -> bool:
        """Whether it is worth asking again for the same pieces."""
        return not self._agreed and 0 < self._tries < _TRIES

    def divides(self, step: int, shared: Sequence[Shared]) -> bool:
        """Whether the holders of these pieces all want to divide just these.

        Where there is no process group to ask, they are taken at the caller's word.
        """
        if not shared or not can_meet(self._who.rank, self._who.world_size):
            return True
        words = {ranks: _digest(repr([(s.name, s.extent.nbytes) for s in of]).encode())
                 for ranks, of in _by_ranks(shared)}  # fmt: skip
        if words == self._known and not self.undecided:
            return self._agreed
        if words != self._known:
            self._known, self._tries = words, _TRIES
        self._asked[step] += 1
        topic = f"{self._topic}/divide/{step}/{self._asked[step]}"
        alike = {
            ranks: Meeting(topic, ranks).all_alike(word, MEET_S) for ranks, word in words.items()
        }
        self._agreed = all(alike.values())
        if self._agreed:
            self._tries = _TRIES
            return True
        late = None in alike.values()
        self._tries = self._tries - 1 if late else 0
        log.warning(
            "step %d: this rank stores all of its state, not a share of it: %s",
            step,
            "not all ranks that hold the same came to snapshot it"
            if late
            else "ranks that should hold the same state have other tensors",
        )
        return False

    def check(self, step: int, number: int, shared: Sequence[Shared]) -> None:
        """Compare the bytes of shared pieces with those of the others, if it is time.

        Args:
            step: of the snapshot.
            number: of the snapshot, as all ranks count them.
            shared: what is divided.

        Raises:
            ReplicasDiverged: they differ; names tensors and ranks.
        """
        again = self._every > 0 and number % self._every == 0
        if self._due == {} and not again:
            return
        if not shared or not can_meet(self._who.rank, self._who.world_size):
            return
        sets = _by_ranks(shared)
        if self._due is None:
            self._due = {ranks: _TRIES for ranks, _ in sets}
        for ranks, of in sets:
            tries = self._due.pop(ranks, 0)
            if not (again or tries) or self._compared(step, ranks, of):
                continue
            log.warning("step %d: not all of ranks %s came to compare their state", step, ranks)
            if tries > 1:
                self._due[ranks] = tries - 1

    def _compared(self, step: int, ranks: tuple[int, ...], of: Sequence[Shared]) -> bool:
        """Whether all came to compare; all are told it alike. Raises ReplicasDiverged."""
        digests = [_digest(s.extent.bytes_view().cpu().numpy().data) for s in of]
        meeting = Meeting(f"{self._topic}/same/{step}", ranks)
        alike = meeting.all_alike(_digest(b"".join(digests)), MEET_S)
        if alike is False:
            told = meeting.tell(self._who.rank, b"".join(digests), MEET_S)
            raise _diverged(step, ranks, [s.name for s in of], told)
        return alike is not None


def _by_ranks(shared: Sequence[Shared]) -> list[tuple[tuple[int, ...], list[Shared]]]:
    """Ascending by ranks: all go through the sets that they are in in the same order."""
    return [
        (ranks, [s for s in shared if s.ranks == ranks])
        for ranks in sorted({s.ranks for s in shared})
    ]


def _diverged(
    step: int, ranks: Sequence[int], names: Sequence[str], told: Sequence[bytes] | None
) -> ReplicasDiverged:
    sentences = []
    for i, name in enumerate(names):
        at = slice(i * _DIGEST_BYTES, (i + 1) * _DIGEST_BYTES)
        seen = [words[at] for words in told or ()]
        if len(set(seen)) > 1:
            ((most, _),) = Counter(seen).most_common(1)
            odd = [rank for rank, digest in zip(ranks, seen, strict=True) if digest != most]
            sentences.append(f"{name}: ranks {odd} differ from the rest of {list(ranks)}")
    return ReplicasDiverged(step, sentences or [f"ranks {list(ranks)}: in what, they did not tell"])


def _digest(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)
