"""snapshotd as peerbench sees it: an adapter to its `Peer`.

Its daemon is started by `peers.py`, and outlives the trainer.
"""

from __future__ import annotations

from peer import Peer

from snapshotd_client import Snapshotter


class Snapshotd(Peer):
    """One rank, one node, without parity: what survives is the trainer's death."""

    def setup(self) -> None:
        self.snap = Snapshotter(
            {"model": self.state.core, "optimizer": self.state.opt},
            job="peerbench",
            rank=self.state.rank,
            world_size=self.state.world,
            local_rank=self.state.rank,
            run_dir=self.opts["run_dir"],
        )
        self.newest = -1
        if self.opts["bench_mode"] != "restore":
            self.snap.restore(on_lost="fresh")

    def save(self, step: int) -> None:
        # The harness saves some steps twice; here every snapshot has a number of its own.
        self.newest = max(self.newest + 1, step)
        self.snap.step(self.newest, at=step)

    def before_update(self) -> None:
        for hook in self.state.opt._optimizer_step_pre_hooks.values():
            hook(self.state.opt, (), {})

    def wait_recoverable(self, step: int) -> None:
        self.snap.wait_protected()
        status = self.snap.status()
        if status.skipped:
            raise RuntimeError(f"{status.skipped} snapshots were skipped: {status.why_not}")

    def restore(self) -> int:
        restored = self.snap.restore()
        if restored is None:
            return -1
        self.state.step = restored.values["at"]
        return self.state.step

    def cleanup(self) -> None:
        self.snap.close()
