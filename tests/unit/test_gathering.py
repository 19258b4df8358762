"""Ranges gathered from peers that answer, break off, or lie."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from snapshotd.coding.digest import grain_digests
from snapshotd.core.ranges import Range
from snapshotd.core.trust import MAX_STRIKES, Misdeed
from snapshotd.errors import PeerError
from snapshotd.flow import rows
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.ranges import Gatherer
from snapshotd.metadata import Home, ParityPlace
from snapshotd.wire.protocol import TRANSFER_BYTES
from snapshotd.wire.v1 import segment_pb2 as seg
from tests.fuzz.room import HERE, VERSION, Memory, room, run
from tests.fuzz.targets import transfers as truth
from tests.fuzz.targets.blocks import IMAGES, seal

JOB = "job"


class _Reader:
    """What a peer answers to one call; after `breaks` bytes it is gone."""

    def __init__(self, row: bytes, breaks: int | None) -> None:
        self._row, self._at, self._breaks = row, 0, breaks

    async def chunk(self) -> memoryview:
        await asyncio.sleep(0)
        if self._breaks is not None and self._at >= self._breaks:
            raise PeerError("it is gone")
        chunk = self._row[self._at : self._at + TRANSFER_BYTES]
        self._at += len(chunk)
        return memoryview(chunk)

    def cancel(self) -> None: ...


class _Peers:
    """The other two slots: they hold shards 1 and 2, and two of the three parity blocks."""

    def __init__(self) -> None:
        self.bytes: dict[object, bytes] = {**IMAGES, **truth.CODED}
        self.gone: set[str] = set()
        self.asked: list[tuple[str, object, int]] = []

    def read_ranges(
        self,
        peer: Any,
        job: str,
        version: object,
        what: object,
        spans: Any,
        content_digest: bytes = b"",
    ) -> _Reader:
        row = b"".join(self.bytes[what][at : at + count] for at, count in spans)
        self.asked.append((peer.node, what, len(row)))
        return _Reader(row, 0 if peer.node in self.gone else None)

    async def record(self, peer: Any, job: str, version: object, what: Any) -> Any:
        if peer.node in self.gone:
            raise PeerError("it is gone")
        return truth._record(what) if isinstance(what, ParityPlace) else seal(what)


def gathered(
    peers: _Peers, ranges: list[Range], parity: Any = None, **held: bytes
) -> tuple[bytes, Any, Memory]:
    async def act(memory: Memory) -> tuple[bytes, Any, Memory]:
        await memory.vault.adopt()
        for shard, image in held.items():
            await memory.seal(int(shard[1:]), image)
        if parity is not None:
            sizes = [len(IMAGES[s]) for s in range(3)]
            segment = await memory.vault.begin_parity(JOB, VERSION, parity, sizes)
            with segment.image(len(truth.CODED[parity])) as view:
                view[:] = truth.CODED[parity]
            digests = grain_digests(memoryview(truth.CODED[parity]))
            await memory.vault.seal_parity(
                segment, [seal(s) for s in range(3)], len(truth.CODED[parity]), digests
            )
        client: Any = peers

        def slots() -> dict[Home, Any]:
            mine = memory.machine.facts("here", memory.vault.counters())
            others = {
                home: facts
                for home, facts in truth._facts().items()
                if memory.conduct.trusts(home.node)
            }
            return {**others, HERE: mine}

        gatherer = Gatherer(HERE, memory.vault, client, truth.CODEC, memory.conduct, slots)
        image = bytearray(max((r.to + r.length for r in ranges), default=0))
        with memoryview(image) as view:
            tally = await gatherer.gather(JOB, VERSION, ranges, view)
        memory.arena.close()
        return bytes(image), tally, memory

    with room() as path:
        return run(act(Memory(path)))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PAUSE_S", 0.0)


def whole(shard: int, to: int = 0) -> Range:
    return Range(shard, 0, len(IMAGES[shard]), to)


def test_own_bytes_theirs_and_those_of_nobody() -> None:
    sizes = [len(IMAGES[s]) for s in range(3)]
    image, tally, _ = gathered(
        _Peers(), [whole(2), whole(0, sizes[2]), whole(1, sizes[2] + sizes[0])], s1=IMAGES[1]
    )
    assert image == IMAGES[2] + IMAGES[0] + IMAGES[1]
    assert (tally.local, tally.copied, tally.decoded) == (sizes[1], sizes[2], sizes[0])


def test_who_breaks_off_is_done_without_where_that_can_be() -> None:
    peers = _Peers()
    peers.gone = {"n2"}
    image, tally, _ = gathered(peers, [whole(1)], s0=IMAGES[0])
    assert image == IMAGES[1]
    assert (tally.copied, tally.decoded) == (len(IMAGES[1]), 0)
    with pytest.raises(PeerError, match="after 12 attempts"):
        gathered(peers, [whole(2)])


def test_a_holder_that_is_gone_leaves_its_shard_to_be_decoded() -> None:
    """With our own shard, that of the other, and the parity that these two have."""
    peers = _Peers()
    peers.gone = {"n2"}
    mine = next(p for p, home in truth.HOLDERS.items() if home == HERE)
    image, tally, _ = gathered(peers, [whole(2)], s0=IMAGES[0], parity=mine)
    assert image == IMAGES[2]
    assert tally.decoded == len(IMAGES[2])


def test_parity_that_lies_is_found_out_and_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[tuple[str, str]] = []
    strike = Conduct.strike

    def seen(self: Conduct, node: str, misdeed: str, why: str) -> None:
        struck.append((node, misdeed))
        strike(self, node, misdeed, why)

    monkeypatch.setattr(Conduct, "strike", seen)
    peers = _Peers()
    place = next(p for p, home in truth.HOLDERS.items() if home.node == "n1")
    peers.bytes[place] = bytes(len(truth.CODED[place]))
    with pytest.raises(PeerError, match="after 12 attempts"):
        gathered(peers, [whole(0)])
    assert struck == [("n1", Misdeed.WRONG_STRIPE)] * MAX_STRIKES, "then it is not asked any more"


def test_a_record_that_is_not_there_is_said() -> None:
    class Liar(_Peers):
        async def record(self, *_: Any) -> Any:
            return seg.ParityRecord()

    with pytest.raises(PeerError, match="shard 0 is missing"):
        gathered(Liar(), [whole(0)])
