"""The ways on which points are struck: each makes something happen and leaves a job to go on.

A path returns the life that was running when the point was struck, or None where no trainer ran.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence

from snapshotd.memory.segment import Segment
from snapshotd.wire.protocol import HEADER_BYTES
from tests.integration.cluster import Node, eventually
from tests.integration.crash.cases import REGROUPED, WORLD, Case
from tests.integration.crash.world import COMMITTED, Life, World
from tests.integration.ranks import segment_files

STRUCK_S = 60.0


def struck(world: World, case: Case) -> None:
    """Wait until the point was reached: a point that is never reached proves nothing."""
    file = world.armed(case)
    eventually(f"{case.point} was struck", lambda: not file.exists(), STRUCK_S)


def _struck_in(world: World, case: Case, life: Life) -> Life:
    file = world.armed(case)
    life.until(f"{case.point} was struck", lambda: not file.exists())
    return life


def first(world: World, case: Case) -> Life:
    """A job's first start: nothing is committed yet."""
    if case.point == "smp.start.begun":
        world.nodes[case.victim].kill()
        world.nodes[case.victim].start()
    world.arm(case)
    return _struck_in(world, case, world.start(case, watches=True))


def step(world: World, case: Case) -> Life:
    """A step while the job trains."""
    life = world.start(case, watches=True, arms_at=COMMITTED)
    life.until("it is armed", life.armed)
    return _struck_in(world, case, life)


def early(world: World, case: Case) -> Life:
    """A step that is read, and coded, while the trainers still write it."""
    return step(world, case)


def restart(world: World, case: Case) -> Life:
    """All trainers start again."""
    world.committed(case)
    world.arm(case)
    return _struck_in(world, case, world.start(case, watches=True))


def forget(world: World, case: Case) -> Life:
    """The trainers are killed."""
    life = world.committed(case, keep=True)
    world.arm(case)
    life.kill()
    struck(world, case)
    return life


def adopt(world: World, case: Case) -> Life:
    """A daemon starts with the memory of its predecessor; trainers wait meanwhile."""
    world.committed(case)
    node = world.nodes[case.victim]
    node.kill()
    world.arm(case)
    node.launch()  # it may die while it starts
    return _struck_in(world, case, world.start(case, watches=True))


def replace(world: World, case: Case) -> Life:
    """A node is lost and comes back empty."""
    return _after_loss(world, case, world.nodes[case.victim])


def survive(world: World, case: Case) -> Life:
    """Another node is lost and comes back empty."""
    return _after_loss(world, case, world.nodes[(case.victim + 1) % WORLD])


def _after_loss(world: World, case: Case, lost: Node) -> Life:
    world.committed(case)
    lost.lose()
    lost.start()
    world.arm(case)
    return _struck_in(world, case, world.start(case, watches=True))


def moved(world: World, case: Case) -> Life:
    """All trainers start again, each on another node."""
    world.committed(case)
    world.arm(case)
    turned = [(rank + 1) % WORLD for rank in range(WORLD)]
    return _struck_in(world, case, world.start(case, turned, watches=True))


def damaged(world: World, case: Case) -> Life:
    """A shard has rotted when the trainers start again."""
    world.committed(case)
    _flip(world.nodes[case.victim], case.name)
    world.arm(case)
    return _struck_in(world, case, world.start(case, watches=True))


def rebuild(world: World, case: Case) -> Life:
    """A shard rots while the trainers do nothing; they train on once it is struck."""
    life = world.committed(case, keep=True)
    _flip(world.nodes[case.victim], case.name)
    world.arm(case)
    struck(world, case)
    life.kill()
    return world.start(case)


def away(world: World, case: Case) -> Life:
    """Another node's daemon is away while the job trains: steps are skipped."""
    other = world.nodes[(case.victim + 1) % WORLD]
    life = world.start(case, watches=True)
    life.until_protected(COMMITTED - 1)
    world.arm(case)
    other.kill()
    try:
        struck(world, case)
    finally:
        other.start()
    return life


def close(world: World, case: Case) -> Life:
    """The trainers leave."""
    life = world.start(case, watches=True, until=COMMITTED, close=True, arms_at=COMMITTED - 1)
    life.until("it is armed", life.armed)
    return _struck_in(world, case, life)


def drop(world: World, case: Case) -> None:
    """The operator gives the job up."""
    world.committed(case)
    world.arm(case)
    world.drop_at(world.nodes[case.victim], case)
    struck(world, case)


def stop(world: World, case: Case) -> Life:
    """The daemon is stopped while the trainers wait for their steps' protection."""
    life = world.start(case)
    life.until_protected(COMMITTED - 1)
    world.arm(case)
    process = world.nodes[case.victim].process
    assert process is not None
    process.terminate()
    return _struck_in(world, case, life)


def orphan(world: World, case: Case) -> Life:
    """An SMP dies, and its supervisor while it deals with that."""
    life = world.start(case)
    life.until_protected(COMMITTED - 1)
    world.arm(case)
    world.kill_smp(world.nodes[case.victim])
    return _struck_in(world, case, life)


def regroup(world: World, case: Case) -> Life:
    """Three ranks, each on another node than before, take up what four saved."""
    world.committed(case)
    world.arm(case)
    return _struck_in(world, case, world.start(case, REGROUPED, watches=True))


def regroup_grpc(world: World, case: Case) -> Life:
    """The same, where blocks go over gRPC."""
    return regroup(world, case)


def written(world: World, case: Case) -> Life:
    """A step is written to the persistent tier while the job trains."""
    life = world.start(case, watches=True, arms_at=COMMITTED)
    life.until("it is armed", life.armed)
    return _struck_in(world, case, life)


def stored(world: World, case: Case) -> Life:
    """All memory is lost; the job comes back out of the persistent tier."""
    return _after_all_is_lost(world, case, range(WORLD))


def regroup_stored(world: World, case: Case) -> Life:
    """The same, and three ranks take up what four saved."""
    return _after_all_is_lost(world, case, REGROUPED)


def _after_all_is_lost(world: World, case: Case, homes: Sequence[int]) -> Life:
    before = world.committed(case, keep=True)
    before.until("it is in the tier", lambda: world.stored(case)[-1:] == [COMMITTED - 1])
    before.kill()
    world.lose_all()
    world.arm(case)
    life = world.start(case, homes, watches=True)
    life.least = COMMITTED - 1
    return _struck_in(world, case, life)


def _flip(node: Node, job: str) -> None:
    """One bit of the newest sealed shard of a job on a node."""
    sealed = []
    for path in segment_files(node):
        segment = Segment.open(path)
        header = segment.header
        if segment.state.name == "SEALED" and header.job == job and path.name.startswith("data"):
            sealed.append((segment.version, path))
        segment.close()
    path = max(sealed)[1]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[HEADER_BYTES + 5000] ^= 0x10


PATHS: Mapping[str, Callable[[World, Case], Life | None]] = {
    path.__name__: path
    for path in (
        first, step, early, restart, forget, adopt, replace, survive, moved, damaged, rebuild, away,
        close, drop, stop, orphan, regroup, regroup_grpc, written, stored, regroup_stored,
    )
}  # fmt: skip
