"""The demo's programs and messages, with real processes and sockets: nothing stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from snapshotd_client.demo.inbox import Exited, Inbox, Ready
from snapshotd_client.demo.journal import Event, Journal, Kind
from snapshotd_client.demo.processes import clean_environment, kill_trees, start

WAIT_S = 30.0
#: Starts a child, says so on its first line, and waits for ever.
PARENT = """
import subprocess, sys, signal
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
signal.pause()
"""
#: Leaves an orphan behind inside no_orphans, and prints its id.
ORPHANING = f"""
import subprocess, sys
from snapshotd_client.demo.processes import no_orphans
with no_orphans():
    middle = subprocess.Popen(
        [sys.executable, "-c", {PARENT!r}], stdout=subprocess.PIPE, start_new_session=True
    )
    orphan = int(middle.stdout.readline())
    middle.kill()
    middle.wait()
print(orphan)
"""


def test_events_arrive_and_stand_in_the_file(tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        journal = Journal(tmp_path, rank=2, node="n2", watcher=inbox.watcher)
        for step in range(30):
            journal.tell(Kind.STEP, step=step, loss=1.5)
        journal.close()
        received = [inbox.receive(WAIT_S) for _ in range(30)]
    assert [message.step for message in received if isinstance(message, Event)] == [*range(30)]
    lines = (tmp_path / "rank2.jsonl").read_text().splitlines()
    assert [Event.from_line(line) for line in lines] == received


def test_a_trainer_does_without_a_watcher(tmp_path: Path) -> None:
    journal = Journal(tmp_path, rank=0, node="n0", watcher=str(tmp_path / "nobody.sock"))
    journal.tell(Kind.UP)
    journal.close()
    assert (tmp_path / "rank0.jsonl").exists()


def test_a_watcher_that_leaves_does_not_stop_a_trainer(tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        journal = Journal(tmp_path, rank=0, node="n0", watcher=inbox.watcher)
    for _ in range(3):
        journal.tell(Kind.UP)
    journal.close()
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 3


def test_readiness_arrives_but_other_notices_do_not(tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        address = inbox.notify_address("n0")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            for notice in (b"STATUS=starting", b"READY=1\nSTATUS=serves"):
                daemon.sendto(notice, address)
        assert inbox.receive(WAIT_S) == Ready("n0")
        assert inbox.receive(0) is None
    assert not list(tmp_path.glob("*.sock"))


def test_end_of_a_program_arrives(tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        process = start([sys.executable, "-c", "raise SystemExit(7)"], {}, tmp_path / "log")
        inbox.watch(process, "the agent")
        assert inbox.receive(WAIT_S) == Exited("the agent", 7)


def test_end_on_purpose_is_no_news(tmp_path: Path) -> None:
    with Inbox(tmp_path) as inbox:
        process = start(
            [sys.executable, "-c", "import signal; signal.pause()"], {}, tmp_path / "log"
        )
        inbox.watch(process, "the daemon")
        kill_trees([process])
        assert inbox.receive(0.2) is None


def test_killing_reaches_children(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        child = int(said.readline())
    assert sorted(kill_trees([process])) == sorted([process.pid, child])
    assert _gone(child)


def test_orphans_are_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHANING], capture_output=True, check=True, timeout=WAIT_S
    )
    assert _gone(int(done.stdout))


def test_environment_of_another_job_stays_outside(monkeypatch) -> None:
    for name in ("SNAPSHOTD_JOB", "TORCHELASTIC_RESTART_COUNT", "RANK", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "foreign")
    environment = clean_environment(SNAPSHOTD_JOB="ours")
    assert environment["SNAPSHOTD_JOB"] == "ours"
    assert "foreign" not in environment.values()
    assert environment["PATH"] == os.environ["PATH"]


def _gone(pid: int) -> bool:
    # Whoever adopted a process that is dead may not have reaped it yet.
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
