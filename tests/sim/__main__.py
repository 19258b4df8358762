"""The long run: any range of seeds over some processes, with totals; or one case again.

`python -m tests.sim --seeds 1000 --start 0 --jobs 2 --summary totals.json`
`python -m tests.sim --replay case.txt`
`python -m tests.sim --add one.json two.json`
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .run import case_of, run
from .shrink import read, shrink, written
from .totals import Totals

PROGRESS_S = 60.0
COLLECT_EVERY = 25  # seeds: closures make cycles, and collecting as they come costs a tenth
MAX_FAILURES = 5


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 1 where a law was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--summary", type=Path, help="write the totals there too")
    parser.add_argument("--replay", type=Path, help="run a written case instead")
    parser.add_argument("--add", type=Path, nargs="+", help="add up totals of several runs")
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary on stdout")
    args = parser.parse_args(argv)
    if args.replay:
        return _replay(args.replay)
    if args.add:
        print(_added([path.read_text() for path in args.add]).to_json())
        return 0
    if args.jobs > 1:
        totals = _spread(args.seeds, args.start, args.jobs)
    else:
        totals = run_range(args.start, args.seeds, quiet=args.quiet)
    if args.summary:
        args.summary.write_text(totals.to_json() + "\n")
    if not args.quiet:
        print(totals.to_json())
    return 1 if totals.failures else 0


def run_range(start: int, seeds: int, *, quiet: bool = False) -> Totals:
    """Run seeds in turn; each failure is shrunk and printed as it is found."""
    totals, told_s, gc_was_on = Totals(), time.monotonic(), gc.isenabled()
    gc.disable()
    began_s = time.process_time()
    seed = start
    for seed in range(start, start + seeds):
        case = case_of(seed)
        outcome = run(case)
        totals.add(outcome)
        if outcome.law:
            totals.failures.append(_report(seed, outcome.law))
        if seed % COLLECT_EVERY == 0:
            gc.collect()
        if not quiet and time.monotonic() - told_s > PROGRESS_S:
            told_s = time.monotonic()
            print(f"seeds {start} to {seed}: {len(totals.failures)} failed", file=sys.stderr)
        if len(totals.failures) >= MAX_FAILURES:
            break
    totals.cpu_s = time.process_time() - began_s
    totals.ranges = [[start, seed + 1]]
    if gc_was_on:
        gc.enable()
    return totals


def _report(seed: int, law: str) -> dict[str, object]:
    small = shrink(case_of(seed), law)
    outcome = run(small)
    text = written(small, outcome)
    print(f"seed {seed} fails: {outcome.what}\n{text}", file=sys.stderr, flush=True)
    return {"seed": seed, "law": law, "what": outcome.what, "case": text}


def _replay(path: Path) -> int:
    outcome = run(read(path.read_text()))
    print(outcome.what or "no law is broken")
    return 1 if outcome.law else 0


def _added(texts: list[str]) -> Totals:
    totals = Totals()
    for text in texts:
        totals.merge(Totals.from_json(text))
    return totals


def _spread(seeds: int, start: int, jobs: int) -> Totals:
    """The range in `jobs` processes of their own."""
    bounds = [start + seeds * i // jobs for i in range(jobs + 1)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.json") for i in range(jobs)]
        processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "tests.sim", "--quiet", "--start", str(bounds[i]),
                    "--seeds", str(bounds[i + 1] - bounds[i]), "--summary", str(path),
                ]
            )
            for i, path in enumerate(paths)
        ]  # fmt: skip
        try:
            _watch(processes)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        broken = [p.returncode for p in processes if p.returncode not in {0, 1}]
        if broken:
            raise SystemExit(f"a process of the simulation ended with {broken[0]}")
        return _added([path.read_text() for path in paths])


def _watch(processes: list[subprocess.Popen[bytes]]) -> None:
    began_s = time.monotonic()
    for process in processes:
        while process.poll() is None:
            try:
                process.wait(PROGRESS_S)
            except subprocess.TimeoutExpired:
                running = sum(p.poll() is None for p in processes)
                spent_s = time.monotonic() - began_s
                print(f"{running} processes run, {spent_s:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
