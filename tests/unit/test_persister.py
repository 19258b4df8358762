"""A slot's share in the persistent tier, apart from its processes: what it keeps and what not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapshotd.core.persist import RETRY_FIRST_S, Schedule
from snapshotd.core.slot import SlotMachine
from snapshotd.errors import DamagedBytes, NoRoom
from snapshotd.flow import persist
from snapshotd.flow.holdings import describe
from snapshotd.flow.persist import Persister, TierSettings
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.memory.segment import Segment
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    PersistFacts,
    Stored,
    Version,
)
from snapshotd.tier.reading import TierError

HOME = Home("n0", 0)
#: The one home of a job of one rank.
DECISION = Decision(DecisionId(1, "n0"), "job", 1, (Group((Member(0, HOME),), 0),), ("t0",))
IMAGE_BYTES = 1 << 20
OLD, NEW = Version(1, 5), Version(1, 6)
Ask = Callable[..., Awaitable[dict[str, Any]]]


class World:
    """A slot with two buffers and memory for no more."""

    def __init__(self, vault: Vault, machine: SlotMachine) -> None:
        self.vault = vault
        self.machine = machine
        settings = TierSettings("/nowhere", 0, Schedule(0.0, 1, 1, 0))
        self.persister = Persister(machine, vault, settings, 2)
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, work: Any) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]

    async def sealed(self, version: Version) -> Segment:
        segment = await self.vault.begin_data("job", 0, version, IMAGE_BYTES)
        await self.vault.seal_data(segment, 1, IMAGE_BYTES, 0)
        self.vault.enter(segment)
        self.machine.orders = Orders((JobFacts("job", 1, 1, 1, version, 1, DECISION),))
        return segment

    async def pursue(self) -> None:
        self.persister.pursue(self.start)
        await turns()

    def told(self) -> PersistFacts:
        (facts,) = self.persister.facts
        return facts


async def turns() -> None:
    """Let threads and tasks come on."""
    for _ in range(10):
        await asyncio.sleep(0.01)


@contextmanager
def opened(shm_path: Path) -> Iterator[World]:
    # Two segments, of 1/16 more than the image and some pages, and no third one.
    arena = Arena(shm_path / "slot-0", Budget(shm_path, 3 * IMAGE_BYTES))
    arena.open()
    machine = SlotMachine(HOME, 2)
    try:
        yield World(Vault(arena, machine, "cluster", 2), machine)
    finally:
        arena.close()


def run(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask, act: Callable[[World], Any]
) -> None:
    async def looked(_url: str, _job: str) -> Stored:
        return Stored()

    monkeypatch.setattr(persist, "look", looked)
    monkeypatch.setattr(persist, "ask", ask)

    async def whole(world: World) -> None:
        try:
            await act(world)
        finally:
            for task in world.tasks:
                task.cancel()
            await asyncio.gather(*world.tasks, return_exceptions=True)

    with opened(shm_path) as world:
        asyncio.run(whole(world))


async def never(_request: object, _progress: object = None) -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def test_a_write_that_only_readers_keep_gives_way_to_a_claim(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(world: World) -> None:
        old = await world.sealed(OLD)
        await world.pursue()  # looks
        await world.pursue()  # writes
        assert world.told().target == OLD
        assert old.pinned
        await world.sealed(NEW)
        # While the version is in the books its memory is nobody's to take.
        with pytest.raises(NoRoom):
            await world.vault.begin_data("job", 0, Version(1, 7), IMAGE_BYTES)
        world.vault.free(describe(old))
        granted = await world.vault.begin_data("job", 0, Version(1, 7), IMAGE_BYTES)
        assert granted is old
        assert world.told().gone == OLD
        assert "gave way to training" in world.told().error
        world.vault.give_back(granted)

    run(shm_path, monkeypatch, never, act)


def test_a_failing_store_is_asked_again_and_then_it_is_written(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def ask(request: dict[str, Any], progress: Any = None) -> dict[str, Any]:
        asked.append(request)
        if request["what"] == "publish":
            steps = [[1, 5, 1, 0, 9.0]]
            return {"steps": steps, "unfinished": [], "damaged": [], "not_removed": ""}
        if len(asked) < 3:
            raise TierError("the bucket is full") if len(asked) == 1 else DamagedBytes("it differs")
        progress(2, 2)
        return {"written": True}

    async def quick(pause_s: float) -> None:
        if pause_s >= RETRY_FIRST_S:
            pauses.append(pause_s)
        await sleep(min(pause_s, 0.01))

    monkeypatch.setattr(asyncio, "sleep", quick)

    async def act(world: World) -> None:
        await world.sealed(OLD)
        for _ in range(4):
            await world.pursue()
            await turns()
        assert [a["what"] for a in asked] == ["write", "write", "write", "publish"]
        assert pauses == [1.0, 2.0]
        assert (world.told().written, world.told().published) == (OLD, OLD)
        assert world.told().error == ""
        assert not world.vault.segment("job", OLD, 0).pinned

    run(shm_path, monkeypatch, ask, act)


def test_memory_that_is_damaged_is_quarantined_and_not_written(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(_request: object, _progress: object = None) -> dict[str, Any]:
        raise DamagedBytes("what is sent is not what was sealed")

    async def act(world: World) -> None:
        segment = await world.sealed(OLD)
        with segment.image(IMAGE_BYTES) as image:
            image[7] ^= 1
        await world.pursue()
        await world.pursue()
        await turns()
        assert world.told().gone == OLD
        assert world.vault.held() == ()
        assert world.vault.counters().quarantined == 1

    run(shm_path, monkeypatch, ask, act)
