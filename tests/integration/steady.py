"""A small job that nothing may disturb: it trains on while a test misbehaves beside it."""

from __future__ import annotations

from tests.integration.cluster import Cluster
from tests.integration.ranks import Job


class Steady:
    """The job that nothing may disturb, and the processes that serve it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes = cluster.start(2)
        self.job = Job([(node, 0) for node in self.nodes])
        self.job.restore()
        self.job.train_protected(1)
        self.processes = self.pids()

    def pids(self) -> list[tuple[int, int]]:
        """Of the supervisors, and of the SMPs that serve the job."""
        served = []
        for node in self.nodes:
            assert node.process is not None
            assert node.process.poll() is None, f"{node.name} ended:\n{node.tail()}"
            served += [(node.process.pid, pid) for pid in node.smp_pids()]
        return served

    def check(self) -> None:
        lost = set(self.processes) - set(self.pids())
        assert not lost, f"{lost} ended:\n" + "\n".join(n.tail() for n in self.nodes)
        self.job.train_protected(1)
        self.job.check()

    def close(self) -> None:
        self.job.close()
