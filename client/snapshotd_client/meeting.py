"""Ranks of a job that tell each other a word, through the store they found each other by.

Every wait is bounded. Words are short: bytes of tensors go through a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import torch.distributed as dist
import xxhash

#: For ranks that train in step to come to the same point.
MEET_S: Final = 20.0


class Meeting:
    """A place where some ranks meet once: all with the same topic, each once.

    Args:
        topic: what for; not used before by the same ranks.
        ranks: who comes, this one among them, ascending.
    """

    def __init__(self, topic: str, ranks: Sequence[int]) -> None:
        # There is no public way to the store.
        from torch.distributed.distributed_c10d import _get_default_store  # noqa: PLC0415

        self._store = _get_default_store()
        self._ranks = ranks
        who = xxhash.xxh3_64_hexdigest(repr(list(ranks)).encode())
        self._topic = f"snapshotd/{topic}/{who}"

    def come(self, timeout_s: float) -> bool:
        """Wait for all of them; whether all came in time."""
        return self._arrive(self._topic, timeout_s)

    def all_alike(self, word: bytes, timeout_s: float) -> bool | None:
        """Whether all came with the same word; None where not all came in time."""
        first = self._store.compare_set(f"{self._topic}/first", "", word.hex()).decode()
        odd = f"{self._topic}/odd"
        if first != word.hex():
            self._store.add(odd, 1)
        if not self._arrive(self._topic, timeout_s):
            return None
        return int(self._store.add(odd, 0)) == 0

    def tell(self, rank: int, words: bytes, timeout_s: float) -> list[bytes] | None:
        """The words of all, in the order of ranks; None where not all came in time."""
        self._store.set(f"{self._topic}/words/{rank}", words.hex())
        if not self._arrive(f"{self._topic}/told", timeout_s):
            return None
        texts = [self._store.get(f"{self._topic}/words/{rank}") for rank in self._ranks]
        return [bytes.fromhex(text.decode()) for text in texts]

    def _arrive(self, place: str, timeout_s: float) -> bool:
        if self._store.add(f"{place}/here", 1) == len(self._ranks):
            self._store.set(f"{place}/all", "1")
            return True
        try:
            self._store.wait([f"{place}/all"], timedelta(seconds=timeout_s))
        except RuntimeError:  # not every kind of store has an error of its own for it
            return False
        return True


def can_meet(rank: int, world: int) -> bool:
    """Whether torch's ranks are there, and those of the job."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and (dist.get_rank(), dist.get_world_size()) == (rank, world)
    )
