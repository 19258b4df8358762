"""Digests of a buffer that is being written: of all grains, in order, none behind its back."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd.coding.digest import grain_digests
from snapshotd.core.slot import SlotMachine
from snapshotd.flow import filling as module
from snapshotd.flow.filling import Filling
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.states import State
from snapshotd.metadata import Home, Version
from snapshotd.wire.protocol import MAX_GRAIN_BYTES, grain_bytes

IMAGE = os.urandom(2_000_003)
GRAIN = grain_bytes(len(IMAGE))


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


async def begun(vault: Vault, tasks: Tasks) -> Filling:
    segment = await vault.begin_data("job", 0, Version(1, 5), len(IMAGE))
    with segment.image(len(IMAGE)) as image:
        image[:] = IMAGE
    return Filling(segment, 5, len(IMAGE), tasks.start)


def test_a_stride_ends_with_a_grain() -> None:
    assert module.STRIDE_BYTES % MAX_GRAIN_BYTES == 0


@pytest.mark.parametrize(
    "stands", [[], [0], [1], [GRAIN - 1, GRAIN, GRAIN + 1], [len(IMAGE)], [3 * GRAIN, GRAIN]]
)
def test_the_digests_are_those_of_one_pass(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, stands: list[int]
) -> None:
    monkeypatch.setattr(module, "STRIDE_BYTES", 2 * GRAIN)

    async def fill() -> bytes | None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        for count in stands:
            filling.stands(count)
        await tasks.ended()
        assert len(filling._digests) // 16 == max(stands, default=0) // GRAIN + (
            len(IMAGE) in stands
        )
        return await filling.digests(len(IMAGE))

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
        return await filling.digests(len(IMAGE))

    assert asyncio.run(fill()) == grain_digests(memoryview(IMAGE))


def test_another_length_than_was_claimed_has_other_grains(vault: Vault) -> None:
    async def fill() -> bytes | None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(GRAIN)
        found = await filling.digests(len(IMAGE) // 3)
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
            await filling.digests(len(IMAGE))

    asyncio.run(fill())


def test_bytes_that_change_after_they_were_said_to_stand_are_damage(vault: Vault) -> None:
    async def fill() -> None:
        tasks = Tasks()
        filling = await begun(vault, tasks)
        filling.stands(GRAIN)
        await tasks.ended()
        with filling.segment.image(1) as image:
            image[0] ^= 1
        digests = await filling.digests(len(IMAGE))
        await vault.seal_data(filling.segment, 1, len(IMAGE), 0, digests)
        with pytest.raises(module.DamagedBytes):
            filling.segment.verify()

    asyncio.run(fill())
