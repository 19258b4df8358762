"""Copies aside, at once, what training may change before the background copy gets to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from snapshotd_client.copying import Load, Piece
from snapshotd_client.extents import Extent
from snapshotd_client.layout import aligned


class Staging:
    """Memory for the eager part of one snapshot, used again for the next of the same sizes."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._places: list[torch.Tensor] = []
        self._load = Load((), ())

    def take(self, pieces: Sequence[Piece]) -> Load:
        """Copy the pieces; what is returned is good until the next call."""
        key = tuple((p.offset, p.extent.nbytes, p.extent.storage.device) for p in pieces)
        if key != self._key:
            self._make(pieces)
            self._key = key
        if pieces:
            with torch.no_grad():
                # On a device this follows what the training has asked of its stream.
                sources = [piece.extent.bytes_view() for piece in pieces]
                torch._foreach_copy_(self._places, sources, non_blocking=True)
        return self._load

    def _make(self, pieces: Sequence[Piece]) -> None:
        sizes: dict[torch.device, int] = {}
        starts = []
        for piece in pieces:
            device = piece.extent.storage.device
            starts.append(sizes.get(device, 0))
            sizes[device] = aligned(starts[-1] + piece.extent.nbytes)
        memory = {
            d: torch.empty(size, dtype=torch.uint8, device=d).untyped_storage()
            for d, size in sizes.items()
        }
        staged = [
            Piece(p.offset, Extent(memory[p.extent.storage.device], start, p.extent.nbytes))
            for p, start in zip(pieces, starts, strict=True)
        ]
        self._places = [piece.extent.bytes_view() for piece in staged]
        self._load = Load(staged, ())
