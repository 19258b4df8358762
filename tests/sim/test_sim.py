"""Many seeds, many faults: the promises hold after each event, and peace returns."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from .__main__ import main, run_range
from .coding import ENDINGS
from .faults import KINDS, Fault, draw
from .run import case_of, run
from .setup import RARE
from .shrink import read, written
from .totals import Totals

SEEDS, CHUNK = 300, 50
#: Beyond those, seeds that failed once.
FAILED_ONCE = (471, 6166, 8355, 11209, 12761, 20403)
ROOT = Path(__file__).parents[2]


@cache
def totals_from(start: int) -> Totals:
    return run_range(start, CHUNK)


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_promises_hold_under_faults(start: int) -> None:
    totals = totals_from(start)
    assert not totals.failures, totals.failures[0]["what"]
    assert totals.counts["commits"] > CHUNK
    assert totals.counts["shards restored"] > 0


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_what_failed_once_holds(seed: int) -> None:
    outcome = run(case_of(seed))
    assert not outcome.law, outcome.what


def test_what_is_still_written_is_coded_meanwhile_and_that_ends_in_every_way() -> None:
    totals = Totals()
    for start in range(0, SEEDS, CHUNK):
        totals.merge(totals_from(start))
    early = {ending: totals.seen[f"coded early: {ending}"] for ending in ENDINGS}
    assert all(early.values()), early
    assert early["stored"] > SEEDS / 2, early
    assert sum(early.values()) <= totals.seen["coded early: begun"], "some die with their SMP"


def test_every_kind_of_fault_is_drawn_and_strikes() -> None:
    drawn = {f.kind for seed in range(SEEDS) for f in draw(seed, case_of(seed).setup)}
    assert drawn == {*KINDS, *RARE}


def test_a_run_is_the_same_in_any_process() -> None:
    """Neither the order of sets nor anything else outside the seed decides."""
    program = (
        "from tests.sim.run import case_of, run\n"
        "outcomes = [run(case_of(seed)) for seed in range(12)]\n"
        "print([(sorted(o.counts.items()), sorted(o.injected.items())) for o in outcomes])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": salt},
            check=True, capture_output=True, text=True,
        ).stdout
        for salt in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_a_written_case_is_the_same_run_again(tmp_path: Path) -> None:
    case = case_of(3)
    again = read(written(case, run(case)))
    assert again == case
    assert run(again).counts == run(case).counts
    path = tmp_path / "case.txt"
    path.write_text(written(replace(case, faults=()), run(case)))
    assert main(["--replay", str(path)]) == 0
    with pytest.raises(ValueError, match="not a case"):
        read("{'seed': 1}")
    rare = replace(case, faults=tuple(Fault(0.1, kind, 0.5, 0.5, 0.1) for kind in RARE))
    assert read(written(rare, run(case))) == rare


def test_totals_of_two_ranges_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    assert main(["--seeds", "2", "--start", "10", "--summary", str(paths[0])]) == 0
    assert main(["--seeds", "3", "--start", "12", "--jobs", "2", "--summary", str(paths[1])]) == 0
    capsys.readouterr()
    assert main(["--add", *map(str, paths)]) == 0
    added = json.loads(capsys.readouterr().out)
    whole = run_range(10, 5)
    assert added["counts"] == dict(whole.counts)
    assert added["injected"] == dict(whole.injected)
    assert Totals.from_json(json.dumps(added)).ranges == [[10, 12], [12, 13], [13, 15]]
