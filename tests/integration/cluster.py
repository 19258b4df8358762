"""Real daemons on loopback, each with its own address, run directory and tmpfs directory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from snapshotd.errors import PeerError
from snapshotd.rpc.operator import fetch_status
from snapshotd.rpc.tls import Identity, TlsFiles
from snapshotd.wire.protocol import FRONT_SOCKET
from snapshotd.wire.v1 import node_pb2 as pb

PORT = 7070
START_S = 30.0
#: Short, so that tests need not wait long for what only time can tell; see Cluster.config.
TIMEOUTS = {"heartbeat_s": 0.3, "suspect_s": 2.5, "dead_s": 5.0, "restore_s": 12.0, "rpc_s": 5.0}


_clusters = itertools.count()


def eventually(
    what: str, condition: Callable[[], object], timeout_s: float = 30.0, pause_s: float = 0.05
) -> None:
    """Wait until a condition holds; it is looked at from outside, so there is no event."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(pause_s)  # noqa: TID251  # looking at other processes from outside


@dataclass
class Node:
    """One daemon: supervisor and SMPs."""

    name: str
    address: str
    root: Path
    shm_dir: Path
    config: Path
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    identity: Identity | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def start(self, **environ: str) -> None:
        self.launch(**environ)
        eventually(f"{self.name} serves:\n{self.tail()}", self.ready, START_S)

    def launch(self, **environ: str) -> None:
        """Start it, and do not wait: it may be about to die."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snapshotd", "serve", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self.environ, **environ},
            )

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.tail()}"
        try:
            self.status()
        except PeerError:
            return False
        return (self.run_dir / FRONT_SOCKET).exists()  # bound after the port for status

    def status(self) -> pb.NodeStatus:
        return fetch_status(self.address, timeout_s=5.0, identity=self.identity)

    def smp_pids(self) -> list[int]:
        if self.process is None or not psutil.pid_exists(self.process.pid):
            return []
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
                if "snapshotd.smp" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def kill(self) -> None:
        """SIGKILL supervisor and SMPs at once."""
        pids = self.smp_pids()
        assert self.process is not None
        self.process.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        eventually("SMPs are gone", lambda: not any(psutil.pid_exists(p) for p in pids))

    def lose(self) -> None:
        """The node is gone with its memory."""
        self.kill()
        shutil.rmtree(self.shm_dir)
        shutil.rmtree(self.run_dir)

    def stop(self) -> None:
        """SIGTERM, and a clean end."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        assert self.process.wait(20) == 0, f"{self.name} did not stop well:\n{self.tail()}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


class Cluster:
    """Some nodes of one cluster. Everything is removed in the end."""

    def __init__(
        self,
        parity: int = 1,
        group_size: int = 4,
        replace_s: float = 60.0,
        persist: Mapping[str, object] | None = None,
        plane: str = "",
        **settings: object,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="sd-"))
        self.shm = Path(tempfile.mkdtemp(prefix="snapshotd-test-", dir="/dev/shm"))
        self.nodes: dict[str, Node] = {}
        self._parity = parity
        self._plane = plane
        self._group_size = group_size
        self._settings = settings
        self.persist = dict(persist or {})
        self.timeouts = {**TIMEOUTS, "replace_s": replace_s}
        # Its own among all clusters of this process, and most likely of all test runs.
        self._subnet = f"127.{64 + os.getpid() % 128}.{next(_clusters) % 250}"

    def node(
        self,
        name: str,
        seeds: list[str] | None = None,
        tls: TlsFiles | None = None,
        **settings: object,
    ) -> Node:
        """Make a node, not yet started; it knows all nodes made so far, or the seeds given."""
        number = len(self.nodes) + 1
        root = self.root / name
        (root / "run").mkdir(parents=True)
        made = Node(
            name,
            f"{self._subnet}.{number}:{PORT}",
            root,
            self.shm / name,
            root / "config.toml",
            root / "log",
        )
        known = self.nodes.values() if seeds is None else [self.nodes[s] for s in seeds]
        self.nodes[name] = made
        text = self._toml(made, [*known], settings)
        if tls:
            text += f'[tls]\nca = "{tls.ca}"\ncert = "{tls.cert}"\nkey = "{tls.key}"\n'
            made.identity = Identity.load(tls, "test")
        made.config.write_text(text)
        return made

    def _toml(self, node: Node, seeds: list[Node], settings: dict[str, object]) -> str:
        top = {
            "cluster_id": "test",
            "node_id": node.name,
            "listen": node.address,
            "run_dir": str(node.run_dir),
            "shm_dir": str(node.shm_dir),
            "memory_budget": "512MiB",
            **self._settings,
            **settings,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        lines += ["[peers]", *(f'{n.name} = "{n.address}"' for n in seeds)]
        lines += ["[protection]", f"group_size = {self._group_size}", f"parity = {self._parity}"]
        lines += [f'plane = "{self._plane}"'] if self._plane else []
        lines += ["unprotected_bound_s = 2.0", "[timeouts]"]
        lines += [f"{key} = {value}" for key, value in self.timeouts.items()]
        lines += ["[persist]", *(f"{k} = {json.dumps(v)}" for k, v in self.persist.items())]
        return "\n".join(lines) + "\n"

    def start(self, count: int) -> list[Node]:
        """Make and start n0 .. n<count-1>."""
        nodes = [self.node(f"n{i}") for i in range(count)]
        for node in nodes:
            node.start()
        self.met()
        return nodes

    def met(self, timeout_s: float = 30.0) -> None:
        """Every running node sees every other one live."""

        def live(node: Node) -> int:
            return sum(m.state == "live" for m in node.status().members)

        running = [n for n in self.nodes.values() if n.process and n.process.poll() is None]
        for node in running:
            eventually(
                f"{node.name} has met all", lambda n=node: live(n) >= len(running), timeout_s
            )

    def close(self) -> None:
        running = [n for n in self.nodes.values() if n.process and n.process.poll() is None]
        for node in running:
            node.process.terminate()
        for node in running:
            try:
                node.process.wait(15)
            except subprocess.TimeoutExpired:
                node.kill()
        shutil.rmtree(self.shm, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
