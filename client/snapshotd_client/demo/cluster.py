"""Four nodes on one machine, each with a daemon, a torchrun agent, an address and memory."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from snapshotd_client.demo.errors import DemoError
from snapshotd_client.demo.inbox import Inbox
from snapshotd_client.demo.processes import clean_environment, kill_trees, start

WORLD: Final = 4
#: The first node's address is 127.0.0.11, the next one's 127.0.0.12, and so on.
_FIRST_HOST: Final = 11
_STOP_TIMEOUT_S: Final = 20.0

#: torchrun notices a lost agent after keep_alive_interval times keep_alive_max_attempt seconds.
#: is_host=0: the rendezvous store lives in the demo itself, so that any node may be lost.
_RENDEZVOUS: Final = (
    "is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=180,close_timeout=10"
)


@dataclass(frozen=True)
class RunPlan:
    """What one run is.

    Attributes:
        name: of the run, its job and its directory.
        parity: nodes a group may lose at once; None trains without daemons.
        steps: to train.
        step_s: a step takes this long at least, seconds.
        logs: directory of journals, logs, configurations and final states.
        scratch: directory of run directories (short: sockets lie in it).
        shm: directory of tmpfs directories.
        rendezvous_port: of the store for torchrun's rendezvous, on 127.0.0.1.
        faults: how many are to strike.
    """

    name: str
    parity: int | None
    steps: int
    step_s: float
    logs: Path
    scratch: Path
    shm: Path
    rendezvous_port: int
    faults: int = 0


@dataclass
class Node:
    """One node; a program that is None does not run."""

    name: str
    host: str
    address: str
    run_dir: Path
    shm_dir: Path
    config: Path
    daemon: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    agent: subprocess.Popen[bytes] | None = field(default=None, repr=False)


class Cluster:
    """The nodes of one run. `stop` ends what runs and removes what lies in memory."""

    def __init__(self, plan: RunPlan, inbox: Inbox) -> None:
        self._plan = plan
        self._inbox = inbox
        self._made = 0
        self.nodes: dict[str, Node] = {}
        for directory in (plan.logs, plan.scratch, plan.shm):
            directory.mkdir(parents=True, exist_ok=True)

    def add_first_nodes(self) -> list[Node]:
        """Make the nodes that know each other from the start."""
        nodes = [self._make_node() for _ in range(WORLD)]
        for node in nodes:
            self._write_config(node, seeds=nodes)
        return nodes

    def add_replacement(self) -> Node:
        """Make an empty node that no other node's configuration names; it knows two live ones."""
        seeds = list(self.nodes.values())[:2]
        node = self._make_node()
        self._write_config(node, seeds=seeds)
        return node

    def start_daemon(self, node: Node) -> None:
        environment = clean_environment(
            NOTIFY_SOCKET=self._inbox.notify_address(f"{self._plan.name}-{node.name}")
        )
        command = [sys.executable, "-m", "snapshotd", "serve", "--config", str(node.config)]
        node.daemon = start(command, environment, self._plan.logs / f"daemon-{node.name}.log")
        self._inbox.watch(node.daemon, f"the daemon of {node.name}")

    def start_agent(self, node: Node) -> None:
        node.agent = start(
            agent_command(self._plan, node),
            agent_environment(self._plan, node, self._inbox.watcher),
            self._plan.logs / f"agent-{node.name}.log",
        )
        self._inbox.watch(node.agent, f"the torchrun agent of {node.name}")

    def kill_daemon(self, node: Node) -> list[int]:
        """SIGKILL a node's supervisor and SMPs; the ids of the processes."""
        daemon, node.daemon = node.daemon, None
        return kill_trees([daemon] if daemon else [])

    def lose(self, nodes: Sequence[Node]) -> None:
        """SIGKILL all that runs on some nodes at once, and delete what they had in memory."""
        kill_trees([p for node in nodes for p in (node.daemon, node.agent) if p])
        for node in nodes:
            node.daemon = node.agent = None
            self._forget(node)
            del self.nodes[node.name]

    def status_command(self, node: Node) -> list[str]:
        """What an operator would type to look at this node."""
        command = [sys.executable, "-m", "snapshotd", "status", "--json"]
        return [*command, "--address", node.address]

    def stop(self, *, quietly: bool = False) -> None:
        """Stop agents, then daemons, and remove what they had in memory.

        Args:
            quietly: a daemon that does not stop cleanly is no error.

        Raises:
            DemoError: a daemon had to be killed or ended with an error.
        """
        kill_trees([node.agent for node in self.nodes.values() if node.agent])
        daemons = [(node, node.daemon) for node in self.nodes.values() if node.daemon]
        for _, daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
        codes = {node.name: _wait_or_kill(daemon) for node, daemon in daemons}
        for node in self.nodes.values():
            self._forget(node)
        self.nodes.clear()
        wrong = {name: code for name, code in codes.items() if code != 0}
        if wrong and not quietly:
            raise DemoError(f"daemons did not stop cleanly on SIGTERM: {wrong}", self._plan.logs)

    def _forget(self, node: Node) -> None:
        shutil.rmtree(node.shm_dir, ignore_errors=True)
        shutil.rmtree(node.run_dir, ignore_errors=True)

    def _make_node(self) -> Node:
        name, host = f"n{self._made}", f"127.0.0.{_FIRST_HOST + self._made}"
        self._made += 1
        node = Node(
            name=name,
            host=host,
            address=f"{host}:{_free_port(host)}",
            run_dir=self._plan.scratch / name,
            shm_dir=self._plan.shm / name,
            config=self._plan.logs / f"{name}.toml",
        )
        self.nodes[name] = node
        return node

    def _write_config(self, node: Node, seeds: Sequence[Node]) -> None:
        if self._plan.parity is not None:
            text = node_config(node, seeds, cluster=self._plan.name, parity=self._plan.parity)
            node.config.write_text(text, encoding="utf-8")


