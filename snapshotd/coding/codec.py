"""The erasure code: parity blocks from data blocks, lost data blocks from the rest.

The code is zfec's: systematic Reed-Solomon over GF(256) from a Vandermonde matrix (L. Rizzo,
"Effective erasure codes for reliable computer communication protocols", 1997). Another
implementation must give the same parity bytes; `known_answer_test` holds it to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import zfec

from snapshotd.errors import SnapshotdError, TooFewBlocks

#: Elements of GF(256): the most blocks a stripe can have.
MAX_BLOCKS: Final = 256

#: Parity rows of `_known_blocks(k)` by (k, m), in hex, as zfec 1.6 computes them.
_KNOWN_PARITY: Final[Mapping[tuple[int, int], tuple[str, ...]]] = {
    (1, 1): ("0718293a4b5c6d7e8fa0b1",),
    (2, 1): ("4546ebfc0912b2a5cd9e73",),
    (3, 1): ("83c4bf94e8d798830b4147",),
    (2, 2): (
        "4546ebfc0912b2a5cd9e73",
        "83a4b0abcfc0ced50bdc28",
    ),
    (4, 2): (
        "11c073c15f114c23992dac",
        "33e61fdbb516c36fbb47d9",
    ),
    (8, 3): (
        "370aba8d77925d5fbf0ad7",
        "3fbf2221998196d0b7fed6",
        "faa142dfebc8f1fe729f1f",
    ),
}


class Codec(Protocol):
    """Arithmetic over the blocks of one stripe.

    Blocks 0 .. k-1 are the data, k .. k+m-1 the parity. Arguments stay the caller's: they are
    read during the call, never changed and never kept. Results are new bytes that nobody shares.
    Calls from several threads at once are safe, and let other Python threads run meanwhile.

    Not promised: that damage is noticed (a wrong byte in gives wrong bytes out: verify digests
    before and after), that blocks of unlike length are padded (the caller pads with zeros), or
    any bound on memory beyond the blocks returned.

    Attributes:
        name: the implementation and its version, for people.
    """

    @property
    def name(self) -> str: ...

    def encode(
        self, k: int, m: int, blocks: Sequence[memoryview], rows: Sequence[int]
    ) -> list[bytes]:
        """Parity rows of a stripe.

        Args:
            k: data blocks of the stripe, at least 1.
            m: its parity blocks; k + m is at most MAX_BLOCKS.
            blocks: the k data blocks in order, contiguous and of equal length.
            rows: which rows, each of 0 .. m-1.

        Returns:
            One block for each row, as long as the data blocks.

        Raises:
            ValueError: arguments that fit no stripe.
        """
        ...

    def decode(
        self, k: int, m: int, have: Mapping[int, memoryview], want: Sequence[int]
    ) -> list[bytes]:
        """Data blocks of a stripe from any k of its blocks.

        Args:
            k: data blocks of the stripe, at least 1.
            m: its parity blocks; k + m is at most MAX_BLOCKS.
            have: blocks by index, contiguous and of equal length; more than k may be given.
            want: indexes of data blocks, each of 0 .. k-1; one that is in `have` is copied.

        Returns:
            One block for each index of `want`.

        Raises:
            TooFewBlocks: `have` holds fewer than k blocks, and one wanted is not among them.
            ValueError: arguments that fit no stripe.
        """
        ...


class ZfecCodec:
    """The reference: runs wherever Python does, at less than 1 GB/s a core."""

    def __init__(self) -> None:
        # The matrix of a (k, m) is computed once. Two threads that meet here compute it twice,
        # to the same result.
        self._encoders: dict[tuple[int, int], zfec.Encoder] = {}
        self._decoders: dict[tuple[int, int], zfec.Decoder] = {}

    @property
    def name(self) -> str:
        return f"zfec {zfec.__version__}"

    def encode(
        self, k: int, m: int, blocks: Sequence[memoryview], rows: Sequence[int]
    ) -> list[bytes]:
        """As `Codec.encode`."""
        _check_stripe(k, m)
        if len(blocks) != k:
            raise ValueError(f"{len(blocks)} data blocks given for a stripe of k = {k}")
        _check_equal_lengths(blocks)
        _check_indexes("parity rows", rows, m)
        if not rows:
            return []
        numbers = [k + row for row in rows]
        return [bytes(block) for block in self._encoder(k, m).encode(list(blocks), numbers)]

    def decode(
        self, k: int, m: int, have: Mapping[int, memoryview], want: Sequence[int]
    ) -> list[bytes]:
        """As `Codec.decode`."""
        _check_stripe(k, m)
        _check_indexes("blocks given", tuple(have), k + m)
        _check_indexes("data blocks wanted", want, k)
        _check_equal_lengths(tuple(have.values()))
        if all(index in have for index in want):
            return [bytes(have[index]) for index in want]
        chosen = _choose(k, m, have, want)
        data = self._decoder(k, m).decode([have[index] for index in chosen], chosen)
        return [bytes(data[index]) for index in want]

    def _encoder(self, k: int, m: int) -> zfec.Encoder:
        if (k, m) not in self._encoders:
            self._encoders[k, m] = zfec.Encoder(k, k + m)
        return self._encoders[k, m]

    def _decoder(self, k: int, m: int) -> zfec.Decoder:
        if (k, m) not in self._decoders:
            self._decoders[k, m] = zfec.Decoder(k, k + m)
        return self._decoders[k, m]


def known_answer_test(codec: Codec) -> None:
    """Prove at start that a codec computes the code that is already at rest in other nodes.

    Raises:
        SnapshotdError: it does not; nothing it codes can be trusted.
    """
    for (k, m), parity in _KNOWN_PARITY.items():
        blocks = _known_blocks(k)
        rows = codec.encode(k, m, blocks, range(m))
        if tuple(row.hex() for row in rows) != parity:
            raise _wrong_codec(codec, k, m, "parity")
        # The hardest loss: as many of the first data blocks as there is parity.
        lost = min(k, m)
        have = dict(enumerate(blocks[lost:], lost)) | {
            k + row: memoryview(rows[row]) for row in range(lost)
        }
        if codec.decode(k, m, have, range(lost)) != [bytes(block) for block in blocks[:lost]]:
            raise _wrong_codec(codec, k, m, "decoded blocks")


def _known_blocks(k: int) -> list[memoryview]:
    """Blocks of 11 bytes: longer than a machine word, and no multiple of one."""
    return [memoryview(bytes((7 + 31 * i + 17 * j) % 256 for j in range(11))) for i in range(k)]


def _wrong_codec(codec: Codec, k: int, m: int, what: str) -> SnapshotdError:
    return SnapshotdError(
        f"erasure code {codec.name} computes wrong {what} for k = {k}, m = {m}",
        "reinstall the package that implements it; nothing is coded with it",
    )


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


def _check_equal_lengths(blocks: Sequence[memoryview]) -> None:
    lengths = {block.nbytes for block in blocks}
    if len(lengths) > 1:
        raise ValueError(f"blocks of a stripe have unlike lengths: {sorted(lengths)} bytes")
