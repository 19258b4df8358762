"""Killed at any point, a job resumes bit for bit: a selection; `make chaos` runs all cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.crash.cases import CASES, Case, uncovered
from tests.integration.crash.paths import PATHS
from tests.integration.crash.strike import strike
from tests.integration.crash.world import World

#: One for each path and each thing that can be half done.
SELECTED = (
    "first-trainer.attach.sent-1-kill",
    "step-trainer.piece.copied-4-kill",
    "step-trainer.written.sent-1-kill",
    "close-trainer.detach.answered-1-kill",
    "first-smp.allocate.filled-1-kill",
    "step-smp.begin.headed-1-kill",
    "step-smp.seal.recorded-1-kill",
    "step-smp.seal.headed-1-both",
    "step-smp.encode.kept-1-kill",
    "step-smp.store.sealed-1-both",
    "step-smp.free.forgotten-1-kill",
    "early-trainer.copied.sent-1-kill",
    "early-smp.read.sent-1-kill",
    "early-smp.encode.coded-1-both",
    "restart-smp.stage.done-1-kill",
    "adopt-smp.adopt.verified-2-kill",
    "replace-smp.decode.block-1-both",
    "moved-smp.fetch.entered-1-kill",
    "damaged-smp.quarantine.done-1-kill",
    "away-smp.claim.denied-1-kill",
    "first-supervisor.record.half-1-kill",
    "adopt-supervisor.port.open-1-kill",
    "drop-supervisor.record.half-1-kill",
    "stop-supervisor.stop.asked-1-kill",
    "regroup-smp.fill.begun-1-kill",
    "written-tier.put.half-1-both",
    "stored-smp.load.sealed-1-both",
    "regroup_stored-trainer.fill.answered-2-kill",
)


def selected(name: str) -> Case:
    """The one case whose name begins so, of those whose trainers are told alike."""
    (case,) = [c for c in CASES if c.name.startswith(f"{name}-")][:1]
    return case


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, World]]:
    made: dict[str, World] = {}
    yield made
    for world in made.values():
        world.close()


@pytest.mark.parametrize("name", SELECTED)
def test_killed_at(worlds: dict[str, World], name: str) -> None:
    case = selected(name)
    for kind in set(worlds) - {case.kind}:
        worlds.pop(kind).close()
    if case.kind not in worlds:
        worlds[case.kind] = World(case.kind)
    strike(worlds[case.kind], case)


def test_every_point_has_a_case_and_every_case_its_own_name() -> None:
    assert not uncovered()
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.path for case in CASES} == set(PATHS)
    assert {selected(name).path for name in SELECTED} <= set(PATHS)