def node_config(node: Node, seeds: Sequence[Node], *, cluster: str, parity: int) -> str:
    """The configuration file of one daemon."""
    peers = "\n".join(f'{seed.name} = "{seed.address}"' for seed in seeds)
    return f"""\
cluster_id = "{cluster}"
node_id = "{node.name}"
listen = "{node.address}"
run_dir = "{node.run_dir}"
shm_dir = "{node.shm_dir}"
memory_budget = "512MiB"

[peers]
{peers}

[protection]
group_size = {WORLD}
parity = {parity}

[timeouts]
heartbeat_s = 0.5
suspect_s = 2.0
dead_s = 5.0
"""


def agent_command(plan: RunPlan, node: Node) -> list[str]:
    """The torchrun command of one node."""
    torchrun = [
        *("--nnodes", str(WORLD), "--nproc-per-node", "1", "--max-restarts", "20"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{plan.rendezvous_port}"),
        *("--rdzv-id", plan.name, "--rdzv-conf", _RENDEZVOUS, "--local-addr", node.host),
        # Else torchrun makes a directory of its own in /tmp, and leaves it.
        *("--log-dir", str(plan.scratch / f"torchrun-{node.name}")),
    ]
    trainer = [
        *("-m", "snapshotd_client.demo.train", "--steps", str(plan.steps)),
        *("--step-s", str(plan.step_s), "--out", str(plan.logs)),
        *("--faults", str(plan.faults), "--store", str(plan.rendezvous_port)),
        *(("--unprotected",) if plan.parity is None else ()),
    ]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, *trainer]


def agent_environment(plan: RunPlan, node: Node, watcher: str) -> dict[str, str]:
    """Variables of one agent and its trainer."""
    return clean_environment(
        OMP_NUM_THREADS="1",
        # This machine's host name may not lead to an address that the others can reach.
        GLOO_SOCKET_IFNAME="lo",
        # Agents that share their store with trainers remember the first rank 0's for ever, and
        # number restarts in its keys: neither survives the loss of a node.
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        SNAPSHOTD_RUN_DIR=str(node.run_dir),
        SNAPSHOTD_JOB=plan.name,
        SNAPSHOTD_DEMO_NODE=node.name,
        SNAPSHOTD_DEMO_WATCHER=watcher,
    )


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait_or_kill(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_trees([process])
        return -signal.SIGKILL
