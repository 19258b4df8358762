"""`python -m tests.integration.crash [--only SUBSTRING] [--json FILE]`: every case, one by one."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from snapshotd.wire.points import POINTS
from tests.integration.crash.cases import CASES, Case, uncovered
from tests.integration.crash.strike import Outcome, strike
from tests.integration.crash.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="crash", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains one of these words")
    parser.add_argument("--json", type=Path, help="write the outcomes there, too")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only each N-th case")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    words = arguments.only.split() or [""]
    cases = [c for c in CASES if any(word in c.name for word in words)][part - 1 :: parts]
    assert not uncovered(), f"points without a case: {uncovered()}"
    outcomes = enumerate_all(cases)
    print_table(outcomes)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return int(any(outcome.failed for outcome in outcomes) or not outcomes)


def enumerate_all(cases: Sequence[Case]) -> list[Outcome]:
    """Strike at each; the world is made anew after a failure, so that none hides another."""
    outcomes: list[Outcome] = []
    world: World | None = None
    try:
        for number, case in enumerate(sorted(cases, key=lambda c: c.kind), 1):
            if world is not None and world.kind != case.kind:
                world.close()
                world = None
            world = world or World(case.kind)
            began_s = time.monotonic()
            try:
                outcome = strike(world, case)
            except Exception as error:  # noqa: BLE001  # told in the table
                traceback.print_exc()
                for node in world.nodes:
                    print(f"---- {node.name}\n{node.tail()[-1500:]}", file=sys.stderr)
                text = f"FAILED: {error}".splitlines()[0]
                outcome = Outcome(case, text, time.monotonic() - began_s, failed=True)
                world.close()
                world = None
            outcomes.append(outcome)
            print(
                f"{number}/{len(cases)} {case.name}: {outcome.what} ({outcome.seconds:.1f} s)",
                flush=True,
            )
    finally:
        if world is not None:
            world.close()
    return outcomes


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Point | role | kills | outcomes; then the sums by role."""
    print(f"\n{'point':32} | {'role':10} | kills | outcomes")
    for name in POINTS:
        mine = [o for o in outcomes if o.case.point == name]
        if mine:
            counts = Counter(o.what for o in mine)
            told = ", ".join(f"{n} x {what}" for what, n in counts.items())
            print(f"{name:32} | {mine[0].case.role:10} | {len(mine):5} | {told}")
    for role in ("trainer", "smp", "supervisor", "tier"):
        mine = [o for o in outcomes if o.case.role == role]
        points = {o.case.point for o in mine}
        failed = sum(o.failed for o in mine)
        print(f"{role}: {len(points)} points, {len(mine)} kills, {failed} failed")
    took_s = sum(o.seconds for o in outcomes)
    print(f"all: {len({o.case.point for o in outcomes})} points of {len(POINTS)}, "
          f"{len(outcomes)} kills in {took_s:.0f} s")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
