"""Whom the kernel ends first: real daemons carry the score they were told, or say why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, homes

#: Becomes nobody after the imports, which nobody may be allowed to read. Who has changed his user
#: may write his own files in /proc only when he may be looked into (PR_SET_DUMPABLE).
UNPRIVILEGED = """
import ctypes, os
from snapshotd.errors import ConfigError
from snapshotd.memory.oom import settle
if os.geteuid() == 0:
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
settle(1000)
try:
    settle(-1000)
except ConfigError as error:
    print(error)
"""


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_supervisor_and_smps_take_the_score_they_are_told(cluster: Callable[..., Cluster]) -> None:
    wanted = min(1000, score(os.getpid()) + 7)
    nodes = cluster(group_size=2, oom_score_adj=wanted).start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(1)
    for node in nodes:
        assert node.process is not None
        (smp,) = node.smp_pids()
        assert [score(pid) for pid in (node.process.pid, smp)] == [wanted] * 2
        assert f"oom_score_adj of the daemon and its SMPs is {wanted}" in node.tail()
    os.kill(smp, 9)
    eventually("the SMP is back", lambda: nodes[1].smp_pids() not in ([], [smp]))
    assert [score(pid) for pid in nodes[1].smp_pids()] == [wanted], "also when started again"
    job.close()


def test_without_the_key_the_score_stays_and_the_log_says_what_it_means(
    cluster: Callable[..., Cluster],
) -> None:
    (node,) = cluster().start(1)
    assert node.process is not None
    mine = score(os.getpid())
    assert score(node.process.pid) == mine
    assert node.tail().count("the kernel may end this daemon") == int(mine >= 0)


def test_what_the_kernel_refuses_is_refused_with_the_remedy() -> None:
    """Without privilege nobody may be safer than he was started."""
    ended = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, check=True, timeout=60
    )
    assert "oom_score_adj = -1000 is refused by the kernel" in ended.stdout
    assert "OOMScoreAdjust=" in ended.stdout


def test_a_budget_above_the_machine_s_memory_is_served_and_noted(
    cluster: Callable[..., Cluster],
) -> None:
    (node,) = cluster(memory_budget="512TiB").start(1)
    status = node.status()
    assert any("is above the machine's memory" in note for note in status.notes)
    assert status.healthy
    assert node.tail().count("is above the machine's memory") == 1
