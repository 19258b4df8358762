"""`required=False`: training goes on whatever becomes of the daemon, and says what that means."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable

import pytest

from tests.integration.cluster import Cluster, Node, eventually
from tests.integration.ranks import Rank, reference


@pytest.fixture
def node(cluster: Callable[..., Cluster]) -> Node:
    """Not started yet."""
    return cluster(group_size=2, parity=0).node("n0")


def test_a_daemon_that_comes_after_restore_neither_ends_training_nor_protects_it(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "snapshotd_client")
    rank = Rank(0, 1)
    with pytest.warns(RuntimeWarning, match="no snapshotd answers"):
        rank.attach(node, required=False)
    snap = rank.snap
    assert snap is not None
    with pytest.warns(
        RuntimeWarning, match="nothing is restored, also where the job has snapshots"
    ):
        assert snap.restore() is None
    for step in range(5):
        if step == 1:
            node.start()
        rank.train()
        snap.step(step)
    status = snap.status()
    assert (status.connected, status.is_protected, status.skipped) == (False, False, 5)
    assert "began without a daemon" in status.why_not
    assert sum("began without a daemon" in r.getMessage() for r in caplog.records) == 1
    assert not any("Call restore()" in r.getMessage() for r in caplog.records)
    assert not node.status().slots, "it does not show up there either"
    rank.vanish()


@pytest.mark.parametrize("directory", ["there", "absent"])
def test_a_daemon_that_comes_before_restore_protects(node: Node, directory: str) -> None:
    if directory == "absent":
        shutil.rmtree(node.run_dir)
    rank = Rank(0, 1)
    with pytest.warns(RuntimeWarning, match="no snapshotd answers"):
        rank.attach(node, required=False)
    snap = rank.snap
    assert snap is not None
    node.start()
    assert snap.restore() is None
    rank.train()
    snap.step(0)
    assert snap.wait_protected() == 0
    rank.vanish()
    eventually("the trainer is gone", lambda: not node.status().slots[0].HasField("trainer"))
    rank = Rank(0, 1)
    rank.attach(node, required=False)
    assert rank.snap is not None
    restored = rank.snap.restore()
    assert restored is not None
    assert restored.step == 0
    assert rank.digest() == reference(0, 1, 1)
    rank.vanish()
