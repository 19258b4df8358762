"""`python -m tests.bench [--only NAME,...] [--mib N] [--repeats N] [--json FILE]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.bench import (
    background,
    capture,
    coding,
    daemon,
    early,
    gpu,
    growth,
    limits,
    memory,
    planes,
    protect,
    recover,
)
from tests.bench.harness import MIB, Scale, Table, report

BENCHES: Mapping[str, Callable[[Scale], Iterator[Table]]] = {
    "limits": limits.run,
    "coding": coding.run,
    "daemon": daemon.run,
    "capture": capture.run,
    "planes": planes.run,
    "protect": protect.run,
    "early": early.run,
    "recover": recover.run,
    "memory": memory.run,
    "growth": growth.run,
    "background": background.run,
    "gpu": gpu.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--mib", type=int, default=Scale().bytes // MIB, help="state, MiB")
    parser.add_argument("--repeats", type=int, default=Scale().repeats)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    scale = Scale(options.mib * MIB, options.repeats)
    report((table for name in names for table in BENCHES[name](scale)), options.json)


if __name__ == "__main__":
    main()
