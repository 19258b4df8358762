"""The link between a supervisor and an SMP leaves nothing behind when it breaks off."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from snapshotd.metadata import SlotFacts
from snapshotd.rpc import local
from snapshotd.rpc.local import Link, LocalServer, Mailbox


class Supervisor:
    def __init__(self) -> None:
        self.heard = asyncio.Event()
        self.gone = asyncio.Event()

    def linked(self, slot: int, outbox: Mailbox) -> None: ...

    def slot_changed(self, facts: SlotFacts) -> None:
        self.heard.set()

    def unlinked(self, slot: int, outbox: Mailbox) -> None:
        self.gone.set()


def waits_for_orders() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if "Mailbox.take" in str(t.get_coro())]


def test_nobody_waits_for_orders_of_an_smp_that_is_gone(shm_path: Path) -> None:
    async def part() -> None:
        supervisor = Supervisor()
        server = LocalServer(supervisor)
        await server.start(shm_path / "links.sock")
        link = Link(shm_path / "links.sock")
        link.publish(SlotFacts(0))
        running = asyncio.create_task(link.run(lambda _: None))
        await supervisor.heard.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await supervisor.gone.wait()
        await server.stop()
        assert waits_for_orders() == []

    asyncio.run(part())


def test_an_smp_that_cannot_tell_its_facts_any_more_ends(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the error that kept it from telling them."""
    unheard: list[dict[str, object]] = []

    def fail(_: str) -> None:
        raise OSError("no more")

    async def part() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
        supervisor = Supervisor()
        server = LocalServer(supervisor)
        await server.start(shm_path / "links.sock")
        link = Link(shm_path / "links.sock")
        link.publish(SlotFacts(0))
        monkeypatch.setattr(local, "point", fail)
        async with asyncio.timeout(10):
            with pytest.raises(OSError, match="no more"):
                await link.run(lambda _: None)
        await server.stop()  # it may have heard of it, or not

    asyncio.run(part())
    gc.collect()
    assert not unheard
