"""Ranks of a job that tell each other a word, through the store they found each other by.

Every wait is bounded. Words are short: bytes of tensors go through a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
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

    def all_alike(self, word: bytes, timeout_s: float) -> bool | None:
        """Whether all came with the same word; None where not all came in time.

        That it is None, they all are told: those that come late, too.
        """
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
        over = f"{place}/over"
        is_last = self._store.add(f"{place}/here", 1) == len(self._ranks)
        if not is_last:
            # Not every kind of store has an error of its own for it.
            with suppress(RuntimeError):
                self._store.wait([over], timedelta(seconds=timeout_s))
        # The last one to come, or the first to wait no longer: who says it first, says it for all.
        ended = self._store.compare_set(over, "", "met" if is_last else "late")
        return ended.decode() == "met"


def can_meet(rank: int, world: int) -> bool:
    """Whether torch's ranks are there, and those of the job."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and (dist.get_rank(), dist.get_world_size()) == (rank, world)
    )
