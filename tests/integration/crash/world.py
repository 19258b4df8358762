"""The running cluster that many kills share, and the lives of the trainers of one job on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import torch

from snapshotd.errors import DamagedBytes, NoRoom, PeerError
from snapshotd.memory.segment import Segment
from snapshotd.rpc.operator import drop
from snapshotd.tier.store import Store
from snapshotd.wire.points import ARM_VARIABLE
from tests.integration.cluster import TIMEOUTS, Cluster, Node, eventually
from tests.integration.crash.cases import GRPC, MEMORY, TIER, WORLD, Case
from tests.integration.ranks import Rank, alive, segment_files
from tests.integration.zygote import Zygote, said, write_arm

#: Committed in the first life of a job, before anything is armed: steps 0 and 1.
COMMITTED = 2
PATIENCE_S = 120.0

#: What may lie in the run directory of a daemon that serves.
_RUN_FILES = {"lock", "address", "trainers.sock", "links.sock", "slot-0.sock", "trainer-0.lock"}


class Reference:
    """Digests of ranks that were never disturbed, after each step, computed when asked for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._ranks = [Rank(rank, WORLD) for rank in range(WORLD)]
        self._digests: list[list[str]] = [[] for _ in range(WORLD)]
        self._first = [rank.digest() for rank in self._ranks]

    def after(self, rank: int, step: int | None) -> str:
        if step is None:
            return self._first[rank]
        while len(self._digests[rank]) <= step:
            self._ranks[rank].train()
            self._digests[rank].append(self._ranks[rank].digest())
        return self._digests[rank][step]


class Life:
    """All trainers of a job from one start to the next."""

    def __init__(self, pids: list[int], outs: list[Path]) -> None:
        self.pids = pids
        self.ranks = range(len(pids))
        self.least = -1  # it is known to go back to this step or a newer one
        self._outs = outs

    def lines(self, rank: int) -> list[dict[str, Any]]:
        return said(self._outs[rank])

    def errors(self) -> list[str]:
        return [
            f"rank {rank}: {line['error']}"
            for rank in self.ranks
            for line in self.lines(rank)
            if "error" in line
        ]

    def restored(self, rank: int) -> int | str | None:
        """The step it came back to; "waits" while there is no answer."""
        found = [line["restored"] for line in self.lines(rank) if "restored" in line]
        return found[0] if found else "waits"

    def protected(self, rank: int) -> int:
        """The newest step it was told is committed; -1 for none."""
        return max((n for line in self.lines(rank) if (n := line.get("protected", -1)) >= 0),
                   default=-1)  # fmt: skip

    def most_protected(self) -> int:
        return max(self.protected(rank) for rank in self.ranks)

    def armed(self) -> bool:
        """Whether a rank has armed the point, as it was told to."""
        return any("armed" in line for rank in self.ranks for line in self.lines(rank))

    def until(self, what: str, condition: Any) -> None:
        """Wait for a condition; an error of any trainer ends the wait."""

        def done() -> bool:
            errors = self.errors()
            assert not errors, errors
            return bool(condition())

        eventually(what, done, PATIENCE_S)

    def until_protected(self, step: int) -> None:
        self.until(
            f"all ranks are protected at step {step}: "
            f"{[self.lines(rank)[-2:] for rank in self.ranks]}",
            lambda: all(self.protected(rank) >= step for rank in self.ranks),
        )

    def kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            eventually(f"trainer {pid} is dead", lambda p=pid: not alive(p))


