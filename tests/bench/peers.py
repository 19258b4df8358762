"""`python -m tests.bench.peers PEERBENCH [arguments]`: snapshotd beside the peers, by peerbench.

For each peer alike, the thread that trains has the first core, and everything else the others.
Peers whose virtual environment is not there are left out, but for those that need torch only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tests.integration.cluster import Cluster

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OURS = "snapshotd"
#: Threads that a trainer starts are moved to the other cores this soon.
LOOK_S = 0.05


def main() -> None:
    peerbench = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="peerbench-snapshotd-") as place:
        directory = Path(place)
        for file in peerbench.glob("*.py"):
            name = "plain_trainer.py" if file.name == "trainer.py" else file.name
            (directory / name).symlink_to(file)
        shutil.copy(HERE / "peer_trainer.py", directory / "trainer.py")
        shutil.copy(HERE / "peer_snapshotd.py", directory)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(directory), str(ROOT), str(ROOT / "client")]
        )
        run = _load(directory)
        _extend(run, directory)
        sys.argv = ["run.py", *sys.argv[2:]]
        with _apart():
            run.main()


def _load(directory: Path) -> ModuleType:
    sys.path.insert(0, str(directory))
    spec = importlib.util.spec_from_file_location("peerbench_run", directory / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _extend(run: Any, directory: Path) -> None:
    """Add our adapter, its daemon, and what it must know."""
    run.HERE = directory
    run.VENVS[OURS] = sys.executable
    peers = {OURS: ("peer_snapshotd:Snapshotd", {}, OURS, 1, run.SHM)}
    for name, (peer, options, venv, world, disk) in run.PEERS.items():
        if Path(run.VENVS[venv]).exists():
            peers[name] = peer, options, venv, world, disk
        elif peer.startswith(("peer_dcp:", "peer_torch:")):
            peers[name] = peer, options, OURS, world, disk
    run.PEERS = peers
    plain_session, plain_init = run.session, run.Job.__init__

    def session(name: str, args: Any, work: Any) -> Any:
        if name != OURS:
            return plain_session(name, args, work)
        with _daemon(args.mib) as run_dir:
            run.PEERS[OURS] = (*peers[OURS][:1], {"run_dir": run_dir}, *peers[OURS][2:])
            return plain_session(name, args, work)

    def init(
        self: Any, name: str, mode: str, args: Any, root: str, extra: Any = (), opts: Any = None
    ) -> None:
        plain_init(self, name, mode, args, root, extra, {**(opts or {}), "bench_mode": mode})

    run.session, run.Job.__init__ = session, init


@contextlib.contextmanager
def _daemon(mib: int) -> Iterator[str]:
    cluster = Cluster(parity=0, group_size=2, memory_budget=f"{4 * mib + 64}MiB")
    try:
        (node,) = cluster.start(1)
        yield str(node.run_dir)
    finally:
        cluster.close()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep trainers' first threads on the first core, everything else below here on the others."""
    cores = sorted(os.sched_getaffinity(0))
    end = threading.Event()
    os.sched_setaffinity(0, cores[1:] or cores)

    def look() -> None:
        while not end.wait(LOOK_S):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    _place(process, cores)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        os.sched_setaffinity(0, cores)


def _place(process: psutil.Process, cores: list[int]) -> None:
    # A trainer is forked by a zygote, and leads a session of its own.
    line = process.cmdline()
    trains = any(part.endswith("trainer.py") for part in line) and os.getsid(process.pid) == (
        process.pid
    )
    for thread in process.threads():
        mine = trains and thread.id == process.pid
        os.sched_setaffinity(thread.id, cores[:1] if mine else cores[1:] or cores)


if __name__ == "__main__":
    main()
