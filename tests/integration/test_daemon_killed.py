"""An SMP that dies by itself is started again, and its trainer finds it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

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
