"""The log of peers that cannot be reached: once when it begins, once when it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from snapshotd.core.instructions import Rebuild
from snapshotd.core.slot import SlotMachine
from snapshotd.flow.conduct import Conduct
from snapshotd.flow.reach import Reach
from snapshotd.flow.smp import Smp
from snapshotd.metadata import Home, Orders, SlotFacts, Version


class Said(logging.Handler):
    """Level and text of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def said() -> Iterator[list[tuple[str, str]]]:
    logger, handler = logging.getLogger("test.reach"), Said()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture
def reach() -> Reach:
    return Reach(logging.getLogger("test.reach"), patience_s=8.0)


def test_a_peer_that_is_only_starting_is_no_warning(
    reach: Reach, said: list[tuple[str, str]]
) -> None:
    for now_s in (0.0, 1.0, 7.9):
        reach.failed("n1", "refused", now_s)
    reach.reached("n1", 8.0)
    assert said == [
        ("INFO", "n1: not up yet, or not to be reached"),
        ("INFO", "n1: is there, after 8.0 s"),
    ]


def test_one_that_never_comes_is_one(reach: Reach, said: list[tuple[str, str]]) -> None:
    for now_s in (0.0, 8.0, 9.0, 99.0):
        reach.failed("n1", "refused", now_s)
    assert said[1:] == [
        ("WARNING", "n1: not reached for 8 s since this daemon started: refused"),
    ]


def test_an_outage_is_told_once_whatever_is_said_of_it(
    reach: Reach, said: list[tuple[str, str]]
) -> None:
    reach.reached("n1", 0.0)
    reach.failed("n1", "reset by peer", 5.0)
    reach.failed("n1", "refused", 6.0)
    reach.reached("n1", 25.5)
    reach.reached("n1", 26.0)
    reach.failed("n1", "refused", 30.0)
    assert said == [
        ("WARNING", "n1: not to be reached: reset by peer"),
        ("INFO", "n1: is back, after 20.5 s"),
        ("WARNING", "n1: not to be reached: refused"),
    ]


def test_who_leaves_says_nothing_more(reach: Reach, said: list[tuple[str, str]]) -> None:
    reach.reached("n1", 0.0)
    reach.leave()
    reach.failed("n1", "refused", 1.0)
    assert said == []


def test_a_forgotten_peer_is_met_anew(reach: Reach, said: list[tuple[str, str]]) -> None:
    reach.reached("n1", 0.0)
    reach.forget("n1")
    reach.failed("n1", "refused", 1.0)
    assert said == [("INFO", "n1: not up yet, or not to be reached")]


def test_a_shard_that_is_not_rebuilt_yet_is_told_once_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "snapshotd.flow.smp")
    here, other = Home("a", 0), Home("a", 1)
    smp = Smp(
        SlotMachine(here, 2), cast("Any", SimpleNamespace()), *[cast("Any", None)] * 5, Conduct()
    )
    task = Rebuild("job", 1, Version(1, 5))
    for facts, reason in [
        (SlotFacts(1), "no copy"),
        (SlotFacts(1), "no parity"),
        (SlotFacts(1, "h:1"), "no parity"),
        (SlotFacts(1, "h:1"), "no parity"),
    ]:
        smp.machine.orders = Orders(peers={other: facts})
        smp._note_not_rebuilt(task, reason)
    what = "shard 1 of job 'job' at step 5 (epoch 1): not rebuilt yet"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"{what}: a/1 still starting"),
        ("WARNING", f"{what}: no parity"),
    ]
