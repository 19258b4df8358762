"""Fault points: each declared one is placed once, on its side, and all are inert until armed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from snapshotd.wire import points
from snapshotd.wire.points import ARM_VARIABLE, POINTS, Action, Arming, point

ROOT = Path(__file__).parents[2]
SIDES = {"snapshotd": ("smp", "supervisor", "tier"), "client": ("trainer",)}
DECISIONS = ROOT / "snapshotd" / "core"

PASSES_TWICE = """
from snapshotd.wire.points import point
for name in ("smp.trim.begun", "smp.trim.removed", "smp.trim.removed"):
    point(name)
    print(name, flush=True)
"""


def placed(under: Path) -> list[ast.expr]:
    """The argument of every call of `point` in the sources of a side."""
    found: list[ast.expr] = []
    for path in under.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "point":
                found += node.args
    return found


@pytest.mark.parametrize("side", SIDES)
def test_every_declared_point_is_placed_once_and_every_placed_one_is_declared(side: str) -> None:
    names = Counter(ast.literal_eval(name) for name in placed(ROOT / side))
    declared = {name for name in POINTS if name.partition(".")[0] in SIDES[side]}
    assert set(names) == declared
    assert not [name for name, times in names.items() if times != 1]


def test_decisions_have_no_points() -> None:
    assert placed(DECISIONS) == []


def test_roles_are_those_of_the_sides() -> None:
    assert {name.partition(".")[0] for name in POINTS} == {r for s in SIDES.values() for r in s}


def test_nothing_watches_unless_a_test_says_so() -> None:
    assert points._watch is None
    for name in POINTS:
        point(name)


def run(arm: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PASSES_TWICE],
        env={**os.environ, ARM_VARIABLE: str(arm)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_strikes_itself_at_the_occurrence_and_removes_the_file(tmp_path: Path) -> None:
    arm = tmp_path / "arm"
    arm.write_text("smp.trim.removed 2")
    ended = run(arm)
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.splitlines() == ["smp.trim.begun", "smp.trim.removed"]
    assert not arm.exists()


def test_without_the_file_or_at_another_point_nothing_happens(tmp_path: Path) -> None:
    arm = tmp_path / "arm"
    assert run(arm).returncode == 0
    arm.write_text("smp.free.headed")
    assert run(arm).returncode == 0
    assert arm.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("smp.trim.remove", "'smp.trim.remove' is no fault point"),
        ("smp.trim.removed x", "expected POINT"),
        ("smp.trim.removed 0", "expected POINT"),
        ("smp.trim.removed 1 explode", "kill | both | stop"),
        ("smp.trim.removed 1 kill now", "expected POINT"),
        ("supervisor.drop.heard 1 both", "only an SMP or an errand"),
    ],
)
def test_nonsense_is_refused_by_name(tmp_path: Path, text: str, why: str) -> None:
    arm = tmp_path / "arm"
    arm.write_text(text)
    ended = run(arm)
    assert ended.returncode == 1
    assert why in ended.stderr


def test_an_arming_is_written_as_it_is_read() -> None:
    arming = Arming("smp.seal.headed", 3, Action.BOTH)
    assert Arming.parse(str(arming)) == arming
