"""Copies pieces of state into a mapped image: the bytes' way, on the CPU.

The interpreter lock is let go for the length of each call, and there are few calls: small pieces
go in batches, large ones in slices. Neither starts torch's own threads, which would compete with
the training's for its cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from snapshotd.wire.points import point
from snapshotd_client.extents import Extent

#: torch copies tensors of fewer elements than this in the calling thread.
_ALONE_ELEMENTS: Final = 32768
_WORD_BYTES: Final = 8
_BATCH_PIECES: Final = 1024
_BATCH_BYTES: Final = 32 << 20
#: Between two slices, or batches, a copy can be given up.
_SLICE_BYTES: Final = 32 << 20


#: What rests and what moves; more would keep tensors alive that nobody else has.
_LOADS_KEPT: Final = 2


class Piece(NamedTuple):
    """Some bytes of a storage, and where they stand in the image."""

    offset: int
    extent: Extent


class _Source(NamedTuple):
    offset: int
    source: torch.Tensor


class Load:
    """Pieces, made ready to be copied into one image after the other.

    Args:
        pieces: what is copied.
        gaps: (offset, length) in the image that are set to zero.
    """

    def __init__(self, pieces: Sequence[Piece], gaps: Sequence[tuple[int, int]]) -> None:
        self.gaps = gaps
        self.nbytes = sum(piece.extent.nbytes for piece in pieces)
        self.end = max((piece.offset + piece.extent.nbytes for piece in pieces), default=0)
        self.batches: list[list[_Source]] = []
        self.large: list[_Source] = []
        self.device: list[_Source] = []
        small = []
        for offset, extent in pieces:
            source = extent.bytes_view()
            if source.device.type != "cpu":
                self.device.append(_Source(offset, source))
            elif (words := _words(source)).numel() < _ALONE_ELEMENTS:
                small.append(_Source(offset, words))
            else:
                self.large.append(_Source(offset, source))
        self.batches = [*_batched(small)]
        self.large.sort(key=lambda piece: piece.offset)


def _words(source: torch.Tensor) -> torch.Tensor:
    """The same bytes in larger elements, where they can be read as such."""
    if source.numel() % _WORD_BYTES or source.data_ptr() % _WORD_BYTES:
        return source
    if source.storage_offset() % _WORD_BYTES:
        return source
    return source.view(torch.int64)


def _batched(pieces: Sequence[_Source]) -> Iterator[list[_Source]]:
    batch: list[_Source] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += piece.source.nbytes
        if len(batch) == _BATCH_PIECES or held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _Views(NamedTuple):
    gaps: list[torch.Tensor]
    batches: list[tuple[list[torch.Tensor], list[torch.Tensor]]]


def _nobody_minds(stands: int) -> None:
    del stands


def _piece_copied() -> None:
    point("trainer.piece.copied")


class Target:
    """One image in memory, and the views of it that the last load needed.

    Args:
        image: uint8, contiguous, on the CPU; its bytes stay where they are.
    """

    def __init__(self, image: torch.Tensor) -> None:
        self.image = image
        self._address = image.data_ptr()
        self._ready: dict[Load, _Views] = {}

    def put_text(self, offset: int, text: bytes) -> None:
        """Copy `text` to `offset`."""
        ctypes.memmove(self._address + offset, text, len(text))
        _piece_copied()

    def put(self, load: Load, check: Callable[[int], None] = _nobody_minds) -> None:
        """Copy a load, that of the CPU's memory.

        Args:
            load: the same as before costs least.
            check: called between pieces, with the length of the image's start of which the load
                has nothing more to copy; what it raises ends the copy.
        """
        self.expect(load)
        views = self._ready[load]
        with torch.no_grad():
            if views.gaps:
                torch._foreach_zero_(views.gaps)
            for batch, sources in views.batches:
                check(0)
                torch._foreach_copy_(batch, sources)
                _piece_copied()
            for offset, source in load.large:
                self._put_large(offset, source, check)
        check(load.end)

    def expect(self, load: Load) -> None:
        """Make the views that copying `load` needs, if they are not there.

        Raises:
            ValueError: it reaches beyond the image.
        """
        if load in self._ready:
            return
        if load.end > self.image.numel():
            raise ValueError(f"{load.end} bytes do not fit an image of {self.image.numel()}")
        while len(self._ready) >= _LOADS_KEPT:
            del self._ready[next(iter(self._ready))]
        self._ready[load] = _Views(
            gaps=[self.image[offset : offset + length] for offset, length in load.gaps],
            batches=[
                ([self._view(*piece) for piece in batch], [piece.source for piece in batch])
                for batch in load.batches
            ],
        )

    def forget(self, load: Load) -> None:
        """Hold on to none of its tensors."""
        self._ready.pop(load, None)

    def _put_large(self, offset: int, source: torch.Tensor, check: Callable[[int], None]) -> None:
        start, end = source.data_ptr(), source.numel()
        for at in range(0, end, _SLICE_BYTES):
            check(offset + at)
            length = min(_SLICE_BYTES, end - at)
            ctypes.memmove(self._address + offset + at, start + at, length)
            _piece_copied()

    def _view(self, offset: int, source: torch.Tensor) -> torch.Tensor:
        return self.image[offset : offset + source.nbytes].view(source.dtype)
