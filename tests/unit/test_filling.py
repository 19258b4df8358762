"""Digests of a buffer that is being written: of all grains, in order, none behind its back."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import pytest

from snapshotd.coding.digest import grain_digests
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import NoRoom, PeerError, RequestError
from snapshotd.flow import filling as module
from snapshotd.flow.filling import Filling
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.states import State
from snapshotd.metadata import Home, Version
from snapshotd.wire.protocol import grain_bytes
from snapshotd.wire.v1.segment_pb2 import SealRecord

IMAGE = os.urandom(2_000_003)
GRAIN = grain_bytes(len(IMAGE))
VERSION = Version(1, 5)


@pytest.fixture
def vault(shm_path: Path) -> Iterator[Vault]:
    arena = Arena(shm_path / "slot-0", Budget(shm_path, 64 << 20))
    arena.open()
    yield Vault(arena, SlotMachine(Home("n0", 0), 2), "cluster", 2)
    arena.close()


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


class Tasks:
    """Starts what a Filling wants run beside the rest."""

    def __init__(self) -> None:
        self.running: list[asyncio.Task[None]] = []

    def start(self, work: object) -> None:
        self.running.append(asyncio.ensure_future(work))

    async def ended(self) -> None:
        await asyncio.gather(*self.running)


async def begun(vault: Vault, tasks: Tasks, blocks: int = 1) -> Filling:
    segment = await vault.begin_data("job", 0, VERSION, len(IMAGE))
    with segment.image(len(IMAGE)) as image:
        image[:] = IMAGE
    is_freed = partial(vault.is_freed, segment)
    filling = Filling(segment, VERSION, len(IMAGE), blocks, tasks.start, is_freed)
    vault.grows("job", VERSION, 0, filling)
    return filling


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 600])
@pytest.mark.parametrize("parts", [[], [0.0], [1e-6], [0.2, 0.21], [1.0], [0.5, 0.1]])
def test_the_digests_are_those_of_one_pass(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, blocks: int, parts: list[float]
) -> None:
    monkeypatch.setattr(module, "STRIDE_BYTES", 2 * GRAIN)

    async def fill() -> bytes | None:
        tasks = Tasks()
        filling = await begun(vault, tasks, blocks)
        for part in parts:
            filling.stands(round(part * filling.block_bytes))
        await tasks.ended()
        stands = round(max(parts, default=0.0) * filling.block_bytes)
        whole = stands if stands == filling.block_bytes else stands - stands % GRAIN
        offsets = range(0, len(IMAGE), filling.block_bytes)
        taken = [o + at for o in offsets for at in range(0, whole, GRAIN) if o + at < len(IMAGE)]
        digests = grain_digests(memoryview(IMAGE))
        for at in range(0, len(IMAGE), GRAIN):
            here = slice(at // GRAIN * 16, (at // GRAIN + 1) * 16)
            assert filling.digests[here] == (digests[here] if at in taken else bytes(16))
        return await filling.finish(len(IMAGE))

    assert asyncio.run(fill()) == grain_digests(memoryview(IMAGE))


def test_on_a_single_processor_nothing_is_read_ahead(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    async def fill() -> bytes | None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(len(IMAGE))
        assert not tasks.running
        return await filling.finish(len(IMAGE))

    assert asyncio.run(fill()) == grain_digests(memoryview(IMAGE))


def test_another_length_than_was_claimed_has_other_grains(vault: Vault) -> None:
    async def fill() -> bytes | None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(GRAIN)
        found = await filling.finish(len(IMAGE) // 3)
        await tasks.ended()
        return found

    assert asyncio.run(fill()) is None


def test_who_reads_it_has_ended_before_it_is_given_back(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go_on = threading.Event(), threading.Event()
    plain = module.chunk_digests

    def slowly(part: memoryview, image_bytes: int) -> bytes:
        held.set()
        go_on.wait()
        return plain(part, image_bytes)

    monkeypatch.setattr(module, "chunk_digests", slowly)

    async def give_back() -> list[State]:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(len(IMAGE))
        await asyncio.to_thread(held.wait)
        back = asyncio.ensure_future(filling.give_back(vault))
        await asyncio.sleep(0)
        meanwhile = filling.segment.state
        go_on.set()
        await back
        await tasks.ended()
        return [meanwhile, filling.segment.state]

    assert asyncio.run(give_back()) == [State.WRITING, State.FREE]


def test_a_file_that_is_cut_is_found_when_it_is_sealed(vault: Vault) -> None:
    async def fill() -> None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        os.truncate(filling.segment.path, 4096)
        filling.stands(len(IMAGE))
        await tasks.ended()
        with pytest.raises(module.DamagedBytes):
            await filling.finish(len(IMAGE))

    asyncio.run(fill())


def test_bytes_that_change_after_they_were_said_to_stand_are_damage(vault: Vault) -> None:
    async def fill() -> None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(GRAIN)
        await tasks.ended()
        with filling.segment.image(1) as image:
            image[0] ^= 1
        digests = await filling.finish(len(IMAGE))
        await vault.seal_data(filling.segment, 1, len(IMAGE), 0, digests)
        with pytest.raises(module.DamagedBytes):
            filling.segment.verify()

    asyncio.run(fill())


# -- peers that read it meanwhile


def test_a_peer_reads_what_stands_of_each_block(vault: Vault) -> None:
    async def follow() -> None:
        tasks = Tasks()
        filling = await begun(vault, tasks, 2)
        second = filling.block_bytes
        filling.stands(3 * GRAIN + 1)
        await tasks.ended()
        assert await filling.standing(0, GRAIN) == 3 * GRAIN
        assert await filling.standing(second + GRAIN, GRAIN) == second + 3 * GRAIN
        waits = asyncio.ensure_future(filling.standing(GRAIN, 3 * GRAIN))
        await asyncio.sleep(0)
        assert not waits.done()
        filling.stands(second)
        await tasks.ended()
        assert await waits == len(IMAGE)  # on to the end, through the other block

    asyncio.run(follow())


def test_a_peer_has_the_record_once_it_is_sealed(vault: Vault) -> None:
    async def follow() -> None:
        filling = await begun(vault, Tasks(), 2)
        with vault.following("job", VERSION, 0) as image:
            waits = asyncio.ensure_future(image.record())
            await asyncio.sleep(0)
            assert not waits.done()
            digests = await filling.finish(len(IMAGE))
            assert await image.standing(0, len(IMAGE)) == len(IMAGE)
            await vault.seal_data(filling.segment, 1, len(IMAGE), 0, digests)
            vault.enter(filling.segment)
            filling.sealed(filling.segment.record)
            assert await waits == filling.segment.record
        with vault.following("job", VERSION, 0) as image:
            assert await image.standing(0, 1) == len(IMAGE)
            assert await image.record() == filling.segment.record

    asyncio.run(follow())


def test_a_peer_leaves_when_it_is_given_up_and_its_memory_stays_until_then(vault: Vault) -> None:
    async def follow() -> None:
        filling = await begun(vault, Tasks(), 2)
        with vault.following("job", VERSION, 0) as image:
            waits = [asyncio.ensure_future(w) for w in (image.standing(0, 1), image.record())]
            await asyncio.sleep(0)
            await filling.give_back(vault)
            assert filling.segment.state is State.WRITING
            for wait in waits:
                with pytest.raises(PeerError, match="its trainer gave it up"):
                    await wait
        assert filling.segment.state is State.FREE
        with pytest.raises(RequestError), vault.following("job", VERSION, 0):
            """It is not there any more."""

    asyncio.run(follow())


def test_another_length_than_was_claimed_ends_what_peers_read(vault: Vault) -> None:
    async def follow() -> None:
        filling = await begun(vault, Tasks())
        await filling.finish(len(IMAGE) - 1)
        filling.sealed(SealRecord(image_bytes=len(IMAGE) - 1))
        with pytest.raises(PeerError, match="and was to have"):
            await filling.record()

    asyncio.run(follow())


def test_what_a_peer_finds_damaged_is_never_sealed(vault: Vault) -> None:
    async def follow() -> None:
        filling = await begun(vault, Tasks())
        with (
            pytest.raises(module.DamagedBytes),
            vault.following("job", VERSION, 0),
        ):
            raise module.DamagedBytes("byte 7 differs")
        with pytest.raises(module.DamagedBytes, match="byte 7 differs"):
            await filling.finish(len(IMAGE))
        with pytest.raises(PeerError, match="byte 7 differs"):
            await filling.record()

    asyncio.run(follow())


@pytest.mark.parametrize("sealed_before", [False, True])
def test_a_peer_leaves_when_what_was_sealed_is_freed(vault: Vault, sealed_before: bool) -> None:
    """Nobody needs parity of it, and its memory is wanted."""

    async def follow() -> None:
        filling = await begun(vault, Tasks())
        with ExitStack() as stack:
            if not sealed_before:
                image = stack.enter_context(vault.following("job", VERSION, 0))
            digests = await filling.finish(len(IMAGE))
            holding = await vault.seal_data(filling.segment, 1, len(IMAGE), 0, digests)
            vault.enter(filling.segment)
            filling.sealed(filling.segment.record)
            if sealed_before:
                image = stack.enter_context(vault.following("job", VERSION, 0))
            image.check()
            vault.free(holding)
            with pytest.raises(PeerError, match="not needed any more"):
                image.check()
        assert filling.segment.state is State.FREE

    asyncio.run(follow())


@pytest.mark.parametrize("followed", [False, True])
def test_memory_that_followers_are_about_to_leave_is_no_shortage(
    vault: Vault, followed: bool
) -> None:
    """Parity would be given up for it."""
    short: list[str] = []
    vault.on_no_room = lambda job, _bytes: short.append(job)

    async def claim() -> None:
        filling = await begun(vault, Tasks())
        with vault.following("job", VERSION, 0) if followed else nullcontext():
            await filling.give_back(vault)
            with pytest.raises(NoRoom):
                await vault.begin_data("job", 0, Version(1, 6), 65 << 20)
        assert short == ([] if followed else ["job"])
        assert filling.segment.state is State.FREE

    asyncio.run(claim())
