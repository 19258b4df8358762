"""One kill from beginning to end: the way to the point, the way back, the comparison."""

from __future__ import annotations

import time
from dataclasses import dataclass

from snapshotd.wire.points import Action
from tests.integration.cluster import eventually
from tests.integration.crash.cases import TIER, WORLD, Case
from tests.integration.crash.paths import PATHS
from tests.integration.crash.world import Life, World
from tests.integration.ranks import alive


@dataclass(frozen=True)
class Outcome:
    """What came of a kill."""

    case: Case
    what: str
    seconds: float
    failed: bool = False


def strike(world: World, case: Case) -> Outcome:
    """Kill at the point, bring everything back, compare every byte, look for what is left.

    Raises:
        AssertionError: something was lost, wrong, mixed or left over; or nothing was struck.
    """
    began_s = time.monotonic()
    life = PATHS[case.path](world, case)
    least = max(life.least, life.most_protected()) if life is not None else -1
    if life is not None and case.role == "trainer":
        eventually("the trainer is dead", lambda: not alive(life.pids[case.victim]))
    _bring_daemon_back(world, case)
    what = ""
    if life is not None and case.goes_on:
        what = "went on, then "
        _goes_on(world, case, life, least)
        least = life.most_protected()
    if life is not None:
        life.kill()
        least = max(least, life.most_protected())
        what += _comes_back(world, case, least)
    else:
        what = _given_up(world, case)
    if world.kind == TIER:
        world.check_tier(case)
    world.drop(case)
    world.check_clean()
    return Outcome(case, what, time.monotonic() - began_s)


def _bring_daemon_back(world: World, case: Case) -> None:
    """As the service manager would: it looks at the supervisor only."""
    node = world.nodes[case.victim]
    assert node.process is not None
    if case.role == "supervisor" or (case.action is Action.BOTH and case.role == "smp"):
        assert node.process.wait(10) != 0
    elif case.point == "smp.stop.begun":
        node.process.wait(10)
    if node.process.poll() is not None:
        node.start()


def _goes_on(world: World, case: Case, life: Life, least: int) -> None:
    """The trainers that live are protected again, at a step they have trained since."""
    life.until("all ranks train", lambda: all(life.restored(r) != "waits" for r in life.ranks))
    newest = max(line.get("step", -1) for rank in life.ranks for line in life.lines(rank))
    life.until_protected(max(newest, least) + 1)
    world.check_bytes(life, case, life.least)


def _comes_back(world: World, case: Case, least: int) -> str:
    """All trainers start again; they must train and be protected, too."""
    life = world.start(case)
    life.until("all ranks restore", lambda: all(life.restored(r) != "waits" for r in range(WORLD)))
    step = life.restored(0)
    life.until_protected((step if isinstance(step, int) else -1) + 2)
    life.kill()
    came_back = world.check_bytes(life, case, least)
    if came_back is None:
        return "fresh: nothing was committed"
    return "old state" if came_back == least else "new state"


def _given_up(world: World, case: Case) -> str:
    """The kill did not bring a job back that was dropped everywhere, nor half of it."""
    world.drop(case)
    life = world.start(case)
    life.until_protected(1)
    life.kill()
    step = world.check_bytes(life, case, -1)
    assert step is None, f"a dropped job came back at step {step}"
    return "given up"
