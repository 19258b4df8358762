"""The loop of an SMP, apart from its processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from snapshotd.core.slot import SlotMachine
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.smp import Smp
from snapshotd.flow.vault import Vault
from snapshotd.memory.arena import Arena
from snapshotd.memory.budget import Budget
from snapshotd.metadata import (
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    Orders,
    SlotFacts,
    TrainerFacts,
    Version,
)


class _Link:
    def publish(self, facts: SlotFacts) -> None:
        """Nobody listens."""


@pytest.mark.parametrize("turns", range(5))
def test_it_ends_when_told_to_at_the_moment_it_is_woken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that meets what it waits for."""
    monkeypatch.setattr(SlotMachine, "next_wake_s", lambda _: time.monotonic() + 3600)

    async def check() -> None:
        machine = SlotMachine(Home("n0", 0), 2)
        arena = Arena(tmp_path / "slot-0", Budget(tmp_path, 1 << 20))
        nobody: Any = None
        link: Any = _Link()
        vault = Vault(arena, machine, "test", 2)
        smp = Smp(machine, vault, nobody, nobody, link, tmp_path / "lock", nobody, Conduct())
        running = asyncio.create_task(smp.run())
        for _ in range(5):
            await asyncio.sleep(0)
        smp.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        arena.close()

    asyncio.run(check())


def test_a_trainer_that_goes_as_its_restore_begins_takes_nothing_with_it(shm_path: Path) -> None:
    home = Home("n0", 0)
    decision = Decision(
        DecisionId(2, "n0"), "job", 1, (Group((Member(0, home),), 0),), ("t0",), Version(1, 5)
    )
    trainer = TrainerFacts("job", "run", 0, "t0", 0, 1)

    async def check() -> None:
        machine = SlotMachine(home, 2)
        arena = Arena(shm_path / "slot-0", Budget(shm_path, 1 << 20))
        arena.open()
        nobody: Any = None
        link: Any = _Link()
        vault = Vault(arena, machine, "test", 2)
        smp = Smp(machine, vault, nobody, nobody, link, shm_path / "lock", nobody, Conduct())
        machine.attach(trainer)
        machine.ask_restore(allow_fresh=False)
        job = JobFacts("job", 1, 2, 1, Version(1, 5), 1, pending=decision)
        machine.orders = Orders((job,), {home: SlotFacts(0, "h:1")})
        running = asyncio.create_task(smp.run())
        await asyncio.sleep(0)
        assert machine.trainer is not None
        assert machine.trainer.decision == decision.id, "its shard is about to be brought here"
        smp.forget_trainer()
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await smp.stop()
        arena.close()

    asyncio.run(check())
