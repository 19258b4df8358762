"""A slot belongs to the trainer that holds its lock, and to nobody else."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable

import pytest

from snapshotd.wire.v1 import trainer_pb2 as tp
from snapshotd_client import WrongUse
from tests.integration import wires
from tests.integration.cluster import Cluster, Node
from tests.integration.ranks import Rank
from tests.integration.steady import Steady


def test_a_process_without_the_lock_does_not_take_over_a_slot(steady: Steady, node: Node) -> None:
    """The lock is held, but by another: the steady job trains on (see the fixture)."""
    with wires.trainer(wires.desk(node), "impostor") as line:
        refused = line.refused(attach=tp.Attach(job="job", run_id="r", shard=0, world=2))
    assert refused.code == "out-of-order"
    assert "held by another trainer" in refused.what
    assert refused.remedy


def test_the_owner_itself_may_attach_again(steady: Steady, node: Node) -> None:
    """As after its connection broke: the incarnation in the lock file is its own."""
    snap = steady.job.ranks[0].snap
    assert snap is not None
    lock = node.run_dir / "trainer-0.lock"
    # Through a child: to close the file here would give up the lock of this process.
    command = [sys.executable, "-c", f"print(open({str(lock)!r}).read())"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.strip() == snap._channel.incarnation


@pytest.fixture
def lone(cluster: Callable[..., Cluster]) -> Node:
    return cluster(group_size=2, parity=0).start(1)[0]


def test_a_second_snapshotter_of_a_slot_in_one_process_is_refused(lone: Node) -> None:
    first, second = Rank(0, 1), Rank(0, 1)
    first.attach(lone)
    assert first.snap is not None
    first.snap.restore()
    with pytest.raises(WrongUse, match="this process has a Snapshotter") as caught:
        second.attach(lone)
    assert "close() it" in caught.value.remedy
    first.train()
    first.snap.step(0)
    assert first.snap.wait_protected() == 0, "the first one still has its slot"
    other = Rank(0, 1)
    other.attach(lone, slot=1, job="other")  # another slot is another matter
    other.vanish()
    first.snap.close()
    second.attach(lone)
    assert second.snap is not None
    assert second.snap.restore().step == 0
    second.vanish()


def test_a_snapshotter_that_was_dropped_does_not_keep_its_slot(lone: Node) -> None:
    rank = Rank(0, 1)
    rank.attach(lone)
    gc.disable()  # it has cycles, and may be found at any time or never
    try:
        rank.snap = None
        rank.attach(lone)
    finally:
        gc.enable()
    assert rank.snap is not None
    assert rank.snap.restore() is None
    rank.vanish()


def test_a_trainer_in_another_process_is_waited_for_and_then_named(
    lone: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapshotd_client.lock._LOCK_PATIENCE_S", 0.2)
    program = (
        "import sys, torch\n"
        "from snapshotd_client import Snapshotter\n"
        f"snap = Snapshotter({{'x': torch.zeros(1)}}, job='j', run_dir={str(lone.run_dir)!r})\n"
        "print('attached', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "attached\n"
        with pytest.raises(WrongUse, match="another live trainer holds"):
            Rank(0, 1).attach(lone, job="j")
        other.kill()
    rank = Rank(0, 1)
    rank.attach(lone, job="j")
    rank.vanish()
