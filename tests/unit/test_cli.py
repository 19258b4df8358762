"""The commands: what they accept, what they print, what they exit with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

import snapshotd
from snapshotd.cli import main, split
from snapshotd.cli.gc import collect
from snapshotd.cli.options import ADDRESS_FILE
from snapshotd.cli.run import start_and_run
from snapshotd.cli.sidecar import Sidecar, is_served
from snapshotd.cli.signals import BorrowedSignals
from snapshotd.cli.units import in_bytes
from snapshotd.errors import SnapshotdError
from snapshotd.memory.locks import DirectoryLock
from snapshotd.wire.v1 import node_pb2 as pb
from snapshotd.wire.v1 import node_pb2_grpc

ESSENTIAL = ("--cluster-id", "c", "--node-id", "n0", "--listen", "127.0.0.1:7070")


class Answers(node_pb2_grpc.NodeServicer):
    """A node with one job, one shard that waits, and one silent peer."""

    def Status(self, request: pb.StatusRequest, context: object) -> pb.NodeStatus:  # noqa: N802  as in the service
        status = pb.NodeStatus(
            cluster_id="c", node="n0", boot="b1", version="0.1.0", coordinator="n0", coding="zfec"
        )
        status.budget_bytes, status.allocated_bytes = 4 << 30, 1 << 30
        status.health_reason = "shard 3 is unprotected for 61 s"
        status.notes.append("shard 3 stands still")
        status.members.add(node="n1", address="h:1", state="dead", silent_s=9, reason="silent")
        shard = status.shards.add(job="gpt", shard=3, why_not="n1 is lost", waits_for=["n1"])
        generation = shard.generations.add(state="sealed", age_s=2.5, bytes=3 << 20)
        generation.version.step, generation.version.epoch = 41, 1
        job = status.jobs.add(job="gpt", world=4, epoch=1)
        job.committed.step, job.committed.epoch = 40, 1
        slot = status.slots.add(slot=0)
        slot.trainer.job, slot.trainer.shard, slot.trainer.world = "gpt", 3, 4
        told = slot.persist.add(job="gpt", bytes_done=3 << 20, bytes_total=4 << 20, error="slow")
        told.published.step, told.published.epoch = 30, 1
        return status

    def Plan(self, request: pb.PlanRequest, context: object) -> pb.PlanReply:  # noqa: N802  as in the service
        if request.job != "gpt":
            return pb.PlanReply(job=request.job, reason="nobody knows this job")
        plan = pb.PlanReply(job="gpt", restorable=True)
        plan.version.step = 40
        plan.shards.add(shard=3, source="decode", detail="from n0, n2")
        return plan

    def Drop(self, request: pb.DropRequest, context: object) -> pb.DropReply:  # noqa: N802  as in the service
        return pb.DropReply(freed_bytes=3 << 20)


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    node_pb2_grpc.add_NodeServicer_to_server(Answers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SNAPSHOTD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def test_config_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.toml"
    file.write_text('cluster_id = "c"\nnode_id = "n0"\nlisten = "h:1"\n')
    options = ["--parity", "2", "--peer", "n1=h:2", "--set", "timeouts.rpc_s=11"]
    assert main(["config", "show", "--config", str(file), "--json", *options]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["node_id"] == {"value": "n0", "origin": f"{file}:2"}
    assert shown["protection.parity"] == {"value": 2, "origin": "flag --protection.parity"}
    assert shown["peers.n1"]["value"] == "h:2"
    assert shown["timeouts.rpc_s"]["value"] == 11.0
    assert main(["config", "show", "--config", str(file)]) == 0
    table = capsys.readouterr().out
    assert f"{file}:3" in table
    assert "oom_score_adj" in table
    assert "not set" in table


def test_nothing_is_cut_short_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS")
    assert main(["config", "show", *ESSENTIAL]) == 0
    assert "protection.unprotected_bound_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["config", "show"], "cluster_id is set nowhere"),
        (["serve", *ESSENTIAL, "--parity", "4"], "no room for 4 parity blocks"),
        (["serve", *ESSENTIAL, "--set", "nonsense"], "is not KEY=VALUE"),
        (["serve", *ESSENTIAL, "--set", "x=1"], "unknown key"),
        (["serve", *ESSENTIAL, "--peer", "n1=a:1", "--peer", "n1=b:1"], "n1 stands twice"),
        (["run", *ESSENTIAL], "no command was given"),
        (["drop", "gpt", "--address", "127.0.0.1:1"], "--yes"),
        (["status", "--run-dir", "/nowhere"], "no daemon serves /nowhere"),
    ],
)
def test_wrong_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_what_belongs_to_another_program() -> None:
    assert split(["run", "--parity", "2", "--", "bash", "-c", "x", "--", "y"]) == (
        ["run", "--parity", "2"],
        ["bash", "-c", "x", "--", "y"],
    )
    assert split(["demo", "--help"]) == (["demo"], ["--help"])
    assert split(["status", "--json"]) == (["status", "--json"], [])


def test_status(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ADDRESS_FILE).write_text(address)
    assert main(["status", "--run-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "NOT HEALTHY: shard 3 is unprotected for 61 s",
        "note         shard 3 stands still",
        "1.0 GiB of 4.0 GiB (25 %)",
        "step 41 (epoch 1) sealed, 2.5 s old, 3.0 MiB",
        "no: n1 is lost",
        "rank 3 of 4, gpt, gone",
        "step 40 (epoch 1)",
        "9.0 s",
        "step 30 (epoch 1)",
        "reading back, 75 % of 2.0 MiB twice",
        "slow",
    ):
        assert fact in shown
    assert main(["status", "--address", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"][0]["state"] == "dead"


def test_plan_and_drop(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt", "--address", address]) == 0
    shown = capsys.readouterr().out
    assert "gpt would resume from step 40" in shown
    assert "from n0, n2" in shown
    assert main(["plan", "other", "--address", address]) == 1
    assert "cannot be restored: nobody knows this job" in capsys.readouterr().out
    assert main(["drop", "gpt", "--yes", "--address", address]) == 0
    assert "all nodes forget it" in capsys.readouterr().out


def test_nobody_answers(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", "127.0.0.1:1", "--timeout-s", "20"]) == 1
    assert "no daemon answers at 127.0.0.1:1" in capsys.readouterr().err


def test_bytes_for_people() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30, 7 << 40, 5000 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "7.0 TiB",
        "5000.0 TiB",
    ]


# ---- gc


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    shm_dir, run_dir = tmp_path / "shm", tmp_path / "run"
    for slot in (0, 1):
        (shm_dir / f"slot-{slot}").mkdir(parents=True)
        (shm_dir / f"slot-{slot}" / "a.seg").write_bytes(bytes(8192))
    (shm_dir / "somebody-else").write_text("keep")
    run_dir.mkdir()
    (run_dir / ADDRESS_FILE).write_text("h:1")
    (run_dir / "trainer-0.lock").write_text("")
    os.mknod(run_dir / "trainers.sock", 0o140660)
    return shm_dir, run_dir


def test_gc_removes_what_nobody_owns(directories: tuple[Path, Path]) -> None:
    shm_dir, run_dir = directories
    with DirectoryLock(shm_dir / "slot-1"):
        owned, unowned, sockets = sorted(
            collect(shm_dir, run_dir, dry_run=False), key=lambda f: (not f.owner, -f.freed_bytes)
        )
    assert "in use by another process" in owned.owner
    assert (unowned.path.name, unowned.files, unowned.freed_bytes) == ("slot-0", 1, 8192)
    assert sockets.files == 2
    assert sorted(path.name for path in shm_dir.iterdir()) == ["lock", "slot-1", "somebody-else"]
    assert sorted(path.name for path in run_dir.iterdir()) == ["lock", "trainer-0.lock"]


def test_gc_leaves_the_sockets_of_a_live_daemon(directories: tuple[Path, Path]) -> None:
    shm_dir, run_dir = directories
    with DirectoryLock(run_dir):
        findings = {f.path: f for f in collect(shm_dir, run_dir, dry_run=False)}
    assert findings[run_dir].owner
    assert (run_dir / "trainers.sock").exists()


def test_gc_leaves_the_idle_slots_of_a_live_daemon(directories: tuple[Path, Path]) -> None:
    shm_dir, run_dir = directories
    with DirectoryLock(shm_dir):
        findings = {f.path: f for f in collect(shm_dir, run_dir, dry_run=False)}
    assert "in use by another process" in findings[shm_dir].owner
    assert (shm_dir / "slot-0" / "a.seg").exists()


def test_gc_dry_run(directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shm_dir, run_dir = directories
    command = ["gc", "--shm-dir", str(shm_dir), "--run-dir", str(run_dir)]
    assert main([*command, "--dry-run"]) == 0
    assert "16.0 KiB would be freed" in capsys.readouterr().out
    assert (shm_dir / "slot-0" / "a.seg").exists()
    assert main(command) == 0
    assert "16.0 KiB freed" in capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("\n0 B freed\n")


# ---- run

DAEMON = """
import os, signal, sys
from pathlib import Path
from snapshotd.memory.locks import DirectoryLock
from snapshotd.telemetry.notify import Notifier

