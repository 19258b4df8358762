"""Jobs of real ranks in some layout, each a process, in a process group of gloo."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("layout_rank.py")
DCP_RANK = Path(__file__).with_name("dcp_rank.py")
_runs = itertools.count()


def run(
    nodes: list[Any], world: int, kind: str, scratch: Path, program: Path = RANK, **given: Any
) -> list[dict]:
    """Start rank r on node r of `nodes`, in turn, to its end; what each wrote."""
    number = next(_runs)
    slots: dict[str, int] = {}
    ranks, outs = [], []
    for rank in range(world):
        node = nodes[rank % len(nodes)]
        slot = slots[node.name] = slots.get(node.name, -1) + 1
        outs.append(scratch / f"{number}-{rank}.json")
        told = {
            "rank": rank, "world": world, "store": str(scratch / f"{number}.store"),
            "run_dir": str(node.run_dir), "slot": slot, "out": str(outs[-1]), **given,
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", program, json.dumps(told), kind],
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(out.exists() for out in outs), "\n".join(texts)
    return [json.loads(out.read_text()) for out in outs]
