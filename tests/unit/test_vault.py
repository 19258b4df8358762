"""The vault's books: what was begun goes back exactly once, whatever happened in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotd.coding.codec import ZfecCodec
from snapshotd.core.instructions import Encode
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import PeerError
from snapshotd.flow.coder import Coder
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.holdings import describe
from snapshotd.flow.vault import Vault
from snapshotd.memory import segment as segments
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.segment import Segment
from snapshotd.memory.states import State
from snapshotd.metadata import DataHolding, Group, Home, Member, ParityPlace, SlotFacts, Version
from snapshotd.wire.v1 import segment_pb2 as seg

IMAGE_BYTES = 5000
VERSION = Version(epoch=1, step=5)


@contextmanager
def opened(shm_path: Path) -> Iterator[Vault]:
    arena = Arena(shm_path / "slot-0", Budget(shm_path, 64 << 20))
    arena.open()
    try:
        yield Vault(arena, SlotMachine(Home("n0", 0), 2), "cluster", 2)
    finally:
        arena.close()


async def sealed(vault: Vault, version: Version = VERSION) -> Segment:
    segment = await vault.begin_data("job", 0, version, IMAGE_BYTES)
    await vault.seal_data(segment, 2, IMAGE_BYTES, 0)
    return segment


def test_a_shard_that_was_brought_here_twice_at_once_is_kept_once(shm_path: Path) -> None:
    """A restore and a repair may both fetch the shard that a slot lacks."""

    async def both(vault: Vault) -> None:
        first, second = await sealed(vault), await sealed(vault)
        for segment in (first, second):
            vault.enter(segment)
            vault.give_back(segment)
        assert (first.state, second.state) == (State.SEALED, State.FREE)
        assert vault.segment("job", VERSION, 0) is first

    with opened(shm_path) as vault:
        asyncio.run(both(vault))


def test_what_was_thrown_away_is_not_given_back(shm_path: Path) -> None:
    async def both(vault: Vault) -> None:
        segment = await vault.begin_data("job", 0, VERSION, IMAGE_BYTES)
        vault.discard(segment, "somebody cut it")
        vault.give_back(segment)
        assert not segment.path.exists()

    with opened(shm_path) as vault:
        asyncio.run(both(vault))


def test_what_was_freed_meanwhile_is_not_freed_again(shm_path: Path) -> None:
    async def superseded(vault: Vault) -> None:
        segment = await sealed(vault)
        vault.enter(segment)
        vault.free(describe(segment))
        vault.give_back(segment)
        assert segment.state is State.FREE

    with opened(shm_path) as vault:
        asyncio.run(superseded(vault))


class Peer:
    """Stands for the other nodes: serves zeros, and looks at the vault when it has stored a row."""

    def __init__(
        self, records: dict[int, seg.SealRecord], on_stored: Callable[[], Awaitable[None]]
    ):
        self._records = records
        self._on_stored = on_stored

    patience_s = 30.0

    def follow(self, address: str, job: str, version: Version, shard: int, *extent: int) -> Peer:
        return Peer({0: self._records[shard]}, self._on_stored)

    async def record(self, *of: object) -> seg.SealRecord:
        return self._records[of[-1] if of else 0]

    def take(self) -> memoryview:
        return memoryview(bytes(IMAGE_BYTES))

    def store(self, address: str, **opening: object) -> Peer:
        return self

    async def open(self) -> None:
        pass

    def put(self, block: memoryview) -> None:
        pass

    def abort(self) -> None:
        pass

    async def finish(self, record: seg.ParityRecord) -> None:
        await self._on_stored()

    def cancel(self) -> None:
        pass


def group_of_three(parity: int) -> Group:
    return Group(tuple(Member(i, Home(f"n{i}", 0)) for i in range(3)), parity)


async def three_shards(vault: Vault) -> dict[int, seg.SealRecord]:
    """The records of three shards of zeros, sealed here."""
    records = {}
    for shard in range(3):
        segment = await vault.begin_data("job", shard, VERSION, IMAGE_BYTES)
        await vault.seal_data(segment, 3, IMAGE_BYTES, 0)
        records[shard] = segment.record
        vault.enter(segment)
    return records


def encode_of(
    group: Group, records: dict[int, seg.SealRecord]
) -> tuple[Encode, dict[Home, SlotFacts]]:
    """Coding of the group's first stripe, and the peers that it takes."""
    sizes = (IMAGE_BYTES,) * len(records)
    task = Encode("job", 1, VERSION, group, 0, tuple(range(group.parity)), sizes)
    peers = {
        member.home: SlotFacts(
            0,
            "peer:1",
            data=(DataHolding("job", i, VERSION, IMAGE_BYTES, records[i].content_digest),),
        )
        for i, member in enumerate(group.members)
    }
    return task, peers


