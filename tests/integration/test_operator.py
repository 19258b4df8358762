"""What the operator sees and does: serve, status, plan, drop, gc, run, health; real daemons."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from snapshotd.cli import main
from snapshotd.memory.segment import Segment
from snapshotd.memory.states import State
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc
from snapshotd_client import Refused
from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Job, Rank, alive, homes, segment_files

NODE_SERVICE = "snapshotd.wire.v1.Node"
SNAPSHOTD = (sys.executable, "-m", "snapshotd")
END_S = 30

Says = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SNAPSHOTD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a command of the command line: its exit code, its output, its errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Four nodes for all tests that leave them running."""
    made = Cluster(parity=1)
    try:
        yield made.start(4)
    finally:
        made.close()


@contextlib.contextmanager
def trained(nodes: list[Node], job: str, steps: int = 2) -> Iterator[Job]:
    """A job with `steps` committed steps; its trainers leave in the end."""
    made = Job(homes(nodes), job)
    try:
        made.restore()
        made.train_protected(steps)
        yield made
    finally:
        made.close()


def is_healthy(node: Node, service: str) -> bool:
    with grpc.insecure_channel(node.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def shard_of(node: Node, job: str) -> pb.ShardStatus:
    (found,) = [s for s in node.status().shards if s.job == job]
    return found


def protected_again(job: Job) -> None:
    """Every rank has found its daemon, and a step of now is committed."""

    def back() -> bool:
        job.train(1)
        return all(r.snap.status().connected for r in job.ranks)

    eventually("all trainers have found their daemons again", back, pause_s=0.2)
    job.train_until_protected()


# ---- serve


class Manager:
    """What a service manager is to a daemon: a notify socket that is listened to."""

    def __init__(self, path: Path) -> None:
        self.environ = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._heard: list[str] = []
        # The kernel keeps a few messages only; a manager listens all the time.
        self._ear = threading.Thread(target=self._listen)
        self._ear.start()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self._heard += message.decode().split("\n")

    def heard(self, assignment: str) -> list[str]:
        return [line for line in self._heard if line.startswith(assignment)]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
            mouth.sendto(b"", self.environ["NOTIFY_SOCKET"])
        self._ear.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_life_under_a_service_manager(
    cluster: Callable[..., Cluster], manager: Manager, number: signal.Signals
) -> None:
    node = cluster(parity=0).node("n0")
    node.start(**manager.environ)
    assert node.process is not None
    eventually("READY", lambda: manager.heard("READY=1"))
    assert manager.heard("STATUS=")[0] == f"STATUS=n0 serves on {node.address}"
    eventually("the watchdog is fed", lambda: len(manager.heard("WATCHDOG=1")) > 3)
    with trained([node], "job"):
        pids = node.smp_pids()
        assert pids
        assert not manager.heard("STOPPING=1")
        node.process.send_signal(number)
        assert node.process.wait(END_S) == 0, node.tail()
    eventually("STOPPING", lambda: len(manager.heard("STOPPING=1")) == 1)
    assert len(manager.heard("READY=1")) == 1
    assert not [pid for pid in pids if alive(pid)]
    assert segment_files(node)
    left = {path.name for path in node.run_dir.iterdir()}
    assert left == {"lock", "trainer-0.lock", "job.job", "job.point"}, node.tail()
    node.start()
    job = Job([(node, 0)])
    assert [r.step for r in job.restore()] == [1]
    job.close()


def test_flags_beat_variables_and_these_the_file(cluster: Callable[..., Cluster]) -> None:
    node = cluster().node("n0", memory_budget="512MiB")
    variables = {"SNAPSHOTD_CLUSTER_ID": "of-variables", "SNAPSHOTD_MEMORY_BUDGET": "256MiB"}
    with node.log.open("ab") as log:
        node.process = subprocess.Popen(
            [*SNAPSHOTD, "serve", "--config", node.config, "--memory-budget", "64MiB"],
            stdout=log,
            stderr=log,
            env={**os.environ, **variables},
        )
    eventually("it serves", node.ready)
    status = node.status()
    assert (status.node, status.cluster_id) == ("n0", "of-variables")
    assert status.budget_bytes == 64 << 20
    node.stop()


@pytest.mark.parametrize("shared", ["run_dir", "shm_dir", "listen"])
def test_a_second_daemon_is_refused(nodes: list[Node], tmp_path: Path, shared: str) -> None:
    one = nodes[0]
    settings = {
        "run_dir": tmp_path / "run",
        "shm_dir": tmp_path / "shm",
        "listen": "127.0.0.1:7070",
        shared: {"run_dir": one.run_dir, "shm_dir": one.shm_dir, "listen": one.address}[shared],
    }
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    second = subprocess.run(
        [*SNAPSHOTD, "serve", "--cluster-id", "test", "--node-id", "second", *flags],
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert second.returncode == 2, second.stderr
    assert str(settings[shared]) in second.stderr
    assert "Traceback" not in second.stderr
    assert one.status().node == one.name


# ---- status, plan, drop, inventory


def test_status_while_a_job_trains(
    nodes: list[Node], says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained(nodes, "seen"):
        monkeypatch.setenv("SNAPSHOTD_RUN_DIR", str(nodes[1].run_dir))
        code, shown, _ = says("status")
        assert code == 0
        for fact in ("n1 of test", "healthy", "n3", "step 1", "committed", "rank 1 of 4, seen"):
            assert fact in shown
        code, shown, _ = says("status", "--json", "--run-dir", nodes[0].run_dir)
        assert code == 0
        status = json.loads(shown)
        assert status["healthy"] is True
        assert [m["state"] for m in status["members"]] == ["live"] * 4
        (shard,) = [s for s in status["shards"] if s["job"] == "seen"]
        assert (shard["shard"], shard["is_protected"], shard["waits_for"]) == (0, True, [])
        newest = shard["generations"][-1]
        assert (newest["version"]["step"], newest["state"]) == ("1", "committed")
        assert int(newest["bytes"]) > 0
        assert newest["age_s"] > 0
        assert int(status["allocated_bytes"]) > 0
        code, shown, _ = says("plan", "seen", "--address", nodes[2].address)
        assert code == 0
        assert "would resume from step 1" in shown
        assert shown.count("local") == 4
        assert "n3/0" in shown


def test_status_says_which_rank_a_restore_waits_for(nodes: list[Node], says: Says) -> None:
    first, second = Rank(0, 2), Rank(1, 2)
    with ThreadPoolExecutor(1) as pool:
        first.attach(nodes[0], job="late")
        waiting = pool.submit(first.snap.restore, timeout_s=20)
        eventually("its shard is shown", lambda: "late" in says("status", *at(nodes[0]))[1])
        status = nodes[0].status()
        (shard,) = [s for s in status.shards if s.job == "late"]
        assert not shard.is_protected
        assert "not yet: shard 1" in shard.why_not
        assert not waiting.done()
        second.attach(nodes[1], job="late")
        assert second.snap.restore() is None
        assert waiting.result(END_S) is None
    first.snap.close()
    second.snap.close()


def at(node: Node) -> tuple[str, Path]:
    return "--run-dir", node.run_dir


def test_drop_is_for_jobs_without_trainers(nodes: list[Node], says: Says) -> None:
    with trained(nodes, "dropped"):
        code, _, why = says("drop", "dropped", "--yes", *at(nodes[0]))
        assert code == 1
        assert "has trainers on n0/0" in why
        assert "dropped" in says("status", *at(nodes[0]))[1]
    eventually("n0 has heard that all trainers left", lambda: not trainers(nodes[0], nodes))
    code, shown, _ = says("drop", "dropped", "--yes", *at(nodes[0]))
    assert code == 0, shown

    def held(node: Node) -> bool:
        return any(s.job == "dropped" for s in node.status().shards)

    eventually("no node holds it", lambda: not any(held(node) for node in nodes))
    eventually(
        "its memory is given back",
        lambda: not any(_free_segments(node) for node in nodes),
    )
    assert says("plan", "dropped", *at(nodes[1]))[0] == 1
    job = Job(homes(nodes), "dropped")
    assert job.restore() == [None] * 4
    job.close()


def _free_segments(node: Node) -> list[str]:
    """Segment files of a node that hold nothing."""
    segments = [Segment.open(path) for path in segment_files(node)]
    free = [s.name for s in segments if s.state is State.FREE]
    for segment in segments:
        segment.close()
    return free


def trainers(node: Node, others: list[Node]) -> int:
    """Trainers of all nodes, as one that shares facts with `node` sees them."""
    return sum(s.HasField("trainer") for each in [node, *others] for s in each.status().slots)


def test_drop_and_plan_of_a_job_nobody_knows(nodes: list[Node], says: Says) -> None:
    code, _, why = says("drop", "unheard-of", "--yes", *at(nodes[0]))
    assert code == 1
    assert "no live node knows a job 'unheard-of'" in why
    code, shown, _ = says("plan", "unheard-of", *at(nodes[0]))
    assert code == 1
    assert "cannot be restored: no live node knows a job 'unheard-of'" in shown


def test_reflection_and_inventory(nodes: list[Node]) -> None:
    with trained(nodes, "listed"), grpc.insecure_channel(nodes[0].address) as channel:
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert {NODE_SERVICE, "grpc.health.v1.Health"} <= set(reflected.get_services())
        facts = node_pb2_grpc.NodeStub(channel).Inventory(pb.InventoryRequest(), timeout=5)
        assert facts.node == "n0"
        assert {d.job for s in facts.slots for d in s.data} >= {"listed"}
        assert {p.job for s in facts.slots for p in s.parity} >= {"listed"}


def test_lack_of_room_is_told_with_numbers(cluster: Callable[..., Cluster]) -> None:
    node = cluster(parity=0).node("n0", memory_budget="1MiB")
    node.start()
    rank = Rank(0, 1, width=600)
    with pytest.raises(Refused, match=r"snapshots need \d+ bytes.* memory_budget has 1048576"):
        rank.attach(node)
    assert "memory_budget has 1048576" in node.tail()


# ---- health


def test_health_follows_protection(
    cluster: Callable[..., Cluster], says: Says, manager: Manager
) -> None:
    made = cluster(parity=1)
    nodes = [made.node(f"n{i}") for i in range(4)]
    for node in nodes:
        node.start(**(manager.environ if node is nodes[0] else {}))
    made.met()
    with trained(nodes, "job") as job:
        assert is_healthy(nodes[0], "")
        assert is_healthy(nodes[0], NODE_SERVICE)
        nodes[2].kill()
        nodes[3].kill()

        def not_serving() -> bool:
            job.train(1)
            return not is_healthy(nodes[0], "") and not is_healthy(nodes[0], NODE_SERVICE)

        eventually("unprotected for too long", not_serving, pause_s=0.2)
        code, shown, _ = says("status", *at(nodes[0]))
        assert code == 0
        assert "NOT HEALTHY: slot 0 of job 'job' has been unprotected for" in shown
        unwell = f"STATUS=n0 serves on {nodes[0].address}; NOT HEALTHY: slot 0 of job 'job'"
        eventually("the service manager is told", lambda: manager.heard(unwell))
        shard = shard_of(nodes[0], "job")
        assert not shard.is_protected
        # Those who are missing, and not all that follows from it.
        assert shard.why_not == "n2/0 is not live; n3/0 is not live"
        assert list(shard.waits_for) == ["n2/0 is not live", "n3/0 is not live"]
        states = {m.node: m.state for m in nodes[0].status().members}
        assert states == {"n0": "live", "n1": "live", "n2": "dead", "n3": "dead"}
        assert says("plan", "job", *at(nodes[0]))[0] == 1
        for node in nodes[2:]:
            node.start()
        protected_again(job)
        eventually("serving again", lambda: is_healthy(nodes[0], ""))
        assert is_healthy(nodes[0], NODE_SERVICE)
        well = f"STATUS=n0 serves on {nodes[0].address}"
        eventually("the manager is told", lambda: manager.heard("STATUS=")[-1] == well)
        job.check()


def test_a_stopped_daemon_stalls_nobody(nodes: list[Node]) -> None:
    with trained(nodes, "stalled") as job:
        assert nodes[3].process is not None
        pids = [nodes[3].process.pid, *nodes[3].smp_pids()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        slowest_s = 0.0

        def noticed() -> bool:
            nonlocal slowest_s
            for rank in job.ranks:
                rank.train()
                began_s = time.monotonic()
                rank.snap.step(job.next_step)
                slowest_s = max(slowest_s, time.monotonic() - began_s)
            job.next_step += 1
            return {m.node: m.state for m in nodes[0].status().members}["n3"] == "dead"

        try:
            eventually("its peers notice", noticed, pause_s=0.2)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        # The one asserted time: max_stall_s of a step is 1 s, and this machine may be busy.
        assert slowest_s < 2.5
        protected_again(job)
        assert shard_of(nodes[3], "stalled").is_protected
        job.check()


# ---- gc


def test_gc_takes_from_the_dead_alone(cluster: Callable[..., Cluster], says: Says) -> None:
    living, dead = cluster(parity=1, group_size=2).start(2)
    with trained([living, dead], "job"):
        dead.kill()
        # A slot whose SMP does not run at this moment is a live daemon's all the same.
        restarting = living.shm_dir / "slot-7"
        restarting.mkdir()
        (restarting / "a.seg").write_bytes(bytes(4096))
        before = segment_files(living)
        code, shown, _ = says("gc", "--config", living.config)
        assert code == 0
        assert "left alone" in shown
        assert shown.endswith("\n0 B freed\n")
        assert segment_files(living) == before
        assert living.status().node == living.name
        assert segment_files(dead)
        code, shown, _ = says("gc", "--config", dead.config)
        assert code == 0
        assert "removed" in shown
        assert not segment_files(dead)
        assert not [p for p in dead.run_dir.iterdir() if p.is_socket()]


# ---- run


def run_options(node: Node) -> list[str | Path]:
    return [*SNAPSHOTD, "run", "--config", node.config, "--"]


def test_run_starts_a_daemon_outside_the_command_s_tree(cluster: Callable[..., Cluster]) -> None:
    node = cluster(parity=0).node("n0")
    script = f"""
        echo $$ $PPID "$SNAPSHOTD_RUN_DIR"
        {sys.executable} -m snapshotd status --json
        trap 'echo signalled; exit 42' TERM
        kill -TERM $PPID
        while :; do read -t 5 <> <(:); done
    """
    ran = subprocess.run(
        [*run_options(node), "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 42, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].split()[2] == str(node.run_dir)
    assert lines[-1] == "signalled"
    assert json.loads("\n".join(lines[1:-1]))["node"] == "n0"
    assert "has stopped; its segments stay" in ran.stderr
    assert not (node.run_dir / "address").exists()


def test_run_s_daemon_has_a_session_of_its_own_and_a_live_one_is_used(
    cluster: Callable[..., Cluster],
) -> None:
    node = cluster(parity=0).node("n0")
    outer = subprocess.Popen(
        [*run_options(node), "sleep", "60"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        eventually("the daemon serves", (node.run_dir / "address").exists)
        eventually("the command runs", lambda: "sleep" in names(outer.pid))
        daemon = int((node.run_dir / "lock").read_text())
        assert os.getsid(daemon) == daemon
        assert os.getsid(outer.pid) == outer.pid
        inner = subprocess.run(
            [*run_options(node), "bash", "-c", "exit 7"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert inner.returncode == 7
        assert "used and left running" in inner.stderr
        assert alive(daemon)
    finally:
        outer.terminate()
        code = outer.wait(END_S)
    assert code == 128 + signal.SIGTERM
    assert not alive(daemon)


def names(pid: int) -> list[str]:
    return [child.name() for child in psutil.Process(pid).children()]


TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from snapshotd_client import Snapshotter

out, rank, life = Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
model = torch.nn.Linear(32, 32)
optimizer = torch.optim.AdamW(model.parameters())
with Snapshotter({"model": model, "optimizer": optimizer}, job="gpt") as snap:
    restored = snap.restore()
    with (out / f"lives-{rank}").open("a") as file:
        step = restored.step if restored else None
        tier = restored.tier if restored else None
        print(json.dumps({"life": life, "step": step, "tier": tier}), file=file)
    for step in range(restored.step + 1 if restored else 0, 6):
        model(torch.rand(4, 32)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        snap.step(step)
        snap.wait_protected(timeout_s=20)
        if step == 3 and life == "0":
            # Ranks die together, so that the last committed step is known to this test.
            (out / f"at-{rank}").touch()
            while not all((out / f"at-{r}").exists() for r in range(2)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_torchrun_restarts_its_workers_beside_one_daemon(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    node = cluster(parity=0).node("n0")
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.1"]
    ran = subprocess.run(
        [*run_options(node), *torchrun, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    for rank in range(2):
        lives = [json.loads(line) for line in (tmp_path / f"lives-{rank}").read_text().splitlines()]
        assert lives == [
            {"life": "0", "step": None, "tier": None},
            {"life": "1", "step": 3, "tier": "local"},
        ]
    assert ran.stderr.count(f"serves on {node.address}") == 1
    assert "has stopped; its segments stay" in ran.stderr
