"""The erasure code: parity blocks from data blocks, lost data blocks from the rest.

The code is zfec's: systematic Reed-Solomon over GF(256) from a Vandermonde matrix (L. Rizzo,
"Effective erasure codes for reliable computer communication protocols", 1997). Another
implementation must give the same parity bytes; `known_answers` holds it to that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

import zfec

from snapshotd.errors import TooFewBlocks

#: Elements of GF(256): the most blocks a stripe can have.
MAX_BLOCKS: Final = 256

#: The longest block of one call: ISA-L counts bytes in an int.
MAX_BLOCK_BYTES: Final = (1 << 31) - 1

Blocks = Sequence[memoryview]


class Codec(ABC):
    """Arithmetic over the blocks of one stripe.

    Blocks 0 .. k-1 are the data, k .. k+m-1 the parity. Blocks are contiguous bytes of equal
    length, up to MAX_BLOCK_BYTES. All memory is the caller's: sources are read during the call,
    never changed and never kept; targets are writable, overlap nothing else, and hold nothing of
    worth if the call fails. Calls from several threads at once are safe, and let other Python
    threads run meanwhile.

    Not promised: that damage is noticed (a wrong byte in gives wrong bytes out: verify digests
    before and after), or that blocks of unlike length are padded (the caller pads with zeros).

    An implementation computes; that the arguments fit, and which blocks to decode from, is
    settled here for all of them.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The implementation and its version, for people."""

    @abstractmethod
    def _code(self, k: int, m: int, blocks: Blocks, rows: Sequence[int], out: Blocks) -> None:
        """Compute parity rows, at least one, of blocks that are not empty."""

    @abstractmethod
    def _solve(
        self,
        k: int,
        m: int,
        chosen: Sequence[int],
        blocks: Blocks,
        lost: Sequence[int],
        out: Blocks,
    ) -> None:
        """Compute lost data blocks, at least one, from k blocks that are not empty.

        `chosen` are the indexes of `blocks`; at place i stands data block i, or parity in its
        stead.
        """

    def encode_into(self, k: int, m: int, blocks: Blocks, rows: Sequence[int], out: Blocks) -> None:
        """Parity rows of a stripe.

        Args:
            k: data blocks of the stripe, at least 1.
            m: its parity blocks; k + m is at most MAX_BLOCKS.
            blocks: the k data blocks in order.
            rows: which rows, each of 0 .. m-1.
            out: where each of them goes.

        Raises:
            ValueError: arguments that fit no stripe.
        """
        _check_stripe(k, m)
        if len(blocks) != k:
            raise ValueError(f"{len(blocks)} data blocks given for a stripe of k = {k}")
        _check_indexes("parity rows", rows, m)
        _check_targets(out, rows)
        _check_equal_lengths((*blocks, *out))
        if rows and blocks[0].nbytes:
            self._code(k, m, blocks, rows, out)

    def decode_into(
        self, k: int, m: int, have: Mapping[int, memoryview], want: Sequence[int], out: Blocks
    ) -> None:
        """Data blocks of a stripe from any k of its blocks.

        Args:
            k: data blocks of the stripe, at least 1.
            m: its parity blocks; k + m is at most MAX_BLOCKS.
            have: blocks by index; more than k may be given.
            want: indexes of data blocks, each of 0 .. k-1; one that is in `have` is copied.
            out: where each of them goes.

        Raises:
            TooFewBlocks: `have` holds fewer than k blocks, and one wanted is not among them.
            ValueError: arguments that fit no stripe.
        """
        _check_stripe(k, m)
        _check_indexes("blocks given", tuple(have), k + m)
        _check_indexes("data blocks wanted", want, k)
        _check_targets(out, want)
        _check_equal_lengths((*have.values(), *out))
        lost, targets = [], []
        for index, target in zip(want, out, strict=True):
            if index in have:
                target[:] = have[index]
            else:
                lost.append(index)
                targets.append(target)
        if not lost:
            return
        chosen = _choose(k, m, have, want)
        if targets[0].nbytes:
            self._solve(k, m, chosen, [have[index] for index in chosen], lost, targets)

    def encode(self, k: int, m: int, blocks: Blocks, rows: Sequence[int]) -> list[bytes]:
        """As `encode_into`, into new memory."""
        new = [bytearray(blocks[0].nbytes if blocks else 0) for _ in rows]
        self.encode_into(k, m, blocks, rows, [memoryview(row) for row in new])
        return [bytes(row) for row in new]

    def decode(
        self, k: int, m: int, have: Mapping[int, memoryview], want: Sequence[int]
    ) -> list[bytes]:
        """As `decode_into`, into new memory."""
        length = max((block.nbytes for block in have.values()), default=0)
        new = [bytearray(length) for _ in want]
        self.decode_into(k, m, have, want, [memoryview(block) for block in new])
        return [bytes(block) for block in new]


class ZfecCodec(Codec):
    """The reference: runs wherever Python does, at 0.5 to 2 GB/s a core."""

    def __init__(self) -> None:
        # The matrix of a (k, m) is computed once. Two threads that meet here compute it twice,
        # to the same result.
        self._encoders: dict[tuple[int, int], zfec.Encoder] = {}
        self._decoders: dict[tuple[int, int], zfec.Decoder] = {}

    @property
    def name(self) -> str:
        return f"zfec {zfec.__version__}"

    def _code(self, k: int, m: int, blocks: Blocks, rows: Sequence[int], out: Blocks) -> None:
        coded = self._encoder(k, m).encode(list(blocks), [k + row for row in rows])
        for target, block in zip(out, coded, strict=True):
            target[:] = block

    def _solve(
        self,
        k: int,
        m: int,
        chosen: Sequence[int],
        blocks: Blocks,
        lost: Sequence[int],
        out: Blocks,
    ) -> None:
        data = self._decoder(k, m).decode(list(blocks), list(chosen))
        for target, index in zip(out, lost, strict=True):
            target[:] = data[index]

    def _encoder(self, k: int, m: int) -> zfec.Encoder:
        if (k, m) not in self._encoders:
            self._encoders[k, m] = zfec.Encoder(k, k + m)
        return self._encoders[k, m]

    def _decoder(self, k: int, m: int) -> zfec.Decoder:
        if (k, m) not in self._decoders:
            self._decoders[k, m] = zfec.Decoder(k, k + m)
        return self._decoders[k, m]


def _choose(k: int, m: int, have: Mapping[int, memoryview], want: Sequence[int]) -> list[int]:
    """The k block numbers to decode from: each data block at its place, parity in the gaps."""
    if len(have) < k:
        missing = sorted(set(range(k + m)) - set(have))
        raise TooFewBlocks(
            f"{len(have)} blocks of a stripe of k = {k}, m = {m} are here, {k} are needed to "
            f"decode blocks {sorted(set(want) - set(have))}; missing are {missing}"
        )
    parity = iter(sorted(index for index in have if index >= k))
    return [index if index in have else next(parity) for index in range(k)]


def _check_stripe(k: int, m: int) -> None:
    if k < 1 or m < 0 or k + m > MAX_BLOCKS:
        raise ValueError(f"k = {k}, m = {m}: k >= 1, m >= 0 and k + m <= {MAX_BLOCKS} expected")


def _check_indexes(what: str, indexes: Sequence[int], bound: int) -> None:
    wrong = [index for index in indexes if not 0 <= index < bound]
    if wrong:
        raise ValueError(f"{what}: {wrong} are not within 0 .. {bound - 1}")


def _check_targets(out: Blocks, wanted: Sequence[int]) -> None:
    if len(out) != len(wanted):
        raise ValueError(f"{len(wanted)} blocks are wanted into {len(out)} targets")
    if any(target.readonly for target in out):
        raise ValueError("a target is read-only")


def _check_equal_lengths(blocks: Sequence[memoryview]) -> None:
    lengths = {block.nbytes for block in blocks}
    if len(lengths) > 1:
        raise ValueError(f"blocks of a stripe have unlike lengths: {sorted(lengths)} bytes")
    if max(lengths, default=0) > MAX_BLOCK_BYTES:
        raise ValueError(f"blocks of {max(lengths)} bytes, at most {MAX_BLOCK_BYTES} are coded")
