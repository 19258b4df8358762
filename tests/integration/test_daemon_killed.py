"""An SMP that dies by itself is started again, and its trainer finds it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from snapshotd_client import ProtectionTimeout
from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, homes


def test_smp_killed_while_training_is_started_again(cluster: Callable[..., Cluster]) -> None:
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    (pid,) = nodes[0].smp_pids()
    os.kill(pid, signal.SIGKILL)
    eventually("another SMP runs", lambda: nodes[0].smp_pids() not in ([], [pid]))

    def back() -> bool:
        job.train(1)
        return all(r.snap.status().connected for r in job.ranks)

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    job.train_until_protected()
    job.check()
    job.close()


def test_the_restore_point_that_a_trainer_was_told_never_moves_back(
    cluster: Callable[..., Cluster],
) -> None:
    """A daemon that starts anew knows of the first commit only, until it hears of the others."""
    nodes = cluster().start(2)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(4)
    for node in nodes:
        node.kill()
    nodes[0].start()
    snap = job.ranks[0].snap

    def back() -> bool:
        job.train(1)
        return snap.status().connected

    eventually("the trainer has found its daemon again", back, pause_s=0.2)
    with pytest.raises(ProtectionTimeout):
        snap.wait_protected(job.next_step, timeout_s=1.0)  # whatever the daemon says meanwhile
    assert snap.status().committed_step == 3
    nodes[1].start()
    job.train_until_protected()
    job.check()
    job.close()
