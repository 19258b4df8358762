"""One rank of the test of layouts: comes back from images in files, trains, leaves its own there.

The files take the daemons' place: what they are asked for is read from them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from snapshotd.wire.v1 import node_pb2
from snapshotd.wire.v1 import trainer_pb2 as pb
from snapshotd_client.accord import Accord
from snapshotd_client.capture import Planner
from snapshotd_client.errors import StateMismatch
from snapshotd_client.identity import Identity
from snapshotd_client.restoring import WayBack
from snapshotd_client.waiting import Deadline
from tests.unit.layout_training import build, digests, train
from tests.unit.ranks import leave


class Files:
    """Answers like a daemon, from the images of a folder."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._images = {
            int(file.stem): file.read_bytes() for file in sorted(folder.glob("*.image"))
        }
        self._lengths = json.loads((folder / "0.json").read_text())
        self._scratch = scratch
        self.asked = 0

    def __call__(self, message: pb.ToDaemon) -> pb.ToTrainer:
        if message.WhichOneof("body") == "query":
            return pb.ToTrainer(progress=pb.Progress())
        self.asked += 1
        path = self._scratch.with_suffix(f".{self.asked}")
        if message.WhichOneof("body") == "manifests":
            pieces, whole = [], b""
            for shard, image in self._images.items():
                length = self._lengths[shard]
                pieces.append(
                    pb.ManifestsGathered.Piece(
                        shard=shard, offset=len(whole), bytes=length, image_bytes=len(image)
                    )
                )
                whole += image[:length]
            path.write_bytes(whole)
            gathered = pb.ManifestsGathered(path=str(path), pieces=pieces)
            return pb.ToTrainer(manifests_gathered=gathered)
        fill = message.fill
        made = bytearray(64 + fill.image_bytes)
        for shard, offset, length, to in zip(
            fill.shards, fill.offsets, fill.lengths, fill.to, strict=True
        ):
            made[64 + to : 64 + to + length] = self._images[shard][offset : offset + length]
        path.write_bytes(made)
        received = sum(fill.lengths)
        filled = pb.Filled(path=str(path), image_offset=64, bytes_received=received)
        return pb.ToTrainer(filled=filled)


class Alone(Accord):
    """Agrees with nobody."""

    def divides(self, step, shared):
        return False


def main(
    rank: int, world: int, kind: str, store: str, old: str, new: str, alone: str = "-1"
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    who = Identity("job", "job", 0, rank, world, rank, Path())
    model = build(kind, world, 40)
    states = {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.01)}
    told = range(world) if kind == "tp" else None
    out, step = {"losses": []}, 0
    if old != "-":
        folder = Path(old)
        files = Files(folder, Path(new) / f"{rank}.answer")
        saved = json.loads((folder / "0.json").read_text())
        reply = pb.Restored(decision=node_pb2.Decision(saved_world=len(saved), tier=2))
        reply.decision.restore.step = 1
        if len(saved) == world:
            reply.path = str(folder / f"{rank}.image")
            reply.image_bytes, reply.manifest_bytes = Path(reply.path).stat().st_size, saved[rank]
        try:
            way = WayBack(
                who,
                states,
                files,
                strict=True,
                deadline=Deadline(60.0),
                spent=lambda image: image.close(),
            )
            restored = way.take(reply)
        except StateMismatch as error:
            out["error"] = str(error)
        else:
            out["came back"] = digests(states)
            out["restored"] = {**vars(restored)}
            out["asked"] = files.asked
            step = 2
    if "error" not in out:
        for _ in range(2):
            out["losses"].append(train(kind, model, states["opt"], step, world))
            step += 1
        accord = Alone(who) if alone == str(rank) else None if alone >= "0" else Accord(who)
        plan = Planner("job", rank, world, states, told, accord).plan(step - 1, {"by": rank})
        image = bytearray(plan.image_bytes)
        plan.write(memoryview(image))
        (Path(new) / f"{rank}.image").write_bytes(image)
        out["left"] = digests(states)
        lengths: list[int | None] = [None] * world
        dist.all_gather_object(lengths, plan.manifest_bytes)
        (Path(new) / f"{rank}.json").write_text(json.dumps(lengths))
    (Path(new) / f"{rank}.out").write_text(json.dumps(out))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:8])
