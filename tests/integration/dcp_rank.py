"""One rank of a job that saves and loads by torch.distributed.checkpoint; ends by SIGKILL.

What it found it writes to a file, as JSON: digests of whole tensors by plain name.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from snapshotd_client import Refused
from snapshotd_client.dcp import SnapshotStorageReader, SnapshotStorageWriter
from tests.unit.layout_training import WIDTH, build, digests, train


class Broken(DefaultSavePlanner):
    """Of the rank that fails."""

    def resolve_data(self, write_item):
        raise Refused("no-room", "no memory of this", "Have some")


class Training:
    def __init__(self, given, kind):
        self.given, self.kind = given, kind
        self.rank, self.world = given["rank"], given["world"]
        self.model = build(kind, self.world, WIDTH)
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        place = {
            "job": "job", "rank": self.rank, "world_size": self.world,
            "local_rank": given["slot"], "run_dir": given["run_dir"], "timeout_s": 60.0,
        }  # fmt: skip
        self.reader = SnapshotStorageReader(**place)
        self.writer = SnapshotStorageWriter(**place)
        self.step = 0
        self.out = {"errors": [], "loaded": []}

    def state(self):
        model, optim = get_state_dict(self.model, self.opt)
        return {"model": model, "optim": optim, "note": {"step": self.step, "of": self.kind}}

    def train(self):
        train(self.kind, self.model, self.opt, self.step, self.world)
        self.step += 1

    def digests(self):
        return digests({"model": self.model, "opt": self.opt})

    def save(self, planner=None):
        name = f"out/step-{self.step}"
        try:
            dcp.save(self.state(), checkpoint_id=name, storage_writer=self.writer, planner=planner)
        except CheckpointException as error:
            self.out["errors"].append(str(error))

    def fail(self):
        self.save(Broken() if self.rank == 1 else None)

    def process(self):
        dcp.async_save(
            self.state(),
            checkpoint_id=f"out/step-{self.step}",
            storage_writer=self.writer,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()

    def load(self):
        self.out["newest"] = self.reader.newest_step()
        state = self.state()
        dcp.load(state, storage_reader=self.reader)
        set_state_dict(
            self.model,
            self.opt,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )
        self.step = state["note"]["step"]
        self.out["loaded"].append(self.digests())
        self.out["note"], self.out["taken"] = state["note"], vars(self.reader.taken)
        manifests = self.reader._found[1]._manifests.values()
        self.out["stored"] = sum(e.bytes for m in manifests for e in m.extents)


def main():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # for the process of async_save
    given = json.loads(sys.argv[1])
    dist.init_process_group(
        "gloo", init_method=f"file://{given['store']}", rank=given["rank"],
        world_size=given["world"],
    )  # fmt: skip
    training = Training(given, sys.argv[2])
    for what in given["acts"]:
        getattr(training, what)()
    training.out["left"] = training.digests()
    Path(given["out"]).write_text(json.dumps(training.out))
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
