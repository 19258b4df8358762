"""The daemon's work stands back behind training: niceness, and processors of its own."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import pytest

from tests.integration.cluster import Cluster
from tests.integration.ranks import Job, homes


def test_an_smp_leaves_a_pinned_trainer_its_processors(cluster: Callable[..., Cluster]) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor only")
    nodes = cluster(group_size=2).start(2)
    mine = min(allowed)
    os.sched_setaffinity(0, {mine})
    try:
        job = Job(homes(nodes))
        job.restore()
        job.train_protected(2)
    finally:
        os.sched_setaffinity(0, allowed)
    for node in nodes:
        assert node.process is not None
        supervisor = psutil.Process(node.process.pid)
        (smp,) = map(psutil.Process, node.smp_pids())
        assert smp.nice() == supervisor.nice() + 5
        assert set(supervisor.cpu_affinity()) == allowed
        assert not {mine} & set(smp.cpu_affinity())
        assert "works on processors" in node.log.read_text()
    job.close()
