"""`python -m tests.integration.soak`: see DESIGN.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.soak import sandbox


def main() -> int:
    arguments = _arguments()
    if sandbox.INSIDE in os.environ:
        return _inside(arguments, Path(os.environ[sandbox.INSIDE]))
    logs = Path(tempfile.mkdtemp(prefix="soak-"))
    passed_on = ["--minutes", str(arguments.minutes), "--seed", str(arguments.seed)]
    passed_on += ["--json", str(arguments.json.absolute())] if arguments.json else []
    try:
        code = sandbox.enter(passed_on, logs)
    except sandbox.CannotRunHere as error:
        print(f"the soak cannot run here: {error}", file=sys.stderr)
        code = 2
    if code in (0, 2):
        shutil.rmtree(logs)
    else:
        print(f"failed with seed {arguments.seed}; schedule and logs are in {logs}")
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.integration.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--json", type=Path, help="write the report there, too")
    return parser.parse_args()


def _inside(arguments: argparse.Namespace, logs: Path) -> int:
    # Here, not above: outside nothing of it is needed.
    from tests.integration.soak.ledger import Ledger
    from tests.integration.soak.run import Run, report, table

    root = logs / "root"
    root.mkdir()
    ledger = Ledger(logs / "schedule.txt")
    run = Run(arguments.seed, arguments.minutes * 60, root, logs, ledger)
    began_s = time.monotonic()
    asyncio.run(run.run())
    found = report(run, time.monotonic() - began_s)
    shutil.rmtree(root, ignore_errors=True)
    text = json.dumps(found, indent=2)
    (logs / "report.json").write_text(text + "\n")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if ledger.failures:
        print(ledger.events.read_text())
    print(table(found), flush=True)
    return 1 if ledger.failures else 0


if __name__ == "__main__":
    sys.exit(main())