class World:
    """Four daemons with two parity blocks a stripe, and trainers to be started on them."""

    def __init__(self, kind: str = MEMORY) -> None:
        self.kind = kind
        self.where = Path(tempfile.mkdtemp(prefix="sd-crash-"))
        self.tier = self.where / "tier"
        self.tier.mkdir()
        persist = {"url": str(self.tier), "interval_s": 0, "every_steps": 1, "keep_last": 1}
        self.cluster = Cluster(
            parity=2,
            group_size=WORLD,
            persist=persist if kind == TIER else None,
            plane="grpc" if kind == GRPC else "",
        )
        # What happens is told at once; heartbeats of eight processes would cost half a core.
        self.cluster.timeouts = {**TIMEOUTS, "heartbeat_s": 0.8}
        self.nodes = [self.cluster.node(f"n{i}") for i in range(WORLD)]
        for node in self.nodes:
            node.environ = {ARM_VARIABLE: str(self.arm_file(node))}
            node.start()
        self.cluster.met()
        self.zygote = Zygote()
        self.reference = Reference()
        self._lives: list[Life] = []

    def close(self) -> None:
        """End all processes and remove all files, whatever state a failure has left."""
        with contextlib.ExitStack() as last:
            last.callback(shutil.rmtree, self.where, ignore_errors=True)
            last.callback(self.cluster.close)
            last.callback(self.zygote.close)
            for life in self._lives[-2:]:
                life.kill()

    def arm_file(self, node: Node) -> Path:
        return node.root / "arm"

    def trainer_arm(self, case: Case) -> Path:
        return self.where / f"arm-{case.name}"

    def armed(self, case: Case) -> Path:
        """The arm file of a case."""
        if case.role == "trainer":
            return self.trainer_arm(case)
        return self.arm_file(self.nodes[case.victim])

    def arm(self, case: Case) -> None:
        write_arm(self.armed(case), f"{case.point} {case.occurrence} {case.action}")

    def start(
        self,
        case: Case,
        homes: Sequence[int] = range(WORLD),
        *,
        until: int | None = None,
        watches: bool = False,
        arms_at: int | None = None,
        close: bool = False,
    ) -> Life:
        """Start all ranks of the case's job, rank r on node homes[r]."""
        outs = [self.where / f"{len(self._lives)}-{rank}.jsonl" for rank in range(len(homes))]
        pids = []
        for rank in range(len(homes)):
            mine: dict[str, object] = {}
            if watches and rank == case.victim:
                mine["watches"] = str(self.trainer_arm(case))
            if arms_at is not None and rank == case.victim:
                text = f"{case.point} {case.occurrence} {case.action}"
                mine["arms"] = [arms_at, str(self.armed(case)), text]
            pids.append(
                self.zygote.trainer(
                    rank=rank,
                    world=len(homes),
                    alike=case.alike,
                    early=case.early,
                    run_dir=str(self.nodes[homes[rank]].run_dir),
                    job=case.name,
                    out=str(outs[rank]),
                    until=until,
                    close=close,
                    **mine,
                )
            )
        self._lives.append(Life(pids, outs))
        return self._lives[-1]

    def committed(self, case: Case, *, keep: bool = False) -> Life:
        """A life in which steps 0 and 1 were committed, ended unless it is to be kept."""
        life = self.start(case, until=COMMITTED)
        life.until_protected(COMMITTED - 1)
        if not keep:
            life.kill()
        return life

    def check_bytes(self, life: Life, case: Case, least: int) -> int | None:
        """All ranks came back to one step, `least` or newer, and hold its very bytes, ever since.

        Returns:
            The step they came back to; None for a fresh start.
        """
        errors = life.errors()
        assert not errors, errors
        steps = {life.restored(rank) for rank in life.ranks}
        assert len(steps) == 1, f"a mix: ranks came back to {steps}"
        (step,) = steps
        assert step is None or isinstance(step, int), step
        assert (-1 if step is None else step) >= least, f"back to {step}, {least} was committed"
        for rank in life.ranks:
            for line in life.lines(rank):
                if "digest" not in line:
                    continue
                at = line.get("step", step)
                assert line["digest"] == self.reference.after(0 if case.alike else rank, at), (
                    f"rank {rank} differs from the reference at step {at}"
                )
        return step

    def stored(self, case: Case) -> list[int]:
        """Steps of the case's job that count in the persistent tier, oldest first."""
        found = sorted(self.tier.glob(f"{quote(case.name, safe='')}/steps/*.json"))
        return [int(path.stem.partition("-")[2]) for path in found]

    def lose_all(self) -> None:
        """All nodes lose their memory, and are started again."""
        for node in self.nodes:
            node.lose()
            node.run_dir.mkdir()
        for node in self.nodes:
            node.start()
        self.cluster.met()

    def check_tier(self, case: Case) -> None:
        """Each step that counts is whole there, whatever was killed; and there is one."""
        store = Store(str(self.tier), case.name)

        def whole() -> bool:
            steps = store.look().steps
            try:
                for step in steps:
                    for record in store.indexed_seals(step.version, range(step.world)):
                        for chunk in store.read(step.version, record):
                            chunk.release()
            except DamagedBytes:
                # Deleted while it was read, or never whole.
                assert store.look().steps != steps
                return False
            return bool(steps)

        eventually("a step is whole in the tier", whole, PATIENCE_S)

    def drop(self, case: Case) -> None:
        """Give the job up on all nodes."""

        def dropped() -> bool:
            try:
                drop(self.nodes[0].address, case.name, 5.0)
            except PeerError as error:
                return "no live node knows" in str(error)
            return True

        eventually("the job is dropped", dropped, PATIENCE_S)

    def drop_at(self, node: Node, case: Case) -> None:
        """Ask one node to give the job up; it may die over it."""

        def asked() -> bool:
            try:
                drop(node.address, case.name, 5.0)
            except PeerError as error:
                return "has trainers" not in str(error)
            return True

        eventually("the drop is asked for", asked, PATIENCE_S)

    def kill_smp(self, node: Node) -> None:
        (pid,) = node.smp_pids()
        os.kill(pid, signal.SIGKILL)

    def check_clean(self) -> None:
        """Nothing is left of a job that was dropped: no bytes, no process, no half-made file."""
        for node in self.nodes:
            eventually(f"{node.name} has one SMP", lambda n=node: len(n.smp_pids()) == 1)
            eventually("no errand is left", lambda n=node: not errands(n), 20.0)
            eventually(
                f"nothing is left on {node.name}:\n{left_over(node)}",
                lambda n=node: not left_over(n),
                20.0,
            )
        self.cluster.met()


def errands(node: Node) -> list[int]:
    """Programs that speak to the persistent tier for a node, or were left behind by it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get(ARM_VARIABLE) == node.environ[ARM_VARIABLE]
            if mine and "snapshotd.tier.program" in process.cmdline():
                found.append(process.pid)
    return found


def left_over(node: Node) -> list[str]:
    """Files of a node that nobody needs once its jobs are dropped."""
    found = []
    for path in segment_files(node):
        try:
            segment = Segment.open(path)
        except (NoRoom, FileNotFoundError):  # it was given back just now
            continue
        if segment.state.name != "FREE":
            found.append(f"{path.name} is {segment.state.name} with {segment.header.job}")
        segment.close()
    files = {p.name for p in node.shm_dir.rglob("*") if p.is_file()}
    found += [name for name in files if not name.endswith((".seg", "lock"))]
    run = {p.name for p in node.run_dir.iterdir()} - _RUN_FILES
    found += [name for name in run if not name.endswith((".job", ".point"))]
    assert node.process is not None
    children = psutil.Process(node.process.pid).children()
    if len(children) != 1:
        found.append(f"{len(children)} child processes")
    return found
