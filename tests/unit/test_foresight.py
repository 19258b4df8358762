"""A restore's bytes are read while the nodes decide: once, all of them, and not too long before."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snapshotd.core.slot import SlotMachine
from snapshotd.errors import DamagedBytes
from snapshotd.flow import foresight
from snapshotd.metadata import DataHolding, Home, Version

OLD, NEW = (DataHolding("job", 0, Version(1, step), 100, bytes([step]) * 16) for step in (1, 2))


class Books:
    """A vault of which each pass over a segment is noted, and may find damage."""

    def __init__(self) -> None:
        self.passes: list[Version] = []
        self.damaged = False

    @contextmanager
    def reading(self, job: str, version: Version, what: int) -> Iterator[Books]:
        self.passes.append(version)
        yield self

    def verify(self, threads: int) -> None:
        assert threads >= 1
        if self.damaged:
            raise DamagedBytes("a flipped bit")


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def ahead(books: Books) -> foresight.Foresight:
    machine = SlotMachine(Home("n0", 0), 2)
    for holding in (NEW, OLD, DataHolding("job", 1, Version(1, 9), 100, bytes(16))):
        machine.keep(holding)
    return foresight.Foresight(books, machine)


def test_the_newest_shard_is_read_once(ahead: foresight.Foresight, books: Books) -> None:
    async def restore() -> None:
        ahead.begin("job", 0)
        ahead.begin("job", 0)  # asked again while it waits
        await ahead.verify(NEW)

    asyncio.run(restore())
    assert books.passes == [NEW.version]


def test_another_choice_has_a_pass_of_its_own(ahead: foresight.Foresight, books: Books) -> None:
    async def restore() -> None:
        ahead.begin("job", 0)
        await ahead.verify(OLD)

    asyncio.run(restore())
    assert OLD.version in books.passes


def test_another_trainer_has_a_pass_of_its_own(ahead: foresight.Foresight, books: Books) -> None:
    async def restore() -> None:
        ahead.begin("job", 0)
        await asyncio.sleep(0.05)  # the pass ends
        ahead.forget()
        await ahead.verify(NEW)

    asyncio.run(restore())
    assert books.passes == [NEW.version] * 2


def test_a_pass_of_long_ago_does_not_count(
    ahead: foresight.Foresight, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "FRESH_S", 0.0)

    async def restore() -> None:
        ahead.begin("job", 0)
        await asyncio.sleep(0.05)  # the pass ends
        books.damaged = True
        await ahead.verify(NEW)

    with pytest.raises(DamagedBytes):
        asyncio.run(restore())
    assert books.passes == [NEW.version] * 2


def test_damage_found_ahead_is_met_again(ahead: foresight.Foresight, books: Books) -> None:
    books.damaged = True

    async def restore() -> None:
        ahead.begin("job", 0)
        await ahead.verify(NEW)

    with pytest.raises(DamagedBytes):
        asyncio.run(restore())
