"""One rank of a job in some layout: restores, trains, is protected, says what it holds.

What each rank finds it writes to a file, as JSON: digests of whole tensors by plain name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from snapshotd_client import Snapshotter
from snapshotd_client.errors import SnapshotdClientError
from tests.unit.layout_training import WIDTH, build, digests, train


def main():
    given = json.loads(sys.argv[1])
    rank, world, kind = given["rank"], given["world"], sys.argv[2]
    out = {}
    dist.init_process_group(
        "gloo", init_method=f"file://{given['store']}", rank=rank, world_size=world
    )
    width = given.get("width", WIDTH)
    model = build(kind, world, width)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    states = {"model": model, "opt": opt}
    told = {"replicas": range(world)} if kind == "tp" else {}
    if given.get("spoil") == rank:
        with torch.no_grad():
            next(model.parameters()).view(-1)[5] += 1
    try:
        snap = Snapshotter(
            states, job="job", rank=rank, world_size=world,
            local_rank=given["slot"], run_dir=given["run_dir"], **told, **given.get("options", {}),
        )  # fmt: skip
        restored = snap.restore(**given.get("restore", {}))
        out["restored"] = None
        first = 0
        if restored is not None:
            out["restored"] = {**vars(restored)}
            out["came back"] = digests(states)
            first = restored.step + 1
        out["losses"] = []
        for step in range(first, first + given["steps"]):
            out["losses"].append(train(kind, model, opt, step, world))
            snap.step(step, at=step, by=rank)
            snap.wait_protected(timeout_s=60)
        out["left"] = digests(states)
    except SnapshotdClientError as error:
        out["error"] = [type(error).__name__, str(error)]
    Path(given["out"]).write_text(json.dumps(out))
    dist.barrier()
    os._exit(0)  # as a job that is killed: nothing is closed


if __name__ == "__main__":
    main()
