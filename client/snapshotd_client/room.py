"""Memory for tensors that a restore will make: its pages are had before it is wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

import torch

from snapshotd_client.pages import touch

_CPU: Final = torch.device("cpu")
#: Whoever says that it is enough waits for one.
_SLICE_BYTES: Final = 4 << 20


class Room:
    """Pieces of memory by their length, each given once.

    Args:
        sizes: of the pieces, bytes.
    """

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        self._pieces: dict[int, list[torch.Tensor]] = defaultdict(list)
        for nbytes in sizes:
            self._pieces[nbytes].append(_new(nbytes, _CPU))

    @property
    def held(self) -> list[int]:
        """Bytes of the pieces that there are."""
        return [piece.nbytes for pieces in self._pieces.values() for piece in pieces]

    def touch(self, enough: Callable[[], bool]) -> None:
        """Have pages under all of it; for a thread of its own, which ends before any is given."""
        for pieces in self._pieces.values():
            for piece in pieces:
                for start in range(0, piece.nbytes, _SLICE_BYTES):
                    if enough():
                        return
                    touch(piece.data_ptr() + start, min(_SLICE_BYTES, piece.nbytes - start))

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Memory of that length, uint8 [nbytes], as it comes; made now where there is none."""
        ready = self._pieces.get(nbytes) if device == _CPU else None
        return ready.pop() if ready else _new(nbytes, device)


def _new(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
