"""Copies pieces of state into a mapped image: the bytes' way, on the CPU.

The interpreter lock is let go for the length of each call, and there are few calls: small pieces
go in batches, large ones in slices. Neither starts torch's own threads, which would compete with
the training's for its cores. The slices go side by side into the blocks that the image is coded in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from snapshotd.wire.points import point
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd_client.extents import Extent

#: torch copies tensors of fewer elements than this in the calling thread.
_ALONE_ELEMENTS: Final = 32768
_WORD_BYTES: Final = 8
_BATCH_PIECES: Final = 1024
_BATCH_BYTES: Final = 32 << 20
#: One slice for each block: so many bytes in all, or an eighth of a larger image, in slices of no
#: more than this. Shorter ones cost time where another thread keeps the interpreter lock. Between
#: two slices, or batches, a copy can be given up.
ROUND_BYTES: Final = 32 << 20
_ROUNDS: Final = 8

#: What rests and what moves; more would keep tensors alive that nobody else has.
_LOADS_KEPT: Final = 2


class Piece(NamedTuple):
    """Some bytes of a storage, and where they stand in the image."""

    offset: int
    extent: Extent


class _Source(NamedTuple):
    offset: int
    source: torch.Tensor


class _Slice(NamedTuple):
    """A part of a large piece.

    Attributes:
        inside: where it starts in its block, which it does not leave.
        offset: where in the image; no two have the same.
        source: the piece.
        start: where in that.
        length: in bytes.
    """

    inside: int
    offset: int
    source: torch.Tensor
    start: int
    length: int


class _Order(NamedTuple):
    """What is copied slice by slice, in the order of `_Slice.inside`.

    Attributes:
        block_bytes: length of a block.
        slice_bytes: no slice is longer, or reaches beyond a multiple of it within its block.
        large: from the CPU's memory.
        device: from the devices'.
    """

    block_bytes: int
    slice_bytes: int
    large: Sequence[_Slice]
    device: Sequence[_Slice]


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
        self._order: _Order | None = None

    def order(self, block_bytes: int) -> _Order:
        """In which pieces are copied: side by side into all blocks.

        Args:
            block_bytes: length of a block, or 0: there is one; the same as before costs nothing.
        """
        block_bytes = min(block_bytes or self.end, self.end)
        if self._order is None or block_bytes != self._order.block_bytes:
            blocks = -(-self.end // max(1, block_bytes))
            together = max(ROUND_BYTES, min(self.end // _ROUNDS, blocks * ROUND_BYTES))
            slice_bytes = -(-together // (max(1, blocks) * TRANSFER_BYTES)) * TRANSFER_BYTES
            self._order = _Order(
                block_bytes,
                slice_bytes,
                sorted(_cut(self.large, block_bytes, slice_bytes)),
                sorted(_cut(self.device, block_bytes, slice_bytes)),
            )
        return self._order


def _cut(pieces: Sequence[_Source], block_bytes: int, slice_bytes: int) -> Iterator[_Slice]:
    """Slices that end where a block ends, and at multiples of `slice_bytes` within it."""
    for offset, source in pieces:
        at, end = offset, offset + source.numel()
        while at < end:
            inside = at % block_bytes
            length = min(end - at, block_bytes - inside, slice_bytes - inside % slice_bytes)
            yield _Slice(inside, at, source, at - offset, length)
            at += length


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

    def put(
        self, load: Load, check: Callable[[int], None] = _nobody_minds, block_bytes: int = 0
    ) -> None:
        """Copy a load, that of the CPU's memory.

        Args:
            load: the same as before costs least.
            check: called between pieces, with a number of bytes: of so many at the start of each
                block the load has nothing more to copy. What it raises ends the copy.
            block_bytes: length of the image's blocks, which are filled side by side; 0: it is one.
        """
        self.expect(load)
        views = self._ready[load]
        order = load.order(block_bytes)
        with torch.no_grad():
            if views.gaps:
                torch._foreach_zero_(views.gaps)
            for batch, sources in views.batches:
                check(0)
                torch._foreach_copy_(batch, sources)
                _piece_copied()
            for inside, offset, source, start, length in order.large:
                check(inside)
                ctypes.memmove(self._address + offset, source.data_ptr() + start, length)
                _piece_copied()
        check(order.block_bytes)

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

    def _view(self, offset: int, source: torch.Tensor) -> torch.Tensor:
        return self.image[offset : offset + source.nbytes].view(source.dtype)