def test_a_coder_that_waits_for_others_does_not_free_what_its_row_has_become(
    shm_path: Path,
) -> None:
    """While a slow holder stores its row, the version is superseded and the segment used anew."""
    group = group_of_three(parity=2)
    reused: list[Segment] = []

    async def code(vault: Vault) -> None:
        records = await three_shards(vault)

        async def supersede() -> None:
            place = ParityPlace(group.shards, group.parity, 0, 0)
            own = vault.segment("job", VERSION, place)
            vault.free(describe(own))
            sizes = [IMAGE_BYTES] * 3
            reused.append(await vault.begin_parity("job", Version(1, 6), place, sizes))
            assert reused == [own]

        task, peers = encode_of(group, records)
        peer = Peer(records, supersede)
        coder = Coder(Home("n0", 0), vault, peer, ZfecCodec(), Conduct())
        await coder.encode(task, lambda: peers)
        assert [s.state for s in reused] == [State.WRITING]

    with opened(shm_path) as vault:
        asyncio.run(code(vault))


def test_a_member_that_hangs_before_its_record_is_not_waited_for_for_long(shm_path: Path) -> None:
    """The holders of other rows wait as well, and would take the coder for stalled."""
    group = group_of_three(parity=2)

    class Hangs(Peer):
        patience_s = 0.05

        def follow(self, *asked: object) -> Peer:
            return Hangs(self._records, self._on_stored)

        async def record(self, *of: object) -> seg.SealRecord:
            await asyncio.Event().wait()
            raise AssertionError

    async def code(vault: Vault) -> None:
        records = await three_shards(vault)
        task, peers = encode_of(group, records)
        hangs = Hangs(records, lambda: asyncio.sleep(0))
        coder = Coder(Home("n0", 0), vault, hangs, ZfecCodec(), Conduct())
        with pytest.raises(PeerError, match="not all have sealed it"):
            async with asyncio.timeout(20):
                await coder.encode(task, lambda: peers)

    with opened(shm_path) as vault:
        asyncio.run(code(vault))


async def cancelled_in(begun: threading.Event, may_end: threading.Event, act: Awaitable[object]):
    """Cancel what works in a thread; it must not leave before the thread has."""
    task = asyncio.ensure_future(act)
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    left_behind = task.done()
    may_end.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not left_behind


def test_a_seal_that_nobody_waits_for_any_more_ends_before_its_memory_goes(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would say SEALED of a segment that was given to another shard meanwhile."""
    begun, may_end = threading.Event(), threading.Event()
    real = segments.grain_digests

    def slow(image: memoryview) -> bytes:
        begun.set()
        assert may_end.wait(30)
        return real(image)

    monkeypatch.setattr(segments, "grain_digests", slow)
    with opened(shm_path) as vault:
        asyncio.run(cancelled_in(begun, may_end, sealed(vault)))


def test_a_coder_that_is_cancelled_leaves_nobody_writing_into_its_segment(shm_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow(ZfecCodec):
        def encode_into(self, *arguments: object) -> None:
            begun.set()
            assert may_end.wait(30)
            super().encode_into(*arguments)

    async def code(vault: Vault) -> None:
        group = group_of_three(parity=1)
        records = await three_shards(vault)
        task, peers = encode_of(group, records)
        nobody = Peer(records, lambda: asyncio.sleep(0))
        coder = Coder(Home("n0", 0), vault, nobody, Slow(), Conduct())
        await cancelled_in(begun, may_end, coder.encode(task, lambda: peers))
        place = ParityPlace(group.shards, 1, 0, 0)
        own = await vault.begin_parity("job", VERSION, place, [IMAGE_BYTES] * 3)
        assert own.state is State.WRITING
        vault.give_back(own)

    with opened(shm_path) as vault:
        asyncio.run(code(vault))
