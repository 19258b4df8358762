"""What the logs say when all goes well, and when something went away and came back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from tests.integration.cluster import Cluster, eventually
from tests.integration.ranks import Job, homes

Make = Callable[..., Cluster]


def test_starting_and_stopping_together_warns_of_nothing(cluster: Make) -> None:
    made = cluster(group_size=3)
    nodes = [made.node(f"n{i}") for i in range(3)]
    for node in nodes:  # everybody knows everybody, as in a real configuration
        peers = "".join(f'{n.name} = "{n.address}"\n' for n in nodes)
        text = node.config.read_text()
        node.config.write_text(re.sub(r"\[peers\]\n[^\[]*", f"[peers]\n{peers}", text))
    for node in nodes:
        node.start()
    made.met()
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    job.close()
    for node in nodes:
        assert node.process is not None
        node.process.terminate()
    for node in nodes:
        assert node.process is not None
        assert node.process.wait(20) == 0
    for node in nodes:
        log = node.tail()
        assert "WARNING" not in log, log
        assert "ERROR" not in log, log
        assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in log.splitlines()), log
    assert "n2: is there, after" in nodes[0].tail()


def test_a_node_and_protection_that_come_back_are_told(
    cluster: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "snapshotd_client")
    made = cluster(group_size=3)
    nodes = made.start(3)
    job = Job(homes(nodes))
    job.restore()
    job.train_protected(2)
    nodes[1].kill()
    job.train(2)
    assert any("step 2 is not protected" in r.getMessage() for r in caplog.records)
    assert not any("protected again" in r.getMessage() for r in caplog.records)
    nodes[1].start()

    def connected() -> bool:
        return all(r.snap is not None and r.snap.status().connected for r in job.ranks)

    def protected_again() -> bool:
        job.train(1)
        connected()
        return sum("protected again" in r.getMessage() for r in caplog.records) >= 3

    eventually("all ranks are attached again", connected)
    eventually("each rank says that it is protected again", protected_again, pause_s=0.3)
    for node in (nodes[0], nodes[2]):
        eventually("it is told", lambda n=node: "n1: is back, after" in n.tail())
        assert node.tail().count("n1: not to be reached") == 1
        assert node.tail().count("n1: is back, after") == 1
        assert "WARNING" not in node.tail().partition("n1: is back")[2]
    job.check()
    job.close()
