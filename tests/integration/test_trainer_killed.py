"""A trainer that is SIGKILLed between any two of its actions costs at most the step it was in."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd_client import capture
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Rank, alive
from tests.integration.zygote import Point, Zygote, said

WORLD = 2
EITHER = ("before", "after")
PROTECTED = 2  # steps 0 and 1 are committed before the killing begins


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    made = Cluster()
    try:
        yield made.start(WORLD)
    finally:
        made.close()


def digests(rank: int, steps: int) -> list[str]:
    """Digest of an undisturbed rank after each step."""
    undisturbed = Rank(rank, WORLD)
    found = []
    for _ in range(steps):
        undisturbed.train()
        found.append(undisturbed.digest())
    return found


def puts_a_step() -> int:
    """Pieces that one snapshot of a rank is copied in."""
    rank = Rank(0, WORLD)
    rank.train()
    return len(capture.plan("job", 0, WORLD, 0, rank.states(), {}).manifest.extents) + 2


PUTS_A_STEP = puts_a_step()

in_step: list[Point] = [
    *((f"send:{kind}", when, PROTECTED + 1) for kind in ("claim", "written") for when in EITHER),
    ("plan", "before", 1 + PROTECTED + 1),  # the first is made to predict the size
    ("plan", "after", 1 + PROTECTED + 1),
    ("map", "after", PROTECTED + 1),
    ("write", "before", PROTECTED + 1),
    ("put", "before", PUTS_A_STEP * PROTECTED + 2),
    ("put", "after", PUTS_A_STEP * PROTECTED + PUTS_A_STEP // 2),
    ("write", "after", PROTECTED + 1),
]  # fmt: skip
at_start: list[Point] = [
    ("lock", "after", 1),
    *((f"send:{kind}", when, 1) for kind in ("find", "attach", "restore") for when in EITHER),
    ("apply", "before", 1),
    ("restore-one", "after", 1),
    ("apply", "after", 1),
]


def life(
    zygote: Zygote, nodes: list[Node], where: Path, job: str, until: int, **first: object
) -> tuple[list[int], list[Path]]:
    """One life of both ranks; `first` is for rank 0 alone."""
    where.mkdir()
    outs = [where / f"{rank}.jsonl" for rank in range(WORLD)]
    pids = [
        zygote.trainer(
            rank=rank,
            world=WORLD,
            run_dir=str(nodes[rank].run_dir),
            job=job,
            out=str(outs[rank]),
            until=until,
            linger=True,
            **(first if rank == 0 else {}),
        )
        for rank in range(WORLD)
    ]
    return pids, outs


def end(pids: list[int]) -> None:
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
        eventually("it is dead", lambda p=pid: not alive(p))


def check_resumes(zygote: Zygote, nodes: list[Node], where: Path, job: str, least: int) -> None:
    pids, outs = life(zygote, nodes, where, job, until=PROTECTED + 2)
    eventually("both ranks are through", lambda: all(_steps(o, PROTECTED + 1) for o in outs))
    end(pids)
    for rank, out in enumerate(outs):
        lines = said(out)
        assert not any("error" in line for line in lines), lines
        expected = digests(rank, PROTECTED + 2)
        assert lines[0]["restored"] >= least
        assert lines[0]["digest"] == expected[lines[0]["restored"]]
        for line in lines[1:]:
            assert line["digest"] == expected[line["step"]]
    assert len({said(out)[0]["restored"] for out in outs}) == 1


def _steps(out: Path, step: int) -> bool:
    lines = said(out)
    return any(line.get("step") == step or "error" in line for line in lines)


@pytest.mark.parametrize("point", in_step, ids=lambda p: f"{p[1]}-{p[0]}-{p[2]}")
def test_killed_in_a_step(zygote: Zygote, nodes: list[Node], tmp_path: Path, point: Point) -> None:
    job = f"step-{'-'.join(map(str, point))}"
    pids, outs = life(zygote, nodes, tmp_path / "first", job, PROTECTED + 1, point=point)
    eventually("rank 0 is dead", lambda: not alive(pids[0]))
    end(pids)
    reached = [line["step"] for line in said(outs[0]) if "step" in line]
    assert reached == list(range(PROTECTED)), "it did not die in the step it was to die in"
    check_resumes(zygote, nodes, tmp_path / "second", job, PROTECTED - 1)


@pytest.mark.parametrize("point", at_start, ids=lambda p: f"{p[1]}-{p[0]}-{p[2]}")
def test_killed_while_starting(
    zygote: Zygote, nodes: list[Node], tmp_path: Path, point: Point
) -> None:
    job = f"start-{'-'.join(map(str, point))}"
    pids, outs = life(zygote, nodes, tmp_path / "first", job, PROTECTED)
    eventually("two steps are committed", lambda: all(_steps(o, PROTECTED - 1) for o in outs))
    end(pids)
    pids, outs = life(zygote, nodes, tmp_path / "second", job, PROTECTED, point=point)
    eventually("rank 0 is dead", lambda: not alive(pids[0]))
    end(pids)
    check_resumes(zygote, nodes, tmp_path / "third", job, PROTECTED - 1)