run_dir = Path(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with DirectoryLock(run_dir), open(run_dir / "lives", "a") as lives:
    print(os.getpid(), os.getsid(0), file=lives, flush=True)
    Notifier.from_environ(os.environ).ready()
    signal.sigwait([signal.SIGTERM])
    (run_dir / "stopped").touch()
"""


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    command = [sys.executable, "-c", DAEMON, str(tmp_path)]
    return Sidecar(command, tmp_path, {**os.environ, "WATCHDOG_USEC": "1"})


def run_beside_sidecar(sidecar: Sidecar, run_dir: Path, script: str) -> int:
    environ = {**os.environ, "SNAPSHOTD_RUN_DIR": str(run_dir)}
    with BorrowedSignals((signal.SIGTERM, signal.SIGHUP)) as signals:
        return start_and_run(
            sidecar, ["bash", "-c", script], environ, signals, ready_s=60, stop_s=60
        )


def test_run_gives_the_command_a_daemon_and_its_code(sidecar: Sidecar, tmp_path: Path) -> None:
    assert not is_served(tmp_path)
    script = 'test -s "$SNAPSHOTD_RUN_DIR/lives" && test ! -e "$SNAPSHOTD_RUN_DIR/stopped"; exit 7'
    assert run_beside_sidecar(sidecar, tmp_path, script) == 7
    assert (tmp_path / "stopped").exists()
    assert not is_served(tmp_path)
    assert not list(tmp_path.glob("notify-*"))
    pid, session = map(int, (tmp_path / "lives").read_text().split())
    assert pid == session != os.getsid(0)


def test_run_passes_signals_on(sidecar: Sidecar, tmp_path: Path) -> None:
    script = f"trap 'exit 42' TERM; kill -TERM {os.getpid()}; while :; do read -t 5 <> <(:); done"
    assert run_beside_sidecar(sidecar, tmp_path, script) == 42
    assert (tmp_path / "stopped").exists()


def test_run_reports_a_signal_s_death(sidecar: Sidecar, tmp_path: Path) -> None:
    assert run_beside_sidecar(sidecar, tmp_path, "kill -KILL $$") == 128 + signal.SIGKILL


def test_run_starts_a_dead_daemon_again(sidecar: Sidecar, tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    script = f"""
        kill -KILL $(cut -d' ' -f1 {lives})
        until test $(wc -l < {lives}) -eq 2; do read -t 0.1 <> <(:); done; exit 0
    """
    assert run_beside_sidecar(sidecar, tmp_path, script) == 0
    assert (tmp_path / "stopped").exists()


def test_run_does_not_start_the_command_without_a_daemon(tmp_path: Path) -> None:
    failing = Sidecar([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, os.environ)
    with pytest.raises(SnapshotdError, match="ended with 3 before it was ready"):
        run_beside_sidecar(failing, tmp_path, f"touch {tmp_path}/started")
    silent = Sidecar(["sleep", "60"], tmp_path, os.environ)
    with (
        BorrowedSignals(()) as signals,
        pytest.raises(SnapshotdError, match=r"not ready within 0\.2 s"),
    ):
        start_and_run(silent, ["false"], os.environ, signals, ready_s=0.2, stop_s=60)
    assert silent.code == -signal.SIGTERM
    assert not (tmp_path / "started").exists()


def test_run_uses_a_daemon_that_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*ESSENTIAL, "--run-dir", str(tmp_path)]
    with DirectoryLock(tmp_path):
        assert main(["run", *options, "--", "bash", "-c", "echo $SNAPSHOTD_RUN_DIR; exit 5"]) == 5
    captured = capfd.readouterr()
    assert captured.out.strip() == str(tmp_path)
    assert "used and left running" in captured.err


def test_a_command_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DirectoryLock(tmp_path):
        assert main(["run", *ESSENTIAL, "--run-dir", str(tmp_path), "--", "no-such-program"]) == 127
    assert "cannot start no-such-program" in capsys.readouterr().err


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with BorrowedSignals((signal.SIGTERM,)) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.take() == (signal.SIGTERM,)
        assert signals.take() == ()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with BorrowedSignals((signal.SIGHUP,)) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.take() == ()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "snapshotd", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == f"snapshotd {snapshotd.__version__}"


def test_export_and_import_say_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tier = tmp_path / "out", tmp_path / "tier"
    tier.mkdir()
    source = ("--from", str(tier), "--job", "gpt")
    for arguments, code, why in (
        (("export", str(out), "--from", str(tier)), 2, "--from takes --job"),
        (("export", str(out), *source), 1, "has no whole step of a job"),
        (("export", str(out), *source, "--step", "x"), 2, "say newest"),
        (("import", "--job", "gpt", "--to", str(tier), str(out)), 1, "no .metadata in it"),
        (("import", "--job", "gpt", "--to", str(out), str(out)), 1, "it is not there"),
        (("import", "--job", "", "--to", str(tier), str(out)), 2, "takes 0 bytes"),
    ):
        assert main(arguments) == code
        assert why in capsys.readouterr().err
    assert not out.exists()
    assert [*tmp_path.iterdir()] == [tier]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["export", str(out), *source]) == 2
    assert "pip install 'snapshotd[client]'" in capsys.readouterr().err


def test_an_export_without_a_daemon_s_snapshot(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take = ("export", str(tmp_path / "out"), "--address", address)
    assert main([*take, "--job", "other"]) == 2
    assert "no snapshot of a job 'other'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
