"""The long profile: all targets in turn until the time is over; what fails joins the corpus.

`python -m tests.fuzz MINUTES [TARGET...]`
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
import time
from collections import Counter

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.harness import explore, keep

EXAMPLES = 50


def main(arguments: list[str]) -> int:
    """Returns 1 when anything failed."""
    minutes, names = float(arguments[0]), arguments[1:] or list(TARGETS)
    logging.disable(logging.CRITICAL)
    began_s = time.monotonic()
    examples: Counter[str] = Counter()
    spent_s: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for name in itertools.cycle(names):
        since_s = time.monotonic()
        if since_s - began_s > 60 * minutes or len(failed) == len(names):
            break
        if name in failed:
            continue
        found = explore(TARGETS[name], EXAMPLES, secrets.randbits(64))
        examples[name] += found.examples
        spent_s[name] += time.monotonic() - since_s
        if found.error is not None:
            failed[name] = f"{keep(name, found.failing)}: {found.error!r}"[:500]
    for name in names:
        print(f"{name:12} {examples[name]:9} examples {spent_s[name] / 60:7.1f} minutes")
    print(f"{'all':12} {examples.total():9} examples {spent_s.total() / 60:7.1f} minutes")
    for name, what in failed.items():
        print(f"FAILED {name}: {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
